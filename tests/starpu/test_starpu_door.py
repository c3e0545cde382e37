"""flashtile.starpu: tensors as handles, tasks submitted by a program, beside tasks and handles of its own."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import Shape, numpy_dtype, read_from, same_bits, uniform
from processes import run

import flashtile
from flashtile.dtypes import DTYPES
from flashtile.engines.starpu import build, runtime, session
from flashtile.engines.starpu.flow import Flow
from flashtile.errors import KernelError, SpecError, UnavailableError
from flashtile.testing import assert_accurate

pytestmark = pytest.mark.usefixtures("starpu")

Script = Callable[..., Any]
ROWS, KEYS = 96, 80


class Registered:
    """q, k, v, o, lse as tiles; o is the state in accumulators with `state`, else in the inputs' dtype."""

    def __init__(self, door: Any, shape: Shape, dtype: str = "float32", state: bool = True) -> None:
        self.arrays = uniform(shape, dtype)
        accumulator = DTYPES[dtype].accumulator
        self.o = np.full((*shape.q[:3], shape.value_size), 7, accumulator if state else numpy_dtype(dtype))
        self.lse = np.full(shape.q[:3], 7, accumulator)
        rows = (ROWS, KEYS, KEYS, ROWS, ROWS)
        self.tensors = [door.register(x, n) for x, n in zip((*self.arrays, self.o, self.lse), rows, strict=True)]

    def close(self) -> None:
        for tensor in self.tensors:
            tensor.unregister()

    def check(self, **options: Any) -> None:
        self.close()
        assert_accurate(self.o.astype(self.arrays[0].dtype), *self.arrays, **options)
        assert_accurate(self.lse, *self.arrays, kind="lse", **options)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True, "align": "bottom_right"},
    {"window": (60, 20), "align": np.array([-40, 90])},
    {"alibi_slopes": np.linspace(0.01, 0.2, 4, dtype="float32"), "align": 0, "causal": True},
    {"sinks": np.linspace(-1, 2, 4, dtype="float32")},
]


def test_tiles_that_were_never_written_are_not_read(starpu: Any) -> None:
    """StarPU would end the process. Whole tensors, single tiles, states, acquire; and no more once they are written."""
    shape, rows = (1, 1, 20, 8), 10
    full = [starpu.register(np.ones(shape, "float32"), rows) for _ in range(3)]
    void, o, lse = starpu.empty(shape, "float32", rows), *(starpu.empty(s, "float32", rows) for s in (shape, shape[:3]))
    other_o, other_lse = starpu.empty(shape, "float32", rows), starpu.empty(shape[:3], "float32", rows)
    never = r"^submit: got tile \(0, 0, {}\) of a tensor of shape \(1, 1, 20(, 8)?\), which was never written"
    for n in range(3):
        given = [void if n == m else x for m, x in enumerate(full)]
        with pytest.raises(SpecError, match=never.format(0)):
            starpu.submit_forward(*given, o, lse)
    for tile in (0, 1):
        with pytest.raises(SpecError, match=never.format(tile)):
            pair = full[0][0, 0, tile], full[1][0, 0, 0], full[2][0, 0, 0], o[0, 0, tile], lse[0, 0, tile]
            starpu.submit_forward(*pair, carry=True)
    with pytest.raises(SpecError, match=never.format(0)):
        starpu.submit_merge(o, lse, other_o, other_lse)
    for mode in ("R", "RW"):
        with (
            pytest.raises(SpecError, match=f"^acquire: got mode '{mode}' on tile .*never written"),
            o.acquire((0, 0, 1), mode),
        ):
            pass
    for tile in (0, 1):
        with void.acquire((0, 0, tile), "W") as held:
            held[...] = 1
    assert starpu.submit_forward(full[0], void, full[2], o, lse) > 0
    starpu.submit_forward(*full, other_o, other_lse)
    starpu.submit_merge(o, lse, other_o, other_lse)
    starpu.wait()
    with o.acquire((0, 0, 1)) as held:
        assert np.allclose(held, 1)
    foreign = starpu.empty(shape, "float32", rows)
    assert foreign[0, 0, 0].handle in {int(h) for h in foreign.handles.ravel()}  # the program's tasks may write it
    assert not foreign.runtime.unwritten.intersection([int(foreign.handles[0, 0, 0])])
    for tensor in (*full, void, o, lse, other_o, other_lse, foreign):
        tensor.unregister()
    assert not runtime.current().unwritten


