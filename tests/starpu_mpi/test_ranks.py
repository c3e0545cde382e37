"""Attention over 1, 2 and 4 ranks: right by the accuracy rule, equal to the last bit; errors that reach everybody."""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
from rank_cases import Ranks, cases

import flashtile
from flashtile import starpu_mpi
from flashtile.engines.starpu_mpi import build, cpus
from flashtile.engines.starpu_mpi.cpus import Place
from flashtile.gradient_problem import ByIdentity, Gradients
from flashtile.testing import assert_gradients_accurate, expect

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

COUNTS = 1, 2, 4
ALL = frozenset(range(4))
# Cases that two ranks compute, too: an exchange of heads, what is cut by rows, what is summed over ranks, few tiles.
ON_TWO = "causal", "float16", "sinks, softcap, ALiBi", "bias", "own", "documents", "fewer tiles than ranks"


@pytest.fixture(scope="module")
def results(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, np.ndarray]]:
    """By number of ranks, what rank_compute.py wrote."""
    found = {}
    for n in COUNTS:
        path = tmp_path_factory.mktemp("ranks") / "out.npz"
        done = ranks(n, "rank_compute.py", path, *(ON_TWO if n == 2 else cases()))
        assert done.returncode == 0, done.stdout + done.stderr
        with np.load(path) as read:
            found[n] = dict(read)
    return found


@pytest.mark.parametrize("name", cases())
def test_every_number_of_ranks_gives_the_same_bits(name: str, results: dict[int, dict[str, np.ndarray]]) -> None:
    found = [what for what in results[1] if what.startswith(f"{name}: ")]
    assert len(found) == 2 + len(cases()[name].wrt)
    for what in found:
        first, *others = (results[n][what] for n in COUNTS if n != 2 or name in ON_TWO)
        assert all(first.tobytes() == other.tobytes() for other in others), what


@pytest.mark.parametrize("name", cases())
def test_ranks_are_accurate(name: str, results: dict[int, dict[str, np.ndarray]]) -> None:
    case = cases()[name]
    arrays, options = case.arrays, case.options
    o, lse = expect(*arrays, **options)
    got = results[4][f"{name}: o"]
    o.check(got.view(arrays[0].dtype), "o")
    lse.check(results[4][f"{name}: lse"], "lse")


@pytest.mark.parametrize("name", [name for name, case in cases().items() if case.wrt])
def test_gradients_of_ranks_are_accurate(name: str, results: dict[int, dict[str, np.ndarray]]) -> None:
    case, got = cases()[name], results[4]
    qkv = {n: got.get(f"{name}: d{n}") for n in "qkv"}
    others = {n: got.get(f"{name}: {n}") for n in ("bias", "sinks", "alibi_slopes")}
    captured = None
    if "captured" in case.wrt:
        source = inspect.getclosurevars(case.options["score_mod"]).nonlocals["table"]
        captured = ByIdentity([(source, got[f"{name}: captured 0"])])
    found = Gradients(**qkv, **others, captured=captured)
    assert_gradients_accurate(found, case.do, *case.arrays, wrt=case.wrt, **case.options)


@pytest.mark.parametrize("distribution", ["zigzag", "contiguous"])
@pytest.mark.parametrize(("length", "ranks", "tile"), [(1000, 4, 96), (10, 3, 4), (0, 2, 8), (97, 1, 96), (5, 8, 1)])
def test_parts_cover_every_row_once(length: int, ranks: int, tile: int, distribution: str) -> None:
    parts = [starpu_mpi.part(length, r, ranks, tile=tile, distribution=distribution) for r in range(ranks)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(length))


def test_zigzag_shares_causal_work_evenly() -> None:
    pairs = [int((starpu_mpi.part(8192, r, 4, tile=64) + 1).sum()) for r in range(4)]
    assert max(pairs) - min(pairs) < max(pairs) // 1000


