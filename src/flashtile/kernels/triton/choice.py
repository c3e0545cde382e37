"""Which rows of the tables compute a call: the first in each use that has not failed its self-test on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from flashtile.errors import UnavailableError
from flashtile.kernels.triton import tiles, timed
from flashtile.kernels.triton.backward_parts import parts_of_keys
from flashtile.kernels.triton.backward_tiles import backward_tiles, cautious_tiles, timed_pairs
from flashtile.kernels.triton.selftest import Judge, Row, failure
from flashtile.kernels.triton.specialisation import Tile, has_spans, padded
from flashtile.spec import AttentionSpec


class Place(NamedTuple):
    """A device: its name with its architecture, the architecture, its processors; and Triton's version."""

    name: str
    arch: str
    processors: int
    version: str


def forward_tiles(spec: AttentionSpec, place: Place, few: bool, packed: bool) -> tuple[Tile, Tile]:
    """The tiles of a forward call, of arrays that tensor descriptors can cut, and of others, by what is known."""
    plain = (
        _usable(forward_rows(spec, place.arch, few, packed), place) or forward_rows(spec, place.arch, few, packed)[0]
    )
    rows = [row for row in described_rows(spec, place, few, plain) if not _failed(row, place)]
    return _fastest([*rows, plain], place).tiles[0], plain.tiles[0]


def refusal(
    spec: AttentionSpec,
    place: Place,
    few: bool,
    packed: bool,
    judge: Judge | None = None,
    stopwatch: timed.Stopwatch | None = None,
) -> str | None:
    """Why no row computes a forward call there; None if one does. Rows are judged in turn, until one is right; those by
    descriptors are then timed beside it, where there are such."""
    rows = forward_rows(spec, place.arch, few, packed)
    plain = _usable(rows, place, judge)
    if plain is None:
        return "; ".join(_reasons(rows, place))
    usable = [row for row in described_rows(spec, place, few, plain) if not _failed(row, place, judge)]
    _fastest([*usable, plain], place, stopwatch)
    return None


def forward_rows(spec: AttentionSpec, arch: str, few: bool, packed: bool) -> tuple[Row, ...]:
    """The rows for arrays of any kind, in order of preference."""
    found = (tiles.forward_tile(spec, arch, few), tiles.cautious_tile(spec, few))
    return tuple(_row(spec, _uses(spec, tile, few, packed), tile) for tile in dict.fromkeys(found))


def described_rows(spec: AttentionSpec, place: Place, few: bool, plain: Row) -> tuple[Row, ...]:
    """The rows by tensor descriptors, where there are any, in order of preference; more than one for calls without a
    score program or dropout. They go with the table's other row alone: plans fit both."""
    best = tiles.forward_tile(spec, place.arch, few, described=True)
    ours = tiles.forward_tile(spec, place.arch, few)
    if not best.described or plain.tiles != (ours,):
        return ()
    others = () if plain.uses or not timed.enabled() else tiles.timed_tiles(spec, place.arch)
    return tuple(_row(spec, plain.uses, tile) for tile in (best, *others))


def usable_backward(
    spec: AttentionSpec,
    place: Place,
    arrays: bool,
    judge: Judge | None = None,
    stopwatch: timed.Stopwatch | None = None,
) -> tuple[Tile, Tile]:
    """The tiles of dQ, and of dK and dV, of a call: the first that are right, judged in turn; of a call without more to
    it, those among the table's and their alternatives that take least time.

    arrays: gradients of captured arrays are among those wanted. Raises: UnavailableError if none are.
    """
    found = backward_tiles(spec, place.arch)
    assert found is not None  # or there were no backward to compile
    cautious = cautious_tiles(spec)
    uses = _uses(spec, found[0], False, False) - {"many keys"} | {"backward"}
    uses |= {"arrays"} if arrays else set()
    items = spec.batch * spec.heads * -(-spec.q_len // found[0].tile_q)
    if parts_of_keys(items, spec.kv_len, found[0].tile_k, place.processors).count > 1:
        uses |= {"parts"}
    rows = tuple(_row(spec, uses, *pair) for pair in dict.fromkeys((found, cautious)))
    usable = _usable(rows, place, judge)
    if usable is None:
        raise UnavailableError(
            "kernel: got a backward on a GPU, expected one that is right; "
            + "; ".join(f"triton: {reason}" for reason in _reasons(rows, place))
        )
    plain = usable is rows[0] and uses == {"backward"} and timed.enabled()
    others = (_row(spec, uses, *pair) for pair in timed_pairs(spec, place.arch)) if plain else ()
    of_q, of_kv = _fastest([usable, *(row for row in others if not _failed(row, place, judge))], place, stopwatch).tiles
    return of_q, of_kv


def _usable(rows: Iterable[Row], place: Place, judge: Judge | None = None) -> Row | None:
    return next((row for row in rows if not _failed(row, place, judge)), None)


def _fastest(rows: list[Row], place: Place, stopwatch: timed.Stopwatch | None = None) -> Row:
    """The first, or a faster one: what is timed is plain attention, which tells nothing of other uses."""
    return rows[0] if rows[0].uses - {"backward"} else timed.fastest(place.name, place.version, rows, stopwatch)


def _reasons(rows: Iterable[Row], place: Place) -> list[str]:
    return [reason for row in rows if (reason := failure(place.name, place.version, row))]


def _failed(row: Row, place: Place, judge: Judge | None = None) -> bool:
    return failure(place.name, place.version, row, judge) is not None


def _row(spec: AttentionSpec, uses: frozenset[str], *of: Tile) -> Row:
    size = tiles.head_of(max(padded(spec.head_size), padded(spec.value_size)))
    return Row(spec.dtype, spec.precision, size, frozenset(uses), of)


def _uses(spec: AttentionSpec, tile: Tile, few: bool, packed: bool) -> frozenset[str]:
    """What a call asks of a row beside plain attention."""
    there = {
        "packed": packed,
        "few rows": few and not packed,
        "program": spec.program is not None,
        "dropout": spec.dropout,
        "sinks": spec.sinks,
        "many keys": not few and has_spans(spec, tile, spec.kv_len),
    }
    return frozenset(name for name, is_there in there.items() if is_there)
