"""flashtile.explain: what a call would do, as data and as text."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import plain
import pytest

import flashtile
from flashtile import kernels, score
from flashtile.errors import SpecError, UnavailableError
from flashtile.kernels import Capabilities

pytestmark = pytest.mark.core


class Compiled:
    scratch_bytes = 3 << 20
    merge_stage = None

    def pack(self, *addresses: int) -> Any:
        raise AssertionError("explain must not run the call")

    run = pack


def family(name: str, reason: str | None = None, **changes: Any) -> kernels.Family:
    """A kernel family that must not be run."""
    able = Capabilities(
        name=name,
        dtypes=frozenset({"float32", "bfloat16"}),
        precisions=frozenset({"ieee", "bf16"}),
        max_head_size=128,
        query_block=16,
        tile_q=(16, 32),
        tile_k=(64,),
        options=frozenset({"band"}),
        native=True,
        isa="isa9",
    )
    return kernels.Family(
        name,
        unavailable=lambda: reason,
        capabilities=lambda spec: dataclasses.replace(able, **changes),
        compile=lambda spec, plan, layout: Compiled(),
    )


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Five families: missing a package, unable here, without masks, the one that fits, and a slower one."""
    found: list[tuple[str, Any]] = [
        ("gone", "No module named 'gone'"),
        ("asleep", family("asleep", reason="no such device")),
        ("bare", family("bare", options=frozenset())),
        ("quick", family("quick")),
        ("slow", family("slow")),
    ]
    monkeypatch.setattr(kernels, "families", lambda: iter(found))
    flashtile.api.clear_cache()
    yield
    flashtile.api.clear_cache()


@pytest.mark.usefixtures("families")
def test_everything_about_a_call() -> None:
    got = flashtile.explain((2, 4, 100, 8), (2, 2, 200, 8), (2, 2, 200, 24), window=(9, 5), align="bottom_right")
    visible = 2 * 4 * int(plain.seen(100, 200, 100, 9, 5).sum())
    assert (got.kernel, got.isa, got.engine, got.threads) == ("quick", "isa9", "direct", flashtile.get_num_threads())
    assert (got.plan.tile_q, got.plan.tile_k, got.plan.items) == (32, 64, 32)
    assert got.coverage.visible == visible and got.flops == visible * 2 * (8 + 24)
    assert got.scratch_bytes == 3 << 20 and got.unfused_bytes == 2 * 4 * 100 * 200 * 4
    assert dict(got.passed_over) == {
        "gone": "No module named 'gone'",
        "asleep": "no such device",
        "bare": "does not know band",
        "slow": "can do it, but comes later in the order",
    }
    assert got.notes == ()
    text = str(got)
    for part in ("quick, isa9", "32 queries x 64 keys", "3 MiB per thread", "not asleep  no such device", "offset 100"):
        assert part in text
    assert "-9 <= j - (i + offset) <= 5" in text and len({line.find("  ") > 0 for line in text.splitlines()}) == 1


@pytest.mark.usefixtures("families")
def test_precision_without_a_unit_is_noted() -> None:
    assert flashtile.explain((4, 8), precision="bf16").notes == ()
    (note,) = flashtile.explain((4, 8), precision="tf32").notes
    assert "'tf32' is honoured at higher precision" in note


@pytest.mark.usefixtures("families")
def test_kernels_asked_for_and_kernels_that_cannot() -> None:
    got = flashtile.explain((4, 8), kernel="slow")
    assert got.kernel == "slow" and dict(got.passed_over)["quick"] == "can do it, but slow was asked for"
    with pytest.raises(UnavailableError, match="kernel: got 'auto'.*asleep: no such device.*not float64"):
        flashtile.explain((4, 8), dtype="float64")
    with pytest.raises(UnavailableError, match="quick: head sizes up to 128, not 129"):
        flashtile.explain((4, 129))
    with pytest.raises(UnavailableError, match="kernel: got 'asleep'.*no such device"):
        flashtile.attention(*[np.ones((4, 8), np.float32)] * 3, kernel="asleep")
    with pytest.raises(UnavailableError, match="bare: does not know band; 'quick' and 'slow' can$"):
        flashtile.attention(*[np.ones((4, 8), np.float32)] * 3, kernel="bare", causal=True)


