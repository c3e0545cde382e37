"""Which kernel computes few queries: passes/decode, whose time goes with the rows, or forward.py, whose time goes with
the registers that they fill; and what the latter does for them. `python -m benchmarks.few` measures both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flashtile.llvm.products import PAIRS, TILES, TILES2, TILES3
from flashtile.plan.tiling import ENOUGH_ITEMS, MANY_KEYS

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
# On matrix registers, by the product; nobody has measured these. By the models of docs/adding-an-isa.md a row of
# passes/decode costs 10 to 12 cycles a key. Forward.py makes a key ready, once for all heads that share it, in 30, 190
# and 240 cycles, in one, two and three parts; then 1 or 2 registers of each head cost 7 to 16, 30 to 55, 80 to 140. But
# it is not less than in 14 or 16 rows: the memory is waited for, which passes/decode asks ahead.
TILED_PACES = {
    TILES.name: (3, (1, 1.5)),
    TILES2.name: (17, (3, 5)),
    TILES3.name: (22, (7, 13)),
}
_FROM_MEMORY = 14, 16
# From so many heads with one query each, they are faster as rows of forward.py. By pairs in registers of 64 bytes 1.35
# times at 32 and D = 128, 1.45 at 48, where in fp32 there is a tenth to gain or to lose; the others by the above.
STACKED_HEADS = {PAIRS.name: 32, TILES.name: 15, TILES2.name: 24, TILES3.name: 40}

# So few panels are soon done with a block of keys, and so many bytes of a head's K and V are more than most second
# caches hold: memory is asked for the next block meanwhile.
ASKING_PANELS, ASKING_BYTES = 2, 1 << 20


def decodes_from(c: Config, q_len: int, group: int) -> float:
    """From how many keys on passes/decode is the faster one for so many queries of each head of a group; inf: it never
    is."""
    if c.dropout or q_len > MOST_QUERIES:
        return math.inf
    registers = -(-max(q_len, 1) // c.lanes)
    heads = group if c.shares else 1
    if c.lands_in_memory:
        ready, of_head = TILED_PACES[c.product.name]
        pace = max(_FROM_MEMORY[registers - 1], ready + heads * of_head[registers - 1])
        row_starts, starts = 40, 120 * heads
    elif (c.isa.vector_bytes, c.lanes) in PACES:
        of_registers, row_starts, starts = PACES[c.isa.vector_bytes, c.lanes]
        pace = of_registers[registers - 1]
    else:
        return 0 if q_len <= NARROW_QUERIES else math.inf
    # The least n of which rows (row_starts + n) <= starts + pace (half a tile + n).
    rows = heads * q_len
    behind = rows * row_starts - starts - pace * (c.rows // 2)
    if pace <= rows:
        return 0 if pace == rows and behind <= 0 else math.inf
    return max(0, math.ceil(behind / (pace - rows)))


def stacks(c: Config, heads: int) -> bool:
    """Whether so many heads of one query, alike and on one key/value head, are faster as rows of forward.py."""
    return c.isa.vector_bytes == 64 and heads >= STACKED_HEADS.get(c.product.name, math.inf)


def shares(c: Config, spec: AttentionSpec) -> bool:
    """Whether a work item has all heads that share keys: if they are enough for threads, as there are where keys are
    many, which are attended in parts."""
    items = spec.batch * spec.kv_heads * -(-spec.q_len // c.panel)
    return c.shares and (items >= ENOUGH_ITEMS or spec.kv_len >= MANY_KEYS * spec.q_len)


def asks(c: Config, spec: AttentionSpec, plan: Plan) -> bool:
    """Whether memory is asked for the next block of keys: not where a mask may skip it, nor for matrix registers, where
    nobody has measured it."""
    panels, keys = plan.tile_q // c.panel, spec.kv_len * (spec.head_size + spec.value_size) * spec.element_bytes
    soon = plan.query_tiles == 1 and panels <= ASKING_PANELS
    return soon and keys >= ASKING_BYTES and not (c.masked or c.lands_in_memory)
