"""Gradients: every kernel that has the backward direction against differences, the reference, poison and bad input."""

from __future__ import annotations

import numpy as np
import pytest

import flashtile
from flashtile import calls, gradients, kernels
from flashtile.calls import Options, clear_cache, split_align
from flashtile.score.keep import keep_of
from flashtile.score.options import ScoreOptions
from flashtile.testing import assert_gradients_accurate

B, H, KV, S, T, D, E = 2, 4, 2, 5, 7, 3, 4
rng = np.random.default_rng(3)
BIAS = rng.standard_normal((1, H, 1, T))
SLOPES = rng.random(H) + 0.1
SINKS = rng.standard_normal(H)
TABLE = rng.standard_normal((H, 13))
SEEN = rng.random((B, 1, S, T)) > 0.4
SEEN[0, 0, 2] = False  # a row that sees nothing


KERNELS = "reference", "vanilla"


def table_score(table):
    return lambda s, b, h, i, j: s * (1 + 0.1 * table[h, i - j + 6]) + table[h, j]


OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "align": "top_left"},
    "window": {"window": (2, 1), "align": "bottom_right"},
    "per batch": {"causal": True, "align": np.array([-2, 1])},
    "mask": {"mask": SEEN},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": SLOPES, "align": 1},
    "bias": {"bias": BIAS, "scale": 0.7},
    "sinks": {"sinks": SINKS, "mask": SEEN},
    "sinks per batch": {"sinks": np.stack([SINKS, -SINKS])},
    "one number": {"bias": np.array([[0.3]]), "sinks": SINKS},
    "dropout": {"dropout_p": 0.3, "seed": 7, "causal": True, "align": 1},
    "function": {"score_mod": table_score(TABLE)},
    "together": {
        "softcap": 2.0,
        "score_mod": table_score(TABLE),
        "alibi_slopes": SLOPES,
        "bias": BIAS,
        "sinks": SINKS,
        "mask": SEEN,
        "causal": True,
        "align": "bottom_right",
        "dropout_p": 0.2,
        "seed": 2**64 - 1,
    },
}


def families(*, causal=False, window=None, align=None, scale=None, dropout_p=0.0, seed=None, **scores):
    """Every kernel that has the backward of these options."""
    align, offsets = (None, None) if align is None else split_align(align, (B, H, S, D))
    options = Options(causal, window, align, scale, "ieee", "auto", "auto")
    changes = ScoreOptions(**scores, keep=keep_of(dropout_p, seed))
    spec, _ = options.scored(changes, *inputs("float64")[:3], offsets)
    for name, family in kernels.families():
        if kernels.objection(family, spec, "backward") is None:
            yield name


def inputs(dtype, seed=0):
    r = np.random.default_rng(seed)
    shapes = (B, H, S, D), (B, KV, T, D), (B, KV, T, E), (B, H, S, E), (B, H, S)
    q, k, v, do, dlse = (r.standard_normal(shape) for shape in shapes)
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    return *(x.astype(dtype) for x in (q, k, v, do)), dlse.astype(np.float64 if dtype == "float64" else np.float32)


def asked(options):
    names = [n for n in ("bias", "sinks", "alibi_slopes") if n in options]
    return ("q", "k", "v", *names, *(["captured"] if "score_mod" in options else []))


def run(kernel, q, k, v, do, dlse, options, **more):
    o, lse = flashtile.attention(q, k, v, return_lse=True, kernel="reference", **options)
    return flashtile.attention_backward(
        do, q, k, v, o, lse, dlse=dlse, wrt=asked(options), kernel=kernel, **options, **more
    )


def parts(gradients, options):
    found = {n: getattr(gradients, n) for n in asked(options) if n != "captured"}
    return found | ({"captured": gradients.captured[TABLE]} if "score_mod" in options else {})


