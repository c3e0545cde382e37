"""From XLA's call of flashtile's function to the start of its kernel, on two clocks that are one: machine code reads it
for calls that stay there, Python for those that enter it."""

from __future__ import annotations

import ctypes
import statistics
import time
from typing import Any

CALLS, SHAPE = 150, (1, 256, 8, 64)  # for several threads
OPTIONS = ("plain", "causal", "mask", "bias", "softcap", "sinks", "lengths")
_CLOCK = getattr(time, "CLOCK_MONOTONIC", 1)
# `enter` stands for the handler that XLA calls, `start` for the kernel of a call's first items.
_TEXT = f"""
@words = global [5 x i64] zeroinitializer

define i64 @now() {{
  %time = alloca [2 x i64]
  %clock.at = getelementptr i64, ptr @words, i64 4
  %clock = load ptr, ptr %clock.at
  %ignored = call i32 %clock(i32 {_CLOCK}, ptr %time)
  %seconds = load i64, ptr %time
  %rest.at = getelementptr i64, ptr %time, i64 1
  %rest = load i64, ptr %rest.at
  %whole = mul i64 %seconds, 1000000000
  %now = add i64 %whole, %rest
  ret i64 %now
}}

define ptr @enter(ptr %frame) {{
  %now = call i64 @now()
  %began.at = getelementptr i64, ptr @words, i64 1
  store i64 0, ptr %began.at
  store i64 %now, ptr @words
  %handler.at = getelementptr i64, ptr @words, i64 2
  %handler = load ptr, ptr %handler.at
  %error = call ptr %handler(ptr %frame)
  ret ptr %error
}}

define i32 @start(ptr %params, i64 %begin, i64 %end, ptr %scratch) {{
  %now = call i64 @now()
  %began.at = getelementptr i64, ptr @words, i64 1
  %first = cmpxchg ptr %began.at, i64 0, i64 %now acq_rel monotonic
  %kernel.at = getelementptr i64, ptr @words, i64 3
  %kernel = load ptr, ptr %kernel.at
  %status = call i32 %kernel(ptr %params, i64 %begin, i64 %end, ptr %scratch)
  ret i32 %status
}}
"""


class _Native:
    """A handler in machine code, with the clock read as it is called and as its kernel starts."""

    made: list[_Native] = []

    def __init__(self, make: Any, native: Any, template: Any, *rest: Any) -> None:
        from flashtile import xla
        from flashtile.llvm import jit
        from flashtile.llvm import machines as isas

        library = jit.load(lambda: _TEXT, f"clocks {_TEXT}", isas.current(), ("words", "enter", "start"))
        self.words = (ctypes.c_int64 * 5).from_address(library.address("words"))
        timed = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 4)(library.address("start"))
        kernel = template.steps[template.kernel]
        steps = tuple(x._replace(function=timed) if x is kernel else x for x in template.steps)
        self.inner = make(native, template._replace(steps=steps), *rest)
        functions = self.inner, kernel.function, ctypes.CDLL(None).clock_gettime
        for n, function in enumerate(functions, start=2):
            self.words[n] = ctypes.cast(function, ctypes.c_void_p).value or 0
        self.handler = xla.Handler(library.address("enter"))
        self.handler.keep = library, timed, self.inner  # type: ignore[attr-defined]  # ctypes keeps attributes
        _Native.made.append(self)


def _watch() -> list[tuple[int, int]]:
    """From now on handlers read the clock; those in Python leave what they read in the list, in nanoseconds."""
    from flashtile import xla, xla_native
    from flashtile.engines import direct

    make, read, run = xla_native.handler, xla._frame, direct._Job.run
    entered, found = [0], []

    def handler(native: Any, template: Any, *rest: Any) -> Any:
        made = None if template is None else make(native, template, *rest)
        return None if made is None else _Native(make, native, template, *rest).handler

    def frame(address: int) -> Any:
        entered[0] = time.perf_counter_ns()
        return read(address)

    def job(self: Any, *given: Any) -> None:
        if entered[0]:
            found.append((entered[0], time.perf_counter_ns()))
            entered[0] = 0
        run(self, *given)

    xla_native.handler, xla._frame, direct._Job.run = handler, frame, job  # type: ignore[assignment]  # theirs, timed
    return found


def measure(option: str, threads: int) -> dict[str, Any]:
    """Median microseconds of a call and of its gradient, and which of them entered Python."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import flashtile.jax

    flashtile.set_num_threads(threads)
    python = _watch()
    rng = np.random.default_rng(0)
    b, t, n, h = SHAPE
    q, k, v = (jnp.asarray(rng.standard_normal(SHAPE), "float32") for _ in range(3))
    given: dict[str, Any] = {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"mask": jnp.asarray(rng.random((b, 1, t, t)) < 0.9)},
        "bias": {"bias": np.asarray(rng.standard_normal((b, n, t, t)), np.float32)},
        "softcap": {"softcap": 3.0},
        "sinks": {"sinks": jnp.zeros(n)},
        "lengths": {},
    }[option]
    numbers = [jnp.full(b, t - n) for n in range(CALLS + 10)]  # of keys: others at every call

    def attend(q: Any, k: Any, v: Any, n: Any) -> Any:
        own = {"key_value_seq_lengths": n} if option == "lengths" else {}
        return flashtile.jax.dot_product_attention(q, k, v, **given, **own)

    calls = {
        "forward": jax.jit(attend),
        "gradient": jax.jit(jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2))),
    }
    answer: dict[str, Any] = {}
    for name, call in calls.items():
        took = []
        for number in range(CALLS + 10):
            python.clear()
            jax.block_until_ready(call(q, k, v, numbers[number]))
            spans = python or [(x.words[0], x.words[1]) for x in _Native.made]
            took += [spans[-1][1] - spans[-1][0]] if number >= 10 else []
        answer[name] = statistics.median(took) / 1e3
        answer[f"python {name}"] = bool(python)
    return answer
