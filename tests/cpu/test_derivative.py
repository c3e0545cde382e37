"""The program pass of the backward: weights, gradients of scores and of captured arrays, against their definition."""

from __future__ import annotations

import numpy as np
import panels
import pytest

from flashtile.kernels.cpu.array_sums import COPIES_BYTES, ArrayPlan, Items
from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.readings import readings
from flashtile.llvm import machines as isas
from flashtile.score import Program
from flashtile.score.affine import affine

B, H, S, T = 2, 3, 50, 37
SCALE = 0.7
rng = np.random.default_rng(0)
BIAS, SLOPES = rng.standard_normal((1, H, S, T)), rng.random(H) + 0.1
TABLE, BACK = rng.standard_normal((H, S + T)), rng.standard_normal((S + T, 3))
TURNED = rng.standard_normal((H, T, S))
ROWS, KEYS, FEW = rng.standard_normal(S), rng.standard_normal((H, 1, T)), rng.standard_normal(7)

# How the indices of a load move: name -> (score, the ways that its readings go).
SCORES = {
    "dense": (lambda s, b, h, i, j: s * BIAS[0, h, i, j], {"tiles"}),
    "dense, by keys": (lambda s, b, h, i, j: s * TURNED[h, j, i], {"lanes"}),
    "turned": (lambda s, b, h, i, j: s + BIAS[0, h, i, j] * BIAS[0, h, j, i % T], {"tiles", "gather"}),
    "diagonal": (lambda s, b, h, i, j: s * (1 + TABLE[h, i - j + T - 1]), {"lanes"}),
    "other diagonal": (lambda s, b, h, i, j: s + BACK[j - i + S - 1, h % 3], {"lanes"}),
    "row": (lambda s, b, h, i, j: s + ROWS[i] * np.tanh(s), {"column"}),
    "key": (lambda s, b, h, i, j: s * KEYS[h, 0, j], {"row"}),
    "head": (lambda s, b, h, i, j: s - SLOPES[h] * abs(i - j), {"total"}),
    "number": (lambda s, b, h, i, j: s * FEW[3], {"total"}),
    "anywhere": (lambda s, b, h, i, j: s + FEW[(i * j) % 7], {"gather"}),
    "outside": (
        lambda s, b, h, i, j: (
            s + np.where(i < 9, FEW[np.minimum(i, 6)], 0) + np.where((i >= j - 3) & (i < j + 4), FEW[i - j + 3] * s, 0)
        ),
        {"gather", "lanes"},
    ),
    "saturated": (lambda s, b, h, i, j: np.minimum(s, 0.5) * TABLE[h, i] + np.where(s > 1, np.log(s), s), {"column"}),
}
ISAS = [name for name in isas.usable() if not name.endswith("emulated")]


def program_of(score, **options):
    return Program.of((B, H, S, T), score_mod=score, mask=lambda b, h, i, j: (i + j) % 5 != h, **options)


