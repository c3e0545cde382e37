"""The keys that each panel of queries reaches by the limits of a mask, as the first step of a call whose values come
with it finds them: one segment a panel (walk.py), cut to the tiles that a plan would cut it to.

    c_i i + c_j j + r <= 0  with c_j = 1 lets the keys up to -r - c_i i be seen, with c_j = -1 those from r + c_i i on,
    and with c_j = 0 all keys or none; some row of a panel sees what its least c_i i leaves, all rows what its greatest.

What other rules hide no segment tells: the mask is then asked for every pair of it.
"""

from __future__ import annotations

from typing import NamedTuple

from flashtile.kernels.cpu.config import Config
from flashtile.llvm.blocks import Block, integers, pointers
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.routines import entry
from flashtile.score.affine import Affine
from flashtile.score.captures import Block as Captures
from flashtile.score.emit import Emission
from flashtile.score.expr import INT_MAX, INT_MIN
from flashtile.score.limits import Limit, limits_of

EXPORTS = ("reach",)

# segments: where they are written; batches, heads: 1 where the mask does not depend on them; items: among which the
# panels of all are shared.
CALL = Block(pointers("captures segments"), integers("batches heads panels items q_len kv_len panel tile"))


class _Stretches(NamedTuple):
    """Keys that some row of a panel sees, and those that every row does."""

    some_from: Value
    some_to: Value
    all_from: Value
    all_to: Value


def reach_text(c: Config) -> str:
    """LLVM IR of the module that exports reach (routines.entry), for the mask of a configuration."""
    assert c.code is not None and c.code.mask is not None
    module = Module()
    f = entry(module, "reach")
    block, begin, end, _ = f.parameters
    p = CALL.load(f, block)
    limits, others = limits_of(c.code.mask)
    count = p.batches * p.heads * p.panels
    with f.range(begin * count // p.items, end * count // p.items) as number:
        head = number // p.panels
        place = {name: f.cast("trunc", x, "i32") for name, x in (("b", head // p.heads), ("h", head % p.heads))}
        values = Emission(f, c.isa, c.acc, c.lanes, Captures(c.code.slots), p.captures, place)
        first = number % p.panels * p.panel
        ends = first, f.minimum(first + p.panel, p.q_len) - 1
        zero = f.const("i64", 0)
        found = _Stretches(zero, p.kv_len, zero, zero if others else p.kv_len)
        for limit in limits:
            found = _cut(f, values, limit, found, ends, p.kv_len)
        _write(f, _in_tiles(f, found, p.kv_len, p.tile), p.segments + number * 32)
    f.ret(f.const("i32", 0))
    return module.text()


def _cut(
    f: Function, values: Emission, limit: Limit, found: _Stretches, rows: tuple[Value, Value], keys: Value
) -> _Stretches:
    """What a limit leaves; where its sums wrap, the mask is asked."""
    zero = f.const("i64", 0)
    sides = [f.cast("sext", values.value(x.rest), "i64") for x in (limit.left, limit.right)]
    rest = sides[0] - sides[1] + int(limit.strict)
    within = _fits(f, limit.left, sides[0], rows[1], keys) & _fits(f, limit.right, sides[1], rows[1], keys)
    least, most = {-1: (zero - rows[1], zero - rows[0]), 0: (zero, zero), 1: rows}[limit.i]
    some_from, some_to, all_from, all_to = found
    if limit.j > 0:
        some_to, all_to = f.minimum(some_to, 1 - rest - least), f.minimum(all_to, 1 - rest - most)
    elif limit.j < 0:
        some_from, all_from = f.maximum(some_from, rest + least), f.maximum(all_from, rest + most)
    else:
        some_to = f.select(rest + least <= 0, some_to, zero)
        all_to = f.select(rest + most <= 0, all_to, zero)
    seen = f.select(within, some_from, found.some_from), f.select(within, some_to, found.some_to)
    return _Stretches(*seen, f.maximum(all_from, found.all_from), f.select(within, all_to, zero))


def _fits(f: Function, side: Affine, rest: Value, last_row: Value, keys: Value) -> Value:
    """Whether a side of a comparison stays in int32 at every position up to these."""
    last_key, zero = f.maximum(keys - 1, 0), f.const("i64", 0)
    ends = [last_row * side.i, last_key * side.j]
    most, least = rest, rest
    for end in ends:
        most, least = most + f.maximum(end, zero), least + f.minimum(end, zero)
    return (most <= INT_MAX) & (least >= INT_MIN)


def _in_tiles(f: Function, found: _Stretches, keys: Value, tile: Value) -> _Stretches:
    """Some: of whole tiles, cut by the keys' end. All: the whole tiles in it."""

    def down(x: Value) -> Value:
        return f.clamp(x, 0, keys) // tile * tile

    def up(x: Value) -> Value:
        return f.minimum((f.clamp(x, 0, keys) + (tile - 1)) // tile * tile, keys)

    some_from, some_to, all_from = down(found.some_from), up(found.some_to), up(found.all_from)
    all_to = f.select(found.all_to >= keys, keys, down(found.all_to))
    zero = f.const("i64", 0)
    none = some_from >= some_to
    some_from, some_to = f.select(none, zero, some_from), f.select(none, zero, some_to)
    nowhere = (all_from >= all_to) | none
    return _Stretches(some_from, some_to, f.select(nowhere, some_to, all_from), f.select(nowhere, some_to, all_to))


def _write(f: Function, found: _Stretches, at: Value) -> None:
    for n, x in enumerate(found):
        f.store(x, at + 8 * n)
