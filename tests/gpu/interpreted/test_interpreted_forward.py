"""The flash kernel under Triton's interpreter, by the accuracy rule: every option, dtype and way to cut the work."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from inputs import Shape, placed, same_bits, uniform
from launching import SMALL, attend, check, problem

import flashtile
from flashtile.dtypes import DTYPES
from flashtile.errors import SpecError
from flashtile.kernels.triton import forward as forward_module
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.host import LONGEST, Forward
from flashtile.kernels.triton.interpreter import Interpreter
from flashtile.kernels.triton.specialisation import Tile
from flashtile.plan import Plan
from flashtile.score import document, padding, prefix
from flashtile.score.coverage import FULL, PARTIAL, coverage

SHAPE = Shape(2, 2, 1, 21, 40, 20, 24)
RNG = np.random.default_rng(0)
BIAS = RNG.normal(size=(2, 21, 40)).astype(np.float16)
HIDING = np.where(RNG.random((2, 1, 21, 40)) < 0.3, -np.inf, 0.0).astype(np.float32)
SLOPES = np.array([0.5, 0.125], np.float32)
SINKS = np.array([0.5, -np.inf], np.float32)
IDS, KEY_IDS = RNG.integers(0, 3, (2, 21)), np.sort(RNG.integers(0, 3, (2, 40)))
LENGTHS, LIMIT = np.array([7, 35]), 0

OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True, "align": 5},
    "bottom right": {"causal": True, "align": "bottom_right"},
    "window, an offset a batch": {"window": (9, 4), "align": np.array([12, -30])},
    "window open to the left": {"window": (None, 3), "align": 20},
    "negative scale": {"scale": -0.7, "causal": True, "align": 3},
    "scale zero": {"scale": 0.0, "window": (20, 0), "align": 0},
    "softcap": {"softcap": 0.5, "causal": True, "align": 0},
    "sinks": {"sinks": SINKS},
    "far sinks": {"sinks": np.array([75.0, 95.0], np.float32)},
    "sinks that are no numbers": {"sinks": np.array([[np.nan, np.inf], [-np.inf, 0.5]], np.float32)},
    "slopes that are no numbers": {"alibi_slopes": np.array([[np.nan, np.inf], [-np.inf, 0.5]]), "align": 30},
    "sinks of each batch": {"sinks": np.stack([SINKS, -SINKS[::-1]]), "causal": True, "align": -10},
    "bias": {"bias": BIAS, "causal": True, "align": 19},
    "bias that hides": {"bias": HIDING},
    "alibi": {"alibi_slopes": SLOPES, "align": 19},
    "boolean mask": {"mask": RNG.random((21, 40)) < 0.4},
    "documents": {"mask": document(IDS, KEY_IDS)},
    "padding": {"mask": padding(LENGTHS), "causal": True, "align": 19},
    "prefix or causal": {"mask": prefix(30) & (lambda b, h, i, j: (i + j) % 3 != 0)},
    "mask of a head": {"mask": lambda b, h, i, j: (h % 2 == 0) | (j > 2 * i)},
    "mask of scalars": {"mask": lambda b, h, i, j: (b * 0.5 == h) & (j <= i + 3) | (h > LIMIT)},
    "score function": {"score_mod": lambda s, b, h, i, j: s * (1 + 0.01 * (i // (j + 1))) - 0.1 * np.abs(h - b)},
    "score function of no score": {"score_mod": lambda s, b, h, i, j: j * 0.125},
    "score function that hides": {
        "score_mod": lambda s, b, h, i, j: np.where(j % 5 == 2, -np.inf, s),
        "causal": True,
        "align": 19,
    },
    "all together": {
        "softcap": 2.0,
        "score_mod": lambda s, b, h, i, j: s * 1.5,
        "alibi_slopes": SLOPES,
        "bias": BIAS,
        "mask": padding(LENGTHS),
        "window": (30, 5),
        "align": np.array([0, 20]),
        "sinks": SINKS,
    },
}


def family(*inputs: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The kernel as users reach it."""
    return flashtile.attention(*inputs, kernel="triton", return_lse=True, **options)