def defined(program, raw, dp, lse, delta, b, h, first):
    """P, dS before the program, and what each load gives: (gradient, where, numbers), as kernels/backward.py has it."""
    at = b, h, np.arange(first, first + len(raw))[:, None], np.arange(T)[None, :]
    s = program.evaluate(raw, *at)
    seen = ~np.isneginf(s)
    p = np.where(seen, np.exp(s - lse[:, None]), 0)
    ds = np.where(seen, p * (dp - delta[:, None]), 0)
    slopes = program.run([program.score_derivative], raw, *at)[0]
    given = []
    for gradient in program.array_gradients:
        value, *index = program.run([gradient.value, *gradient.index], raw, *at)
        shape = program.capture(gradient.slot).array.shape
        where = tuple(np.broadcast_to(np.clip(x, 0, n - 1), ds.shape) for x, n in zip(index, shape, strict=True))
        given.append((gradient.slot.number, where, np.where(seen & (value != 0), ds * value, 0)))
    return p, np.where(seen & (slopes != 0), ds * slopes, 0), given


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("storage", ["float", "double"])
@pytest.mark.parametrize("name", SCORES)
@np.errstate(all="ignore")
def test_weights_and_gradients_are_those_of_the_definition(name, storage, isa):
    score, ways = SCORES[name]
    program = program_of(score, softcap=3.0)
    wanted = {g.slot.number for g in program.array_gradients}
    panel = panels.Panel(program, isas.known()[isa], storage, wanted, Items(B, H, 1))
    assert {x.how for x in panel.reads} == ways
    sums = {n: np.zeros(program.captures[n].array.shape) for n in wanted}
    near = {"rtol": 0, "atol": np.sqrt(np.finfo(panel.real).eps)}  # the accuracy rule judges whole calls
    for b, h in np.ndindex(B, H):
        for first in range(0, S, panel.c.panel):
            lanes = min(panel.c.panel, S - first)
            raw, dp = 2 * rng.standard_normal((2, lanes, T)).astype(panel.real)
            lse, delta = rng.standard_normal((2, lanes)).astype(panel.real)
            p, ds, given = defined(program, SCALE * raw.astype(float), dp, lse, delta, b, h, first)
            got = panel(raw, dp, lse, delta, b=b, h=h, row=first, block=0, scale=SCALE, item=b * H + h)
            for x, y in zip(got, (p, ds), strict=True):
                np.testing.assert_allclose(x / np.abs(y).max(), y / np.abs(y).max(), **near)
            for n, where, numbers in given:
                np.add.at(sums[n], where, numbers if where else numbers.sum())
    for n, total in panel.sums.totals().items():
        np.testing.assert_allclose(total / np.abs(sums[n]).max(), sums[n] / np.abs(sums[n]).max(), **near)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_hidden_gives_nothing_whatever_it_holds(isa):
    """Hidden scores and gradients of weights that are NaN, and an infinite branch that is not taken."""
    score = lambda s, b, h, i, j: np.where(s > 0, np.log(s) * TABLE[h, i - j + T], s) + KEYS[h, 0, j]  # noqa: E731
    program = program_of(score)
    wanted = {g.slot.number for g in program.array_gradients}
    rows = np.arange(S - 6, S)  # a panel that is not full is the last one
    seen = program.visible(0, 1, rows[:, None], np.arange(T)[None, :])
    results = []
    for poison in (0.0, np.nan, np.inf):
        panel = panels.Panel(program, isas.known()[isa], "float", wanted, Items(B, H, 1))
        r = np.random.default_rng(1)
        raw, dp = (np.where(seen, x, np.float32(poison)) for x in r.standard_normal((2, 6, T)).astype(np.float32))
        lse, delta = r.standard_normal((2, 6)).astype(np.float32)
        results.append(
            [*panel(raw, dp, lse, delta, b=0, h=1, row=rows[0], block=0, scale=1.0), *panel.sums.totals().values()]
        )
    for clean, *others in zip(*results, strict=True):
        assert np.isfinite(clean).all()
        for other in others:
            np.testing.assert_array_equal(clean.view(np.uint32), other.view(np.uint32))


def plan_of(score, items, shape=(B, H, S, T), mask=None):
    program = Program.of(shape, score_mod=score, mask=mask)
    wanted = {g.slot.number for g in program.array_gradients}
    c = Config(isas.current(), "float", code=program.code)
    return ArrayPlan(readings(program.code, wanted), {n: program.captures[n].array.shape for n in wanted}, c, items)