def test_arrays_and_shapes_give_the_same() -> None:
    q, k = np.zeros((2, 4, 9, 8), np.float16), np.zeros((2, 2, 9, 8), np.float16)
    assert flashtile.explain(q, k, causal=True) == flashtile.explain(q.shape, k.shape, dtype="float16", causal=True)
    assert flashtile.explain(q.shape).spec.dtype == "float32"
    assert flashtile.explain(q, out=q, progress=True, return_lse=True) == flashtile.explain(q)


def test_offsets_of_each_batch_are_counted() -> None:
    got = flashtile.explain((3, 1, 4, 8), (3, 1, 9, 8), causal=True, align=np.array([0, 5, -9]))
    assert got.coverage.visible == sum(plain.seen(4, 9, offset, None, 0).sum() for offset in (0, 5, -9))
    assert "offset per batch" in str(got) and len(got.notes) == 1


def test_what_changes_scores_is_written_out() -> None:
    table, shape = np.arange(4.0), (1, 4, 64, 8)
    got = flashtile.explain(shape, mask=lambda b, h, i, j: (i // 16 == j // 16) & (j <= i), softcap=30.0)
    assert got.mask == "((i // 16) == (j // 16)) & (j <= i)" and got.score.startswith("30 * tanh(s * 0.0333")
    assert got.notes == ()
    rule = score.causal() | score.prefix(5)
    got = flashtile.explain(shape, mask=rule, score_mod=lambda s, b, h, i, j: s + table[h])
    assert (got.mask, got.score, got.notes) == ("(j <= i) | (j < 5)", "s + table[h]", ())
    assert " (j <= i) | (j < 5)\n" in str(got) and " as the mask says\n" in str(got)
    got = flashtile.explain(shape, alibi_slopes=table)
    assert got.score == "s - (alibi_slopes[h] * abs(i - j))" and got.mask == ""


def test_masks_of_arrays_are_counted_as_given() -> None:
    got = flashtile.explain((2, 1, 8, 4), mask=score.padding([3, 8]))
    assert got.coverage.visible == 8 * 3 + 8 * 8 and got.flops == got.coverage.visible * 16
    assert got.mask == "j < lengths[b]" and len(got.notes) == 1


def test_torch_tensors_are_described() -> None:
    torch = pytest.importorskip("torch")
    assert flashtile.explain(torch.ones(2, 4, 9, 8, dtype=torch.bfloat16)).spec.dtype == "bfloat16"


def test_every_kernel_explains_itself(kernel: Any, dtype: str) -> None:
    got = flashtile.explain((1, 2, 300, 64), dtype=dtype, causal=True, kernel=kernel.name)
    assert got.kernel == kernel.name and got.scratch_bytes >= 0
    assert got.isa == (kernel.isa or "")
    assert str(got).count("\n") >= 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": (1, 2, 3, 4, 5)}, SpecError, "q: got shape"),
        ({"q": "text"}, SpecError, "q: got 'text'"),
        ({"q": (4, -8)}, SpecError, "q: got a tuple"),
        ({"q": (4, 8), "dtype": "int8"}, SpecError, "dtype: got dtype int8"),
        ({"q": np.ones((4, 8)), "dtype": "float32"}, SpecError, "dtype: got float32, expected float64 as in q"),
        ({"q": (4, 8), "mask": 1}, SpecError, "mask: got 1, expected a boolean array"),
        ({"q": (4, 8), "bias": np.ones((3, 4))}, SpecError, r"bias: got shape \(3, 4\)"),
        ({"q": (4, 8), "dropout_p": 0.5}, SpecError, "seed: got None with dropout_p = 0.5"),
        ({"q": (4, 8), "kernel": "none"}, SpecError, "kernel: got 'none'"),
        ({"q": (4, 8), "no_such": 1}, TypeError, "no_such"),
        ({"q": (4, 8), "is_causal": True}, SpecError, "is_causal: got a keyword .* did you mean causal="),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flashtile.explain(**arguments)


def test_gradients_are_explained(kernel: Any, dtype: str) -> None:
    """Five products where the forward has two, by a kernel that has them; the reasons of the others are about that."""
    shapes = (2, 4, 100, 8), (2, 2, 200, 8), (2, 2, 200, 24)
    options = {"window": (9, 5), "align": "bottom_right", "dtype": dtype}
    got = flashtile.explain(*shapes, **options, backward=True)
    assert got.direction == "backward" and "gradients  " in str(got)
    assert got.flops == got.coverage.visible * 2 * (3 * 8 + 2 * 24)
    assert got.coverage.visible == flashtile.explain(*shapes, **options).coverage.visible
    family = dict(kernels.families())[kernel.name]
    if "backward" in family.capabilities(got.spec).directions:
        chosen = flashtile.explain(*shapes, **options, backward=True, kernel=kernel.name)
        assert chosen.kernel == kernel.name and chosen.plan.items > 0
    else:
        assert dict(got.passed_over)[kernel.name].startswith("has no backward")
        with pytest.raises(UnavailableError, match=f"{kernel.name}: has no backward"):
            flashtile.explain(*shapes, **options, backward=True, kernel=kernel.name)


def test_gradients_in_numpy_are_noted() -> None:
    got = flashtile.explain((4, 8), backward=True, kernel="vanilla")
    assert got.threads == 1 and "NumPy" in got.notes[-1] and "gradients" not in str(flashtile.explain((4, 8)))


def test_backward_is_a_flag() -> None:
    with pytest.raises(SpecError, match="^backward: got 'yes', expected True or False"):
        flashtile.explain((4, 8), backward="yes")


@pytest.mark.parametrize("backward", [False, True])
def test_few_queries_say_that_they_multiply_in_fp32(backward: bool) -> None:
    options: Any = {"precision": "bf16", "backward": backward, "kernel": "cpu"}
    few, many = (flashtile.explain((n, 64), (500, 64), (500, 64), **options) for n in (1, 200))
    assert few.product.startswith("fma: ") and "the queries are few" in few.product
    assert "few" not in many.product


def test_engines_with_tiles_of_their_own_are_explained() -> None:
    pytest.importorskip("dask")
    told = flashtile.explain((1, 8, 1000, 64), causal=True, engine="dask")
    direct = flashtile.explain((1, 8, 1000, 64), causal=True)
    assert (told.plan.tile_k, told.flops) == (1000, direct.flops) and told.plan.tile_q % 16 == 0
    assert "dask, on its workers" in str(told) and "work items" not in str(told) and "work items" in str(direct)
    with pytest.raises(UnavailableError, match="kernel: got 'vanilla' with engine 'dask'"):
        flashtile.explain((1, 8, 1000, 64), kernel="vanilla", engine="dask")


@pytest.mark.parametrize("engine", ["dask", "starpu"])
def test_gradients_in_numpy_are_explained_whatever_the_engine(engine: str) -> None:
    """They are computed on the calling thread."""
    try:
        told = flashtile.explain((1, 2, 40, 8), kernel="vanilla", engine=engine, backward=True)
    except UnavailableError as missing:
        pytest.skip(str(missing))
    assert told.threads == 1 and "work items" in str(told) and "computed in NumPy" in told.notes[-1]
    q, k, v, o, do = np.ones((5, 1, 2, 40, 8), np.float32)
    lse = np.zeros((1, 2, 40), np.float32)
    flashtile.attention_backward(do, q, k, v, o, lse, kernel="vanilla", engine=engine)


def test_every_name_of_an_engine_stays_what_it_is() -> None:
    """No module of an engine's package takes the name of a function that its ENGINE is made of, once it is imported."""
    for name in ("dask", "starpu"):
        package = importlib.import_module(f"flashtile.engines.{name}")
        modules = {x.name for x in pkgutil.iter_modules(package.__path__)}
        functions = {x.__name__ for x in vars(package).values() if inspect.isfunction(x)}
        assert functions and not functions & modules