def options_and_dtypes() -> list[Any]:
    """Every option in two dtypes, a wide one and a narrow one, each pair in turn; in the others at night."""
    found = []
    for (n, name), storage in itertools.product(enumerate(OPTIONS), DTYPES):
        quick = list(DTYPES).index(storage) % 2 == n % 2
        found.append(pytest.param(name, storage, id=f"{name}-{storage}", marks=() if quick else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("name", "storage"), options_and_dtypes())
def test_options(name: str, storage: str) -> None:
    inputs = uniform(SHAPE, storage)
    check(family(*inputs, **OPTIONS[name]), *inputs, **OPTIONS[name])


WAYS: dict[str, dict[str, Any]] = {
    "wide tiles": {"tile": Tile(16, 64)},
    "tall tiles": {"tile": Tile(64, 16)},
    "in parts": {"parts": 3},
    "packed": {"packed": True, "tile": Tile(64, 16)},
    "packed, in parts": {"packed": True, "parts": 2, "tile": Tile(64, 16)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["window, an offset a batch", "documents", "all together", "sinks"])
def test_ways_to_cut_the_work(name: str, way: str) -> None:
    inputs = uniform(SHAPE, "float32")
    check(attend(*inputs, **WAYS[way], **OPTIONS[name]), *inputs, **OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_in_every_way(dtype: str, name: str, way: str) -> None:
    if name in ("mask of a head", "mask of scalars") and "packed" in way:
        pytest.skip("packed heads see the same keys")
    inputs = uniform(SHAPE, dtype)
    check(attend(*inputs, **WAYS[way], **OPTIONS[name]), *inputs, **OPTIONS[name])


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["dense", "all together"])
def test_precisions_of_the_products(precision: str, name: str) -> None:
    """The interpreter has no tf32 and computes it exactly; the operands of the others are rounded."""
    inputs = uniform(SHAPE, "float32")
    options = {**OPTIONS[name], "precision": precision}
    o, lse = family(*inputs, **options)
    check((o, lse), *inputs, **options)
    if precision != "tf32":
        assert not np.array_equal(o, family(*inputs, **OPTIONS[name])[0])


def test_scale_keeps_the_precision_of_a_double() -> None:
    """What float32 makes of 0.1 is 1.5e-9 away from it, a million times what is allowed."""
    inputs = uniform(SHAPE, "float64", size=4)
    check(family(*inputs, scale=0.1), *inputs, scale=0.1)
    factor = 0.1
    options = {"score_mod": lambda s, b, h, i, j: s * factor + 0.3 * i}
    check(family(*inputs, **options), *inputs, **options)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 40), (16, 16), (17, 5), (64, 64), (65, 130), (256, 256)], ids=str)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_head_sizes(name: str, sizes: tuple[int, int]) -> None:
    inputs = uniform(Shape(1, 2, 1, 9, 37, *sizes), name)
    check(family(*inputs, causal=True, align=20), *inputs, causal=True, align=20)


@pytest.mark.slow
@pytest.mark.parametrize("size", range(1, 257))
def test_every_head_size(size: int) -> None:
    inputs = uniform(Shape(1, 1, 1, 3, 20, size, 257 - size), "float32")
    check(family(*inputs), *inputs)


@pytest.mark.parametrize("name", ["causal", "documents", "all together", "bias that hides"])
def test_continues_a_state(name: str) -> None:
    """Keys in three stretches: a state carried from one to the next, then finished with the sinks and cast.

    The first stretch starts from the empty state.
    """
    inputs = uniform(SHAPE, "float16")
    p, device, memory = problem(*inputs, **OPTIONS[name]), Interpreter(), special.Memory(aligned=False)
    spec, (o, lse) = p.spec, p.arrays[3:]
    state = np.zeros((*p.arrays[3].shape,), np.float32), np.full(lse.shape, -np.inf, np.float32)
    steps = {"o_split": 0, "lse_split": 0}
    carried = {**places(device, *state), **steps}
    plan = Plan(spec.batch, spec.heads, 2, 4, 16, 16, 0, split_keys=16)
    call = Forward(spec, plan, p.layout, SMALL, device).pack(*p.addresses, p.scoring)  # which holds its workspace
    launches = call.stages[0]
    for part in range(plan.splits):
        for bound, contain in zip(launches.kernels, (False, True), strict=True):
            kernel = special.forward(spec, SMALL, state=special.CARRIED, contain=contain, memory=memory)
            for item in range(part, plan.items, plan.splits):
                values = {**bound.fixed, **launches.values, **carried, "first": item, "items": 1}
                device.launch(kernel, 1, values)
    sinks = p.scoring.sinks
    finish = {
        "parts_o": carried["o"],
        "parts_lse": carried["lse"],
        **places(device, o, lse),
        **steps,
        "first": 0,
        "heads": spec.heads,
        "q_len": spec.q_len,
        "value_size": spec.value_size,
        "query_tiles": 2,
        "splits": 1,
        "sinks": None if sinks is None else device.place(sinks, "fp32").pointer,
    }
    device.launch(special.merge(spec, SMALL, memory=memory), 2 * spec.batch * spec.heads, finish)
    check((o, lse), *inputs, **OPTIONS[name])