@pytest.mark.parametrize("family", ["cpu", "vanilla"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "none")
def test_whole_tensors(starpu: Any, dtype: str, options: dict[str, Any], family: str) -> None:
    given = Registered(starpu, Shape(2, 4, 2, 200, 250, 16, 24), dtype, state=False)
    assert starpu.submit_forward(*given.tensors, kernel=family, **options) > 0
    starpu.wait()
    given.check(**options)


# A sink is counted by the last task, and in any order there is none.
CHAINS = [(how, options) for how in ("ordered", "commute") for options in OPTIONS[: -1 if how == "commute" else None]]


@pytest.mark.parametrize(("accumulate", "options"), CHAINS, ids=lambda x: "-".join(x) if isinstance(x, dict) else x)
def test_tiles_one_by_one(starpu: Any, dtype: str, options: dict[str, Any], accumulate: str) -> None:
    """The state is carried from task to task in any order of keys; a sink is counted with the last."""
    given = Registered(starpu, Shape(2, 4, 2, 200, 250, 16, 24), dtype)
    q, k, v, o, lse = given.tensors
    for b, h, i in np.ndindex(q.grid):
        begun = 0
        for j in (2, 0, 3, 1):
            begun += starpu.submit_forward(
                q[b, h, i],
                k[b, h // 2, j],
                v[b, h // 2, j],
                o[b, h, i],
                lse[b, h, i],
                carry=begun > 0,
                last=j == 1,
                accumulate=accumulate,
                **options,
            )
        if not begun:  # the mask hides every key: nobody wrote the state
            for tensor, nothing in ((o, 0), (lse, -np.inf)):
                with tensor.acquire((b, h, i), "W") as empty:
                    empty[...] = nothing
    starpu.wait()
    given.check(**options)


def test_commuting_whole_tensors_and_what_cannot_commute(starpu: Any) -> None:
    given = Registered(starpu, Shape(1, 2, 2, 300, 500, 16, 16))
    starpu.submit_forward(*given.tensors, accumulate="commute")
    starpu.wait()
    with pytest.raises(UnavailableError, match="accumulate: got 'commute' with sinks"):
        starpu.submit_forward(*given.tensors, accumulate="commute", sinks=np.zeros(2, "float32"))
    with pytest.raises(SpecError, match="accumulate: got 'redux', expected 'ordered' or 'commute'"):
        starpu.submit_forward(*given.tensors, accumulate="redux")
    given.check()


@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_merge(starpu: Any, wide: str) -> None:
    """Two partial results over disjoint keys, one of which saw nothing in some rows."""
    q, k, v = uniform(Shape(2, 3, 3, 130, 200, 16, 20), wide)
    parts = [
        flashtile.attention(q, k[:, :, at], v[:, :, at], return_lse=True, causal=True, align=shift)
        for at, shift in ((slice(0, 90), 0), (slice(90, 200), -90))
    ]
    expected = flashtile.merge(parts)
    tensors = [[starpu.register(np.ascontiguousarray(x), 50) for x in part] for part in parts]
    assert starpu.submit_merge(*tensors[0], *tensors[1]) == tensors[0][0].handles.size
    starpu.wait()
    for part in tensors:
        for tensor in part:
            tensor.unregister()
    assert_accurate(parts[0][0], q, k, v, causal=True, align=0)
    assert_accurate(parts[0][1], q, k, v, kind="lse", causal=True, align=0)
    assert np.isneginf(expected[1]).sum() == np.isneginf(parts[0][1]).sum()


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_finish_rounds_to_nearest(starpu: Any, narrow: str) -> None:
    state = np.random.default_rng(0).standard_normal((2, 3, 130, 21)).astype("float32")
    lse, o = np.zeros((2, 3, 130), "float32"), np.zeros(state.shape, numpy_dtype(narrow))
    lse[:, :, ::7], state[:, :, ::7] = -np.inf, 0
    tensors = [starpu.register(x, 50) for x in (state, lse, o)]
    assert starpu.submit_finish(*tensors) == 18
    starpu.wait()
    for tensor in tensors:
        tensor.unregister()
    assert same_bits(o, state.astype(numpy_dtype(narrow)))


def test_tensors_that_starpu_owns(starpu: Any) -> None:
    """Filled by acquire(W), read by acquire(R); tiles are ragged; nothing of ours lies behind them."""
    arrays = uniform(Shape(1, 2, 2, 200, 250, 16, 24), "float32")
    shapes = [x.shape for x in arrays] + [(1, 2, 200, 24), (1, 2, 200)]
    tensors = [starpu.empty(shape, "float32", n) for shape, n in zip(shapes, (96, 80, 80, 96, 96), strict=True)]
    for array, tensor in zip(arrays, tensors, strict=False):
        for b, h, i in np.ndindex(tensor.grid):
            with tensor.acquire((b, h, i), "W") as tile:
                tile[...] = array[b, h, tensor[b, h, i].first :][: tensor[b, h, i].height]
    starpu.submit_forward(*tensors)
    found = np.empty((1, 2, 200, 24), "float32")
    for b, h, i in np.ndindex(tensors[3].grid):
        with tensors[3].acquire((b, h, i)) as tile:  # waits for the tasks
            assert not tile.flags.writeable and len(tile) == (96, 96, 8)[i]
            found[b, h, 96 * i : 96 * i + len(tile)] = tile
    assert_accurate(found, *arrays)
    for tensor in tensors:
        with tensor:  # unregisters at the end of the block
            pass
        with pytest.raises(SpecError, match="unregistered"):
            tensor.unregister()


def test_arrays_are_not_copied(starpu: Any) -> None:
    """A strided array: what a task writes is in the array itself, and gaps between rows stay as they were."""
    wide = np.full((1, 2, 200, 40), 3, "float32")
    o = wide[..., 5:29]
    given = Registered(starpu, Shape(1, 2, 2, 200, 250, 16, 24))
    tensor = starpu.register(o, ROWS)
    with tensor.acquire((0, 1, 1)) as tile:
        assert tile.ctypes.data == o[0, 1, 96:].ctypes.data and tile.strides == (160, 4)
    starpu.submit_forward(*given.tensors[:3], tensor, given.tensors[4])
    starpu.wait()
    tensor.unregister()
    given.close()
    assert_accurate(np.ascontiguousarray(o), *given.arrays)
    assert (wide[..., :5] == 3).all() and (wide[..., 29:] == 3).all()


MISFITS: list[tuple[str, Callable[[Any, list[Any]], Any]]] = [
    (
        "k: got tile (0, 0, 0), expected tile (0, 1, 0)",
        lambda s, t: s.submit_forward(t[0][0, 1, 0], t[1][0, 0, 0], t[2][0, 1, 0], t[3][0, 1, 0], t[4][0, 1, 0]),
    ),
    (
        "o: got tile (0, 0, 1)",
        lambda s, t: s.submit_forward(t[0][0, 0, 0], t[1][0, 0, 0], t[2][0, 0, 0], t[3][0, 0, 1], t[4][0, 0, 0]),
    ),
    ("k: got a TiledTensor, expected a tile as q", lambda s, t: s.submit_forward(t[0][0, 0, 0], *t[1:])),
    ("q: got a ndarray, expected a registered tensor", lambda s, t: s.submit_forward(np.zeros(3), *t[1:])),
    ("carry: got a value with whole tensors", lambda s, t: s.submit_forward(*t, carry=True)),
    ("kernel: got 'reference', expected 'cpu' or 'vanilla'", lambda s, t: s.submit_forward(*t, kernel="reference")),
    (
        "accumulate: got 'commute', expected 'ordered' with kernel 'vanilla'",
        lambda s, t: s.submit_forward(*t, kernel="vanilla", accumulate="commute"),
    ),
    ("o: got an array within the memory that", lambda s, t: s.submit_forward(*t[:3], t[0], t[4])),
    ("lse: got shape", lambda s, t: s.submit_forward(*t[:4], t[3])),
    (
        "v: got tiles of 96 rows, expected 80 as in k",
        lambda s, t: s.submit_forward(*t[:2], s.empty((1, 2, 250, 16), "float32", 96), *t[3:]),
    ),
    ("align: got None with 200 queries and 250 keys", lambda s, t: s.submit_forward(*t, causal=True)),
    ("rows: got 0", lambda s, t: s.empty((1, 1, 4, 4), "float32", 0)),
    ("shape: got", lambda s, t: s.empty((1, -1, 4, 4), "float32", 2)),
    ("array: got strides", lambda s, t: s.register(np.zeros((1, 1, 4, 8), "float32")[..., ::2], 2)),
    (
        "handles: got shape (1, 1, 1), expected (1, 1, 2)",
        lambda s, t: s.wrap(np.ones((1, 1, 1), int), (1, 1, 4, 4), "float32", 2),
    ),
    (
        "handle (0, 0, 0): got 0x1, expected a matrix, vector or variable of 32 bytes",
        lambda s, t: s.wrap(np.array([[[1, 0]]]), (1, 1, 4, 4), "float32", 2),
    ),
    (
        "handle (0, 0, 0): got 0x10000, expected",
        lambda s, t: s.wrap(np.array([[[1 << 16, 0]]]), (1, 1, 4, 4), "float32", 2),
    ),
    (
        "handle (0, 0, 0): got one of 6144 bytes, expected a matrix, vector or variable of 6080 bytes",
        lambda s, t: s.wrap(t[0].handles[:1, :1, :1], (1, 1, 95, 16), "float32", 95),
    ),
    (
        "o: got float32 (1, 2, 200, 16) in tiles of 96 rows, expected (1, 2, 200, 16) in tiles of 96 rows, of a dtype",
        lambda s, t: s.submit_finish(
            s.empty((1, 2, 200, 16), "float64", 96), s.empty((1, 2, 200), "float64", 96), t[3]
        ),
    ),
    ("other_o: got float32 (1, 2, 200, 16), expected another", lambda s, t: s.submit_merge(*t[3:], *t[3:])),
]


def test_misfits_are_one_clear_error_each(starpu: Any) -> None:
    given = Registered(starpu, Shape(1, 2, 2, 200, 250, 16, 16))
    for expected, call in MISFITS:
        with pytest.raises(SpecError) as raised:
            call(starpu, given.tensors)
        assert str(raised.value).startswith(expected), raised.value
    starpu.submit_forward(*given.tensors)
    starpu.wait()
    given.check()


@pytest.mark.parametrize("which", ["o", "lse"])
@pytest.mark.parametrize("name", read_from(np.zeros((1, 2, 96), np.float32), 96))
def test_outputs_in_the_memory_of_what_changes_scores(starpu: Any, name: str, which: str) -> None:
    """Tasks would read what other tasks write: of whole tensors, and of tiles."""
    arrays = [np.zeros((1, 2, 96, 8)[: 3 + (n < 4)], np.float32) for n in range(5)]
    given = [starpu.register(x, 96) for x in arrays]
    options = read_from(arrays[("q", "k", "v", "o", "lse").index(which)], 96)[name]
    for call in given, [x[0, 1, 0] for x in given]:
        with pytest.raises(SpecError, match=f"^{which}: got an array within the memory that {name} spans"):
            starpu.submit_forward(*call, **options)
    for x in given:
        x.unregister()


PROGRAM = r"""
#include <starpu.h>
#include <stdlib.h>
#include <unistd.h>
/* A program's own handles and tasks: each doubles the elements of a tile, once the program says so. */
static volatile int allowed;
void own_allow(void) { allowed = 1; }
static void twice(void *buffers[], void *arg)
{
    float *x = (float *)STARPU_VARIABLE_GET_PTR(buffers[0]);
    size_t n = STARPU_VARIABLE_GET_ELEMSIZE(buffers[0]) / sizeof *x;
    (void)arg;
    while (!allowed) usleep(100);
    for (size_t i = 0; i < n; i++) x[i] *= 2;
}
static struct starpu_codelet codelet = {.cpu_funcs = {twice}, .nbuffers = 1, .modes = {STARPU_RW}, .name = "twice"};
void *own_register(float *x, size_t bytes)
{
    starpu_data_handle_t handle;
    starpu_variable_data_register(&handle, STARPU_MAIN_RAM, (uintptr_t)x, bytes);
    return handle;
}
int own_twice(void *handle) { return starpu_task_insert(&codelet, STARPU_RW, (starpu_data_handle_t)handle, 0); }
void own_unregister(void *handle) { starpu_data_unregister((starpu_data_handle_t)handle); }
"""


@pytest.fixture
def program(tmp_path: Path) -> ctypes.CDLL:
    """A C program on the same StarPU."""
    found = build.package()
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert found is not None and compiler is not None
    source, library = tmp_path / "own.c", tmp_path / "own.so"
    source.write_text(PROGRAM)
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", found[0]], capture_output=True, text=True, check=True)
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(source), *flags.stdout.split()]
    run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.own_register.restype = ctypes.c_void_p
    loaded.own_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.own_twice.argtypes = loaded.own_unregister.argtypes = [ctypes.c_void_p]
    return loaded


def test_a_program_s_own_handles_and_tasks(starpu: Any, program: ctypes.CDLL) -> None:
    """Its tasks before ours change what ours read, its tasks after ours change what ours wrote; nobody waits."""
    q, k, v = uniform(Shape(1, 2, 2, 60, 80, 16, 16), "float32")
    o, lse = np.zeros_like(q), np.zeros(q.shape[:3], "float32")
    given = [x.copy() for x in (q, k, v)]

    def wrapped(x: np.ndarray) -> tuple[list[int], Any]:
        handles = [program.own_register(x[0, h].ctypes.data, x[0, h].nbytes) for h in range(2)]
        return handles, starpu.wrap(np.array(handles).reshape(1, 2, 1), x.shape, "float32", x.shape[2])

    handles, tensors = zip(*map(wrapped, (*given, o, lse)), strict=True)
    for handle in handles[0]:
        assert program.own_twice(handle) == 0  # q
    starpu.submit_forward(*tensors)
    for handle in handles[3]:
        assert program.own_twice(handle) == 0  # o
    assert session.current().door_job().pending == 2  # all is submitted, nothing has run
    program.own_allow()
    for tensor in tensors:
        tensor.unregister()  # only forgets them
    for handle in sum(handles, []):
        program.own_unregister(handle)
    starpu.wait()
    assert same_bits(given[0], q * 2)
    assert_accurate(o / 2, q * 2, k, v)


def test_errors_in_tasks_come_out_of_wait(starpu: Any) -> None:
    """With the codelet and the tile; wait then works again."""
    kernel = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    given = Registered(starpu, Shape(1, 2, 2, 200, 250, 16, 16))
    starpu.submit_forward(*given.tensors, scale=0.5)
    starpu.wait()
    (flow,) = [f for f in session.current().flows.values() if isinstance(f, Flow) and f.spec.scale == 0.5]
    native, broken = flow.program.data.cpu, kernel(lambda *_: 33)
    flow.program.data.cpu = ctypes.cast(broken, ctypes.c_void_p).value
    try:
        starpu.submit_forward(*given.tensors, scale=0.5)
        with pytest.raises(
            KernelError,
            match=r"codelet flashtile_forward_float32 failed on batch 0, head \d, query "
            r"tile \d, key tile \d with status 33, on CPU \d",
        ):
            starpu.wait()
    finally:
        flow.program.data.cpu = native
    starpu.wait()
    starpu.submit_forward(*given.tensors, scale=0.5)
    starpu.wait()
    given.check(scale=0.5)


def test_out_of_core(script: Script, tmp_path: Path) -> None:
    """34 MB of tiles that StarPU owns in 8 MB of memory: the rest lies in a folder, and the result is right."""
    done = script(
        """
        starpu.init(workers=2)
        heads, n, size, rows = 16, 1024, 128, 256
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal((1, heads, n, size)).astype("float32") for _ in range(3)]
        tensors = [starpu.empty(x.shape, "float32", rows) for x in arrays]
        outputs = [starpu.empty((1, heads, n, size), "float32", rows), starpu.empty((1, heads, n), "float32", rows)]
        for x, tensor in zip(arrays, tensors):
            for b, h, i in np.ndindex(tensor.grid):
                with tensor.acquire((b, h, i), "W") as tile:
                    tile[...] = x[b, h, i * rows : (i + 1) * rows]
        starpu.submit_forward(*tensors, *outputs)
        starpu.wait()
        o = np.empty_like(arrays[0])
        for b, h, i in np.ndindex(outputs[0].grid):
            with outputs[0].acquire((b, h, i)) as tile:
                o[b, h, i * rows : (i + 1) * rows] = tile
        from flashtile.testing import assert_accurate
        assert_accurate(*(x[:, 15] for x in (o, *arrays)))
        files = [os.path.getsize(os.path.join(root, f)) for root, _, names in os.walk(os.environ["SWAP"])
                 for f in names]
        print(len(files), sum(files))
        """,
        STARPU_LIMIT_CPU_MEM="8",
        STARPU_DISK_SWAP=str(tmp_path),
        STARPU_DISK_SWAP_SIZE="200",
        SWAP=str(tmp_path),
    )
    files, nbytes = map(int, done.stdout.split())
    assert files > 0 and nbytes > 10_000_000


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_torch_tensor_is_registered_where_it_lies(starpu: Any, name: str) -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 16, generator=generator).to(getattr(torch, name)) for _ in range(3))

    def array(x: Any) -> np.ndarray:
        """A copy for NumPy."""
        return (x.view(torch.int16).numpy() if name == "bfloat16" else x.numpy()).copy().view(numpy_dtype(name))

    def attended(q: Any, k: Any, v: Any, o: Any, lse: Any) -> None:
        tensors = [starpu.register(x, 32) for x in (q, k, v, o, lse)]
        starpu.submit_forward(*tensors, causal=True)
        starpu.wait()
        for x in tensors:
            x.unregister()

    o, lse = torch.zeros_like(q), torch.zeros(1, 2, 70)
    expected, expected_lse = array(o), lse.numpy().copy()
    attended(q, k, v, o, lse)
    attended(*map(array, (q, k, v)), expected, expected_lse)
    assert same_bits(array(o), expected) and same_bits(lse.numpy(), expected_lse) and expected.any()
    with pytest.raises(SpecError, match="^array: got a tensor that requires grad"):
        starpu.register(torch.zeros(1, 1, 4, 8, requires_grad=True), 2)


