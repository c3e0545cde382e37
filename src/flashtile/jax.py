"""The door for JAX: `jax.nn.dot_product_attention` by its own signature, under jit, grad and vmap, on CPUs.

XLA calls back with the buffers of a call, where they lie: nothing is copied on the way in or out.
"""

from __future__ import annotations

import functools
import hashlib
import json
import numbers
import threading
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flashtile import score, xla, xla_native
from flashtile.api import attention
from flashtile.arrays import View, contiguous
from flashtile.calls import Call, Options, lookup, prepare
from flashtile.checks import check_flag, integer
from flashtile.errors import FlashtileError, SpecError, UnavailableError, described, wrong
from flashtile.gradients import ByIdentity, Gradients, attention_backward
from flashtile.hints import check_keywords
from flashtile.score.capture import capture
from flashtile.score.frozen import parse
from flashtile.score.mask import as_mask, as_score

__all__ = ["dot_product_attention"]

FORWARD, BACKWARD = "flashtile_attention", "flashtile_attention_backward"
DIFFERENTIABLE = "bias", "sinks"  # of the operands after query, key and value; and these, by their numbers:
LEARNED, READ = "learned ", "read "  # arrays that the score function captured, with a gradient or without


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
    softcap: float | None = None,
    sinks: Any = None,
    score_mod: Any = None,
    **unknown: Any,
) -> Any:
    """`jax.nn.dot_product_attention` by its own signature and defaults, and a few options more.

    Shapes:   query (B, T, N, H), key (B, S, K, H), value (B, S, K, H_v), or all without B -> (B, T, N, H_v); query head
              n reads head n // (N / K).
    Options:  is_causal and local_window_size, (left, right) or one number for both, are anchored at the top left, as in
              JAX: row t stands at key t. mask (boolean, True = attend) and bias (added) broadcast to (B, N, T, S).
              query_seq_lengths, key_value_seq_lengths (B,): what is past a sequence's end is padding.
              softcap, sinks, (N,) or (B, N), and score_mod as in `flashtile.attention`; float arrays that score_mod
              captures have gradients, too. implementation must be None: flashtile is neither of JAX's two.
    Returns:  an array of query's dtype; with return_residual=True also lse, (B, T, N), float32 (float64 for float64),
              to which, as in JAX, no gradient flows.
    Numerics: as `flashtile.attention`; a row that sees no key gives 0, where JAX gives the mean of all values.
    Raises:   SpecError, while tracing; errors of a run come as JAX's, with flashtile's text. Forward mode and second
              derivatives raise. Where arrays are sharded over devices the call is replicated.
    Source:   JAX 0.10.2, jax.nn.dot_product_attention.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 5, 4, 8))
    >>> dot_product_attention(x, x, x, is_causal=True).shape
    (1, 5, 4, 8)
    """
    if unknown:
        check_keywords(dot_product_attention, unknown)
    if implementation is not None:
        raise UnavailableError(f"implementation: got {described(implementation)}, expected None: that is flashtile's")
    check_flag("return_residual", return_residual)
    arrays, single = _inputs({"query": query, "key": key, "value": value})
    q, k, v = arrays
    shape = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    rule = _Rule.of(score_mod, shape)
    given = {
        "bias": None if bias is None else _broadcast("bias", bias, shape),
        "mask": None if mask is None else _broadcast("mask", mask, shape),
        "query_seq_lengths": _lengths("query_seq_lengths", query_seq_lengths, shape),
        "key_value_seq_lengths": _lengths("key_value_seq_lengths", key_value_seq_lengths, shape),
        "sinks": _sinks(sinks, shape),
        **rule.operands,
    }
    others = {name: x for name, x in given.items() if x is not None}
    call = _Call(
        scale=_number("scale", scale),
        is_causal=is_causal,
        window=_window(local_window_size),
        softcap=_number("softcap", softcap),
        score_mod=rule.text,
        numbers=rule.numbers,
        operands=tuple(others),
    )
    call.check(q, k, v, shape)
    _register()
    if call.plain:
        call = replace(call, target=_target(call, tuple((tuple(x.shape), x.dtype) for x in (q, k, v))))
    o, lse = _attend(call, (q, k, v, *others.values()))
    lse = jax.lax.stop_gradient(lse).swapaxes(1, 2)
    o, lse = (o[0], lse[0]) if single else (o, lse)
    return (o, lse) if return_residual else o


