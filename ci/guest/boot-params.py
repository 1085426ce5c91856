#!/usr/bin/env python3
"""Writes what Linux wants to find in memory when it is entered without boot loader and firmware.

    boot-params.py OUT ENTRY-FILE INITRD MEMORY-MIB KERNEL-WORDS

OUT is to be loaded at 64 KiB, INITRD at 96 MiB (see boot-rom.S and kernel-image.py for the rest of the map).
"""
import os
import struct
import sys

BASE, ENTRY_AT, WORDS_AT = 0x10000, 0x11000, 0x12000
INITRD_AT = 0x6000000

out, entry_file, initrd, memory, words = sys.argv[1:]
memory = int(memory) << 20
with open(entry_file) as file:
    entry = int(file.read())

if INITRD_AT + os.path.getsize(initrd) > memory - (32 << 20):
    raise SystemExit(f"the files for the guest ({os.path.getsize(initrd) >> 20} MiB) do not fit into its {memory >> 20} MiB")

image = bytearray(0x3000)
struct.pack_into("<H", image, 0x1FE, 0xAA55)
image[0x202:0x206] = b"HdrS"
struct.pack_into("<H", image, 0x206, 0x20F)  # boot protocol 2.15
image[0x210] = 0xFF  # an unnamed boot loader
image[0x211] = 1  # loaded high
struct.pack_into("<II", image, 0x218, INITRD_AT, os.path.getsize(initrd))
struct.pack_into("<I", image, 0x228, WORDS_AT)
usable, reserved = 1, 2
areas = [(0, 0x9F000, usable), (0x9F000, 0x61000, reserved), (0x100000, memory - 0x100000, usable)]
image[0x1E8] = len(areas)
for number, area in enumerate(areas):
    struct.pack_into("<QQI", image, 0x2D0 + 20 * number, *area)
struct.pack_into("<Q", image, ENTRY_AT - BASE, entry)
line = words.encode() + b"\0"
image[WORDS_AT - BASE : WORDS_AT - BASE + len(line)] = line
with open(out, "wb") as file:
    file.write(image)
