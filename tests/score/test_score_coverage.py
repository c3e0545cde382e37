"""Coverage against the dense mask: EMPTY and FULL are certain, runs are well formed, known cases are exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import as_mask, trees

from flashtile.score import (
    EMPTY,
    FULL,
    PARTIAL,
    Program,
    causal,
    coverage,
    dense,
    document,
    padding,
    prefix,
    varlen,
    window,
)
from flashtile.score.mask import as_mask as to_mask


def dense_mask(program: Program) -> np.ndarray:
    axes = np.ix_(*(np.arange(n) for n in program.shape))
    return np.broadcast_to(program.visible(*axes), program.shape)


def kinds_by_force(program: Program, tile_q: int, tile_k: int) -> np.ndarray:
    """The exact map, tile by tile, from the dense mask."""
    mask = dense_mask(program)
    b, h, s_q, s_kv = mask.shape
    kinds = np.empty((b, h, -(-s_q // tile_q), -(-s_kv // tile_k)), np.uint8)
    for q, k in np.ndindex(*kinds.shape[2:]):
        tile = mask[:, :, q * tile_q : (q + 1) * tile_q, k * tile_k : (k + 1) * tile_k]
        kinds[:, :, q, k] = np.where(tile.all((2, 3)), FULL, np.where(tile.any((2, 3)), PARTIAL, EMPTY))
    return kinds


def check(program: Program, tile_q: int, tile_k: int, *, exact: bool = False) -> None:
    found, force = coverage(program, tile_q, tile_k), kinds_by_force(program, tile_q, tile_k)
    kinds = np.broadcast_to(found.tiles(), force.shape)
    agree = kinds == force
    assert (agree if exact else agree | (kinds == PARTIAL)).all()
    check_runs(found, program.shape[3])


def check_runs(found, s_kv: int) -> None:
    """Ascending, apart or of another kind, inside the keys; and they say what the map says."""
    batches, heads, rows, columns = found.shape
    assert found.indptr[0] == 0 and found.indptr[-1] == len(found.start) == len(found.stop) == len(found.kind)
    kinds = found.tiles()
    count = {EMPTY: 0, PARTIAL: 0, FULL: 0}
    for b, h, q in np.ndindex(batches, heads, rows):
        line, before, last = np.zeros(columns, np.uint8), 0, EMPTY
        for start, stop, kind in found.runs(b, h, q):
            assert before <= start < stop <= s_kv and start % found.tile_k == 0
            assert stop % found.tile_k == 0 or stop == s_kv
            assert kind in (PARTIAL, FULL) and not (start == before and kind == last)
            line[start // found.tile_k : -(-stop // found.tile_k)] = kind
            before, last = stop, kind
        np.testing.assert_array_equal(line, kinds[b, h, q])
        for kind in count:
            count[kind] += int((line == kind).sum())
    assert found.count() == count


SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70))
TILES = st.tuples(st.sampled_from([1, 3, 8, 16]), st.sampled_from([1, 4, 7, 32]))


@given(trees("b", scores=False, approximate=True, depth=4), SHAPES, TILES)
def test_random_programs(tree, shape, tiles):
    check(Program.of(shape, mask=as_mask(tree)), *tiles)


def captured_masks(rng: np.random.Generator, shape) -> list:
    b, h, s_q, s_kv = shape
    ids = np.sort(rng.integers(0, 6, (b, max(s_q, s_kv))), 1)
    table = rng.normal(size=max(s_q, s_kv)).astype(rng.choice([np.float16, np.float32, np.float64]))
    table[rng.integers(0, len(table))] = rng.choice([np.nan, np.inf, 0.0])
    starts = np.searchsorted(ids[0], np.arange(6)).clip(max=len(ids[0]) - 1)
    return [
        document(ids),
        document(ids[0]),
        document(ids[:, :s_q], ids[:, :s_kv]),
        padding(rng.integers(0, s_kv + 1, b)),
        dense(rng.random((b, 1, s_q, s_kv)) < 0.9),
        dense(rng.random((1, h, 1, s_kv)) < 0.5),
        prefix(int(s_kv // 2)),
        dense(rng.random((s_q, s_kv))[::-1] < rng.choice([0, 1, 0.97])),
        prefix(rng.integers(0, s_kv + 1, b)),
        lambda b, h, i, j: table[i] < table[j],
        lambda b, h, i, j: table[(i + j) // 2] + 1 != table[i],
        lambda b, h, i, j: j - starts[ids[0, j]] <= i - starts[ids[0, i]],
        lambda b, h, i, j: (ids[b, j] == 2) | (ids[b][i] > 4),
        lambda b, h, i, j: (i * 0.1 < j * 0.1) & (h != 1),
    ]


@pytest.mark.parametrize("which", range(14))
@given(SHAPES, TILES, st.integers(0, 1000), st.booleans(), st.booleans())
def test_captured_arrays_and_compositions(which, shape, tiles, seed, inverted, with_causal):
    rng = np.random.default_rng(seed)
    mask = captured_masks(rng, shape)[which]
    mask = ~to_mask(mask) if inverted else mask
    check(Program.of(shape, mask=mask, causal=with_causal, offset=shape[3] - shape[2]), *tiles)


@pytest.mark.parametrize("left, right", [(5, 0), (0, 0), (None, 3), (7, None), (-1, 0), (2, 9)])
@given(SHAPES, TILES, st.integers(-20, 20))
def test_windows_are_exact_on_one_side_at_least(left, right, shape, tiles, offset):
    check(Program.of(shape, window=(left, right), offset=offset), *tiles, exact=left in (None, -1) or right is None)


@given(SHAPES, TILES, st.integers(-80, 80))
def test_causal_is_exact(shape, tiles, offset):
    check(Program.of(shape, causal=True, offset=offset), *tiles, exact=True)


LENGTHS = st.lists(st.tuples(*[st.integers(0, 30)] * 2), min_size=1, max_size=6)
DISTANCE = st.none() | st.integers(-1, 12)


@given(LENGTHS, TILES, st.booleans(), st.tuples(DISTANCE, DISTANCE), st.integers(-9, 9), st.data())
def test_packed_sequences_are_exact(lengths, tiles, is_causal, sides, number, data):
    """Whatever tiles cut and gaps lie between; and the mask is that of each sequence on its own."""
    rows, keys = (np.cumsum([0, *column]) for column in zip(*lengths, strict=True))
    each = data.draw(st.sampled_from(["bottom_right", "top_left", number, np.arange(len(lengths)) - number]))
    shape = (1, 1, int(rows[-1]), int(keys[-1]))
    program = Program.of(shape, mask=varlen(rows, keys, causal=is_causal, window=sides, align=each))
    seen = np.zeros(shape, bool)
    for n, (s_q, s_kv) in enumerate(lengths):
        offset = (
            {"bottom_right": s_kv - s_q, "top_left": 0}[each]
            if isinstance(each, str)
            else np.ravel(each)[n % np.size(each)]
        )
        alone = Program.of((1, 1, s_q, s_kv), causal=is_causal, window=sides, offset=int(offset))
        seen[:, :, rows[n] : rows[n + 1], keys[n] : keys[n + 1]] = dense_mask(alone)
    np.testing.assert_array_equal(dense_mask(program), seen)
    check(program, *tiles, exact=True)


def tiles_of(shape=(1, 1, 8, 8), tile=2, **options) -> list[str]:
    """The 4 x 4 map of an 8 x 8 mask as text: . EMPTY, / PARTIAL, # FULL."""
    return ["".join("./#"[k] for k in row) for row in coverage(Program.of(shape, **options), tile, tile).tiles()[0, 0]]