@pytest.mark.parametrize("name", OPTIONS)
def test_the_reference_is_the_limit_of_differences(name):
    options = OPTIONS[name]
    q, k, v, do, dlse = inputs("float64")
    got = parts(run("reference", q, k, v, do, dlse, options), options)
    variables = {"q": q, "k": k, "v": v, "captured": TABLE} | options
    for which, gradient in got.items():
        x, direction = variables[which], np.random.default_rng(1).standard_normal(variables[which].shape)

        def loss(step, which=which, x=x, direction=direction):
            moved = x + step * direction
            a = {"q": q, "k": k, "v": v} | options
            a["score_mod" if which == "captured" else which] = table_score(moved) if which == "captured" else moved
            o, lse = flashtile.attention(**a, return_lse=True, kernel="reference")
            return np.sum(do * o) + np.sum(np.where(np.isfinite(lse), dlse * lse, 0))

        step = 1e-5
        difference = (loss(step) - loss(-step)) / (2 * step)
        assert np.sum(gradient * direction) == pytest.approx(difference, rel=1e-7, abs=1e-8), which


@pytest.mark.parametrize("storage", ["float64", "float32", "float16", "bfloat16"])
# Not of one number: the largest error of a single element, in any four orders, may happen to be next to nothing.
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "one number"])
def test_every_kernel_errs_at_most_three_times_as_much_as_the_baseline(name, storage):
    options = OPTIONS[name]
    q, k, v, do, dlse = inputs(storage)
    for kernel in families(**options):
        got = run(kernel, q, k, v, do, dlse, options)
        assert_gradients_accurate(got, do, q, k, v, dlse=dlse, wrt=asked(options), **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_baseline_is_the_reference_up_to_rounding(name):
    # The rule above judges the baseline by itself, so it is held to the reference here: fp64 loses no half of its bits.
    truth, got = (parts(run(kernel, *inputs("float64"), OPTIONS[name]), OPTIONS[name]) for kernel in KERNELS)
    for which, x in got.items():
        np.testing.assert_allclose(x, truth[which], rtol=0, atol=np.sqrt(np.finfo(float).eps), err_msg=which)


@pytest.mark.parametrize("family", list(families(mask=SEEN)))
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_hidden_reaches_no_gradient(family, poison):
    q, k, v, do, dlse = inputs("float32")
    mask, bias = SEEN.copy(), np.broadcast_to(BIAS, (B, H, S, T)).astype(np.float32)
    mask[..., 3] = False
    table = TABLE.astype(np.float32)

    def score(table):
        return lambda s, b, h, i, j: s + table[h, j]

    def gradients(k, v, do, bias, table, q=q):
        options = {"mask": mask, "bias": bias, "sinks": SINKS, "score_mod": score(table)}
        o, lse = flashtile.attention(q, k, v, return_lse=True, kernel="reference", **options)
        g = flashtile.attention_backward(
            do, q, k, v, o, lse, dlse=dlse, wrt=("q", "k", "v", "bias", "sinks", "captured"), kernel=family, **options
        )
        return g.q, g.k, g.v, g.bias, g.sinks, g.captured[table]

    clean = gradients(k, v, do, bias, table)
    k, v, do, bias, table, q = (x.copy() for x in (k, v, do, bias, table, q))
    k[:, :, 3] = v[:, :, 3] = do[0, :, 2] = q[0, :, 2] = table[:, 3] = poison
    bias[..., 3] = poison
    for a, b in zip(clean, gradients(k, v, do, bias, table, q), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("family", list(families()))
def test_a_visible_nan_stays_with_the_rows_that_see_it(family):
    q, k, v, do, dlse = inputs("float64")
    v[0, 0, 5] = np.nan
    g = run(family, q, k, v, do, dlse, {"causal": True, "align": 1})  # row i sees keys up to i + 1
    assert np.isnan(g.q[0, :2, 4]).all() and np.isfinite(g.q[0, :2, :4]).all() and np.isfinite(g.q[0, 2:]).all()
    assert np.isfinite(g.k[1]).all() and np.isfinite(g.v).all() and np.isnan(g.k[0, 0, :6]).all()


@pytest.mark.parametrize("family", list(families()))
def test_out_accumulates_strides_are_free_and_only_what_is_asked_for_comes(family):
    q, k, v, _, _ = inputs("float32")
    do = np.broadcast_to(np.float32(1), (B, H, S, E))
    o, lse = flashtile.attention(q, k, v, return_lse=True)
    one = flashtile.attention_backward(do, q, k, v, o, lse, wrt="k", kernel=family)
    assert one.q is one.v is one.captured is None
    out = flashtile.Gradients(k=np.full_like(k, np.nan))
    assert flashtile.attention_backward(do, q, k, v, o, lse, wrt="k", kernel=family, out=out).k is out.k
    np.testing.assert_array_equal(out.k, one.k)
    flashtile.attention_backward(do, q, k, v, o, lse, wrt="k", kernel=family, out=out, accumulate=True)
    np.testing.assert_allclose(out.k, 2 * one.k, rtol=1e-6)


@pytest.mark.parametrize("family", list(families(**OPTIONS["dropout"])))
@pytest.mark.parametrize("storage", ["float64", "float32", "float16"])
def test_the_mask_read_out_of_the_backward_is_that_of_the_forward(family, storage):
    """q = 0, and do an identity: dv is the dropped weights, transposed. With v and do of ones dP shows them as well."""
    rows = keys = 21
    q = np.zeros((B, H, rows, D), storage)
    v, do = np.ones((B, H, keys, rows), storage), np.broadcast_to(np.eye(rows, dtype=storage), (B, H, rows, rows))
    options = {"dropout_p": 0.25, "seed": 99}
    o, lse = flashtile.attention(q, q, v, return_lse=True, **options)
    g = flashtile.attention_backward(do, q, q, v, o, lse, wrt="v", kernel=family, **options)
    mask = flashtile.score.dropout_keep((B, H, rows, keys), **options)
    np.testing.assert_array_equal(g.v.swapaxes(2, 3) != 0, mask)
    np.testing.assert_allclose(g.v.swapaxes(2, 3)[mask] * keys, 4 / 3, rtol=8 * np.finfo(storage).eps)
    # With a bias, dS = P (dP - delta): its sign tells dP's zeros where delta is between 0 and the kept dP.
    bias = np.zeros((B, H, rows, keys), storage)
    one = np.ones_like(o)
    ds = flashtile.attention_backward(one, q, q, v, o, lse, wrt="bias", bias=bias, kernel=family, **options).bias
    told = ~(mask.all(axis=-1) | ~mask.any(axis=-1))
    np.testing.assert_array_equal((ds > 0)[told], mask[told])


def test_dropout_needs_its_seed():
    q, k, v, do, _ = inputs("float32")
    o, lse = flashtile.attention(q, k, v, return_lse=True)
    for change, message in (({"dropout_p": 1.0}, "dropout_p: got 1.0"), ({"dropout_p": 0.5}, "seed: got None")):
        with pytest.raises(flashtile.SpecError, match=message):
            flashtile.attention_backward(do, q, k, v, o, lse, **change)


@pytest.mark.parametrize("place", ["mask", "bias", "sinks", "alibi_slopes", "captured", "align", "q", "do"])
def test_out_may_not_lie_in_what_the_call_reads(place):
    q, k, v, do, _ = inputs("float32")
    room = np.zeros(do.size, np.float32)
    target, number = room[: q.size].reshape(q.shape), room[:T]
    option = {
        "mask": {"mask": room.view(bool)[: S * T].reshape(S, T)},
        "bias": {"bias": room[:T]},
        "sinks": {"sinks": room[:H]},
        "alibi_slopes": {"alibi_slopes": room[:H], "align": 0},
        "captured": {"score_mod": lambda s, b, h, i, j: s + number[j]},
        "align": {"align": room.view(np.int64)[:B], "causal": True},
    }.get(place, {})
    q, do = target if place == "q" else q, room.reshape(do.shape) if place == "do" else do
    o, lse = flashtile.attention(q, k, v, return_lse=True, **option)
    with pytest.raises(flashtile.SpecError, match=r"^out\.q: got an array that shares memory"):
        flashtile.attention_backward(do, q, k, v, o, lse, wrt="q", out=flashtile.Gradients(q=target), **option)


def test_an_array_captured_twice_is_one_sum_and_a_clamped_load_gets_none():
    q, k, v, do, dlse = inputs("float64")
    short = np.linspace(0.1, 0.4, 4)

    def gradient(score):
        o, lse = flashtile.attention(q, k, v, score_mod=score, return_lse=True)
        return flashtile.attention_backward(do, q, k, v, o, lse, wrt="captured", score_mod=score).captured

    twice = gradient(lambda s, b, h, i, j: s + short[h] * j + short[h])
    once = gradient(lambda s, b, h, i, j: s + short[h] * (j + 1))
    np.testing.assert_allclose(twice[short], once[short])
    view = short[:]
    assert view not in twice and len(twice) == 1
    full = np.concatenate([short, [0.4, 0.4, 0.4]])
    guarded = gradient(lambda s, b, h, i, j: s + np.where(j < 4, short[j], 0.4))[short]
    np.testing.assert_allclose(guarded, gradient(lambda s, b, h, i, j: s + full[j])[full][:4])


def test_what_is_read_at_a_fixed_place_belongs_to_the_array():
    q, k, v, do, dlse = inputs("float64")
    table = np.random.default_rng(2).standard_normal((3, H, T))
    layer = 1

    def gradient(score):
        o, lse = flashtile.attention(q, k, v, score_mod=score, return_lse=True)
        captured = flashtile.attention_backward(do, q, k, v, o, lse, wrt="captured", score_mod=score).captured
        assert list(captured)[0] is table and len(captured) == 1
        return captured[table]

    fixed = gradient(lambda s, b, h, i, j: s * table[-1, 0, 2] + table[layer][h, j] + table[0][-2][j] * j)
    turning = gradient(
        lambda s, b, h, i, j: (
            s * table[h * 0 + 2, h * 0, h * 0 + 2] + table[h * 0 + 1, h, j] + table[h * 0, h * 0 + H - 2, j] * j
        )
    )
    assert fixed.any(axis=(1, 2)).all()
    np.testing.assert_allclose(fixed, turning, rtol=1e-12, atol=1e-14)


def test_a_tie_belongs_to_the_first_operand():
    s = np.array([-1.0, 0.0, 2.0])
    for function, slopes in (
        (lambda s, b, h, i, j: np.maximum(s, 0.0 * i), [0, 1, 1]),
        (lambda s, b, h, i, j: np.maximum(0.0 * i, s), [0, 0, 1]),
        (lambda s, b, h, i, j: np.minimum(s, 0.0 * i), [1, 1, 0]),
        (lambda s, b, h, i, j: np.minimum(0.0 * i, s), [1, 0, 0]),
    ):
        program = flashtile.score.Program.of((1, 1, 1, 3), score_mod=function)
        np.testing.assert_array_equal(program.run([program.score_derivative], s, 0, 0, 0, np.arange(3))[0], slopes)


def test_merge_backward_is_the_limit_of_differences():
    r = np.random.default_rng(5)
    pairs = [(r.standard_normal((3, 4)), r.standard_normal(3)) for _ in range(3)]
    pairs[1][1][0] = -np.inf  # a partial whose row saw no key: its o is not read
    pairs[1][0][0] = np.nan
    do, dlse = r.standard_normal((3, 4)), r.standard_normal(3)
    got = flashtile.merge_backward(do, pairs, dlse=dlse)
    assert not got[1][0][0].any() and got[1][1][0] == 0
    for n, which in np.ndindex(3, 2):
        direction = r.standard_normal(pairs[n][which].shape)

        def loss(step, n=n, which=which, direction=direction):
            moved = [list(pair) for pair in pairs]
            moved[n][which] = moved[n][which] + step * direction
            o, lse = flashtile.merge(moved)
            return np.sum(do * o) + np.sum(dlse * lse)

        difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert np.sum(got[n][which] * direction) == pytest.approx(difference, rel=1e-7, abs=1e-8)


def test_merge_backward_of_rows_that_saw_nothing_is_zero_and_bad_shapes_raise():
    nothing = np.zeros((2, 3), np.float32), np.full(2, -np.inf, np.float32)
    do = np.full((2, 3), np.nan, np.float32)
    assert all(not x.any() for pair in flashtile.merge_backward(do, [nothing, nothing]) for x in pair)
    with pytest.raises(flashtile.SpecError, match="do: got shape"):
        flashtile.merge_backward(do[:1], [nothing])
    with pytest.raises(flashtile.SpecError, match="dlse: got dtype"):
        flashtile.merge_backward(do, [nothing], dlse=np.zeros(2))


BAD = {
    "do": ({"do": np.zeros((B, H, S, E + 1), np.float32)}, "do: got shape"),
    "do's dtype": ({"do": np.zeros((B, H, S, E))}, "do: got dtype"),
    "o": ({"o": np.zeros((B, H, S + 1, E), np.float32)}, "o: got shape"),
    "lse": ({"lse": np.zeros((B, H, S))}, "lse: got dtype"),
    "dlse": ({"dlse": np.zeros((B, H), np.float32)}, "dlse: got shape"),
    "a name": ({"wrt": ("q", "w")}, "wrt: got 'w'"),
    "no names": ({"wrt": 3}, "wrt: got 3"),
    "an array without axes": ({"wrt": np.array(3)}, "wrt: got a ndarray, expected names among"),
    "an array": ({"wrt": np.ones((2, 2))}, "wrt: got a ndarray, expected names among"),
    "numbers": ({"wrt": [np.ones(2)]}, "wrt: got a ndarray, expected names among"),
    "no flag": ({"accumulate": 1}, "accumulate: got 1, expected True or False"),
    "no bias": ({"wrt": "bias"}, "wrt: got 'bias'"),
    "no capture": ({"wrt": ("captured",)}, "wrt: got 'captured'"),
    "accumulate": ({"accumulate": True}, "accumulate"),
    "out": ({"out": flashtile.Gradients()}, "out.q"),
    "engine": ({"engine": "none"}, "engine"),
    "kernel": ({"kernel": "none"}, "kernel"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name):
    q, k, v, do, dlse = inputs("float32")
    o, lse = flashtile.attention(q, k, v, return_lse=True)
    change, message = BAD[name]
    arguments = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}
    flashtile.attention_backward(**arguments)  # what was found right is remembered; that is no excuse
    with pytest.raises(flashtile.SpecError, match=message):
        flashtile.attention_backward(**(arguments | change))


@pytest.mark.parametrize("wrt", [("q", "k", "v"), ("k",), ("v", "q")], ids=str)
@pytest.mark.parametrize("name", [*OPTIONS, "dlse"])
def test_a_repeated_call_is_validated_once(name, wrt, monkeypatch):
    """It goes straight to its kernel, with the bits of the first one and of any other way there, and with what its
    arrays hold now; another call does not."""
    q, k, v, do, dlse = inputs("float32")
    options = OPTIONS.get(name, {})
    o, lse = flashtile.attention(q, k, v, return_lse=True, **options)
    given = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "wrt": wrt, **options}
    given |= {"dlse": dlse} if name == "dlse" else {}
    clear_cache()
    first = flashtile.attention_backward(**given)
    arrays = dict(zip("qkv", (q, k, v), strict=True))
    empty = flashtile.Gradients(**{n: np.empty_like(arrays[n]) for n in wrt})
    with monkeypatch.context() as another_way:
        another_way.setattr(gradients, "differentiate", None)
        written = flashtile.attention_backward(**given, out=empty)
    monkeypatch.setattr(calls.backward, "_validated", None)
    again = flashtile.attention_backward(**given)
    doubled = flashtile.attention_backward(**(given | {"do": 2 * do} | ({"dlse": 2 * dlse} if name == "dlse" else {})))
    for n in "qkv":
        found = [getattr(x, n) for x in (first, again, written, doubled)]
        if n not in wrt:
            assert all(x is None for x in found)
            continue
        assert found[0].any() and found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
        np.testing.assert_array_equal(found[3], 2 * found[0])
    unlike = {"scale": 0.31}, {"kernel": "cpu"}, {"wrt": ("q", "k")}, {"do": do[..., ::-1]}
    for change in unlike:
        with pytest.raises(TypeError, match="not callable"):
            flashtile.attention_backward(**(given | change))


def test_arrays_are_read_as_they_lie():
    """Strides of every kind, lse's too, give the bits of row-major arrays."""
    q, k, v, do, _ = inputs("float32")
    o, lse = flashtile.attention(q, k, v, return_lse=True)
    row_major = flashtile.attention_backward(do, q, k, v, o, lse)
    lying = [np.repeat(x, 2, axis=-1)[..., ::2] for x in (do, q, k, v, o, lse)]
    assert not any(x.flags.c_contiguous for x in lying)
    for _ in range(2):
        found = flashtile.attention_backward(*lying)
        for name in "qkv":
            gradient = getattr(found, name)
            assert gradient.flags.c_contiguous and gradient.tobytes() == getattr(row_major, name).tobytes()


def test_auto_takes_a_kernel_that_has_the_direction():
    spec = Options(False, None, None, None, "ieee", "auto", "auto").spec(*inputs("float32")[:3])
    assert "backward" in kernels.pick(spec, "auto", "backward").capabilities(spec).directions
