"""Every command of `flashtile`, in this process but for two, and what each says about bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import run

import flashtile
from flashtile import arrayfiles, bench, cli, doctor, score
from flashtile.errors import KernelError
from flashtile.testing import assert_accurate

pytestmark = pytest.mark.core

Capture = pytest.CaptureFixture[str]
OPTIONS = {"causal": True, "window": (20, -1), "align": "bottom_right", "scale": 0.3}
FLAGS = ["--causal", "--window", "20", "-1", "--align", "bottom_right", "--scale", "0.3"]


@pytest.fixture(autouse=True)
def threads_as_before() -> object:
    before = flashtile.get_num_threads()
    yield
    flashtile.set_num_threads(before)


def _arrays(dtype: object = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 4, 30, 16), "k": (2, 2, 50, 16), "v": (2, 2, 50, 8)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def _npy(folder: Path, arrays: dict[str, np.ndarray]) -> list[str]:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [str(folder / f"{name}.npy") for name in arrays]


def _fails(arguments: list[str], capsys: Capture) -> str:
    """The one line that a command with bad input prints."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    return printed.err


# -- run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["npy", "npz", "compressed npz"])
@pytest.mark.parametrize("target", ["o.npy", "o.npz"])
def test_run_computes_attention(tmp_path: Path, stored: str, source: str, target: str, capsys: Capture) -> None:
    arrays = _arrays(pytest.importorskip("ml_dtypes").bfloat16 if stored == "bfloat16" else stored)
    if source == "npy":
        inputs = _npy(tmp_path, arrays)
    else:
        inputs = [str(tmp_path / "qkv.npz")]
        (np.savez if source == "npz" else np.savez_compressed)(inputs[0], **arrays)
    output = tmp_path / target
    assert cli.main(["run", *inputs, "-o", str(output), "--return-lse", *FLAGS]) == 0
    if target == "o.npz":
        o, lse = arrayfiles.open_npz(output, ("o", "lse"))
    else:
        o, lse = arrayfiles.open_npy(output), arrayfiles.open_npy(tmp_path / "o.lse.npy")
    assert_accurate(np.asarray(o), **arrays, **OPTIONS)
    assert_accurate(np.asarray(lse), **arrays, **OPTIONS, kind="lse")
    said = capsys.readouterr().out
    assert str(output) in said and "(2, 4, 30, 8)" in said and stored in said
    assert not list(tmp_path.glob(".*"))


def test_run_maps_its_inputs(tmp_path: Path) -> None:
    arrays = _arrays()
    np.savez(tmp_path / "qkv.npz", **arrays)
    _npy(tmp_path, arrays)
    mapped = [*arrayfiles.open_npz(tmp_path / "qkv.npz", ("q", "k", "v")), arrayfiles.open_npy(tmp_path / "q.npy")]
    for got, expected in zip(mapped, [*arrays.values(), arrays["q"]], strict=True):
        assert isinstance(got, np.memmap) and not got.flags.writeable
        np.testing.assert_array_equal(got, expected)


def test_npz_with_other_layouts(tmp_path: Path) -> None:
    arrays = {"a": np.asfortranarray(np.arange(12.0).reshape(3, 4)), "b": np.ones((0, 4)), "c": np.float32(3)}
    np.savez(tmp_path / "x.npz", **arrays)
    for got, expected in zip(arrayfiles.open_npz(tmp_path / "x.npz", tuple(arrays)), arrays.values(), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype


def test_run_writes_only_lse_that_is_asked_for(tmp_path: Path) -> None:
    inputs = _npy(tmp_path, _arrays())
    for target in ("o.npy", "o.npz"):
        assert cli.main(["run", *inputs, "-o", str(tmp_path / target), *FLAGS]) == 0
    assert not (tmp_path / "o.lse.npy").exists()
    with np.load(tmp_path / "o.npz") as archive:
        assert archive.files == ["o"]


def _option_files(folder: Path, **arrays: np.ndarray) -> list[str]:
    """Each array in a file of its own, as flags."""
    flags = []
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        flags += ["--" + name.replace("_", "-"), str(folder / f"{name}.npy")]
    return flags


def _score_options() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "bias": rng.standard_normal((4, 30, 50)).astype(np.float16),
        "alibi_slopes": np.float32([0.5, 0.25, 0.125, 0.0625]),
        "sinks": rng.standard_normal((2, 4)),
    }