def _inputs(given: dict[str, Any]) -> tuple[list[Any], bool]:
    """Query, key and value with four axes, and whether B was added. Raises: SpecError."""
    arrays = [_array(name, x, ranks=(3, 4)) for name, x in given.items()]
    if len({x.ndim for x in arrays}) > 1:
        raise wrong("query, key, value", ", ".join(f"shape {x.shape}" for x in arrays), "as many axes in each")
    single = arrays[0].ndim == 3
    return [x[None] if single else x for x in arrays], single


class _View(NamedTuple):
    """An array without its elements, in flashtile's order of the axes."""

    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class _Call:
    """What a call does, beside its arrays: part of the compiled program, as text."""

    scale: float | None
    is_causal: bool
    window: tuple[int, int] | None
    softcap: float | None
    score_mod: str | None  # as flashtile.score.freeze writes it
    numbers: tuple[float, ...]  # that it captured
    operands: tuple[str, ...]  # after query, key and value
    target: str = FORWARD  # the function that XLA calls

    @property
    def plain(self) -> bool:
        """Whether it depends on nothing but shapes and addresses."""
        return not self.operands and self.softcap is None and self.score_mod is None

    @property
    def options(self) -> Options:
        return Options(self.is_causal, self.window, "top_left", self.scale)

    @property
    def text(self) -> str:
        return json.dumps(vars(self), sort_keys=True)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(text: str) -> _Call:
        found = json.loads(text)
        lists: dict[str, Any] = {name: tuple(x) for name, x in found.items() if isinstance(x, list)}
        return _Call(**(found | lists))

    @property
    def band(self) -> dict[str, Any]:
        return {"causal": self.is_causal, "window": self.window, "align": "top_left", "scale": self.scale}

    def check(self, q: Any, k: Any, v: Any, shape: tuple[int, int, int, int]) -> None:
        """Raise SpecError now, while tracing, for what the run would refuse."""
        shapes = [_View((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in (q, k, v)]
        try:
            self.options.spec(shapes[0], shapes[1], shapes[2])
            score.Program.of(shape, softcap=self.softcap)
        except SpecError as e:
            _spell(e)
            raise

    @property
    def differentiable(self) -> list[str]:
        """The operands that have gradients."""
        return [x for x in self.operands if x in DIFFERENTIABLE or x.startswith(LEARNED)]

    @staticmethod
    def captured(given: dict[str, Any]) -> tuple[Any, ...]:
        """What the score function captured, in its order."""
        return tuple(x for name, x in given.items() if name.startswith((LEARNED, READ)))

    def keywords(self, arrays: list[np.ndarray]) -> dict[str, Any]:
        """The call as flashtile.attention's keywords, from the arrays after query, key and value."""
        given = dict(zip(self.operands, arrays, strict=True))
        rules: list[Any] = [given["mask"]] if "mask" in given else []
        if "query_seq_lengths" in given:
            rows = given["query_seq_lengths"]
            rules.append(lambda b, h, i, j: i < rows[b])
        if "key_value_seq_lengths" in given:
            rules.append(score.padding(given["key_value_seq_lengths"]))
        mask = rules[0] if rules else None
        for rule in rules[1:]:
            mask = as_mask(mask) & rule
        return {
            **self.band,
            "mask": mask,
            "bias": given.get("bias"),
            "sinks": given.get("sinks"),
            "softcap": self.softcap,
            "score_mod": None
            if self.score_mod is None
            else score.thaw(self.score_mod, self.captured(given), self.numbers),
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, operands: tuple[Any, ...]) -> tuple[Any, Any]:
    """o and lse (B, N, T)."""
    q, v = operands[0], operands[2]
    accumulator = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    shapes = (
        jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype),
        jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), accumulator),
    )
    o, lse = jax.ffi.ffi_call(call.target, shapes, vmap_method="expand_dims")(*operands, call=call.text)
    return o, lse


def _attend_recorded(call: _Call, operands: tuple[Any, ...]) -> Any:
    o, lse = _attend(call, operands)
    return (o, lse), (operands, o, lse)


def _differentiate(call: _Call, kept: Any, given: Any) -> Any:
    operands, o, lse = kept
    places = [0, 1, 2, *(3 + n for n, name in enumerate(call.operands) if name in call.differentiable)]
    shapes = [jax.ShapeDtypeStruct(operands[n].shape, operands[n].dtype) for n in places]
    found = jax.ffi.ffi_call(BACKWARD, shapes, vmap_method="expand_dims")(given[0], o, lse, *operands, call=call.text)
    gradients = dict(zip(places, found, strict=True))
    return (tuple(gradients.get(n) for n in range(len(operands))),)


_attend.defvjp(_attend_recorded, _differentiate)