def test_a_tensor_tells_what_it_is(starpu: Any) -> None:
    tensor = starpu.register(np.zeros((1, 2, 70, 16), "float32"), 32)
    assert repr(tensor) == "<TiledTensor (1, 2, 70, 16) float32, 1 x 2 x 3 tiles of 32 rows>"
    tensor.unregister()
    assert repr(tensor).endswith("rows, unregistered>")


def test_init_replaces_a_start_by_a_call(script: Any) -> None:
    done = script("""
        q, k, v, *_ = arrays()
        before = flashtile.attention(q, k, v, engine="starpu")
        starpu.init(workers=1)
        print(starpu.workers())
        assert np.array_equal(flashtile.attention(q, k, v, engine="starpu"), before)
        print(message(starpu.init, SpecError))
    """)
    assert done.stdout == "1\ninit: got a second call, expected shutdown() before another init()\n"


@pytest.mark.parametrize("silent", ["0", "1"])
def test_messages_of_starpu_are_kept_back_on_request(script: Any, tmp_path: Any, silent: str) -> None:
    """A first start on a machine measures the bus, and says so."""
    done = script(f"""
        from flashtile.llvm import cache
        os.environ["FLASHTILE_CACHE_DIR"] = str(cache.directory())
        os.environ.pop("STARPU_PERF_MODEL_DIR", None)
        # StarPU looks into the first before the second for what an earlier start measured.
        os.environ.update(STARPU_SILENT="{silent}", XDG_CACHE_HOME="{tmp_path}", STARPU_HOME="{tmp_path}")
        starpu.init(workers=1)
        starpu.shutdown()
    """)
    assert ("calibrating" in done.stderr) == (silent == "0"), done.stderr
    assert silent == "0" or not done.stderr


def test_workers_stay_on_the_cpus_of_the_process(script: Any) -> None:
    done = script("""
        allowed = {min(os.sched_getaffinity(0))}
        os.sched_setaffinity(0, allowed)
        starpu.init(workers=2)
        print(all(os.sched_getaffinity(int(task)) == allowed for task in os.listdir("/proc/self/task")))
    """)
    assert done.stdout == "True\n"