@pytest.mark.parametrize(
    ("ranks", "expected", "crowded"),
    [
        ([Place("a", frozenset({0, 1}), 2), Place("a", frozenset({2, 3}), 2)], [{}, {}], True),
        ([Place("a", frozenset({0, 1}), 1), Place("b", frozenset({0, 1}), 1)], [{}, {}], False),
        ([Place("a", ALL, 1)] * 2, [{"STARPU_WORKERS_CPUID": "0"}, {"STARPU_WORKERS_CPUID": "2"}], False),
        (
            [Place("a", ALL, 2), Place("a", ALL, 1)],
            [{"STARPU_WORKERS_CPUID": "0 1"}, {"STARPU_WORKERS_CPUID": "2"}],
            True,
        ),
        ([Place("a", ALL, 3)] * 2, [{"STARPU_WORKERS_NOBIND": "1"}] * 2, True),
        (
            [Place("a", frozenset({0, 1}), 1), Place("a", frozenset({1, 2}), 1)],
            [{"STARPU_WORKERS_NOBIND": "1"}] * 2,
            True,
        ),
    ],
)
def test_ranks_that_share_cpus_keep_their_workers_apart(
    ranks: list[Place], expected: list[dict[str, str]], crowded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound as StarPU has them, workers of two ranks would be on the same CPU, at half of the speed."""
    monkeypatch.setattr(os, "cpu_count", lambda: len(ALL))
    for rank, found in enumerate(expected):
        assert cpus.settings(ranks, rank) == (found and {**found, "STARPU_MPI_NOBIND": "1"})
        assert cpus.crowded(ranks, rank) == crowded


ERRORS = """
import json, sys
import numpy as np
from mpi4py import MPI
import flashtile
from flashtile import starpu_mpi
from flashtile.errors import FlashtileError

comm = MPI.COMM_WORLD
second = comm.rank == 1

def call(rows=None, dtype="float32", heads=2, **options):
    rows = len(starpu_mpi.part(400, comm.rank, comm.size, tile=96)) if rows is None else rows
    q = np.zeros((1, heads, rows, 8), dtype)
    return starpu_mpi.attention(q, q, q, **{"tile": 96, **options})

def text(what):
    try:
        what()
    except FlashtileError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"

said = {
    "dtype": text(lambda: call(dtype="float64" if second else "float32")),
    "heads": text(lambda: call(heads=4 if second else 2)),
    "rows": text(lambda: call(rows=90 if second else None)),
    "option": text(lambda: call(causal=second)),
    "array": text(lambda: call(sinks=np.array([1.0, 2.0 + second]))),
    "refused": text(lambda: call(softcap=-1.0 if second else 3.0)),
    "tile": text(lambda: call(tile=0)),
    "distribution": text(lambda: call(distribution="ring")),
    "seed": text(lambda: call(dropout_p=0.5, seed=1 + second)),
    "then": text(call),
}
every = comm.gather(said)
if comm.rank == 0:
    print(json.dumps(every))
"""


def test_an_error_of_one_rank_is_raised_on_all(printed: dict[str, list[str]]) -> None:
    first, second = json.loads(printed["errors"][0])
    for name in ("dtype", "heads", "rows", "option", "array", "seed"):
        assert first[name] == second[name], name  # both compare the same facts
        assert first[name].startswith("SpecError: rank ") and " got " in first[name], first[name]
    assert first["refused"] == "SpecError: rank 1: " + second["refused"].removeprefix("SpecError: ")
    assert first["tile"] == "SpecError: tile: got 0, expected a positive integer"
    assert "'zigzag' or 'contiguous'" in first["distribution"]
    assert first["then"] == second["then"] == "no error"


GRADIENT_ERRORS = """
import json
from pathlib import Path
import numpy as np
from mpi4py import MPI
import flashtile
from flashtile import starpu, starpu_mpi
from flashtile.errors import FlashtileError

comm = MPI.COMM_WORLD
second = comm.rank == 1
rows = len(starpu_mpi.part(400, comm.rank, comm.size, tile=96))
q = np.zeros((1, 2, rows, 8), "float32")
lse = np.zeros((1, 2, rows), "float32")

def call(do=q, lse=lse, **options):
    return starpu_mpi.attention_backward(do, q, q, q, q, lse, **{"tile": 96, **options})

def text(what):
    try:
        what()
    except FlashtileError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"

rng = np.random.default_rng(0)
large = rng.standard_normal((1500, 1500)).astype("float32")  # 9 MB, to whose elements rows of every tile add
x = rng.standard_normal((1, 2, 400, 8)).astype("float32")
part = starpu_mpi.part(400, comm.rank, comm.size, tile=96)

def shared():
    options = {"score_mod": lambda s, b, h, i, j: s + large[7, j]}
    mine = x[:, :, part]
    o, lse = starpu_mpi.attention(mine, mine, mine, return_lse=True, tile=96, **options)
    found = starpu_mpi.attention_backward(mine, mine, mine, mine, o, lse, wrt="captured", tile=96, **options)
    o, lse = flashtile.attention(x, x, x, return_lse=True, **options)
    want = flashtile.attention_backward(x, x, x, x, o, lse, wrt="captured", **options)
    off = np.abs(found.captured[large] - want.captured[large]).max()
    assert off < 1e-5 and np.abs(want.captured[large]).max() > 0.1, off

def naps():  # of StarPU-MPI's thread, which otherwise polls
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text() == "MPI\\n":
            return int((task / "status").read_text().split("voluntary_ctxt_switches:")[1].split()[0])

bias = np.zeros((400, 400), "float32")

def pairs():  # that are computed, of five tiles by five, and two heads
    with starpu.profile() as seen:
        call(bias=bias, wrt=("q", "k", "v", "bias"))
    return comm.allreduce(sum("backward" in x.codelet for x in seen.tasks))

said = {
    "do": text(lambda: call(do=q[:, :, 1:] if second else q)),
    "lse": text(lambda: call(lse=lse.astype("float64") if second else lse)),
    "wrt": text(lambda: call(wrt="q" if second else "k")),
    "dlse": text(lambda: call(dlse=lse if second else None)),
    "name": text(lambda: call(wrt="bias")),
    "shared": text(shared),
    "bias": text(lambda: call(bias=bias[: rows - second])),
    "no bias": text(lambda: call(bias=bias[:rows] if second else None)),
    "then": text(call),
    "pairs": pairs(),
    "naps": naps(),
}
every = comm.gather(said)
if comm.rank == 0:
    print(json.dumps(every))
"""


def test_an_error_in_gradients_of_one_rank_is_raised_on_all(printed: dict[str, list[str]]) -> None:
    first, second = json.loads(printed["errors in gradients"][0])
    for name, expected in (("do", "do: got shape (1, 2, "), ("lse", "lse: got dtype float64, expected float32")):
        assert second[name].startswith(f"SpecError: {expected}") and first[name].startswith(
            f"SpecError: rank 1: {name}"
        )
    for name in ("wrt", "dlse"):
        assert first[name] == second[name] and first[name].startswith(f"SpecError: rank 1: {name}: got ")
    assert "wrt: got 'bias' in a call without bias" in first["name"]
    for name in ("bias", "no bias"):
        assert first[name] == second[name] and ": bias: got " in first[name], first[name]
    assert first["shared"] == second["shared"] == "no error"
    assert first["then"] == second["then"] == "no error"
    assert first["pairs"] == 2 * 5 * 5, "each once, wherever its rows are"
    assert min(first["naps"], second["naps"]) > 20  # ranks that share CPUs leave them to workers


UNPLACED = """
import numpy as np
from mpi4py import MPI
from flashtile import starpu_mpi
from flashtile.engines.starpu_mpi import collective
from flashtile.errors import KernelError

rank, honest = MPI.COMM_WORLD.rank, collective.TiledTensor
x = np.zeros((1, 1, len(starpu_mpi.part(400, rank, 2, tile=96)), 8), "float32")

def refuse(*given, **more):
    raise KernelError("no memory for tiles")

if rank == 1:
    collective.TiledTensor = refuse
try:
    starpu_mpi.attention(x, x, x, tile=96)
except KernelError as error:
    said = str(error)
collective.TiledTensor = honest
every = MPI.COMM_WORLD.gather((said, float(starpu_mpi.attention(x, x, x, tile=96).sum())))
if rank == 0:
    print(every)
"""


def test_a_rank_that_cannot_begin_leaves_nobody_waiting(printed: dict[str, list[str]]) -> None:
    assert (
        printed["a rank that cannot begin"][0]
        == "[('rank 1: no memory for tiles', 0.0), ('no memory for tiles', 0.0)]\n"
    )


def test_a_killed_rank_ends_all(ranks: Ranks) -> None:
    done = ranks(
        2,
        """
import os, signal
import numpy as np
from mpi4py import MPI
from flashtile import starpu_mpi
if MPI.COMM_WORLD.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
x = np.zeros((1, 1, len(starpu_mpi.part(400, 0, 2, tile=96)), 8), "float32")
starpu_mpi.attention(x, x, x, tile=96)
""",
    )
    assert done.returncode != 0
    assert "rank 1" in done.stdout + done.stderr


@pytest.mark.parametrize("calls", [0, 1])
def test_an_exception_of_one_rank_ends_all(calls: int, ranks: Ranks) -> None:
    done = ranks(
        2,
        """
import sys
import numpy as np
from mpi4py import MPI
from flashtile import starpu_mpi
x = np.zeros((1, 1, len(starpu_mpi.part(400, MPI.COMM_WORLD.rank, 2, tile=96)), 8), "float32")
for _ in range(int(sys.argv[1])):
    starpu_mpi.attention(x, x, x, tile=96)
if MPI.COMM_WORLD.rank == 1:
    raise RuntimeError("lost its file")
starpu_mpi.attention(x, x, x, tile=96)
""",
        calls,
    )
    assert done.returncode != 0
    assert "lost its file" in done.stderr


TRAFFIC = """
import numpy as np
from mpi4py import MPI
from flashtile import starpu_mpi
from flashtile.engines.starpu_mpi import collective

made = []
class Noted(collective.Collective):
    def run(self, *arrays):
        made.append(self)
        super().run(*arrays)
starpu_mpi.Collective = Noted
comm = MPI.COMM_WORLD
x = np.zeros((1, 1, len(starpu_mpi.part(768, comm.rank, 2, tile=96)), 8), "float32")
starpu_mpi.attention(x, x, x, tile=96, window=(95, 0))
starpu_mpi.attention(x, x, x, tile=96)
print(comm.rank, *(m.received_bytes // (96 * 2 * 8 * 4) for m in made))
"""


def test_only_tiles_that_are_seen_travel(printed: dict[str, list[str]]) -> None:
    # Eight tiles: rank 0 has 0, 1, 6, 7, rank 1 has 2 ... 5. A row sees its own tile and the one before.
    assert printed["traffic"] == ["0 1 4\n", "1 1 4\n"]


PROGRAMS = {
    "errors": ERRORS,
    "errors in gradients": GRADIENT_ERRORS,
    "a rank that cannot begin": UNPLACED,
    "traffic": TRAFFIC,
}
ONE_BY_ONE = """
import contextlib, io, json, sys
from mpi4py import MPI

said = {}
for name, text in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as found:
        exec(text, {"__name__": name})
    said[name] = MPI.COMM_WORLD.gather(found.getvalue())
if MPI.COMM_WORLD.rank == 0:
    print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def printed(ranks: Ranks) -> dict[str, list[str]]:
    """What each of two ranks printed, by the name of a program: all in one start of the ranks."""
    done = ranks(2, ONE_BY_ONE, json.dumps(PROGRAMS))
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_the_command_runs_a_program_on_ranks_and_returns_its_code(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    text = """
import pathlib, sys
from mpi4py import MPI

comm = MPI.COMM_WORLD
pathlib.Path(sys.argv[1], f"rank{comm.rank}").write_text(" ".join(sys.argv[2:]))
comm.Barrier()  # a code of one rank ends the others: all are to have written
sys.exit(3)
"""
    program.write_text(text)
    command = [sys.executable, "-m", "flashtile", "mpi", "run", "-n", "2", program, tmp_path, "a", "--b"]
    done = processes.run(command)
    assert done.returncode != 0
    assert [(tmp_path / f"rank{n}").read_text() for n in range(2)] == ["a --b"] * 2, done.stderr


def test_the_example_runs_on_four_ranks() -> None:
    example = Path(__file__).parents[2] / "examples" / "several_ranks.py"
    done = processes.run([sys.executable, "-m", "flashtile", "mpi", "run", "-n", "4", example])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 ranks")


def test_the_doctor_of_ranks_computes_something_on_two() -> None:
    done = processes.run([sys.executable, "-m", "flashtile", "mpi", "doctor"])
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout and "ok" in done.stdout


def test_without_what_it_needs_the_door_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "missing", lambda: "mpicc is not installed: apt-get install ...")
    x = np.zeros((1, 1, 4, 8), np.float32)
    with pytest.raises(flashtile.UnavailableError, match="starpu_mpi: mpicc is not installed"):
        starpu_mpi.attention(x, x, x)
