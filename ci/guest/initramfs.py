#!/usr/bin/env python3
"""Writes the file system that a guest starts with, a newc cpio archive.

    initramfs.py OUT NAME=FILE…

NAME is the absolute path in the guest, FILE what it holds; a FILE that is a folder is taken whole. Folders on the way
are made. No device file of the host is touched and nobody need be root.
"""
import os
import stat
import sys


class Archive:
    def __init__(self):
        self.data = bytearray()
        self.inode = 0
        self.folders = set()

    def _align(self):
        self.data.extend(b"\0" * (-len(self.data) % 4))

    def entry(self, name, mode, content=b"", device=(0, 0)):
        self.inode += 1
        encoded = os.fsencode(name) + b"\0"
        fields = (self.inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        self.data.extend(b"070701" + b"".join(b"%08x" % field for field in fields) + encoded)
        self._align()
        self.data.extend(content)
        self._align()

    def folder(self, name, mode=0o755):
        if name and name not in self.folders:
            self.folder(os.path.dirname(name))
            self.folders.add(name)
            self.entry(name, stat.S_IFDIR | mode)

    def file(self, name, source):
        self.folder(os.path.dirname(name))
        with open(source, "rb") as content:
            self.entry(name, stat.S_IFREG | stat.S_IMODE(os.stat(source).st_mode) | 0o444, content.read())


def main():
    archive = Archive()
    for name in ("dev", "proc", "sys", "bin"):
        archive.folder(name)
    archive.folder("tmp", 0o1777)
    archive.entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    for argument in sys.argv[2:]:
        name, source = argument.split("=", 1)
        name = os.path.normpath(name).lstrip("/")
        if os.path.isdir(source):
            archive.folder(name)
            for folder, _, files in os.walk(source):
                inside = os.path.normpath(os.path.join(name, os.path.relpath(folder, source)))
                archive.folder(inside)
                for file in files:
                    archive.file(os.path.join(inside, file), os.path.join(folder, file))
        else:
            archive.file(name, source)
    archive.entry("TRAILER!!!", 0)
    with open(sys.argv[1], "wb") as out:
        out.write(archive.data)


main()
