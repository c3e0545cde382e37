"""Calls within a limit of memory: the bits of the call without one, files that are whole or not there, and the peak."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from inputs import Shape, read_from, same_bits, uniform

import flashtile
from flashtile.calls import clear_cache
from flashtile.engines.starpu import engine, outofcore, outofcore_sums, runtime
from flashtile.engines.starpu.backward import BackwardFlow
from flashtile.engines.starpu.outofcore_gradients import StreamedBackward
from flashtile.engines.starpu.outofcore_sums import Target
from flashtile.errors import SpecError, UnavailableError
from flashtile.gradient_problem import ByIdentity, Gradients
from flashtile.outputs import place_of

pytestmark = pytest.mark.usefixtures("starpu")

rng = np.random.default_rng(3)
MASK = rng.random((230, 330)) < 0.4
MASK[40:150] = False  # a query tile without keys
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("float32", {}),
    ("float16", {"causal": True, "align": 37, "sinks": np.linspace(-1, 2, 4)}),
    ("bfloat16", {"causal": True, "align": np.array([-250, 90])}),
    ("float64", {"mask": MASK, "dropout_p": 0.2, "seed": 9}),
    ("float32", {"window": (40, 30), "align": "bottom_right", "softcap": 3.0}),
]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engine, "TILE_Q", (64,))
    monkeypatch.setattr(engine, "TILE_K", 100)
    clear_cache()
    yield
    clear_cache()


def least(make: Callable[[int], Any]) -> int:
    """The smallest limit, as the error for a smaller one names it."""
    with pytest.raises(SpecError, match=r"^memory_limit: got 1 bytes, expected at least (\d+) bytes") as caught:
        make(1)
    return int(str(caught.value).split("at least ")[1].split()[0])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("element", "options"), CALLS, ids=[f"{e}-{'-'.join(o)}" for e, o in CALLS])
def test_bits_are_those_without_a_limit(element: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one query tile at a time, for three, for all; and with as few buffers as there may be."""
    arrays = uniform(Shape(2, 4, 2, 230, 330, 24, 17), element)
    want, logs = flashtile.attention(*arrays, engine="starpu", return_lse=True, **options)
    small = least(lambda limit: flashtile.attention(*arrays, memory_limit=limit, **options))
    rooms = []
    share = outofcore.Needs.room
    monkeypatch.setattr(outofcore.Needs, "room", lambda *given: rooms.append(share(*given)) or rooms[-1])
    for limit in (small, small + 200_000, 1 << 30):
        o, lse = flashtile.attention(*arrays, memory_limit=limit, return_lse=True, **options)
        assert same_bits(o, want) and same_bits(lse, logs)
    assert rooms[0] == outofcore.Room(1, 2)
    assert rooms[0].group < rooms[1].group <= rooms[2].group


@pytest.mark.usefixtures("small_tiles")
def test_layouts_ranks_and_stores(tmp_path: Path) -> None:
    """Of three axes, strided, mapped from a file, in storage; results into an array, into a map, into a file."""
    q, k, v = (x[0] for x in uniform(Shape(1, 2, 2, 150, 250, 8, 8), "float32"))
    want = flashtile.attention(q, k, v, engine="starpu")
    np.save(tmp_path / "k.npy", k)
    k_mapped = np.load(tmp_path / "k.npy", mmap_mode="r")
    v_turned = np.ascontiguousarray(v.transpose(1, 0, 2)).transpose(1, 0, 2)

    class Stored:
        shape, dtype, chunks = q.shape, q.dtype, (1, 64, 8)

        def __getitem__(self, index: Any) -> np.ndarray:
            return q[index]

    limit = least(lambda n: flashtile.attention(q, k, v, memory_limit=n)) + 50_000
    out = np.lib.format.open_memmap(tmp_path / "o.npy", "w+", np.float32, q.shape)
    assert flashtile.attention(Stored(), k_mapped, v_turned, memory_limit=limit, out=out) is out
    assert same_bits(np.asarray(out), want)
    found = flashtile.attention(q, k_mapped, v, memory_limit=limit, out=tmp_path / "new.npy")
    assert isinstance(found, np.memmap) and same_bits(np.load(tmp_path / "new.npy"), want)
    private = np.load(tmp_path / "k.npy", mmap_mode="c")
    private[0, 0, 0] = 7.0  # a change that is in memory alone, and stays
    flashtile.attention(q, private, v, memory_limit=limit)
    assert private[0, 0, 0] == 7.0 != k[0, 0, 0]