def test_an_array_has_one_accumulator_or_small_copies():
    items = Items(B, H, 1)
    each = plan_of(lambda s, b, h, i, j: s + BIAS[0, h, i, j], Items(1, H, 1))
    assert each.chains.tolist() == [[0], [1], [2]] and each.layouts[0][1] == 1
    copied = plan_of(lambda s, b, h, i, j: s + BIAS[0, h, i, j], items)
    assert copied.chains.shape == (6, 1) and copied.layouts[0][1] == items.count
    large = np.broadcast_to(np.float32(0), (1, H, 1200, 1200))
    assert large.size * 4 * items.count > COPIES_BYTES
    chained = plan_of(lambda s, b, h, i, j: s + large[0, h, i, j], items, (B, H, 1200, 1200))
    assert chained.chains.tolist() == [[0, 3], [1, 4], [2, 5]] and chained.layouts[0][1] == 1
    # Parts of the keys meet where no index is the key, and elsewhere do not.
    assert plan_of(lambda s, b, h, i, j: s + large[0, h, i, j], Items(1, H, 4), (1, H, 1200, 1200)).chains.shape == (
        12,
        1,
    )
    # They meet in the last element of an array that is shorter than the keys: what is hidden past it adds 0 there. So
    # do heads.
    short, few = np.zeros(1100, np.float32), np.zeros(2, np.float32)
    keys, heads = (lambda s, b, h, i, j: s + short[j]), (lambda s, b, h, i, j: s + few[h])
    shown = plan_of(keys, Items(1, 1, 4), (1, 1, 1200, 1200), mask=lambda b, h, i, j: j < 1100)
    assert shown.layouts[0][1] == 4 and plan_of(keys, Items(1, 1, 4), (1, 1, 1200, 1100)).layouts[0][1] == 1
    assert plan_of(heads, Items(1, H, 1), mask=lambda b, h, i, j: h < 2).layouts[0][1] == H
    assert plan_of(heads, Items(1, 2, 1), (1, 2, S, T)).layouts[0][1] == 1
    skew = np.broadcast_to(np.float32(0), (1200, 2400))
    assert plan_of(lambda s, b, h, i, j: s + skew[i, j + h], Items(1, 1, 2), (1, 2, 1200, 1200)).chains.shape == (1, 2)


def test_heads_that_share_a_large_array_are_cut_into_parts_of_their_keys():
    from flashtile.calls import Options
    from flashtile.kernels import BackwardLayout
    from flashtile.kernels.cpu.backward import Backward
    from flashtile.score.options import ScoreOptions

    q = np.empty((B, H, 1200, 4), np.float32)
    layout = BackwardLayout(*[q.strides] * 8)
    row, large = np.zeros((1200, 300), np.float32), np.broadcast_to(np.float32(0), (1200, 1200))

    def kernel(bias, score_mod=None):
        scores = ScoreOptions(bias=bias, score_mod=score_mod)
        spec, scoring = Options(False, None, None, None, "ieee", "auto", "auto").scored(scores, q, q, q, None)
        wanted = {g.slot.number for g in scoring.program.array_gradients}
        return Backward(spec, layout, tuple(scoring.shapes(wanted).items())).plan

    assert (kernel(large).items, kernel(large).splits) == (4, 4)  # all heads one after the other, in four parts
    assert kernel(np.broadcast_to(large, (H, 1200, 1200))).items == H * 3
    spread = np.broadcast_to(np.float32(0), (1200, 2400))  # not apart by keys
    assert kernel(None, lambda s, b, h, i, j: s + spread[i, j + h]).items == 1
    assert kernel(row[:, :1]).items == B * H * 2  # small: copies


def test_chains_run_in_order_and_stop_at_the_first_failure():
    large = np.broadcast_to(np.float32(0), (1200, 1200))
    plan = plan_of(lambda s, b, h, i, j: s + large[i, j], Items(B, H, 1), (B, H, 1200, 1200))
    ran = []

    def native(params, begin, end, scratch):
        ran.append((begin, end))
        return int(begin == 3)

    assert plan.run(native)(None, 0, 1, 0) == 1 and ran == [(n, n + 1) for n in range(4)]


def test_an_index_in_affine_form():
    table = np.zeros((200, 3))
    score = lambda s, b, h, i, j: s + table[-(j - i) + 2 * h + 60, h] + table[i * 2 // 2, 0] + table[b + 1, h]  # noqa: E731
    program = Program.of((B, H, S, T), score_mod=score)
    forms = [affine(x) for g in program.array_gradients for x in g.index]
    assert [x and (x.i, x.j) for x in forms] == [(1, -1), (0, 0), None, (0, 0), (0, 0), (0, 0)]
    assert program.run([forms[0].rest], 0.0, 1, 2, 5, 6)[0] == 64
