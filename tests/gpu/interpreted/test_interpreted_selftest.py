"""The self-test of a first use, on a device that is Triton's interpreter under another name."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Iterator
from typing import Any

import launching  # noqa: F401  # skips this file unless Triton interprets
import numpy as np
import pytest
from devices import DeviceArray, HostOwner
from inputs import Shape, uniform

import flashtile
from flashtile import current, kernels, owners
from flashtile.arrays import contiguous
from flashtile.calls import clear_cache
from flashtile.errors import KernelError, UnavailableError
from flashtile.kernels import BackwardLayout
from flashtile.kernels import triton as family
from flashtile.kernels.triton import choice, driver, problems, selftest, tiles, timed
from flashtile.kernels.triton.backward_tiles import backward_tiles, rows_for
from flashtile.kernels.triton.interpreter import Interpreter
from flashtile.kernels.triton.selftest import Row
from flashtile.kernels.triton.specialisation import Specialisation
from flashtile.score.options import ScoreOptions
from flashtile.spec import AttentionSpec
from flashtile.testing import assert_accurate

ARCH, OUTPUTS = "sm_90", {"forward": "o", "merge": "o", "backward_q": "dq", "backward_kv": "dk", "add_parts": "out"}


class Machine:
    """A GPU in name: `device` is what runs its launches."""

    def __init__(self) -> None:
        self.device: Any = Interpreter()
        self.owner = HostOwner()
        self.judged: list[Row] = []

    def forget(self) -> None:
        """What a new process does not know."""
        selftest._verdicts.clear()
        timed._known.clear()
        clear_cache()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Machine]:
    made = Machine()
    monkeypatch.setenv("FLASHTILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(timed.VARIABLE, "0")
    monkeypatch.setitem(owners.OWNERS, "cupy", lambda: made.owner)  # type: ignore[arg-type]
    monkeypatch.setattr(family, "interpreting", lambda: False)
    monkeypatch.setattr(family, "device_of", lambda spec: made.device)
    monkeypatch.setattr(driver, "missing", lambda: None)
    monkeypatch.setattr(driver, "device", lambda number: driver.Device(f"Fake GPU {number}", ARCH, 232448, 132))
    judged = selftest._judged

    def spy(row: Row, judge: Any) -> str | None:
        made.judged.append(row)
        return judged(row, judge)

    monkeypatch.setattr(selftest, "_judged", spy)
    made.forget()
    yield made
    made.forget()


class Faulty(Interpreter):
    """A device that gets one element of one kernel's output wrong, as miscompiled code would."""

    def __init__(self, kernel: str = "forward", where: Callable[[Specialisation], bool] = lambda what: True) -> None:
        self.kernel, self.where, self.launched = kernel, where, list[Specialisation]()

    def launch(self, specialisation: Any, grid: int, values: Any) -> None:
        super().launch(specialisation, grid, values)
        self.launched.append(specialisation)
        second = dict(specialisation.constants).get("CONTAIN", False)
        if specialisation.kernel == self.kernel and not second and self.where(specialisation):
            name = OUTPUTS[self.kernel]
            size = {"*fp64": 8, "*fp32": 4}.get(str(dict(specialisation.signature)[name]), 2)
            element = (ctypes.c_ubyte * size).from_address(operator.index(values[name]) + 5 * size)
            element[size - 1] ^= 0x40  # the highest bit of the exponent


class Broken(Interpreter):
    def launch(self, specialisation: Any, grid: int, values: Any) -> None:
        raise KernelError("launch: NVIDIA's driver: error 719: unspecified launch failure")


class Exhausted(Interpreter):
    def launch(self, specialisation: Any, grid: int, values: Any) -> None:
        raise KernelError("launch: NVIDIA's driver: error 2: out of memory") from MemoryError("full")


def inputs(device: int = 0, dtype: str = "float32") -> tuple[tuple[np.ndarray, ...], list[DeviceArray]]:
    arrays = uniform(Shape(1, 2, 1, 20, 30, 16, 16), dtype)
    return arrays, [DeviceArray(x, device) for x in arrays]


def test_the_first_call_on_a_device_tests_and_later_ones_do_not(machine: Machine) -> None:
    arrays, placed = inputs()
    o = flashtile.attention(*placed, causal=True, align=5)
    assert_accurate(o.array, *arrays, causal=True, align=5)
    assert [str(row) for row in machine.judged] == ["float32, head size 64, tiles 32 x 32 (4 warps, 2 stages)"]
    flashtile.attention(*placed)
    machine.forget()
    flashtile.attention(*placed)
    assert len(machine.judged) == 1, "the verdict is kept for other processes"
    flashtile.attention(*inputs(device=1)[1])
    assert len(machine.judged) == 2, "another device, another verdict"
    row = next(row for row in kernels.survey() if row[1] == "triton")
    assert row[2] and row[3].startswith("Fake GPU 0 (sm_90), triton ") and "failed" not in row[3]