def test_run_takes_what_changes_scores_from_files(tmp_path: Path) -> None:
    options, inputs = _score_options(), _npy(tmp_path, _arrays())
    flags = [*_option_files(tmp_path, **options), "--softcap", "5"]
    assert cli.main(["run", *inputs, "-o", str(tmp_path / "o.npy"), "-q", *flags, *FLAGS]) == 0
    want = flashtile.attention(*_arrays().values(), **options, softcap=5.0, **OPTIONS)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), want)
    assert np.abs(want - flashtile.attention(*_arrays().values(), **OPTIONS)).max() > 0.01


def test_masks_in_files_intersect(tmp_path: Path) -> None:
    visible = np.random.default_rng(2).random((30, 50)) < 0.8
    lengths, documents = np.array([50, 20]), np.arange(50) // 12
    flags = _option_files(tmp_path, mask=visible, lengths=lengths, documents=documents)
    assert cli.main(["run", *_npy(tmp_path, _arrays()), "-o", str(tmp_path / "o.npy"), "-q", *flags, *FLAGS]) == 0
    j = np.arange(50)
    dense = visible & (j < lengths[:, None, None, None]) & (documents[:30, None] == documents)
    np.testing.assert_array_equal(
        np.load(tmp_path / "o.npy"), flashtile.attention(*_arrays().values(), mask=dense, **OPTIONS)
    )


GRADIENTS = ["q", "v", "bias", "sinks", "alibi_slopes"]


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["o.npy", "o.npz"])
def test_run_writes_gradients_beside(tmp_path: Path, target: str, stored: str, capsys: Capture) -> None:
    """Of what --wrt names, from do in a file of its own or beside q, k and v, with every option of the call."""
    arrays = _arrays(pytest.importorskip("ml_dtypes").bfloat16 if stored == "bfloat16" else stored)
    do = np.random.default_rng(3).standard_normal((2, 4, 30, 8)).astype(arrays["q"].dtype)
    options, output = _score_options(), tmp_path / target
    flags = [*_option_files(tmp_path, **options), *FLAGS, "--backward", "--wrt", ",".join(GRADIENTS)]
    if target == "o.npz":
        np.savez(tmp_path / "qkv.npz", **arrays, do=do)
        inputs = [str(tmp_path / "qkv.npz")]
    else:
        inputs = [*_npy(tmp_path, arrays), *_option_files(tmp_path, do=do)]
    assert cli.main(["run", *inputs, "-o", str(output), *flags, "--return-lse"]) == 0
    assert ", dq, dv, dbias" in capsys.readouterr().out
    names = ["o", "lse", *(f"d{name}" for name in GRADIENTS)]
    if target == "o.npz":
        with np.load(output) as archive:
            assert archive.files == names
        written = dict(zip(names, arrayfiles.open_npz(output, tuple(names)), strict=True))
    else:
        written = {name: arrayfiles.open_npy(tmp_path / f"o.{name}.npy") for name in names[1:]}
        assert not (tmp_path / "o.dk.npy").exists()
    o, lse = flashtile.attention(**arrays, **options, **OPTIONS, return_lse=True)
    want = flashtile.attention_backward(do, **arrays, o=o, lse=lse, wrt=GRADIENTS, **options, **OPTIONS)
    for name in GRADIENTS:
        assert written[f"d{name}"].dtype == getattr(want, name).dtype
        np.testing.assert_array_equal(written[f"d{name}"], getattr(want, name))
        assert np.abs(getattr(want, name).astype(float)).max() > 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backward"], "--do: got nothing, expected an .npy file"),
        (["--do", "do.npy"], "--do: got do.npy, expected it beside --backward only"),
        (["--wrt", "q,k"], "--wrt: got q,k, expected it beside --backward only"),
        (["--backward", "--do", "do.npy", "--wrt", "q,bias"], "--wrt: got bias, expected names among q, k, v"),
        (["--backward", "--do", "k.npy"], "do: got float32 of shape (2, 2, 50, 16), expected float32 of shape (2, 4"),
        (["--backward", "--do", "wide.npy"], "do: got float64 of shape (2, 4, 30, 8), expected float32"),
        (["--backward", "--do", "none.npy"], "none.npy: got no such file or directory"),
        (["--backward", "--do", "do.npy", "--kernel", "unknown"], "kernel: got 'unknown'"),
        (["--backward", "--do", "o.dq.npy"], "expected another name: o.dq.npy is an input"),
    ],
)
def test_run_refuses_bad_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    _npy(tmp_path, _arrays())
    for name, dtype in (("do", np.float32), ("o.dq", np.float32), ("wide", np.float64)):
        np.save(tmp_path / f"{name}.npy", np.ones((2, 4, 30, 8), dtype))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert message in _fails(["run", "q.npy", "k.npy", "v.npy", "-o", "o.npy", *flags], capsys)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_run_may_replace_its_input_where_told(tmp_path: Path) -> None:
    arrays = _arrays()
    inputs = _npy(tmp_path, arrays)
    assert cli.main(["run", *inputs, "-o", inputs[0], "--overwrite", "--quiet", *FLAGS]) == 0
    assert_accurate(np.load(inputs[0]), **arrays, **OPTIONS)


