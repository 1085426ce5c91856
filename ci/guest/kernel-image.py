#!/usr/bin/env python3
"""Lays a bzImage out as it stands in memory after its own decompressor has run.

    kernel-image.py VMLINUZ IMAGE ENTRY

IMAGE is to be loaded at 16 MiB; ENTRY receives the address of the 64-bit entry as decimal text.
"""
import struct
import subprocess
import sys

LOAD = 0x1000000
ROOM = 0x6000000 - LOAD  # the initial file system is loaded at 96 MiB

vmlinuz, image, entry = sys.argv[1:]
with open(vmlinuz, "rb") as file:
    raw = file.read()
setup_sectors = raw[0x1F1] or 4
offset, length = struct.unpack_from("<II", raw, 0x248)
start = (setup_sectors + 1) * 512 + offset
payload = raw[start : start + length]
if payload[:4] != b"\x28\xb5\x2f\xfd":
    raise SystemExit("the kernel is not compressed with zstd; kernel-image.py knows no other way")
elf = subprocess.run(["zstd", "-dc"], input=payload[:-4], stdout=subprocess.PIPE, check=True).stdout

entry_address, program_headers = struct.unpack_from("<QQ", elf, 24)
entry_size, count = struct.unpack_from("<HH", elf, 54)
segments = [struct.unpack_from("<IIQQQQQQ", elf, program_headers + i * entry_size) for i in range(count)]
segments = [s for s in segments if s[0] == 1]
lowest = min(s[4] for s in segments)
memory = bytearray(max(s[4] + s[6] for s in segments) - lowest)
if lowest != LOAD or len(memory) > ROOM:
    raise SystemExit(f"the kernel wants {len(memory):#x} bytes at {lowest:#x}; kernel-image.py expects {LOAD:#x} and less than {ROOM:#x}")
for _, _, file_offset, _, physical, file_size, _, _ in segments:
    memory[physical - lowest : physical - lowest + file_size] = elf[file_offset : file_offset + file_size]
filled = max(s[4] + s[5] for s in segments) - lowest
with open(image, "wb") as file:
    file.write(memory[:filled])
with open(entry, "w") as file:
    file.write(str(entry_address))
