"""Which kernel computes few queries: passes/decode, whose time goes with the rows, or forward.py, whose time goes with
the registers that they fill; and what the latter does for them. `python -m benchmarks.few` measures both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flashtile.llvm.products import PAIRS, TILES, TILES2, TILES3

if TYPE_CHECKING:
    from flashtile.kernels.cpu.config import Config
    from flashtile.plan import Plan
    from flashtile.spec import AttentionSpec

MOST_QUERIES = 20  # for passes/decode
NARROW_QUERIES = 12  # the most where nobody has measured more
# Measured at D = 128, in keys of one row of passes/decode: what 1, 2, ... registers cost for each key; what a row costs
# before its first key, and what forward.py costs, which works on whole tiles of keys, too many by half of one.
PACES = {
    (64, 16): ((15, 29), 15, 150),  # by bytes and lanes of a register
    (64, 8): ((8, 15, 22), 11, 70),
    (32, 8): ((11, 12, 16), 12, 100),
    (32, 4): ((8, 8, 10, 18, 18), 22, 70),
}
# On matrix registers, by the product; nobody has measured these. By the models of docs/adding-an-isa.md a key costs 37
# to 46 cycles in one part, 215 to 240 in two, 290 to 350 in three, most of them for making it ready; a row of
# passes/decode 10 to 12. But in one part it is the memory that is waited for, and that kernel asks it ahead.
TILED_PACES = {
    TILES.name: ((14, 16), 40, 120),
    TILES2.name: ((20, 22), 40, 120),
    TILES3.name: ((29, 35), 40, 120),
}
# From so many heads with one query each, they are faster as rows of forward.py. By pairs in registers of 64 bytes 1.35
# times at 32 and D = 128, 1.45 at 48, where in fp32 there is a tenth to gain or to lose; the others by the above.
STACKED_HEADS = {PAIRS.name: 32, TILES.name: 15, TILES2.name: 24, TILES3.name: 40}

# So few panels are soon done with a block of keys, and so many bytes of a head's K and V are more than most second
# caches hold: memory is asked for the next block meanwhile.
ASKING_PANELS, ASKING_BYTES = 2, 1 << 20


def decodes_from(c: Config, q_len: int) -> float:
    """From how many keys on passes/decode is the faster one for so many queries of a head; inf: it never is."""
    if c.dropout:
        return math.inf
    pace = TILED_PACES.get(c.product.name) if c.lands_in_memory else PACES.get((c.isa.vector_bytes, c.lanes))
    if pace is None:
        return 0 if q_len <= NARROW_QUERIES else math.inf
    of_registers, row_starts, starts = pace
    registers = -(-max(q_len, 1) // c.lanes)
    if q_len > MOST_QUERIES:
        return math.inf
    rows = of_registers[registers - 1]
    # The least n of which q_len (row_starts + n) <= starts + rows (half a tile + n).
    behind = q_len * row_starts - starts - rows * (c.rows // 2)
    if rows <= q_len:
        return 0 if rows == q_len and behind <= 0 else math.inf
    return max(0, -(-behind // (rows - q_len)))


def stacks(c: Config, heads: int) -> bool:
    """Whether so many heads of one query, alike and on one key/value head, are faster as rows of forward.py."""
    return c.isa.vector_bytes == 64 and heads >= STACKED_HEADS.get(c.product.name, math.inf)


def asks(c: Config, spec: AttentionSpec, plan: Plan) -> bool:
    """Whether memory is asked for the next block of keys: not where a mask may skip it, nor for matrix registers, where
    nobody has measured it."""
    panels, keys = plan.tile_q // c.panel, spec.kv_len * (spec.head_size + spec.value_size) * spec.element_bytes
    soon = plan.query_tiles == 1 and panels <= ASKING_PANELS
    return soon and keys >= ASKING_BYTES and not (c.masked or c.lands_in_memory)