@pytest.mark.parametrize("name", ["q.npy", "bias.npy", "link.npy", "qkv.npz", "o.npy"])
def test_run_does_not_replace_an_input(tmp_path: Path, name: str, capsys: Capture) -> None:
    """Of q, k, v, of an option, behind a link, all in one file; nor with lse, whose name follows from that of o."""
    arrays = _arrays()
    inputs = _npy(tmp_path, arrays)
    flags = _option_files(tmp_path, bias=np.ones((30, 50), np.float32))
    np.save(tmp_path / "o.lse.npy", np.ones((30, 50), np.float32))
    if name == "qkv.npz":
        np.savez(tmp_path / name, **arrays)
        inputs = [str(tmp_path / name)]
    elif name == "link.npy":
        (tmp_path / name).symlink_to(inputs[1])
    elif name == "o.npy":
        flags = ["--bias", str(tmp_path / "o.lse.npy"), "--return-lse"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    said = _fails(["run", *inputs, "-o", str(tmp_path / name), *flags, *FLAGS], capsys)
    replaced = "o.lse.npy" if name == "o.npy" else name
    assert f"--output: got {tmp_path / name}, expected another name: {tmp_path / replaced} is an input" in said
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_run_honours_threads_kernel_and_quiet(tmp_path: Path, capsys: Capture) -> None:
    inputs = _npy(tmp_path, _arrays())
    command = ["run", *inputs, "-q", "-o", str(tmp_path / "o.npy"), "--threads", "1", "--kernel", "reference"]
    assert cli.main(command) == 0
    assert flashtile.get_num_threads() == 1
    exact = flashtile.attention(*_arrays().values(), kernel="reference")
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), exact)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--causal"], "align: "),
        (["--scale", "nan"], "scale: got nan"),
        (["--kernel", "fast"], "kernel: got 'fast'"),
        (["--engine", "fast"], "engine: got 'fast'"),
        (["--precision", "low"], "precision: got 'low'"),
        (["--causal", "--align", "middle"], "align: got 'middle'"),
        (["--window", "-2", "0", "--align", "0"], "window: got "),
        (["--window", "3"], "--window: expected 2 arguments"),
        (["--threads", "0"], "--threads: got '0', expected an integer from 1 to 4096"),
        (["--threads", "1000000"], "--threads: got '1000000', expected an integer from 1 to 4096"),
        (["--scale", "big"], "--scale: invalid float value: 'big'"),
        (["--softcap", "-1"], "softcap: got -1.0"),
        (["--bias", "none.npy"], "none.npy: got no such file or directory, expected a readable .npy file"),
    ],
)
def test_run_refuses_bad_options(tmp_path: Path, flags: list[str], message: str, capsys: Capture) -> None:
    output = tmp_path / "o.npy"
    output.write_bytes(b"precious")
    said = _fails(["run", *_npy(tmp_path, _arrays()), "-o", str(output), *flags], capsys)
    assert said.startswith("flashtile run: error: ") and message in said
    assert output.read_bytes() == b"precious"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("option", "array", "message"),
    [
        ("mask", np.ones((30, 50)), "mask: got float64, expected bool"),
        ("mask", np.ones((30, 49), bool), "mask: got shape (30, 49)"),
        ("lengths", np.array([1, 2, 3]), "padding: got shape (3,), expected (B,) = (2,)"),
        ("documents", np.arange(30), "document ids: got shape (30,)"),
        ("bias", np.ones(50, int), "bias: got int64"),
        ("alibi_slopes", np.ones(3), "alibi_slopes: got shape (3,)"),
        ("sinks", np.ones(3), "sinks: got shape (3,)"),
    ],
)
def test_run_refuses_wrong_arrays(
    tmp_path: Path, option: str, array: np.ndarray, message: str, capsys: Capture
) -> None:
    flags = [*_option_files(tmp_path, **{option: array}), "--align", "0"]
    said = _fails(["run", *_npy(tmp_path, _arrays()), "-o", str(tmp_path / "o.npy"), *flags], capsys)
    assert said.startswith("flashtile run: error: ") and message in said
    assert not (tmp_path / "o.npy").exists()