def places(device: Interpreter, o: np.ndarray, lse: np.ndarray) -> dict[str, Any]:
    """o and its strides, and lse, as arguments."""
    out = device.place(o, special.ELEMENTS[str(o.dtype)])
    strides = dict(zip(("o_b", "o_h", "o_s", "o_d"), out.strides, strict=True))
    return {"o": out.pointer, "lse": device.place(lse, special.ELEMENTS[str(lse.dtype)]).pointer, **strides}


@pytest.mark.parametrize("name", ["dense", "causal", "documents"])
def test_ranges_of_work_items_give_the_same_bits(name: str) -> None:
    inputs = uniform(SHAPE, "float32")
    p = problem(*inputs, **OPTIONS[name])
    plan = Plan(p.spec.batch, p.spec.heads, 2, 1, 16, 16, 0)
    kernel = Forward(p.spec, plan, p.layout, SMALL, Interpreter())
    call = kernel.pack(*p.addresses, p.scoring)
    for begin, end in ((5, plan.items), (0, 2), (2, 2), (2, 5)):
        kernel.run(call, begin, end, 0)
    whole = attend(*inputs, **OPTIONS[name])
    assert same_bits(p.arrays[3], whole[0]) and same_bits(p.arrays[4], whole[1])


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_of_keys_that_no_row_sees(parts: int) -> None:
    inputs = uniform(Shape(1, 2, 2, 20, 100, 16, 16), "float64")
    options = {"window": (5, 5), "align": 40}
    check(attend(*inputs, parts=parts, **options), *inputs, **options)