def test_a_failure_takes_a_row_out_of_the_choice(machine: Machine) -> None:
    """The next one computes, here and in other processes; `flashtile doctor` says so."""
    arrays, placed = inputs()
    machine.device = device = Faulty(where=lambda what: what.num_stages == 2)
    for _ in range(2):
        assert_accurate(flashtile.attention(*placed).array, *arrays)
        assert {what.num_stages for what in device.launched[-2:]} == {1}
        machine.forget()
    assert [row.tiles[0].num_stages for row in machine.judged] == [2, 1]
    row = next(row for row in kernels.survey() if row[1] == "triton")
    assert row[2] and "failed its self-test in float32, head size 64, tiles 32 x 32 (4 warps, 2 stages) on" in row[3]
    assert row[3].count("failed") == 1 and "output: error over" in row[3]


@pytest.mark.parametrize(
    ("device", "why"),
    [
        (Faulty, r"output: error over the .* allowed, in 1 of 35072 elements; at \(0, 0, 0, 5\)"),
        (Broken, "KernelError: a kernel failed .* error 719: unspecified launch failure"),
    ],
)
def test_where_no_row_is_left_another_family_is_asked(machine: Machine, device: Any, why: str) -> None:
    _, placed = inputs()
    machine.device = device()
    message = (
        rf"triton: failed its self-test in float32, .* on Fake GPU 0 \(sm_90\): {why}.*again, remove .*; failed its"
    )
    for _ in range(2):
        with pytest.raises(UnavailableError, match=message):
            flashtile.attention(*placed)
        machine.forget()
        machine.device = Interpreter()  # the verdicts stand, whatever would come now
    assert len(machine.judged) == 2
    reasons = dict(flashtile.explain(*inputs()[0]).passed_over)
    assert reasons["triton"] == "runs on cuda, not on cpu"
    double = [DeviceArray(x.array.astype(np.float64)) for x in placed]
    flashtile.attention(*double)  # other dtypes have verdicts of their own


def test_tiles_by_descriptors_are_judged_apart(machine: Machine) -> None:
    arrays, placed = inputs(dtype="float16")
    machine.device = device = Faulty(where=lambda what: dict(what.constants)["DESCRIBED"])
    assert_accurate(flashtile.attention(*placed).array, *arrays)
    assert [row.tiles[0].described for row in machine.judged] == [False, True]
    assert [dict(what.constants)["DESCRIBED"] for what in device.launched[-2:]] == [False, False]


def test_the_fastest_of_several_rows_is_taken(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that says so: the first call judges and times them, later ones know."""
    device = machine.device = Faulty(where=lambda what: False)

    def clock() -> float:  # plain loads take longest, 128 keys least
        seen = [dict(what.constants) for what in device.launched]
        return sum(2.0 if not x["DESCRIBED"] else 64 / x["TILE_K"] for x in seen if not x["CONTAIN"])

    monkeypatch.setenv(timed.VARIABLE, "1")
    monkeypatch.setattr(problems, "TIMED_SHAPE", (1, 1, 16))
    monkeypatch.setattr(problems, "TIMED_CALLS", 1)
    monkeypatch.setattr(problems, "clock", clock)
    monkeypatch.setattr(timed, "ROUNDS", 1)
    arrays, placed = inputs(dtype="float16")
    for _ in range(2):
        assert_accurate(flashtile.attention(*placed).array, *arrays)
        assert [dict(what.constants)["TILE_K"] for what in device.launched[-2:]] == [128, 128]
        machine.forget()
    assert [row.tiles[0].tile_k for row in machine.judged] == [64, 64, 128]
    assert "ms" in family.remark()


def test_gradients_are_timed_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts launches: those of a call, and one call to warm up."""
    monkeypatch.setattr(problems, "TIMED_SHAPE", (1, 1, 16))
    monkeypatch.setattr(problems, "TIMED_CALLS", 2)
    device = Faulty(where=lambda what: False)
    monkeypatch.setattr(problems, "clock", lambda: float(len(device.launched)))
    row = rows_of(("backward",), "float16", 64)
    with current.calling(machine.owner, inputs()[1][0]):
        assert problems.stopwatch(family.capabilities, device, row) == 5.0
    kernels = ["row_deltas", "backward_q", "backward_q", "backward_kv", "backward_kv"]
    assert [what.kernel for what in device.launched] == kernels * 3
    keys = {dict(what.constants).get("TILE_K") for what in device.launched if what.kernel == "backward_kv"}
    assert keys == {row.tiles[1].tile_k}


def gradients_of(machine: Machine) -> Any:
    """What would compute the gradients of a call on the machine's device."""
    _, (q, k, v) = inputs()
    views = [contiguous(x.shape, "float32", "cuda:0") for x in (q, k, v)]
    spec = AttentionSpec.of(*views)
    with current.calling(machine.owner, q):
        layout = BackwardLayout(*(views[n].strides4() for n in (0, 1, 2, 0, 0, 0, 1, 2)))
        return family.compile_backward(spec, layout, ())


def test_gradients_have_rows_of_their_own(machine: Machine) -> None:
    """A wrong dK takes the rows of the backward out, and where none is left, gradients; the forward stays."""
    found = rows_for(ARCH, "float32", 64)
    assert found is not None and found[1].tile.num_warps == 8, "which the first faulty kernel goes by"
    machine.device = Faulty("backward_kv", where=lambda what: what.num_warps == 8)
    assert gradients_of(machine)._tile_kv.num_warps == 4
    assert [row.uses for row in machine.judged] == [{"backward"}] * 2
    machine.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "sources_digest", lambda: "another version")
        machine.device = Faulty("backward_kv")
        message = (
            r"one that is right; triton: failed its self-test in .*backward, tiles .*gradient of k: (error|NaN in)"
        )
        with pytest.raises(UnavailableError, match=message):
            gradients_of(machine)