def _forward(text: str, arguments: list[xla.Argument], results: list[xla.Argument]) -> None:
    """The handler of FORWARD: axes that vmap added stand first, in every buffer, of length 1 where it added none."""
    key = text, *((x.shape, x.element) for x in arguments)
    prepared = lookup(key)
    if prepared is None:
        prepared = _prepare(key, _Call.of(text), arguments, results)
    if prepared is not None:
        q_at, k_at, v_at, o_at, lse_at = (x.address for x in (*arguments, *results))
        prepared.run(prepared.pack(q_at, k_at, v_at, o_at, lse_at, 0, None), None)
        return
    call = _Call.of(text)
    inputs, outputs = ([x.array() for x in given] for given in (arguments, results))
    for mapped in np.ndindex(outputs[0].shape[:-4]):
        q, k, v, *others = (_at(x, mapped) for x in inputs)
        o, lse = (x[mapped] for x in outputs)
        _, lse[...] = attention(
            *(x.swapaxes(1, 2) for x in (q, k, v)), out=o.swapaxes(1, 2), return_lse=True, **call.keywords(others)
        )


def _prepare(key: Any, call: _Call, arguments: list[xla.Argument], results: list[xla.Argument]) -> Call | None:
    """A call that depends on nothing but shapes and addresses, kept under the key; None for any other."""
    if not call.plain or len(arguments[0].shape) != 4:
        return None
    q, k, v, o = (x.array().swapaxes(1, 2) for x in (*arguments, results[0]))
    return prepare(key, q, k, v, o, call.options)


def _backward(text: str, arguments: list[xla.Argument], results: list[xla.Argument]) -> None:
    """The handler of BACKWARD."""
    call = _Call.of(text)
    names = ["q", "k", "v", *call.differentiable]
    wrt = [name for name in names if not name.startswith(LEARNED)]
    wrt += ["captured"] if len(wrt) < len(names) else []
    inputs, outputs = ([x.array() for x in given] for given in (arguments, results))
    for mapped in np.ndindex(outputs[0].shape[: outputs[0].ndim - 4]):
        do, o, lse, *operands = (_at(x, mapped) for x in inputs)
        do, q, k, v, o = (x.swapaxes(1, 2) for x in (do, *operands[:3], o))
        targets: dict[str, Any] = {name: x[(*mapped, ...)] for name, x in zip(names, outputs, strict=True)}
        for name in "qkv":
            targets[name] = targets[name].swapaxes(1, 2)
        given = dict(zip(call.operands, operands[3:], strict=True))
        learned = ByIdentity((x, targets.pop(name)) for name, x in given.items() if name.startswith(LEARNED))
        out = Gradients(**targets, captured=learned)
        attention_backward(do, q, k, v, o, lse, wrt=wrt, out=out, **call.keywords(operands[3:]))


def _at(x: np.ndarray, mapped: tuple[int, ...]) -> np.ndarray:
    at: tuple[Any, ...] = tuple(n if size > 1 else 0 for n, size in zip(mapped, x.shape, strict=False))
    return x[(*at, ...)]


@functools.cache
def _register() -> list[Any]:
    """Tell XLA of the handlers, once, and keep them."""
    kept = []
    for name, work in ((FORWARD, _forward), (BACKWARD, _backward)):
        function = xla.handler(work)
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
        kept.append(function)
    return kept


@functools.lru_cache(maxsize=1024)
def _target(call: _Call, arrays: tuple[tuple[tuple[int, ...], Any], ...]) -> str:
    """The function for a plain call of these shapes and dtypes: one that needs no Python, if the call is small enough,
    by a name that says what it computes, since compiled programs may be kept on disk."""
    (q, dtype), _, (v, _) = arrays
    shapes = [*(shape for shape, _ in arrays), (*q[:-1], v[-1])]
    try:
        q_view, k_view, v_view, o_view = (_swapped(x, dtype) for x in shapes)
        ready = prepare(("jax", call, arrays), q_view, k_view, v_view, o_view, call.options)
        found = xla_native.handler(ready, shapes, _register()[0])
    except FlashtileError:  # of this machine: the run tells of it
        found = None
    if found is None:
        return FORWARD
    name = f"{FORWARD}_{hashlib.blake2b(f'{call.text} {arrays}'.encode(), digest_size=12).hexdigest()}"
    with _lock:
        if name not in _native:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(found), platform="cpu")
            _native[name] = found
    return name


_native: dict[str, Any] = {}  # functions that XLA may call, for good
_lock = threading.Lock()