def test_run_refuses_bad_files(tmp_path: Path, capsys: Capture) -> None:
    q, k, v = _npy(tmp_path, _arrays())
    np.savez(tmp_path / "qk.npz", q=np.ones((4, 8)), k=np.ones((4, 8)))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", q=np.array([{}]), k=np.ones(1), v=np.ones(1))
    np.save(tmp_path / "integers.npy", np.ones((2, 2, 50, 8), int))
    (tmp_path / "text.npz").write_text("not a zip")
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "cut.npy").write_bytes(Path(q).read_bytes()[:500])
    (tmp_path / "empty.npy").write_bytes(b"")
    output = ["-o", str(tmp_path / "new.npy")]

    def refused(*inputs: str) -> str:
        return _fails(["run", *(str(tmp_path / name) for name in inputs), *output], capsys)

    assert "none.npy: got no such file or directory, expected a readable .npy file" in refused("none.npy", "k.npy", q)
    assert "expected one .npz with q, k and v, or three .npy files" in refused("q.npy", "k.npy")
    assert "qk.npz: got arrays q, k, expected also v" in refused("qk.npz")
    assert "text.npz: got " in refused("text.npz")
    assert "objects.npz: " in refused("objects.npz")
    for name in ("text.npy", "cut.npy", "empty.npy", "objects.npy"):
        assert f"{name}: got " in refused(name, k, v)
    assert "v: got dtype int64" in refused(q, k, "integers.npy")
    assert "k: got head size 8" in refused(q, v, v)
    assert not (tmp_path / "new.npy").exists()


@pytest.mark.parametrize("output", ["o.txt", "missing/o.npy"])
def test_run_refuses_bad_outputs(tmp_path: Path, output: str, capsys: Capture) -> None:
    said = _fails(["run", *_npy(tmp_path, _arrays()), "-o", str(tmp_path / output)], capsys)
    assert f"--output: got {tmp_path / output}, expected a name " in said


def test_kernel_failure_is_not_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def failing(*_: object, **__: object) -> None:
        raise KernelError("kernel: it broke")

    inputs = _npy(tmp_path, _arrays())
    monkeypatch.setattr(flashtile, "attention", failing)
    assert cli.main(["run", *inputs, "-o", str(tmp_path / "o.npy")]) == 1
    assert capsys.readouterr().err == "flashtile run: error: kernel: it broke\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.npy", "q.npy", "v.npy"]