def test_maps_of_4_by_4_tiles():
    assert tiles_of() == ["####"] * 4
    assert tiles_of(causal=True) == ["/...", "#/..", "##/.", "###/"]
    assert tiles_of(causal=True, offset=1) == ["#/..", "##/.", "###/", "####"]
    assert tiles_of(causal=True, offset=-2) == ["....", "/...", "#/..", "##/."]
    assert tiles_of(window=(0, 0)) == ["/...", "./..", "../.", ".../"]
    assert tiles_of(window=(2, 1)) == ["#/..", "/#/.", "./#/", "../#"]
    assert tiles_of(mask=document(np.array([0, 0, 0, 0, 1, 1, 1, 1]))) == ["##..", "##..", "..##", "..##"]
    assert tiles_of(mask=document(np.array([0, 0, 0, 1, 1, 1, 1, 1]))) == ["#/..", "////", "./##", "./##"]
    assert tiles_of(mask=causal() & document(np.array([0, 0, 0, 0, 1, 1, 1, 1]))) == ["/...", "#/..", "../.", "..#/"]
    assert tiles_of(mask=causal() | prefix(4)) == ["##..", "##..", "##/.", "###/"]
    assert tiles_of(mask=~causal()) == ["/###", "./##", "../#", ".../"]
    assert tiles_of(mask=padding([5])) == ["##/."] * 4
    assert tiles_of(mask=lambda b, h, i, j: i // 2 == j // 2) == ["#...", ".#..", "..#.", "...#"]
    assert tiles_of(mask=lambda b, h, i, j: (i < 4) & (j >= 2)) == [".###", ".###", "....", "...."]
    assert tiles_of(mask=np.tri(8, dtype=bool)) == ["////"] * 4  # an S x S array is not looked through
    assert tiles_of(mask=np.tri(8, dtype=bool), causal=True) == ["/...", "//..", "///.", "////"]
    assert tiles_of(mask=np.arange(8) < 5) == ["##/."] * 4
    assert tiles_of(mask=window(None, 1) & ~window(0, None)) == ["/...", "#/..", "##/.", "###/"]


def test_score_mods_that_hide_by_minus_inf_are_covered_as_masks():
    hide = lambda s, b, h, i, j: np.where(j <= i, s * 2, -np.inf)  # noqa: E731
    assert tiles_of(score_mod=hide) == ["/...", "#/..", "##/.", "###/"]


def test_runs_of_a_row():
    found = coverage(Program.of((1, 1, 8, 7), causal=True), 2, 2)
    assert [found.runs(0, 0, q) for q in range(4)] == [
        [(0, 2, PARTIAL)],
        [(0, 2, FULL), (2, 4, PARTIAL)],
        [(0, 4, FULL), (4, 6, PARTIAL)],
        [(0, 7, FULL)],
    ]


def test_batches_and_heads_that_the_mask_does_not_mention_are_shared():
    assert coverage(Program.of((4, 8, 64, 64), causal=True), 8, 8).shape == (1, 1, 8, 8)
    assert coverage(Program.of((4, 8, 64, 64), mask=padding(np.arange(4) * 9)), 8, 8).shape == (4, 1, 8, 8)
    shared = coverage(Program.of((4, 8, 64, 64), mask=lambda b, h, i, j: i < h * 8), 8, 8)
    assert shared.shape == (1, 8, 8, 8)
    assert shared.runs(3, 2, 1) == [(0, 64, FULL)] and shared.runs(3, 2, 2) == []


@pytest.mark.parametrize("shape", [(1, 1, 0, 8), (1, 1, 8, 0), (0, 1, 8, 8)])
def test_empty_sizes(shape):
    found = coverage(Program.of(shape, causal=True), 4, 4)
    assert len(found.start) == 0 and found.count() == {EMPTY: 0, PARTIAL: 0, FULL: 0}
    assert len(found.indptr) == np.prod(found.shape[:3]) + 1


def test_a_long_sequence_takes_few_evaluations(monkeypatch):
    """S = 65,536: 175,104 tiles, of which coarse to fine looks at a few per cent."""
    from flashtile.score.bounds import Bounds

    looked_at = []
    run = Bounds.run
    monkeypatch.setattr(
        Bounds, "run", lambda self, roots: looked_at.append(self.variables["i"].lo.size) or run(self, roots)
    )
    program = Program.of((1, 1, 65536, 65536), causal=True, mask=document(np.repeat(np.arange(64), 1024)))
    looked_at.clear()
    found = coverage(program, 192, 128)
    assert sum(found.count().values()) == 342 * 512
    assert sum(looked_at) < 342 * 512 // 10