# -- which tiles are looked at ----------------------------------------------------------------------


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Key tiles that the kernel computes, by kind."""
    count = {FULL: 0, PARTIAL: 0}
    tile = forward_module._key_tile
    position = tile.arg_names.index("FULL")

    def counting(*arguments: Any) -> Any:
        count[FULL if arguments[position] else PARTIAL] += 1
        return tile(*arguments)

    monkeypatch.setattr(forward_module, "_key_tile", counting)
    return count


@pytest.mark.parametrize(
    ("options", "full", "partial"),
    [
        ({}, 16, 0),
        ({"causal": True, "align": 0}, 6, 4),
        ({"causal": True, "align": -64}, 0, 0),
        ({"window": (16, 16), "align": 0}, 4, 6),
        ({"window": (47, -1), "align": 0}, 15, 1),
    ],
    ids=str,
)
def test_band_tiles(visited: dict[int, int], options: dict[str, Any], full: int, partial: int) -> None:
    """64 rows and keys in tiles of 16: those that nobody sees are not touched, those that all see run no mask code."""
    attend(*uniform(Shape(1, 1, 1, 64, 64, 16, 16), "float32"), **options)
    assert visited == {FULL: full, PARTIAL: partial}


@pytest.mark.parametrize("name", ["documents", "padding", "prefix or causal", "mask of a head", "boolean mask"])
def test_mask_tiles_are_those_of_the_coverage(visited: dict[int, int], name: str) -> None:
    """The last key tile is ragged, so where the coverage has it FULL the kernel has it PARTIAL."""
    inputs = uniform(SHAPE, "float32")
    p = problem(*inputs, **OPTIONS[name])
    assert p.scoring.program is not None
    tiles = coverage(p.scoring.program, 16, 16).tiles()
    alike = (2 // tiles.shape[0]) * (2 // tiles.shape[1])
    attend(*inputs, **OPTIONS[name])
    ragged = int((tiles[..., -1] == FULL).sum())
    assert visited[FULL] == alike * (int((tiles == FULL).sum()) - ragged)
    assert visited[PARTIAL] == alike * (int((tiles == PARTIAL).sum()) + ragged)


# -- what hidden keys hold, and odd places ------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "where"),
    [("causal", "k"), ("causal", "v"), ("documents", "k"), ("documents", "v"), ("bias that hides", "v")],
)
def test_hidden_keys_change_no_bit(name: str, where: str, poison: float) -> None:
    """Rows that do not see the poisoned keys keep their bits; the others are what the reference says.

    A bias of -inf hides too, but what it is added to may be NaN: there only the values may be poisoned.
    """
    q, k, v = inputs = uniform(SHAPE, "bfloat16")
    clean = attend(*inputs, **OPTIONS[name])
    keys = [20, 33]
    (k if where == "k" else v)[:, :, keys] = poison
    got = attend(*inputs, **OPTIONS[name])
    check(got, *inputs, **OPTIONS[name])
    scoring = problem(*inputs, **OPTIONS[name]).scoring
    b, h, i, j = np.ix_(*map(np.arange, q.shape[:3]), keys)
    if scoring.program is not None:
        seen = ~np.isneginf(scoring.program.evaluate(np.float32(0), b, h, i, j))
    else:
        seen = np.broadcast_to(j <= i + 5, (*q.shape[:3], 2))
    untouched = ~seen.any(axis=3)
    assert untouched.any() and not untouched.all()
    assert same_bits(got[0][untouched], clean[0][untouched]) and same_bits(got[1][untouched], clean[1][untouched])


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_one_visible_nan(dtype: str, where: str) -> None:
    _check_poisoned(dtype, where, np.nan)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("poison", [np.inf, -np.inf])
def test_one_visible_infinity(where: str, poison: float) -> None:
    _check_poisoned("float32", where, poison)


def _check_poisoned(dtype: str, where: str, poison: float) -> None:
    inputs = uniform(SHAPE, dtype)
    inputs["qkv".index(where)][0, 0, 14, 3] = poison
    check(attend(*inputs, parts=2, **OPTIONS["causal"]), *inputs, **OPTIONS["causal"])


@pytest.mark.parametrize("shape", [Shape(2, 2, 1, 5, 0, 4, 6), Shape(batch=0), Shape(q_len=0)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True, "align": 0}, {"sinks": np.zeros(2, np.float32)}], ids=str)
def test_empty_axes(shape: Shape, options: dict[str, Any]) -> None:
    if "sinks" in options:
        options = {"sinks": options["sinks"][: shape.heads]}
    inputs = uniform(shape, "float32")
    check(family(*inputs, **options), *inputs, **options)


@pytest.mark.parametrize(
    "place",
    [
        {"order": (0, 2, 1, 3), "steps": (1, 1, 1, 1), "shift": 0},
        {"order": (3, 2, 1, 0), "steps": (1, -2, 1, -1), "shift": 0},
        {"order": (0, 1, 2, 3), "steps": (1, 1, 1, 1), "shift": 1},
        {"order": (0, 1, 2, 3), "steps": (1, 1, 1, 1), "shift": 0, "constant": (2,)},
    ],
    ids=str,
)
def test_any_layout(dtype: str, place: dict[str, Any]) -> None:
    q, k, v = (placed(x, **place) for x in uniform(SHAPE, dtype))
    out = placed(np.zeros((*q.shape[:3], v.shape[3]), q.dtype), **{**place, "constant": ()})
    got = flashtile.attention(q, k, v, kernel="triton", return_lse=True, out=out)
    assert got[0] is out
    check(got, q, k, v)


def test_captured_arrays_of_any_layout() -> None:
    inputs = uniform(SHAPE, "float32")
    bias = np.broadcast_to(BIAS[0, ::-1, ::-1], (2, 2, 21, 40))
    check(family(*inputs, bias=bias), *inputs, bias=bias)
    tensor = torch.linspace(-1, 1, 40, dtype=torch.bfloat16)
    score_mod = lambda s, b, h, i, j: s + tensor[j]  # noqa: E731
    check(family(*inputs, score_mod=score_mod), *inputs, score_mod=score_mod)


# -- bad input ----------------------------------------------------------------------------------------


def test_strides_of_part_of_an_element_are_refused() -> None:
    records = np.zeros((1, 1, 4, 8), np.dtype([("x", np.float32), ("y", np.uint8)]))
    q = records["x"]
    with pytest.raises(SpecError, match=r"^q: got strides of .* bytes, expected multiples of 4 bytes"):
        flashtile.attention(q, q.copy(), q.copy(), kernel="triton")


def test_lengths_beyond_int32_are_refused() -> None:
    row = np.zeros((1, 1, 1, 8), np.float16)
    far = np.broadcast_to(row, (1, 1, LONGEST + 1, 8))
    with pytest.raises(SpecError, match=f"^k: got length {LONGEST + 1}, expected at most {LONGEST} on a GPU"):
        flashtile.attention(row, far, far, kernel="triton")


def test_the_kernel_says_what_it_does() -> None:
    text = str(flashtile.explain(*uniform(SHAPE, "float32"), kernel="triton"))
    assert "triton" in text and "interpreter" in text