def test_want_of_memory_is_no_verdict(machine: Machine) -> None:
    arrays, placed = inputs()
    machine.device = Exhausted()
    with pytest.raises(KernelError, match="out of memory"):
        flashtile.attention(*placed)
    machine.device = Interpreter()
    assert_accurate(flashtile.attention(*placed).array, *arrays)


def test_explain_tells_what_is_known_and_tests_nothing(machine: Machine) -> None:
    told = flashtile.explain((1, 2, 20, 16), device="cuda")
    assert (told.kernel, told.isa) == ("triton", "sm_90") and not machine.owner.diary and not machine.judged


def rows_of(uses: tuple[str, ...], dtype: str, size: int) -> Row:
    view = contiguous((1, 1, 1, size), dtype)
    spec = AttentionSpec.of(view, view, view)
    if "backward" in uses:
        found = backward_tiles(spec, ARCH)
        assert found is not None
        return Row(dtype, "ieee", size, frozenset(uses), found)
    few = bool({"packed", "few rows"} & set(uses))
    return Row(dtype, "ieee", size, frozenset(uses), (tiles.forward_tile(spec, ARCH, few),))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("uses", "storage", "size", "changed"),
    [
        (("packed",), "float16", 64, "merge"),
        (("program", "dropout", "sinks"), "bfloat16", 128, "forward"),
        (("backward", "program", "arrays", "dropout", "sinks"), "float32", 64, "backward_q"),
        pytest.param((), "float64", 256, "forward", marks=SLOW),
        pytest.param(("few rows", "program"), "float32", 64, "merge", marks=SLOW),
        pytest.param(("many keys",), "float32", 64, "forward", marks=SLOW),
        pytest.param(("backward", "parts"), "float16", 128, "add_parts", marks=SLOW),
    ],
    ids=str,
)
def test_every_use_has_a_problem_that_right_kernels_pass_and_wrong_ones_fail(
    machine: Machine, uses: tuple[str, ...], storage: str, size: int, changed: str
) -> None:
    row, device = rows_of(uses, storage, size), Faulty(changed, where=lambda what: False)
    if "parts" in uses:  # of a device with processors to fill
        device.processors = lambda: 132  # type: ignore[method-assign]
    with current.calling(machine.owner, inputs()[1][0]):
        problems.judge(family.capabilities, device, row)
        assert changed in {what.kernel for what in device.launched}
        device.where = lambda what: True
        with pytest.raises(AssertionError, match="error over|NaN in one|inf in one"):
            problems.judge(family.capabilities, device, row)


def test_what_a_call_asks_of_a_row() -> None:
    """Its uses, from the spec alone."""
    place = choice.Place("Fake GPU", ARCH, 132, "3.9")

    def uses(shape: tuple[int, ...], keys: int, dtype: str = "float32", **options: Any) -> set[str]:
        q, k = contiguous(shape, dtype, "cuda:0"), contiguous((*shape[:1], 1, keys, shape[3]), dtype, "cuda:0")
        spec, _ = ScoreOptions(**options).scoring(AttentionSpec.of(q, k, k), False, None, 0)
        rows = choice.forward_rows(spec, place.arch, family.few_rows(spec), family.packs(spec))
        assert len({row.tiles for row in rows}) == len(rows) == 2
        return set(rows[0].uses)

    assert uses((1, 4, 100, 64), 100) == set()
    assert uses((1, 4, 1, 64), 100) == {"packed"} and uses((1, 1, 1, 64), 100) == {"few rows"}
    assert uses((1, 4, 100, 64), 128 * 32 + 1) == {"many keys"} and uses((1, 4, 9, 64), 5000, "float16") == set()
    assert uses((1, 1, 50, 64), 50, softcap=2.0, sinks=np.zeros(1)) == {"program", "sinks"}
