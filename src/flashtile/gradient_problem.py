"""A call that is to be differentiated: what is asked for, checked, and how a kernel's sums become the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from flashtile.arrays import view_of
from flashtile.calls import Request
from flashtile.checks import elements
from flashtile.errors import described, wrong
from flashtile.kernels.gradients import Inputs, Sums
from flashtile.score.capture import ArrayCapture
from flashtile.score.options import Scoring
from flashtile.spec import AttentionSpec

SINGLE = ("q", "k", "v", "sinks")  # what is no array of the program
NAMES = ("q", "k", "v", "bias", "sinks", "alibi_slopes", "captured")


class ByIdentity(Mapping[Any, Any]):
    """Gradients of captured arrays: looked up by the array object itself, since arrays have no hash. A view of an
    array is another array."""

    def __init__(self, pairs: Iterable[tuple[Any, Any]] = ()) -> None:
        self._pairs = {id(array): (array, gradient) for array, gradient in pairs}

    def __getitem__(self, array: Any) -> Any:
        try:
            return self._pairs[id(array)][1]
        except KeyError:
            raise KeyError("an array that no score function of the call captured") from None

    def __contains__(self, array: object) -> bool:
        return id(array) in self._pairs

    def __iter__(self) -> Iterator[Any]:
        return (array for array, _ in self._pairs.values())

    def __len__(self) -> int:
        return len(self._pairs)


@dataclass(frozen=True, eq=False)
class Gradients:
    """What `attention_backward` returns: each of its array's shape and dtype, None where `wrt` does not ask."""

    q: Any = None
    k: Any = None
    v: Any = None
    bias: Any = None
    sinks: Any = None
    alibi_slopes: Any = None
    captured: Mapping[Any, Any] | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """A validated call, and what of it is to be differentiated."""

    spec: AttentionSpec
    scoring: Scoring
    offset: Any  # an integer, or (B,)
    names: tuple[str, ...]  # wrt
    sources: list[tuple[str, Any]]  # everything whose gradient is asked for: q, ..., and "captured" as often as needed

    @classmethod
    def of(cls, inputs: tuple[Any, Any, Any], request: Request, wrt: Iterable[str]) -> Problem:
        """Raises: SpecError."""
        spec, scoring = request.of(*inputs)
        given = dict(zip("qkv", inputs, strict=True))
        given |= {name: getattr(request.scores, name, None) for name in ("bias", "sinks", "alibi_slopes")}
        names = _names(wrt, given, scoring)
        return cls(spec, scoring, request.offset(spec), names, _sources(names, given, scoring))

    @property
    def wanted(self) -> frozenset[str | int]:
        """What a kernel is asked for: "q", "k", "v", "sinks", and slots."""
        slots = (slots_of(self.scoring, source) for name, source in self.sources if name not in SINGLE)
        return frozenset(self.names).intersection(SINGLE).union(*slots)

    def differentiate(self, family: Any, inputs: Sequence[Any], order: np.ndarray | None = None) -> Sums:
        """The sums of a kernel family for do, q, k, v, o, lse, dlse, of 2 to 4 axes and any float dtype."""
        ranks = 4, 4, 4, 4, 4, 3, 3
        wide = Inputs(*(None if x is None else _wide(x, n) for x, n in zip(inputs, ranks, strict=True)))  # type: ignore[arg-type]  # only dlse
        sums: Sums = family.backward(self.spec, wide, self.offset, self.scoring, self.wanted, order)
        return sums

    def values(self, sums: Sums) -> Iterator[tuple[str, Any, np.ndarray]]:
        """(name, source, gradient) of everything that is asked for, in the source's shape and the sums' dtype."""
        for name, source in self.sources:
            yield name, source, _sum_of(sums, name, source, self.scoring)

    def gradients(
        self,
        sums: Sums,
        out: Gradients | None = None,
        accumulate: bool = False,
        done: Mapping[str, Any] = MappingProxyType({}),
    ) -> Gradients:
        """All that is asked for and not done, from sums, each in its array's dtype, written to `out` if there is one;
        beside what is done."""
        rest = replace(self, sources=[x for x in self.sources if x[0] not in done])
        return _finish(rest, rest.values(sums), out, accumulate, dict(done))


def _wide(x: np.ndarray, rank: int) -> np.ndarray:
    x = x.astype(np.float32) if x.dtype.name == "bfloat16" else x
    return x[(None,) * (rank - x.ndim)]


def wrt_of(wrt: Any) -> tuple[Any, ...]:
    """The names given as `wrt`, one or several, whatever they are. Raises: SpecError for what holds none."""
    return (wrt,) if isinstance(wrt, str) else tuple(elements("wrt", wrt, "names among " + ", ".join(NAMES)))


