"""A call of a kernel as an image that boots: the machine code, the pages of a process, and tables that put them where
the process has them.

Addresses here are the emulated machine's: boot.S at 1 MB, a stack, the kernel, the tables, the pages.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BOOT = Path(__file__).with_name("boot.S")
PAGE = 4096
_START, _GATES, _STACK, _KERNEL, _TABLES = 0x100000, 0x180000, 0x280000, 0x300000, 0x1000000
_PRESENT, _LARGE = 0x7, 0x80  # present, writable, for users; 2 MB
_LOADER = Path("/usr/lib/syslinux/modules/bios")
_FIRST = Path("/usr/lib/ISOLINUX/isolinux.bin")
NEEDED = (_FIRST, _LOADER / "ldlinux.c32", _LOADER / "mboot.c32", _LOADER / "libcom32.c32")


def run(*command: object) -> bytes:
    """What a program prints. Raises RuntimeError with what it complained of."""
    done = subprocess.run([str(x) for x in command], capture_output=True, check=False)
    if done.returncode:
        why = done.stderr.decode()[-2000:]
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}: {why}")
    return done.stdout


class Tables:
    """Page tables: the first GB where it is, and pages of a process at its addresses."""

    def __init__(self) -> None:
        self._tables: list[np.ndarray] = []
        self._of: dict[tuple[int, ...], int] = {}
        for level in range(1, 4):
            self._table((0,) * (level - 1))
        self._tables[2][:] = (np.arange(512) << 21) | _LARGE | _PRESENT

    def _at(self, table: int) -> int:
        return _TABLES + table * PAGE

    def _table(self, path: tuple[int, ...]) -> int:
        """The table at the end of a path of entries, made where there is none."""
        if path not in self._of:
            self._tables.append(np.zeros(512, np.uint64))
            self._of[path] = len(self._tables) - 1
            if path:
                self._tables[self._table(path[:-1])][path[-1]] = self._at(self._of[path]) | _PRESENT
        return self._of[path]

    def place(self, addresses: Sequence[int]) -> tuple[bytes, bytes, int]:
        """The tables; where the entry of each page lies; where the first page is to be put."""
        entries = []
        for address in addresses:
            four, three, two, one = ((address >> shift) & 511 for shift in (39, 30, 21, 12))
            assert four, "a page within the first 512 GB, where the image is"
            entries.append((self._table((four, three, two)), one))
        first = self._at(len(self._tables)) + -(-8 * len(entries) // PAGE) * PAGE
        for number, (table, one) in enumerate(entries):
            self._tables[table][one] = (first + number * PAGE) | _PRESENT
        where = np.array([self._at(table) + 8 * one for table, one in entries], np.uint64)
        return b"".join(t.tobytes() for t in self._tables), where.tobytes(), first


def link(obj: Path, entry: str) -> tuple[bytes, int]:
    """A kernel's machine code where the image has it, and the address of one of its functions."""
    linked, flat = obj.with_suffix(".elf"), obj.with_suffix(".bin")
    run("ld", f"-Ttext={_KERNEL:#x}", "-e", entry, "-N", "--no-warn-rwx-segments", "-o", linked, obj)
    run("objcopy", "-O", "binary", linked, flat)
    symbols = (line.split() for line in run("nm", linked).decode().splitlines())
    code = flat.read_bytes()
    assert _KERNEL + len(code) <= _TABLES, f"{len(code)} bytes of machine code"
    return code, next(int(at, 16) for at, _, name in symbols if name == entry)


def write(
    folder: Path, kernel: tuple[bytes, int], arguments: Sequence[int], addresses: Sequence[int], pages: bytes
) -> Path:
    """An image of a CD that calls a linked kernel with up to four integers, on these pages at these addresses."""
    code, entry = kernel
    tables, entries, first = Tables().place(addresses)
    end = first + len(pages)
    names = {"END": end, "STACK": _STACK, "GATES": _GATES, "TABLES": _TABLES, "ENTRIES": _TABLES + len(tables)}
    names |= {"KERNEL": entry, "PAGES": len(addresses)} | {f"ARGUMENT_{i}": x for i, x in enumerate(arguments)}
    boot = folder / "boot.elf"
    flags = (f"-Wa,--defsym,{name}={value:#x}" for name, value in names.items())
    place = f"-Wl,--build-id=none,-Ttext={_START:#x},-e,start,-N"
    run("gcc", "-nostdlib", "-static", place, *flags, BOOT, "-o", boot)
    run("objcopy", "-O", "binary", "-j", ".text", boot, folder / "boot.bin")
    image = bytearray(end - _START)
    parts = {_START: (folder / "boot.bin").read_bytes(), _KERNEL: code, _TABLES: tables, _TABLES + len(tables): entries}
    for at, part in (parts | {first: pages}).items():
        image[at - _START : at - _START + len(part)] = part
    return _on_cd(folder, bytes(image))


def _on_cd(folder: Path, image: bytes) -> Path:
    loader = folder / "cd" / "isolinux"
    loader.mkdir(parents=True, exist_ok=True)
    for file in NEEDED:
        (loader / file.name).write_bytes(file.read_bytes())
    (loader / "isolinux.cfg").write_text("DEFAULT call\nLABEL call\n  KERNEL mboot.c32\n  APPEND -aout /image\n")
    (folder / "cd" / "image").write_bytes(image)
    bootable = ("-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat", "-no-emul-boot", "-boot-load-size", 4)
    cd = folder / "call.iso"
    run("xorriso", "-as", "mkisofs", "-quiet", "-o", cd, *bootable, "-boot-info-table", folder / "cd")
    return cd
