"""From LLVM IR text to callable machine code: verify, generate code, link, look up.

Objects come from and go to a disk cache (cache.py), so a process pays for code generation only the first
time anyone on the machine does.  No IR passes run: the generators emit what the back end should see, which
halves the time to the first call at equal speed (docs/design/experiments.md).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable

import llvmlite
import llvmlite.binding as llvm

from flashtile.errors import KernelError
from flashtile.llvm import cache
from flashtile.llvm.machines import ISA

# One thread at a time uses LLVM: the second to want the same kernel then finds it on disk.  A fork waits for the end
# of it, or the child would inherit LLVM half way, and locks that no one releases.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_serial = itertools.count()
_linked: list[llvm.ResourceTracker] = []  # never unloaded: a thread may be inside, and LLVM would be used unlocked


@functools.cache
def _initialise(arch: str) -> None:
    if llvm.get_process_triple().startswith(arch):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    else:  # another machine's assembly is wanted, for a look or for an emulator
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()


def target_machine(isa: ISA) -> llvm.TargetMachine:
    """LLVM's code generator for the instruction set."""
    _initialise(isa.arch)
    native = llvm.get_process_triple()
    triple = native if native.startswith(isa.arch) else f"{isa.arch}-unknown-linux-gnu"
    target = llvm.Target.from_triple(triple)
    return target.create_target_machine(cpu=isa.cpu, features=isa.features, opt=2, reloc="pic", codemodel="default")


def parse(text: str) -> llvm.ModuleRef:
    """Parse and verify; KernelError with LLVM's reason if the generator emitted nonsense."""
    try:
        module = llvm.parse_assembly(text)
        module.verify()
    except RuntimeError as e:
        raise KernelError(f"the kernel generator emitted invalid LLVM IR: {e}") from e
    return module


def assembly(text: str, isa: ISA) -> str:
    """The machine code as text, for tests that look for spills and for the curious."""
    with _lock:
        return target_machine(isa).emit_assembly(parse(text))


def object_code(text: str, isa: ISA) -> bytes:
    """The machine code as a relocatable object file."""
    with _lock:
        return target_machine(isa).emit_object(parse(text))


@functools.cache
def _linker() -> llvm.LLJIT:
    """JITLink puts the sections of an object side by side. RuntimeDyld, its predecessor, maps each where it finds room:
    in a process that holds many libraries two may lie more than 2 GB apart, and LLVM then ends the process."""
    arch = llvm.get_process_triple().split("-")[0]
    _initialise(arch)
    target = llvm.Target.from_default_triple().create_target_machine(reloc="pic")
    return llvm.create_lljit_compiler(target, use_jit_link=arch == "x86_64")  # elsewhere it was not tried


class Library:
    """Linked machine code; functions stay callable as long as the process lives."""

    def __init__(self, obj: bytes, exports: tuple[str, ...]):
        builder = llvm.JITLibraryBuilder().add_object_img(obj)
        for name in exports:
            builder.export_symbol(name)
        with _lock:
            try:
                self._tracker = builder.link(_linker(), f"flashtile.{next(_serial)}")
            except RuntimeError as e:
                raise KernelError(f"linking {', '.join(exports)} failed: {e}") from e
            _linked.append(self._tracker)

    def address(self, name: str) -> int:
        """Address of an exported function, for callers outside Python."""
        return self._tracker[name]

    def function(self, name: str, returns: object, *args: type) -> Callable[..., int]:
        """A ctypes function; calls release the GIL."""
        return ctypes.CFUNCTYPE(returns, *args)(self._tracker[name])  # type: ignore[arg-type]  # a type, or None


def load(generate: Callable[[], str], key: str, isa: ISA, exports: tuple[str, ...]) -> Library:
    """The library of a generated module, from the disk cache if its object is there.

    ``key`` is everything the text depends on besides the generator's own sources (cache.py adds a digest of
    those), so a hit neither generates text nor starts LLVM's code generator.
    """
    full_key = f"{key} {isa!r} {llvm.get_process_triple()} llvmlite {llvmlite.__version__}"
    with _lock:
        obj = cache.fetch(full_key, lambda: object_code(generate(), isa))
        try:
            return Library(obj, exports)
        except KernelError:  # a file whose digest is right but which this LLVM will not link: build it again
            return Library(cache.rebuild(full_key, lambda: object_code(generate(), isa)), exports)