# -- explain, doctor, bench, demo ---------------------------------------------------------------------------


def test_explain_prints_the_explanation(capsys: Capture) -> None:
    shape = "--shape 2,8,64,32 --kv-heads 2 --s-kv 96 --d-v 16 --dtype bfloat16"
    assert cli.main(["explain", *shape.split(), *FLAGS]) == 0
    call = flashtile.explain((2, 8, 64, 32), (2, 2, 96, 32), (2, 2, 96, 16), dtype="bfloat16", **OPTIONS)
    assert capsys.readouterr().out == f"{call}\n"


def test_explain_counts_masks_in_files(tmp_path: Path, capsys: Capture) -> None:
    lengths = np.array([64, 10])
    flags = [*_option_files(tmp_path, lengths=lengths), "--softcap", "30"]
    assert cli.main(["explain", "--shape", "2,4,64,32", *flags]) == 0
    call = flashtile.explain((2, 4, 64, 32), mask=score.padding(lengths), softcap=30.0)
    assert capsys.readouterr().out == f"{call}\n" and call.coverage.visible == 4 * 64 * (64 + 10)


def test_explain_prints_the_gradients(capsys: Capture) -> None:
    assert cli.main(["explain", "--shape", "2,64,32", "--causal", "--backward"]) == 0
    assert capsys.readouterr().out == f"{flashtile.explain((2, 64, 32), causal=True, backward=True)}\n"


def test_explain_takes_fewer_axes(capsys: Capture) -> None:
    assert cli.main(["explain", "--shape", "64,32"]) == 0
    assert cli.main(["explain", "--shape", "3,64,32", "--s-kv", "0"]) == 0
    expected = [flashtile.explain((64, 32)), flashtile.explain((3, 64, 32), (3, 0, 32))]
    assert capsys.readouterr().out == "".join(f"{call}\n" for call in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: --shape"),
        ("--shape 8", "--shape: got 8, expected B,H,S,D or H,S,D or S,D"),
        ("--shape 1,2,x,4", "--shape: got '1,2,x,4', expected numbers with commas"),
        ("--shape=-1,2", "--shape: got '-1,2'"),
        ("--shape 8,8 --kv-heads 1", "--kv-heads: got 1, expected a --shape with heads"),
        ("--shape 1,3,8,8 --kv-heads 2", "k: got 2 heads"),
        ("--shape 8,8 --dtype int8", "dtype: got dtype int8"),
    ],
)
def test_explain_refuses(arguments: str, message: str, capsys: Capture) -> None:
    assert message in _fails(["explain", *arguments.split()], capsys)


def test_doctor_lists_every_room(capsys: Capture) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    package = Path(flashtile.__file__).parent
    for room, folder in (("kernel", "kernels"), ("engine", "engines")):
        for row in doctor.survey():
            if row[0] == room:
                assert (package / folder / f"{row[1]}.py").exists() or (package / folder / row[1]).is_dir()
    lines = [line.split(None, 2) for line in said.splitlines() if line]
    shown = {(words[0], words[1]): words[2] for words in lines if len(words) == 3}
    assert shown["kernel", "reference"] == shown["engine", "direct"] == shown["isa", "generic"].split(":")[0]
    assert ("door", "flashtile.torch") in shown
    for room, name, available, reason in doctor.survey():
        assert shown[room, name].startswith("available" if available else "not available")
        assert reason in shown[room, name]
        assert available or reason
    assert f"threads    {flashtile.get_num_threads()}\n" in said
    assert f"flashtile  {flashtile.__version__}" in said and f"numpy {np.__version__}" in said


def test_doctor_says_why_a_door_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    assert ("door", "flashtile.torch", False, "torch not installed: pip install torch") in doctor.survey()


def test_doctor_says_why_the_door_of_an_engine_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.engines, "survey", lambda: [("engine", "starpu", False, "no such library")])
    assert ("door", "flashtile.starpu", False, "no such library") in doctor.survey()