TABLE = rng.standard_normal(600).astype("float32")
GRADIENTS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("float32", {"score_mod": lambda s, b, h, i, j: s + TABLE[i - j + 330]}, ("captured", "q", "k", "v")),
    ("float16", {"causal": True, "align": 37, "sinks": np.linspace(-1, 2, 4)}, ("q", "k", "v", "sinks")),
    ("float64", {"mask": MASK, "dropout_p": 0.2, "seed": 9, "bias": np.ones((230, 330))}, ("k", "bias")),
    ("bfloat16", {"window": (40, 30), "align": np.array([-250, 90])}, ("q", "v")),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("element", "options", "wrt"), GRADIENTS, ids=["-".join((e, *o)) for e, o, _ in GRADIENTS])
def test_bits_of_gradients_are_those_without_a_limit(
    element: str, options: dict[str, Any], wrt: tuple[str, ...]
) -> None:
    """With room for one tile at a time, for a few, for all; with and without a gradient of lse; added to others."""
    arrays = uniform(Shape(2, 4, 2, 230, 330, 24, 17), element)
    o, lse = flashtile.attention(*arrays, kernel="reference", return_lse=True, **options)
    do = uniform(Shape(2, 4, 2, 230, 230, 17, 17), element)[0]
    given, dlse = (do, *arrays, o, lse), np.sin(np.arange(lse.size)).reshape(lse.shape).astype(lse.dtype)
    options = {**options, "wrt": wrt}
    plain, more = (flashtile.attention_backward(*given, engine="starpu", dlse=x, **options) for x in (None, dlse))
    small = least(lambda limit: flashtile.attention_backward(*given, memory_limit=limit, **options))
    for limit, x, want in ((small, None, plain), (small + 100_000, dlse, more), (1 << 30, None, plain)):
        got = flashtile.attention_backward(*given, memory_limit=limit, dlse=x, **options)
        assert all(same_bits(a, b) for a, b in zip(of(got, wrt), of(want, wrt), strict=True))
    sums = []
    for how in ({"memory_limit": small}, {"engine": "starpu"}):
        ones = {n: np.ones_like(x) for n, x in zip(wrt, of(plain, wrt), strict=True) if n != "captured"}
        out = Gradients(**ones, captured=ByIdentity([(TABLE, np.ones_like(TABLE))]))
        flashtile.attention_backward(*given, out=out, accumulate=True, **options, **how)
        sums.append(of(out, wrt))
    assert all(same_bits(a, b) for a, b in zip(*sums, strict=True))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("element", ["float32", "bfloat16"])
