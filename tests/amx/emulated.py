"""A pytest plugin: kernels for matrix registers run on Bochs, an emulator of whole machines that knows AMX.

    BOCHS=.../bochs PYTHONPATH=tests/amx pytest -p emulated ...

Everything but the native call is the product: the API, the plan, the parameters, the engine, the machine code for a
processor with tiles. The call is made by a program that boots (boot.S), on a copy of the memory of this process; what
it wrote is then written here. Modules without tile instructions run on this machine, which needs AVX-512 and its dot of
bf16 pairs. With the plugin the machine named amx is usable, and tests that take it run on it; a call takes seconds.

BOCHS is the program, built as `.ci/amx` says (bochs.patch: a conversion of Bochs reads past its register); its folder
``bios`` is found beside it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import image
import numpy as np

import flashtile
from flashtile.llvm import jit
from flashtile.llvm import machines as isas
from flashtile.llvm.machines import ISA, amx

BOCHS = Path(os.environ["BOCHS"]).resolve()
BIOS = BOCHS.parent / "bios"
TILES = "llvm.x86.tdpbf16ps"
SECONDS = 600
_SPECIAL = ("[vvar]", "[vdso]", "[vsyscall]", "[stack]")  # a kernel's own stack is the image's
RETURNED, FAULTED = b"RETURNED", b"FAULTED_"  # what boot.S begins with
BLOCK, BEFORE, AFTER = 2048, 64 << 10, 1 << 20  # bytes that are searched for addresses; about an address
_MACHINE = """cpu: model=sapphire_rapids, count=1, ips=200000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file={bios}/BIOS-bochs-latest
vgaromimage: file={bios}/VGABIOS-lgpl-latest.bin
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={cd}, status=inserted
boot: cdrom
port_e9_hack: enabled=1
log: {log}
panic: action=fatal
error: action=report
clock: sync=none
pci: enabled=1, chipset=i440fx
"""

calls_made = itertools.count()  # next() tells how many, so that a test can know that tiles were used at all
_load = jit.load


class Memory:
    """Pages of this process, as they were: at first those about the addresses that a call is given, then what it asks
    for."""

    def __init__(self, given: Sequence[int]) -> None:
        self._spans = list(_writable())
        self._pages: dict[int, bytes] = {}
        for address in given:
            if self.add(address):
                for word in np.frombuffer(ctypes.string_at(address, BLOCK), np.uint64):  # of parameters: more addresses
                    self.add(int(word))

    def add(self, address: int) -> bool:
        """Whether a kernel may use the address; the pages about it are then there."""
        span = next(((begin, end) for begin, end in self._spans if begin <= address < end), None)
        if span is None:
            return False
        begin, end = max(span[0], address - BEFORE & -image.PAGE), min(span[1], address + AFTER & -image.PAGE)
        for page in range(begin, end, image.PAGE):
            if page not in self._pages:
                self._pages[page] = ctypes.string_at(page, image.PAGE)
        return True

    def all(self) -> tuple[list[int], bytes]:
        return list(self._pages), b"".join(self._pages.values())


def _writable() -> Iterator[tuple[int, int]]:
    """The memory that a kernel may be given: what is no file's, and not shared."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, inode, *name = line.split()
        if rights[:2] == "rw" and "p" in rights and inode == "0" and not (name and name[0] in _SPECIAL):
            begin, end = (int(x, 16) for x in span.split("-"))
            yield begin, end


class Library:
    """As jit.Library, but its functions run on the emulated machine."""

    def __init__(self, obj: bytes):
        self._keep = tempfile.TemporaryDirectory(prefix="flashtile-amx-")
        self._folder = Path(self._keep.name)
        (self._folder / "kernel.o").write_bytes(obj)

    def function(self, name: str, returns: object, *args: type) -> Callable[..., int]:
        kernel = image.link(self._folder / "kernel.o", name)

        def call(*given: bytes | int | None) -> int:
            next(calls_made)
            numbers = [ctypes.cast(a, ctypes.c_void_p).value if isinstance(a, bytes) else int(a or 0) for a in given]
            memory = Memory([n for n in numbers if n])
            while True:
                addresses, pages = memory.all()
                cd = image.write(self._folder, kernel, [n or 0 for n in numbers], addresses, pages)
                greeting, said = self._run(cd)
                if greeting == RETURNED:
                    return _take_over(said, addresses, pages)
                address, *stack = (int.from_bytes(said[i : i + 8], "little") for i in range(0, 24, 8))
                if address & -image.PAGE in addresses or not memory.add(address):
                    raise RuntimeError(f"{name} faulted at {address:#x}; its stack has {stack[0]:#x}, {stack[1]:#x}")

        return call

    def _run(self, cd: Path) -> tuple[bytes, bytes]:
        log = self._folder / "bochs.log"
        (self._folder / "bochsrc").write_text(_MACHINE.format(bios=BIOS, cd=cd, log=log))
        command = [BOCHS, "-q", "-unlock", "-f", self._folder / "bochsrc"]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS, check=False)
        for greeting in (RETURNED, FAULTED):
            if greeting in done.stdout:
                return greeting, done.stdout.partition(greeting)[2]
        raise RuntimeError(f"the emulated machine stopped before the kernel returned: {log.read_text()[-3000:]}")


def _take_over(said: bytes, addresses: list[int], before: bytes) -> int:
    """Write here what the kernel changed, and no other byte: Python has gone on. What it returned."""
    status, at = int.from_bytes(said[:4], "little", signed=True), 8
    while (number := int.from_bytes(said[at : at + 8], "little", signed=True)) >= 0:
        page = np.frombuffer(said, np.uint8, image.PAGE, at + 8)
        changed = page != np.frombuffer(before, np.uint8, image.PAGE, number * image.PAGE)
        here = np.ctypeslib.as_array((ctypes.c_uint8 * image.PAGE).from_address(addresses[number]))
        here[changed] = page[changed]
        at += 8 + image.PAGE
    return status


def _load_there(generate: Callable[[], str], key: str, isa: ISA, exports: tuple[str, ...]) -> object:
    if isa.name != "amx":
        return _load(generate, key, isa, exports)
    text = generate()
    if TILES in text:
        return Library(jit.object_code(text, isa))
    return _load(lambda: text, key, isas.known()["avx512_bf16"], exports)


def pytest_configure() -> None:
    """Before any test is collected: this machine has tiles, and one thread calls."""
    there = isas._host_features() | {"amx-tile", "amx-bf16"}
    isas._host_features = lambda: there
    amx.refusal.cache_clear()
    amx.refusal = lambda: None
    jit.load = _load_there
    flashtile.set_num_threads(1)
