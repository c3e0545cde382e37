"""The machine code of a call of XLA: its steps, shared over XLA's own threads.

`handle` is what XLA calls. Where the buffers are what it was made for, it fills the parameters of a prepared call
(kernels.Template) with their addresses, once for each element of axes that vmap put in front, asks XLA's pool for as
many threads as flashtile may use, and takes part. Work items are taken from one counter a step; a step begins when the
one before it is done. Nobody waits for a thread that never comes: one that comes late finds nothing to do, and whoever
leaves last frees the memory of the call. All else goes to the handler in Python.
"""

from __future__ import annotations

import ctypes
import functools

from flashtile import xla
from flashtile.llvm.blocks import ALIGNMENT, WORD, Block, integers, pointers
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.routines import Routine
from flashtile.xla_frame import CONTEXT, buffer_addresses, context, element_count, field

EXPORTS = ("handle", "context")
# The memory of a call. users: who may still come; then a lock, a signal, the addresses of the buffers, and of each step
# which item is next and how many are done.
_JOB = Block(pointers("block"), integers("members users failed"))
_LOCK, _SIGNAL, DATA, STATE = 64, 192, 320, 64
_SHARES = 4  # a thread takes at most so much of its part of what is left, that all end together
_SPINS = 1000  # some 20 microseconds


def text(arch: str) -> str:
    """The module that exports EXPORTS."""
    module = Module()
    leave = _leave(module)
    work = _work(module, _take(module), _await(module, arch), _freshen(module))
    member = _member(module, work, leave)
    attempt = _attempt(module, buffer_addresses(module), member, work, leave)
    _handle(module, element_count(module), attempt)
    return f"@context = global [{len(CONTEXT.types)} x i64] zeroinitializer\n{module.text()}\n"


def _null(f: Function) -> Value:
    return Value(f, "ptr", "null")


def _invoke(f: Function, returns: str, function: Value, *arguments: Value) -> Value:
    """A call by address."""
    return f.emit(returns, f"call {returns} {function.ref}({', '.join(map(str, arguments))})")


def _atomic_add(f: Function, at: Value, n: Value) -> Value:
    """What stood there."""
    return f.emit("i64", f"atomicrmw add ptr {at.ref}, {n} acq_rel")


def _atomic(f: Function, at: Value) -> Value:
    return f.emit("i64", f"load atomic i64, ptr {at.ref} acquire, align 8")


def _word(f: Function, job: Value, name: str) -> Value:
    return job + WORD * _JOB.index[name]


# -- the steps of a call -----------------------------------------------------------------------------