def test_keys_pass_queries_that_fit_once(element: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five products: the bits of the call in memory, and 0 for keys that nobody sees."""
    arrays = uniform(Shape(2, 4, 2, 90, 530, 24, 17), element)
    options: dict[str, Any] = {"window": (130, 40), "align": np.array([120, 390])}
    o, lse = flashtile.attention(*arrays, kernel="reference", return_lse=True, **options)
    given = uniform(Shape(2, 4, 2, 90, 90, 17, 17), element)[0], *arrays, o, lse
    enough = least(lambda n: flashtile.attention_backward(*given, memory_limit=n, **options)) + 100_000
    calls: list[StreamedBackward] = []
    run = StreamedBackward.run
    monkeypatch.setattr(StreamedBackward, "run", lambda call, *given: calls.append(call) or run(call, *given))
    for accumulate in (False, True):
        found = []
        for how in ({"engine": "starpu"}, {"memory_limit": enough}):
            found.append(Gradients(*(np.full_like(x, 0.5) for x in arrays)))
            flashtile.attention_backward(*given, out=found[-1], accumulate=accumulate, **how, **options)
        assert all(same_bits(getattr(found[0], n), getattr(found[1], n)) for n in "qkv")
        if not accumulate:
            assert not found[1].k[:, :, :-1].any(axis=(1, 3)).all() and found[1].k.any()
    for call in calls:
        stages, _ = call.order.stages(call.of_head(0, 0), call.limit, call.workers)
        assert [(len(x.tiles), len(x.heads)) for x in stages] == [(2, 2)] and call.order.of_rows
        assert call.moved()[0] == call.moved()[1]


ORDERS: list[tuple[str, int, int, dict[str, Any], bool]] = [
    ("float32", 530, 230, {"causal": True, "align": 90}, False),
    ("bfloat16", 190, 530, {}, True),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("element", "rows", "keys", "options", "of_rows"), ORDERS, ids=["keys stay", "rows stay"])
def test_pairs_are_computed_once_and_bytes_move_as_planned(
    element: str, rows: int, keys: int, options: dict[str, Any], of_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for a tile or a few: sums leave and return; in files, or where they wait in arrays; added to others."""
    arrays = uniform(Shape(1, 4, 2, rows, keys, 24, 17), element)
    o, lse = flashtile.attention(*arrays, kernel="reference", return_lse=True, **options)
    given = uniform(Shape(1, 4, 2, rows, rows, 17, 17), element)[0], *arrays, o, lse
    calls: list[StreamedBackward] = []
    pairs, moved = [0], [0]
    submit, run = BackwardFlow.submit_backward, StreamedBackward._run

    def counted(flow: BackwardFlow, *args: Any) -> None:
        pairs[0] += len(flow.tasks[args[3]] if len(args) > 3 else flow.tasks) * flow.heads
        submit(flow, *args)

    def weighed(move: Any, place: int) -> Any:
        def wrapped(*args: Any) -> None:
            moved[0] += args[place].nbytes
            move(*args)

        return wrapped

    def watched(call: StreamedBackward, given: dict[str, Any], targets: dict[str, Target]) -> None:
        calls.append(call)
        targets = {
            n: x._replace(write=weighed(x.write, 3), back=x.back and weighed(x.back, 3)) for n, x in targets.items()
        }
        run(call, {n: weighed(x, 3) for n, x in given.items()}, targets)

    monkeypatch.setattr(BackwardFlow, "submit_backward", counted)
    monkeypatch.setattr(StreamedBackward, "_run", watched)
    for way in ("write", "read"):  # of sums in files; in arrays the targets count
        monkeypatch.setattr(outofcore_sums, f"{way}_at", weighed(getattr(outofcore_sums, f"{way}_at"), 1))
    small = least(lambda limit: flashtile.attention_backward(*given, memory_limit=limit, **options))
    for limit, accumulate in ((small, False), (small + 20_000, True)):
        found, counts = [], []
        for how in ({"engine": "starpu"}, {"memory_limit": limit}):
            found.append(Gradients(*(np.full_like(x, 0.5) for x in arrays)))
            pairs[0] = moved[0] = 0
            flashtile.attention_backward(*given, out=found[-1], accumulate=accumulate, **how, **options)
            counts.append(pairs[0])
        assert all(same_bits(getattr(found[0], n), getattr(found[1], n)) for n in "qkv")
        assert counts[0] == counts[1] > 0
        call = calls[-1]
        assert moved[0] == call.moved()[0] > call.moved()[1] and call.order.of_rows == of_rows


def of(found: Gradients, wrt: tuple[str, ...]) -> list[np.ndarray]:
    """The gradients of these names."""
    return [found.captured[TABLE] if n == "captured" and found.captured else getattr(found, n) for n in wrt]


@pytest.mark.usefixtures("small_tiles")
def test_gradients_of_stores_go_to_files_that_are_whole(tmp_path: Path) -> None:
    """Of three axes, mapped, in storage; into a map, into files; a call that fails leaves those that were there."""
    q, k, v = (x[0] for x in uniform(Shape(1, 2, 2, 150, 250, 8, 8), "float32"))
    o, lse = flashtile.attention(q, k, v, engine="starpu", return_lse=True)
    want = flashtile.attention_backward(q, q, k, v, o, lse, engine="starpu")
    np.save(tmp_path / "k.npy", k)
    k_mapped = np.load(tmp_path / "k.npy", mmap_mode="r")
    names = {n: tmp_path / f"d{n}.npy" for n in "kv"}
    names["k"].write_bytes(b"older")
    dq = np.lib.format.open_memmap(tmp_path / "dq.npy", "w+", np.float32, q.shape)
    out = Gradients(q=dq, **names)
    with pytest.raises(OSError, match="the disk is gone"):
        flashtile.attention_backward(q, q, k_mapped, Broken(v, 4), o, lse, memory_limit=1 << 24, out=out)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["dk.npy", "dq.npy", "k.npy"]
    assert names["k"].read_bytes() == b"older"
    stored = Broken(o, 1000), Broken(lse, 1000)
    got = flashtile.attention_backward(q, Broken(q, 1000), k_mapped, v, *stored, memory_limit=1 << 24, out=out)
    assert got.q is dq and isinstance(got.k, np.memmap) and not got.k.flags.writeable
    for n in "qkv":
        assert same_bits(np.load(tmp_path / f"d{n}.npy"), getattr(want, n)), n


class Broken:
    """Storage that fails after some reads."""

    def __init__(self, values: np.ndarray, reads: int) -> None:
        self.shape, self.dtype, self.chunks = values.shape, values.dtype, (1, 1, 64, 8)
        self.values, self.left = values, reads

    def __getitem__(self, index: Any) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        return self.values[index]


@pytest.mark.usefixtures("small_tiles")
def test_a_call_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    q, k, v = uniform(Shape(1, 2, 2, 150, 250, 8, 8), "float32")
    path = tmp_path / "o.npy"
    path.write_bytes(b"older")
    with pytest.raises(OSError, match="the disk is gone"):
        flashtile.attention(q, Broken(k, 4), v, memory_limit=1 << 24, out=path)
    assert [x.name for x in tmp_path.iterdir()] == ["o.npy"] and path.read_bytes() == b"older"
    want = flashtile.attention(q, k, v, engine="starpu")
    assert same_bits(flashtile.attention(q, k, v, memory_limit=1 << 24), want), "the engine stays usable"


@pytest.mark.usefixtures("small_tiles")
def test_zarr_arrays_are_replaced_when_they_are_whole(tmp_path: Path) -> None:
    """A new one by its name, one of a group, one in no folder; a call that fails leaves what was there."""
    zarr = pytest.importorskip("zarr")
    q, k, v = uniform(Shape(1, 2, 2, 150, 250, 8, 8), "float32")
    o, lse = flashtile.attention(q, k, v, engine="starpu", return_lse=True)
    want = flashtile.attention_backward(q, q, k, v, o, lse, engine="starpu")
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    size: dict[str, Any] = {"shape": k.shape, "dtype": "float32"}
    dk = group.create_array("dk", chunks=(1, 2, 70, 8), attributes={"kept": 1}, fill_value=3.0, **size)
    dv = zarr.create_array(zarr.storage.MemoryStore(), chunks=k.shape, **size)
    out, limit = Gradients(q=tmp_path / "dq.zarr", k=dk, v=dv), {"memory_limit": 1 << 24}

    def names() -> list[str]:
        return sorted(str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.parent.name != "c")

    before = names()
    with pytest.raises(OSError, match="the disk is gone"):
        flashtile.attention_backward(q, q, k, Broken(v, 4), o, lse, out=out, **limit)
    assert names() == before and (dk[:] == 3.0).all()
    got = flashtile.attention_backward(q, q, k, v, o, lse, out=out, **limit)
    assert got.k is dk and dk.attrs["kept"] == 1 and dk.chunks == (1, 2, 70, 8) and got.q.read_only
    assert all(same_bits(getattr(got, n)[:], getattr(want, n)) for n in "qkv")
    sums = Gradients(zarr.open_array(tmp_path / "dq.zarr", mode="r+"), dk, dv)
    flashtile.attention_backward(q, q, k, v, o, lse, out=sums, accumulate=True, **limit)
    twice = Gradients(*(getattr(want, n).copy() for n in "qkv"))
    flashtile.attention_backward(q, q, k, v, o, lse, out=twice, accumulate=True, engine="starpu")
    assert all(same_bits(getattr(sums, n)[:], getattr(twice, n)) for n in "qkv")
    for target in (tmp_path / "dq.zarr", sums.q):
        assert same_bits(flashtile.attention(q, k, v, out=target, **limit)[:], o)
    assert {name.split("/")[0] for name in names()} == {"g.zarr", "dq.zarr"}, "nothing is left beside"
    with pytest.raises(SpecError, match=r"^out: got shape \(1, 2, 250, 8\), expected \(1, 2, 150, 8\)"):
        flashtile.attention(q, k, v, out=dk, **limit)
    with pytest.raises(SpecError, match="^out: got an array in storage that is read only"):
        flashtile.attention(q, k, v, out=zarr.open_array(tmp_path / "dq.zarr", mode="r"), **limit)
    with pytest.raises(SpecError, match=r"^out\.k: got .*, expected a file of its own"):
        flashtile.attention_backward(q, q, k, v, o, lse, out=Gradients(sums.q, dk, dk), **limit)


FILES = """
import errno, os, resource, sys
import numpy as np
import flashtile

os.chdir(sys.argv[1])
x = np.random.default_rng(0).standard_normal((1, 3, 2000, 8), dtype=np.float32)
np.save("k.npy", x)
k = np.load("k.npy", mmap_mode="r")

def fails(number, name, call):
    try:
        call()
    except OSError as e:
        assert e.errno == number and name in str(e), e
    else:
        raise SystemExit("no error")

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, -1))  # as if the disk were full
fails(errno.EFBIG, "o.npy", lambda: flashtile.attention(x, k, k, memory_limit=1 << 24, out="o.npy"))
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
cut = lambda done, total: os.truncate("k.npy", 4096)
fails(errno.EIO, "k.npy", lambda: flashtile.attention(x, k, k, memory_limit=1 << 24, out="o.npy", progress=cut))
assert os.listdir() == ["k.npy"]
np.save("k.npy", x)
flashtile.attention(x, np.load("k.npy", mmap_mode="r"), x, memory_limit=1 << 24, out="k.npy")
assert (np.load("k.npy") == flashtile.attention(x, x, x, engine="starpu")).all()
"""


def test_files_that_fill_the_disk_or_are_cut_short_while_they_are_read(tmp_path: Path) -> None:
    """Errors that name the file, where a touch of a map would end the process."""
    done = processes.run([sys.executable, "-c", FILES, str(tmp_path)])
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("small_tiles")
def test_ctrl_c_at_the_end_of_a_wait_leaves_nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = uniform(Shape(1, 2, 2, 150, 250, 8, 8), "float32")
    want = flashtile.attention(q, k, v, memory_limit=1 << 24)
    unregister, calls = runtime.Runtime.unregister, [0]

    def interrupted(*given: Any) -> None:
        unregister(*given)
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt

    before = len(runtime.current().handles)
    monkeypatch.setattr(runtime.Runtime, "unregister", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flashtile.attention(q, k, v, memory_limit=1 << 24)
    assert len(runtime.current().handles) == before
    assert same_bits(flashtile.attention(q, k, v, memory_limit=1 << 24), want)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_array_in_storage_outlives_a_replacement_that_fails(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever change of names is interrupted."""
    zarr = pytest.importorskip("zarr")
    zarr.create_array(tmp_path / "o.zarr", shape=(2, 3), dtype="float32")[...] = 7
    place, replace, done = place_of(tmp_path / "o.zarr", "out"), os.replace, []
    assert place is not None

    def interrupted(source: Path, target: Path) -> None:
        done.append(target)
        if len(done) == failing + 1:
            raise KeyboardInterrupt
        replace(source, target)

    with pytest.raises(KeyboardInterrupt), place.writing((2, 3), np.dtype(np.float32)) as target:
        target[...] = 8
        monkeypatch.setattr(os, "replace", interrupted)  # Zarr replaces files of its own until here
    monkeypatch.undo()
    assert (zarr.open_array(tmp_path / "o.zarr", mode="r")[...] == 7).all()
    assert [x.name for x in tmp_path.iterdir()] == ["o.zarr"], "nothing is left beside"


def test_nothing_but_an_array_is_replaced(tmp_path: Path) -> None:
    """A folder that has the name of a result, a group of arrays, a file: refused before anything is computed."""
    zarr = pytest.importorskip("zarr")
    zarr.open_group(tmp_path / "group.zarr", mode="w").create_array("x", shape=(3,), dtype="float32")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "file.zarr").write_bytes(b"of something")
    for name in ("group.zarr", "folder.npy", "file.zarr"):
        with pytest.raises(SpecError, match=rf"^out: got '.*{name}', .*expected"):
            flashtile.attention(Q, K, V, memory_limit=1 << 24, out=tmp_path / name)
    assert len(sorted(tmp_path.rglob("*"))) == 6 and (tmp_path / "file.zarr").read_bytes() == b"of something"
    (tmp_path / "empty.zarr").mkdir()
    assert flashtile.attention(Q, K, V, memory_limit=1 << 24, out=tmp_path / "empty.zarr").shape == Q.shape


def test_progress_comes_to_its_end() -> None:
    q, k, v = uniform(Shape(1, 3, 3, 100, 100, 8, 8), "float32")
    seen: list[tuple[int, int]] = []
    flashtile.attention(q, k, v, memory_limit=1 << 24, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


PEAK = """
import ctypes, json, sys
import numpy as np
import flashtile

folder, keys, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def bytes_of(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

def peak_of(call):
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not to hide what comes
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # from here on the peak is this call's
    before = bytes_of("VmRSS")
    call()
    return bytes_of("VmHWM") - before

def written(name, rows):
    rng = np.random.default_rng(len(name))
    file = np.lib.format.open_memmap(f"{folder}/{name}.npy", "w+", np.float32, (1, 1, rows, 128))
    for first in range(0, rows, 4096):
        file[:, :, first : first + 4096] = rng.standard_normal(file[:, :, first : first + 4096].shape, np.float32)
    file.flush()

for name, rows in (("q", 5120), ("k", keys), ("vv", keys)):
    written(name, rows)
q, k, v = (np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("q", "k", "vv"))
part = np.ones((1, 1, 1500, 128), np.float32)
flashtile.attention(part, part, part, memory_limit=1 << 28)  # compiles, starts StarPU
peak = peak_of(lambda: flashtile.attention(q, k, v, memory_limit=limit, out=f"{folder}/o.npy"))
o = np.load(f"{folder}/o.npy", mmap_mode="r")
rows, whole = slice(5032, 5120), [np.load(f"{folder}/{name}.npy") for name in ("k", "vv")]
want = flashtile.attention(np.asarray(q[:, :, rows]), *whole)
off = np.abs(o[:, :, rows] - want).max()

few = np.array(q[:, :, :1024])
o, lse = flashtile.attention(few, *whole, return_lse=True)
del whole
given = few, q[:, :, :1024], k, v, o, lse
one = np.ones((1, 1, 1500, 128), np.float32)
flashtile.attention_backward(one, one, one, one, one, one[..., 0], memory_limit=1 << 28)
out = flashtile.Gradients(*(f"{folder}/{name}.npy" for name in ("dq", "dk", "dv")))
peak_backward = peak_of(lambda: flashtile.attention_backward(*given, memory_limit=limit, out=out))
last = np.array(k[:, :, -88:]), np.array(v[:, :, -88:])
want = flashtile.attention_backward(few, few, *last, o, lse)
for name in "kv":
    got = np.load(f"{folder}/d{name}.npy", mmap_mode="r")[:, :, -88:]
    off = max(off, np.abs(got - getattr(want, name)).max())
print(json.dumps([k.nbytes + v.nbytes, [peak, peak_backward], float(off)]))
"""


def test_the_peak_is_within_the_limit(tmp_path: Path) -> None:
    """Keys and values of four times the limit, their gradients of as much again, and more queries, or keys, than fit at
    once: the resident memory that a call adds, as the system counts it, maps included. It is a good part of the limit,
    too."""
    limit = 8 << 20
    done = processes.run([sys.executable, "-c", PEAK, str(tmp_path), "32768", str(limit)])
    assert done.returncode == 0, done.stderr
    keys, peaks, difference = json.loads(done.stdout)
    assert keys == 4 * limit
    for peak in peaks:
        assert limit // 2 < peak < 1.2 * limit, f"{peak / limit:.2f} of the limit"
    assert difference < 1e-5


Q, K, V = uniform(Shape(1, 2, 2, 96, 96, 8, 8), "float32")
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no bytes": (SpecError, "^memory_limit: got 0, expected bytes", {"memory_limit": 0}),
    "text": (SpecError, "^memory_limit: got '1GB'", {"memory_limit": "1GB"}),
    "another engine": (SpecError, "^engine: got 'direct' with a memory_limit", {"engine": "direct"}),
    "another kernel": (UnavailableError, "^kernel: got 'vanilla' with a memory_limit", {"kernel": "vanilla"}),
    "a name": (SpecError, r"^out: got 'o\.npz', expected an array, or a name that ends in \.npy", {"out": "o.npz"}),
    "no folder": (SpecError, "^out: got '/nowhere/o.npy'", {"out": "/nowhere/o.npy"}),
    "another shape": (SpecError, "^out: got shape", {"out": np.empty((1, 2, 96, 7), "float32")}),
    "an input": (SpecError, "^out: got an array within the memory that k spans", {"out": K}),
    "the name of an input": (SpecError, "^k: got the name 'k.npy' with a memory_limit, .* mmap_mode", {"k": "k.npy"}),
    "bfloat16 as np.load has it": (SpecError, "^k: got dtype void16, .*bfloat16", {"k": K.view("V2")}),
    "an unknown keyword": (SpecError, "^memory: ", {"memory": 3}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    kind, text, options = BAD[name]
    with pytest.raises(kind, match=text):
        flashtile.attention(**{"q": Q, "k": K, "v": V, "memory_limit": 1 << 24, **options})


@pytest.mark.parametrize("name", read_from(Q, 96))
def test_out_in_the_memory_of_what_changes_scores(name: str) -> None:
    out = np.zeros_like(Q)
    with pytest.raises(SpecError, match=f"^out: got an array within the memory that {name} spans"):
        flashtile.attention(Q, K, V, **read_from(out, 96)[name], out=out, memory_limit=1 << 24)
    assert not out.any()


BAD_GRADIENTS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no bytes": (SpecError, "^memory_limit: got 0, expected bytes", {"memory_limit": 0}),
    "too few": (SpecError, "^memory_limit: got 9 bytes, expected at least .* for a key tile", {"memory_limit": 9}),
    "another engine": (SpecError, "^engine: got 'direct' with a memory_limit", {"engine": "direct"}),
    "another kernel": (UnavailableError, "^kernel: got 'vanilla' with a memory_limit", {"kernel": "vanilla"}),
    "a name": (SpecError, r"^out\.k: got 'k\.npz', expected an array, or a name", {"out": Gradients(Q, "k.npz", V)}),
    "one file": (SpecError, r"^out\.q: got .*, expected a file of its own", {"out": Gradients(*["x.npy"] * 3)}),
    "an input": (SpecError, r"^out\.q: got an array that shares memory", {"out": Gradients(Q, "k.npy", "v.npy")}),
    "a file to add to": (SpecError, r"^out\.q: got 'q\.npy' with accumulate", {
        "out": Gradients("q.npy", "k.npy", "v.npy"), "accumulate": True}),
    "do": (SpecError, "^do: got shape", {"do": Q[:, :, 1:]}),
    "lse": (SpecError, "^lse: got dtype", {"lse": Q[..., 0].astype("float64")}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_bad_input_for_gradients_is_named(name: str) -> None:
    kind, text, options = BAD_GRADIENTS[name]
    given = {"do": Q, "q": Q, "k": K, "v": V, "o": Q, "lse": Q[..., 0], "memory_limit": 1 << 24}
    with pytest.raises(kind, match=text):
        flashtile.attention_backward(**{**given, **options})