def test_doctor_survives_a_wrong_isa(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("FLASHTILE_ISA", "mmx")
    assert cli.main(["doctor"]) == 0
    assert "not available: FLASHTILE_ISA: got 'mmx'" in capsys.readouterr().out


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.001)
    monkeypatch.setattr(bench, "ROUNDS", 1)


@pytest.mark.parametrize("flags", [[], ["--backward"]], ids=["forward", "backward"])
def test_bench_prints_a_row_a_case(short_rounds: None, capsys: Capture, flags: list[str]) -> None:
    assert cli.main(["bench", "--shape", "1,2,32,16", *flags]) == 0
    _, heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["GFLOP/s", "flashtile", "numpy"]
    assert [row.split()[0] for row in rows] == ["float32", "float32", "bfloat16", "float16", "float64"]
    for row in rows:
        *speeds, ratio = row.split(")")[1].split()
        assert all(float(speed) > 0 for speed in speeds)
        assert float(ratio) == pytest.approx(float(speeds[0]) / max(map(float, speeds[1:])), rel=0.02)


@pytest.mark.parametrize("flags", [[], ["--backward"]], ids=["forward", "backward"])
@pytest.mark.parametrize("place", [0, -1])
def test_bench_times_nothing_that_is_wrong(
    short_rounds: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture, flags: list[str], place: int
) -> None:
    """Of a contestant that is right but for one of its arrays."""
    known = bench._DIFFERENTIATING if flags else bench._CONTESTANTS
    honest = known["flashtile"]

    def wrong(*arguments: object) -> bench.Contestant:
        arrays = list(honest(*arguments)())
        arrays[place] = np.ones_like(arrays[place])
        return lambda: tuple(arrays)

    monkeypatch.setitem(known, "numpy", wrong)
    assert cli.main(["bench", "--shape", "1,2,32,16", *flags]) == 0
    assert all(row.split(")")[1].split()[1] == "wrong" for row in capsys.readouterr().out.splitlines()[2:])
    monkeypatch.setitem(known, "flashtile", wrong)
    assert cli.main(["bench", "--shape", "1,2,32,16", *flags]) == 1
    assert "inaccurate result for float32 dense (1,2,32,16)" in capsys.readouterr().err


def test_bench_refuses_another_rank(capsys: Capture) -> None:
    assert "--shape: got 32,16, expected four positive numbers" in _fails(["bench", "--shape", "32,16"], capsys)


def test_demo_runs(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib", reason="the demo's photograph is matplotlib's")
    command = ["demo", "--size", "48", "--seed", "3", "--sigma", "0.15", "--quiet", "--threads", "1"]
    assert cli.main([*command, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith((tmp_path / "report.txt").read_text())
    assert "2,304 queries" in printed.out and "sigma 0.15, seed 3" in printed.out and ", 1 thread\n" in printed.out


def test_demo_refuses(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib", reason="the demo's photograph is matplotlib's")
    assert "size: got 8, expected 32 to 512 pixels" in _fails(["demo", "--size", "8", "-o", str(tmp_path)], capsys)
    assert "not allowed with" in _fails(["demo", "--size", "64", "--full"], capsys)
    assert "--seed: got '-1'" in _fails(["demo", "--seed=-1"], capsys)
    (tmp_path / "file").touch()
    assert "file" in _fails(["demo", "--size", "32", "-o", str(tmp_path / "file")], capsys)


def test_interrupt_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "text", interrupted)
    assert cli.main(["doctor"]) == 130


# -- the command itself -------------------------------------------------------------------------------------


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashtile", *arguments]
    return run(command)


def test_module_is_the_command() -> None:
    version = _command("--version")
    assert (version.returncode, version.stdout) == (0, f"flashtile {flashtile.__version__}\n")
    refused = _command("explain", "--shape", "8")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr == "flashtile explain: error: --shape: got 8, expected B,H,S,D or H,S,D or S,D\n"


def test_no_command_prints_the_help(capsys: Capture) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("usage: flashtile ") and "\n    explain " in printed.err


def test_help_names_every_command(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(f"\n    {name} " in said for name in ("demo", "run", "bench", "explain", "doctor"))