def _take(module: Module) -> Routine:
    """The first of the next items of a step, of which there are none where it is no item; behind the last at `end`."""
    f = Routine(module, "take", "i64", state="ptr", items="i64", members="i64", end="ptr")
    state, items, members, end = f.parameters

    def attempt(carry: list[Value]) -> list[Value]:
        begin = carry[0]
        left = items - begin
        share = f.maximum(left // (members * _SHARES), f.minimum(left, f.const("i64", 1)))
        following = begin + f.maximum(share, f.const("i64", 0))
        how = f"cmpxchg ptr {state.ref}, {begin}, {following} acq_rel acquire"
        pair = f.emit("{ i64, i1 }", how)
        seen, done = (f.emit(t, f"extractvalue {pair}, {n}") for n, t in enumerate(("i64", "i1")))
        return [seen, done, following]

    start = [_atomic(f, state), f.const("i1", 0), f.const("i64", 0)]
    begin, _, following = f.repeat(start, lambda c: c[1].eq(0), attempt)
    f.store(following, end)
    f.ret(begin)
    return f


def _await(module: Module, arch: str) -> Routine:
    """Until all items of a step are done."""
    f = Routine(module, "await", job="ptr", state="ptr", items="i64")
    job, state, items = f.parameters
    done = state + WORD
    x86 = arch.startswith("x86")
    pause, given = ("llvm.x86.sse2.pause", []) if x86 else ("llvm.aarch64.hint", [f.const("i32", 1)])

    def spin(carry: list[Value]) -> list[Value]:
        f.intrinsic(pause, "void", given)
        return [carry[0] + 1]

    f.repeat([f.const("i64", 0)], lambda c: (_atomic(f, done) < items) & (c[0] < _SPINS), spin)
    with f.when(_atomic(f, done) < items):
        lock, unlock, wait = context(f, "lock", "unlock", "wait")
        own = job + _LOCK
        _invoke(f, "i32", lock, own)

        def sleep(carry: list[Value]) -> list[Value]:
            _invoke(f, "i32", wait, job + _SIGNAL, own)
            return carry

        f.repeat([f.const("i64", 0)], lambda c: _atomic(f, done) < items, sleep)
        _invoke(f, "i32", unlock, own)
    f.ret()
    return f


def _work(module: Module, take: Routine, wait: Routine, freshen: Routine) -> Routine:
    """What a thread does of a call: of each step what it can get. After a failure the rest counts as done."""
    f = Routine(module, "work", job="ptr", scratch="ptr")
    job, _ = f.parameters
    end = f.emit("ptr", "alloca i64")
    step_count, at_states = context(f, "step_count", "at_states")
    with f.range(0, step_count) as n:
        state = job + at_states + n * STATE
        items = _take_part(f, n, state, end, take, freshen)
        wait(f, job=job, state=state, items=items)
    f.ret()
    return f


def _take_part(f: Routine, n: Value, state: Value, end_at: Value, take: Routine, freshen: Routine) -> Value:
    """Compute items of step n as long as some are left; how many there are in all."""
    job, scratch = f.parameters
    steps, kernel, at_memory = context(f, "steps", "kernel", "at_memory")
    function, offset, items = (
        f.load(t, steps + n * (3 * WORD) + k * WORD) for k, t in enumerate(("ptr", "i64", "i64"))
    )
    members, failed = _JOB.read(f, job, "members"), _word(f, job, "failed")
    following = functools.partial(take, f, state=state, items=items, members=members, end=end_at)

    def compute(carry: list[Value]) -> list[Value]:
        begin, end = carry[0], f.load("i64", end_at)
        with f.when(_atomic(f, failed).eq(0)):
            with f.when(n.eq(kernel)), f.range(begin, end) as item:
                freshen(f, job=job, item=item)
            status = _invoke(f, "i32", function, job + at_memory + offset, begin, end, scratch)
            with f.when(status.ne(0)):
                f.put(f"store atomic i64 1, ptr {failed.ref} release, align 8")
        ready = _atomic_add(f, state + WORD, end - begin) + (end - begin)
        with f.when(ready.eq(items) & (members > 1)):
            lock, unlock, wake = context(f, "lock", "unlock", "wake")
            _invoke(f, "i32", lock, job + _LOCK)
            _invoke(f, "i32", wake, job + _SIGNAL)
            _invoke(f, "i32", unlock, job + _LOCK)
        return [following()]

    f.repeat([following()], lambda c: c[0] < items, compute)
    return items


def _freshen(module: Module) -> Routine:
    """Zeros where an item of the kernel adds to."""
    f = Routine(module, "freshen", job="ptr", item="i64")
    job, item = f.parameters
    areas, count, at_memory = context(f, "areas", "area_count", "at_memory")
    with f.range(0, count) as n:
        row = areas + (item * count + n) * (5 * WORD)
        number, offset, rows, size, stride = (f.load("i64", row + k * WORD) for k in range(5))
        start = _place(f, job, job + at_memory, number) + offset
        with f.range(0, rows) as m:
            _memset(f, start + m * stride, size)
    f.ret()
    return f


def _place(f: Function, job: Value, memory: Value, number: Value) -> Value:
    """Where a buffer begins, the memory for -1."""
    inside = number < 0
    own = f.cast("ptrtoint", memory, "i64")
    found = f.load("i64", job + f.select(inside, 0, number) * WORD + DATA)
    return f.cast("inttoptr", f.select(inside, own, found), "ptr")


def _memset(f: Function, at: Value, size: Value) -> None:
    f.intrinsic("llvm.memset.p0.i64", "void", [at, f.const("i8", 0), size, f.const("i1", 0)])


# -- threads -----------------------------------------------------------------------------------------


def _member(module: Module, work: Routine, leave: Routine) -> Routine:
    """What a thread of XLA's runs."""
    f = Routine(module, "member", job="ptr")
    (job,) = f.parameters
    allocate, release, scratch = context(f, "allocate", "release", "scratch")
    block = _invoke(f, "ptr", allocate, scratch + ALIGNMENT)
    with f.when(f.is_null(block).eq(0)):
        work(f, job=job, scratch=_aligned(f, block))
        f.put(f"call void {release.ref}({block})")
    leave(f, job=job)
    f.ret()
    return f


def _aligned(f: Function, pointer: Value) -> Value:
    word = f.cast("ptrtoint", pointer, "i64") + (ALIGNMENT - 1)
    return f.cast("inttoptr", word & -ALIGNMENT, "ptr")


def _leave(module: Module) -> Routine:
    """The last of a call's users frees it."""
    f = Routine(module, "leave", job="ptr")
    (job,) = f.parameters
    with f.when(_atomic_add(f, _word(f, job, "users"), f.const("i64", -1)).eq(1)):
        end_lock, end_signal, release = context(f, "end_lock", "end_signal", "release")
        with f.when(_JOB.read(f, job, "members") > 1):
            _invoke(f, "i32", end_signal, job + _SIGNAL)
            _invoke(f, "i32", end_lock, job + _LOCK)
        f.put(f"call void {release.ref}({_JOB.read(f, job, 'block')})")
    f.ret()
    return f


def _ask(f: Function, frame: Value, job: Value, members: Value, member: Routine, args: Value) -> None:
    """Ask XLA for the other members."""
    api, ctx = (field(f, frame, xla.CallFrame, name, "ptr") for name in ("api", "ctx"))
    schedule = field(f, api, xla.Api, "XLA_FFI_ThreadPool_Schedule", "ptr")
    given = xla.ThreadPool_Schedule_Args
    f.store(f.const("i64", ctypes.sizeof(given)), args)
    task = Value(f, "ptr", f"@{member.name}")
    for name, x in (("extension_start", _null(f)), ("ctx", ctx), ("task", task), ("data", job)):
        f.store(x, args + getattr(given, name).offset)
    with f.range(1, members):
        error = _invoke(f, "ptr", schedule, args)
        with f.when(f.is_null(error).eq(0)):  # there is no pool
            _atomic_add(f, _word(f, job, "users"), f.const("i64", -1))
            destroy = field(f, api, xla.Api, "XLA_FFI_Error_Destroy", "ptr")
            said = xla.Error_Destroy_Args
            f.store(f.const("i64", ctypes.sizeof(said)), args)
            f.store(error, args + said.error.offset)
            f.put(f"call void {destroy.ref}({args})")
            f.store(f.const("i64", ctypes.sizeof(given)), args)
            f.store(ctx, args + given.ctx.offset)


def _attempt(module: Module, gather: Routine, member: Routine, work: Routine, leave: Routine) -> Routine:
    """The call for one element of the axes in front; 0 where all went well."""
    f = Routine(module, "attempt", "i64", frame="ptr", element="i64")
    frame, element = f.parameters
    args = f.emit("ptr", f"alloca [{ctypes.sizeof(xla.ThreadPool_Schedule_Args)} x i8], align 8")
    c = CONTEXT.load(f, Value(f, "ptr", "@context"))
    block = _invoke(f, "ptr", c.allocate, c.at_memory + c.bytes + c.room + 2 * ALIGNMENT)
    own = _invoke(f, "ptr", c.allocate, c.scratch + ALIGNMENT)
    absent = f.is_null(block) | f.is_null(own)

    def run() -> Value:
        job = _aligned(f, block)
        api = field(f, frame, xla.CallFrame, "api", "ptr")
        # An older XLA may know no pool.
        known = field(f, api, xla.Api, "struct_size", "i64") >= ctypes.sizeof(xla.Api)
        one = f.const("i64", 1)
        members = f.select(known, f.maximum(f.minimum(f.load("i64", c.threads), c.most), one), one)
        _memset(f, job, c.at_memory)
        _JOB.write(f, job, block=block, members=members, users=members)
        gather(f, frame=frame, element=element, data=job + DATA)
        memory = job + c.at_memory
        f.intrinsic("llvm.memcpy.p0.p0.i64", "void", [memory, c.memory, c.bytes, f.const("i1", 0)])
        with f.range(0, c.place_count) as n:
            offset, number, within = (f.load("i64", c.places + n * (3 * WORD) + k * WORD) for k in range(3))
            f.store(_place(f, job, memory, number) + within, memory + offset)
        with f.when(members > 1):
            _invoke(f, "i32", c.init_lock, job + _LOCK, _null(f))
            _invoke(f, "i32", c.init_signal, job + _SIGNAL, _null(f))
            _ask(f, frame, job, members, member, args)
        work(f, job=job, scratch=_aligned(f, own))
        failed = _atomic(f, _word(f, job, "failed"))
        leave(f, job=job)
        return failed

    failed = f.value_when(absent.eq(0), run, f.const("i64", 1))
    f.put(f"call void {c.release.ref}({own})")
    with f.when(absent):
        f.put(f"call void {c.release.ref}({block})")
    f.ret(failed)
    return f


def _handle(module: Module, count: Routine, attempt: Routine) -> None:
    f = Routine(module, "handle", "ptr", exported=True, frame="ptr")
    (frame,) = f.parameters
    other, arguments, buffers = context(f, "other", "arguments", "buffers")
    good = f.is_null(field(f, frame, xla.CallFrame, "extension_start", "ptr"))
    good = good & field(f, frame, xla.CallFrame, "stage", "i32").eq(xla.STAGE_EXECUTE)
    good = good & field(f, frame, xla.CallFrame, "args.size", "i64").eq(arguments)
    good = good & field(f, frame, xla.CallFrame, "rets.size", "i64").eq(buffers - arguments)
    elements = f.value_when(good, lambda: count(f, frame=frame), f.const("i64", -1))

    def run(element: Value, carry: list[Value]) -> list[Value]:
        (failed,) = carry
        return [f.value_when(failed.eq(0), lambda: attempt(f, frame=frame, element=element), failed)]

    (failed,) = f.fold(0, elements, 1, [f.const("i64", 0)], run)
    python = (elements < 0) | failed.ne(0)
    f.ret(f.value_when(python, lambda: _invoke(f, "ptr", other, frame), _null(f)))