def _names(wrt: Iterable[str], given: dict[str, Any], scoring: Scoring) -> tuple[str, ...]:
    names = wrt_of(wrt)
    for name in names:
        if not isinstance(name, str) or name not in NAMES:
            raise wrong("wrt", described(name), "names among " + ", ".join(NAMES))
        if name != "captured" and given[name] is None:
            raise wrong("wrt", f"{name!r} in a call without {name}", "names of what the call has")
        if name == "captured" and not _captured(given, scoring):
            raise wrong("wrt", "'captured'", "a score function that captures a float array")
    return names


def _captured(given: dict[str, Any], scoring: Scoring) -> list[Any]:
    """The float arrays that the score depends on and that came with a function, each once."""
    if scoring.program is None:
        return []
    own = {id(given["bias"]), id(given["alibi_slopes"])}
    sources = (scoring.program.capture(g.slot).source for g in scoring.program.array_gradients)
    return list({id(x): x for x in sources if id(x) not in own}.values())


def _sources(names: tuple[str, ...], given: dict[str, Any], scoring: Scoring) -> list[tuple[str, Any]]:
    """(name, array) of everything whose gradient is asked for."""
    found = [(n, given[n]) for n in dict.fromkeys(names) if n != "captured"]
    return found + ([("captured", x) for x in _captured(given, scoring)] if "captured" in names else [])


def target_of(out: Gradients, name: str, source: Any) -> Any:
    """The array of ``out`` for a gradient, None if there is none."""
    if name != "captured":
        return getattr(out, name)
    return out.captured[source] if out.captured is not None and source in out.captured else None


def check_out(out: Any, accumulate: bool, problem: Problem, inputs: Sequence[Any]) -> None:
    """Raise SpecError unless out has an array for each gradient, in memory of its own."""
    if out is None:
        if accumulate:
            raise wrong("accumulate", "True without out", "out=, a Gradients to add to")
        return
    if not isinstance(out, Gradients):
        raise wrong("out", described(out), "a flashtile.Gradients")
    seen = _memory(problem, inputs)
    for name, source in problem.sources:
        target = target_of(out, name, source)
        if not isinstance(target, np.ndarray):
            raise wrong(f"out.{name}", described(target), "a NumPy array, since wrt asks for it")
        if target.shape != source.shape or target.dtype != source.dtype:
            raise wrong(f"out.{name}", f"{target.dtype} of shape {target.shape}", f"{source.dtype} of {source.shape}")
        if not target.flags.writeable:
            raise wrong(f"out.{name}", "a read-only array", "a writable one")
        if view_of(target).may_overlap_itself() or any(np.may_share_memory(target, x) for x in seen):
            raise wrong(f"out.{name}", "an array that shares memory", "memory of its own")
        seen.append(target)


def _memory(problem: Problem, inputs: Sequence[Any]) -> list[np.ndarray]:
    """Every array that the call reads: those of its arguments, and those that its functions captured."""
    program = problem.scoring.program
    captures = () if program is None else program.captures
    captured = [x.array for x in captures if isinstance(x, ArrayCapture)]
    return [x for x in (*inputs, *(x for _, x in problem.sources), *captured) if isinstance(x, np.ndarray)]


def _finish(
    problem: Problem,
    values: Iterable[tuple[str, Any, np.ndarray]],
    out: Gradients | None,
    accumulate: bool,
    done: dict[str, Any],
) -> Gradients:
    """Sums in their arrays' dtypes, written to `out` if there is one, beside what is done."""
    captured: list[tuple[Any, np.ndarray]] = []
    for name, source, value in values:
        with np.errstate(over="ignore", invalid="ignore"):  # what the dtype cannot hold is an infinity there
            if out is None:
                target = np.require(value, source.dtype, ("C", "W"))
            else:
                target = target_of(out, name, source)
                target[...] = (target.astype(value.dtype) + value if accumulate else value).astype(target.dtype)
        if name == "captured":
            captured.append((source, target))
        else:
            done[name] = target
    return Gradients(**done, captured=ByIdentity(captured) if "captured" in problem.names else None)


def _sum_of(sums: Sums, name: str, source: Any, scoring: Scoring) -> np.ndarray:
    if name in ("q", "k", "v"):
        return np.asarray(getattr(sums, name)).reshape(source.shape)
    if name == "sinks":
        assert sums.sinks is not None
        return sums.sinks.sum(axis=0) if source.ndim == 1 else sums.sinks
    return array_sum(sums, source, scoring)


def slots_of(scoring: Scoring, source: Any) -> frozenset[int]:
    """The numbers of the slots through which a call's score depends on this very array."""
    program = scoring.program
    if program is None:
        return frozenset()
    return frozenset(g.slot.number for g in program.array_gradients if program.capture(g.slot).source is source)


def array_sum(sums: Sums, source: Any, scoring: Scoring) -> np.ndarray:
    """The gradient of a captured array, of its shape, in the arithmetic's dtype; 0 if no score depends on it."""
    parts = [sums.arrays[n] for n in sorted(slots_of(scoring, source))]
    total = sum(parts[1:], start=parts[0]) if parts else np.zeros(())
    shape = tuple(source.shape)
    return total if total.shape == shape else np.broadcast_to(total, shape)
