"""The arguments of the door for JAX, checked, and the function of scores as what XLA can carry."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flashtile import score
from flashtile.arrays import is_torch
from flashtile.checks import integer
from flashtile.dtypes import check_byte_order
from flashtile.errors import described, wrong
from flashtile.jax.call import LEARNED, READ
from flashtile.score.capture import capture
from flashtile.score.mask import as_score
from flashtile.score.texts import parse


def inputs_of(given: dict[str, Any]) -> tuple[list[Any], bool]:
    """Query, key and value with four axes, and whether B was added. Raises: SpecError."""
    arrays = [_array(name, x, ranks=(3, 4)) for name, x in given.items()]
    if len({x.ndim for x in arrays}) > 1:
        raise wrong("query, key, value", ", ".join(f"shape {x.shape}" for x in arrays), "as many axes in each")
    single = arrays[0].ndim == 3
    return [x[None] if single else x for x in arrays], single


class Rule(NamedTuple):
    """A score function, traced: a text, numbers, and what it captured as operands of the call."""

    text: str | None
    numbers: tuple[float, ...]
    operands: dict[str, Any]
    sources: dict[str, Any]  # of the operands, as the function has them

    @staticmethod
    def of(score_mod: Any, shape: tuple[int, int, int, int]) -> Rule:
        """Of a call of (B, N, T, S). Raises: SpecError for a function outside of the language."""
        if score_mod is None:
            return Rule(None, (), {}, {})
        rule = as_score(score_mod)
        rule.fits(shape)
        frozen = score.freeze(rule)
        program = score.Program.compose(shape, [frozen.expression()], [])
        learned = {id(program.capture(x.slot).source) for x in program.array_gradients}
        text, operands, sources = frozen.text, {}, {}
        slots = [slot for slot in parse(text)[2] if slot.rank >= 0]
        for slot, source in zip(slots, frozen.arrays, strict=True):
            # JAX may hold it in fewer bits than it came in: the text says what is read.
            x = source if isinstance(source, jax.Array) else jnp.asarray(np.asarray(source))
            text = text.replace(f"[#{slot.number} {slot.element} ", f"[#{slot.number} {capture(x).element} ")
            name = f"{LEARNED if id(source) in learned else READ}{slot.number}"
            operands[name], sources[name] = x, source
        return Rule(text, frozen.numbers, operands, sources)


def _array(name: str, x: Any, ranks: tuple[int, ...]) -> Any:
    if isinstance(x, np.ndarray):
        check_byte_order(x.dtype, name)
    try:
        found = jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as cause:
        raise wrong(name, described(x), "an array") from cause
    except RuntimeError as cause:  # torch's, of a tensor that is not lent; JAX's own says what happened to an array
        if is_torch(x):
            raise wrong(name, described(x), "an array") from cause
        raise
    if found.ndim not in ranks:
        raise wrong(name, f"shape {found.shape}", f"{' or '.join(map(str, ranks))} axes")
    return found


def broadcast(name: str, x: Any, shape: tuple[int, int, int, int]) -> Any:
    """A mask or a bias with four axes, as JAX asks for. Raises: SpecError."""
    found = _array(name, x, ranks=(0, 1, 2, 3, 4))
    if not jnp.issubdtype(found.dtype, jnp.bool_ if name == "mask" else jnp.floating):
        raise wrong(name, f"dtype {found.dtype}", "bool (True = attend)" if name == "mask" else "a float dtype")
    found = found[(None,) * (4 - found.ndim)]
    if any(n not in (1, m) for n, m in zip(found.shape, shape, strict=True)):
        raise wrong(name, f"shape {found.shape}", f"one that broadcasts to (B, N, T, S) = {shape}")
    return found


def lengths(name: str, x: Any, shape: tuple[int, int, int, int]) -> Any:
    if x is None:
        return None
    found = _array(name, x, ranks=(1,))
    if found.shape != shape[:1] or not jnp.issubdtype(found.dtype, jnp.integer):
        raise wrong(name, f"{found.dtype} of shape {found.shape}", f"integers (B,) = ({shape[0]},)")
    return found


def sinks_of(sinks: Any, shape: tuple[int, int, int, int], dtype: Any) -> Any:
    """Sinks of a call on arrays of this dtype as (B, N) of its accumulator: what a kernel reads."""
    if sinks is None:
        return None
    found = _array("sinks", sinks, ranks=(1, 2))
    if found.shape not in (shape[1:2], shape[:2]) or not jnp.issubdtype(found.dtype, jnp.floating):
        expected = f"floats (N,) = ({shape[1]},) or (B, N) = ({shape[0]}, {shape[1]})"
        raise wrong("sinks", f"{found.dtype} of shape {found.shape}", expected)
    accumulator = jnp.float64 if dtype == jnp.float64 else jnp.float32
    return jnp.broadcast_to(found, shape[:2]).astype(accumulator)


def number(name: str, value: Any) -> float | None:
    """A number that is part of the compiled program."""
    if value is None or isinstance(value, numbers.Real) and not isinstance(value, bool):
        return None if value is None else float(value)
    try:
        return float(value)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError) as cause:
        raise wrong(name, described(value), "a number, known while tracing") from cause


def window_of(size: Any) -> tuple[int, int] | None:
    sides = (size, size) if integer(size) is not None else size
    if sides is None:
        return None
    if (
        not isinstance(sides, tuple)
        or len(sides) != 2
        or any((integer(n) or 0) < 0 or integer(n) is None for n in sides)
    ):
        raise wrong("local_window_size", described(size), "a distance, or (left, right)")
    return int(sides[0]), int(sides[1])


SPELLINGS = {"q": "query", "k": "key", "v": "value", "causal": "is_causal", "window": "local_window_size"}
