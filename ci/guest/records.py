#!/usr/bin/env python3
"""Reads what a guest's first process sends (ci/guest/init.c says how) and gives it out as the program's own output.

    records.py LOG FINISHED [each] < MACHINE-OUTPUT

Standard output and standard error of the programs come out on their own streams; whatever else the machine said goes to
LOG. Ends with the exit status of the first program that failed, 128 + N when it died of signal N, and with 99 when the machine ended first;
the file FINISHED is made unless it did. With `each`, every program's status follows its output as a line "=== STATUS".
"""
import os
import signal
import sys

MACHINE_FAILED = 99
HEAD = 7  # 0x02, kind, four digits, space


def records(source, log):
    """Yields (kind, bytes) and writes everything between records to the log."""
    buffer = b""
    while True:
        start = buffer.find(b"\x02")
        if start < 0:
            log.write(buffer)
            buffer = b""
        else:
            log.write(buffer[:start])
            buffer = buffer[start:]
            if len(buffer) >= HEAD:
                kind, digits = chr(buffer[1]), buffer[2:6]
                if kind in "boexsq" and buffer[6:7] == b" " and all(d in b"0123456789abcdef" for d in digits):
                    end = HEAD + int(digits, 16)
                    if len(buffer) > end:
                        yield kind, buffer[HEAD:end]
                        buffer = buffer[end + 1 :]
                        continue
                else:
                    log.write(buffer[:1])
                    buffer = buffer[1:]
                    continue
        more = os.read(source, 1 << 16)
        if not more:
            log.write(buffer)
            return
        buffer += more


def write_all(descriptor, data):
    while data:
        data = data[os.write(descriptor, data) :]


def main():
    overall = 0
    finished = False
    with open(sys.argv[1], "wb") as log:
        for kind, data in records(0, log):
            if kind == "o":
                write_all(1, data)
            elif kind == "e":
                write_all(2, data)
            elif kind in "xs":
                status = int(data) + (128 if kind == "s" else 0)
                overall = overall or status
                if "each" in sys.argv[3:]:
                    write_all(1, b"=== %d\n" % status)
            elif kind == "b":
                log.write(b"the first process began %s s after the kernel\n" % data)
            elif kind == "q":
                finished = True
                open(sys.argv[2], "wb").close()
    sys.exit(overall if finished else MACHINE_FAILED)


try:
    main()
except BrokenPipeError:
    sys.exit(128 + signal.SIGPIPE)