def _swapped(shape: tuple[int, ...], dtype: Any) -> View:
    """A row-major array of JAX's order of the axes, in flashtile's."""
    view = contiguous(shape, dtype)
    (b, t, n, h), strides = view.shape, view.strides
    return view._replace(shape=(b, n, t, h), strides=(strides[0], strides[2], strides[1], strides[3]))


class _Rule(NamedTuple):
    """A score function, traced: a text, numbers, and what it captured as operands of the call."""

    text: str | None
    numbers: tuple[float, ...]
    operands: dict[str, Any]

    @staticmethod
    def of(score_mod: Any, shape: tuple[int, int, int, int]) -> _Rule:
        """Of a call of (B, N, T, S). Raises: SpecError for a function outside of the language."""
        if score_mod is None:
            return _Rule(None, (), {})
        rule = as_score(score_mod)
        rule.fits(shape)
        frozen = score.freeze(rule)
        program = score.Program.compose(shape, [frozen.expression()], [])
        learned = {id(program.capture(x.slot).source) for x in program.array_gradients}
        text, operands = frozen.text, {}
        slots = [slot for slot in parse(text)[2] if slot.rank >= 0]
        for slot, source in zip(slots, frozen.arrays, strict=True):
            # JAX may hold it in fewer bits than it came in: the text says what is read.
            x = source if isinstance(source, jax.Array) else jnp.asarray(np.asarray(source))
            text = text.replace(f"[#{slot.number} {slot.element} ", f"[#{slot.number} {capture(x).element} ")
            operands[f"{LEARNED if id(source) in learned else READ}{slot.number}"] = x
        return _Rule(text, frozen.numbers, operands)


def _array(name: str, x: Any, ranks: tuple[int, ...]) -> Any:
    try:
        found = jnp.asarray(x)
    except (TypeError, ValueError) as cause:
        raise wrong(name, described(x), "an array") from cause
    if found.ndim not in ranks:
        raise wrong(name, f"shape {found.shape}", f"{' or '.join(map(str, ranks))} axes")
    return found


def _broadcast(name: str, x: Any, shape: tuple[int, int, int, int]) -> Any:
    """A mask or a bias with four axes, as JAX asks for. Raises: SpecError."""
    found = _array(name, x, ranks=(0, 1, 2, 3, 4))
    if (found.dtype == jnp.bool_) != (name == "mask"):
        raise wrong(name, f"dtype {found.dtype}", "bool (True = attend)" if name == "mask" else "a float dtype")
    found = found[(None,) * (4 - found.ndim)]
    if any(n not in (1, m) for n, m in zip(found.shape, shape, strict=True)):
        raise wrong(name, f"shape {found.shape}", f"one that broadcasts to (B, N, T, S) = {shape}")
    return found


def _lengths(name: str, x: Any, shape: tuple[int, int, int, int]) -> Any:
    if x is None:
        return None
    found = _array(name, x, ranks=(1,))
    if found.shape != shape[:1] or not jnp.issubdtype(found.dtype, jnp.integer):
        raise wrong(name, f"{found.dtype} of shape {found.shape}", f"integers (B,) = ({shape[0]},)")
    return found


def _sinks(sinks: Any, shape: tuple[int, int, int, int]) -> Any:
    if sinks is None:
        return None
    found = _array("sinks", sinks, ranks=(1, 2))
    if found.shape not in (shape[1:2], shape[:2]) or not jnp.issubdtype(found.dtype, jnp.floating):
        expected = f"floats (N,) = ({shape[1]},) or (B, N) = ({shape[0]}, {shape[1]})"
        raise wrong("sinks", f"{found.dtype} of shape {found.shape}", expected)
    return found


def _number(name: str, value: Any) -> float | None:
    """A number that is part of the compiled program."""
    if value is None or isinstance(value, numbers.Real) and not isinstance(value, bool):
        return None if value is None else float(value)
    try:
        return float(value)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError) as cause:
        raise wrong(name, described(value), "a number, known while tracing") from cause


def _window(size: Any) -> tuple[int, int] | None:
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


_SPELLINGS = {"q": "query", "k": "key", "v": "value", "causal": "is_causal", "window": "local_window_size"}


def _spell(error: SpecError) -> None:
    """Call the argument that a message begins with what this signature calls it."""
    argument, colon, rest = str(error).partition(":")
    for ours, theirs in (("as in q", "as in query"), ("as in k", "as in key"), ("q's", "query's")):
        rest = rest.replace(ours, theirs)
    error.args = (_SPELLINGS.get(argument, argument) + colon + rest,)
