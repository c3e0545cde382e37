"""The binding: no misuse aborts or hangs the process, and every refusal says what was expected."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest

from flashtile.engines.starpu import build
from flashtile.errors import UnavailableError

Script = Callable[..., Any]


def test_the_shim_compiles_without_warnings(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Compiled anew, against the installed header; every declaration that Python uses is checked by the compiler."""
    monkeypatch.setenv("CFLAGS", "-Werror")
    monkeypatch.setattr(build, "directory", lambda: tmp_path)
    path = build.build(force=True)
    assert path.parent == tmp_path and path.stat().st_size > 10_000
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing is left behind


def test_a_compiler_error_is_reported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(build, "directory", lambda: tmp_path)
    monkeypatch.setenv("CFLAGS", "-include /no/such/header.h")
    with pytest.raises(UnavailableError, match=r"compiling .*shim\.c failed"):
        build.build(force=True)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("PATH", "/nowhere", "pkg-config is not installed"),
        ("FLASHTILE_STARPU", "starpu-0.1", "pkg-config does not know starpu-0.1"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(script: Script, variable: str, value: str, expected: str) -> None:
    done = script("print(message(lambda: starpu.init(), UnavailableError))", **{variable: value})
    assert expected in done.stdout and "libstarpu-dev" in done.stdout


@pytest.mark.parametrize(
    ("module", "name", "gone", "expected"),
    [
        (build.shutil, "which", ("cc", "gcc", "clang"), "no C compiler found: apt-get install gcc libc6-dev"),
        (build.importlib.util, "find_spec", ("cffi",), "cffi is not installed: pip install cffi"),
        (build.sysconfig, "get_path", ("include",), "Python.h does not exist: apt-get install python3-dev"),
    ],
)
def test_what_a_build_lacks_is_named(
    module: Any, name: str, gone: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    there = getattr(module, name)
    nothing = "/nowhere" if name == "get_path" else None
    monkeypatch.setattr(module, name, lambda what, *more: nothing if what in gone else there(what, *more))
    monkeypatch.setattr(build, "directory", lambda: tmp_path)  # where nothing was built yet
    assert expected in str(build.missing())
    with pytest.raises(UnavailableError, match=re.escape(expected)):
        build.build()


@pytest.mark.parametrize(
    "call",
    [
        "starpu.register(np.zeros((1, 1, 4, 4), 'float32'), 2)",
        "starpu.empty((1, 1, 4, 4), 'float32', 2)",
        "starpu.wrap(np.zeros((1, 1, 2), int), (1, 1, 4, 4), 'float32', 2)",
        "starpu.wait()",
        "starpu.workers()",
        "starpu.restrict('cpu')",
    ],
)
def test_use_before_init(script: Script, call: str) -> None:
    done = script(f"print(message(lambda: {call}, UnavailableError)); starpu.shutdown()")
    assert "expected flashtile.starpu.init() first" in done.stdout


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("starpu.init(scheduler='fastest')", "scheduler: got 'fastest', expected one of modular-eager"),
        ("starpu.init(workers=0)", "workers: got 0, expected an integer from 1 to"),
        ("starpu.init(workers=10**6)", "workers: got 1000000, expected an integer from 1 to"),
        ("starpu.init(workers=1.5)", "workers: got 1.5"),
        ("starpu.init(cuda=1)", "cuda: got 1, expected"),
        ("starpu.init(calibrate=2)", "calibrate: got 2"),
    ],
)
def test_wrong_settings(script: Script, call: str, expected: str) -> None:
    """Refused before StarPU sees them; it starts afterwards."""
    done = script(f"print(message(lambda: {call}, SpecError)); starpu.init(workers=1); print(starpu.workers())")
    assert expected in done.stdout and done.stdout.split()[-1] == "1"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("STARPU_SCHED", "fastest", "STARPU_SCHED: got 'fastest'"),
        ("STARPU_LIMIT_CPU_MEM", "10", "STARPU_LIMIT_CPU_MEM: got 10 without STARPU_DISK_SWAP"),
        ("STARPU_LIMIT_CPU_NUMA_MEM", "10", "STARPU_LIMIT_CPU_NUMA_MEM: got 10"),
        ("STARPU_NCPU", "0", "expected at least one worker"),
    ],
)
def test_wrong_environment(script: Script, variable: str, value: str, expected: str) -> None:
    body = """
    print(message(lambda: starpu.init()))
    q, k, v, o, lse = arrays()
    print(message(lambda: flashtile.attention(q, k, v, engine="starpu"))) if "NCPU" not in os.environ["WHICH"] else None
    """
    assert expected in script(body, **{variable: value, "WHICH": variable}).stdout


def test_init_twice(script: Script) -> None:
    done = script("""
        starpu.init()
        print(message(lambda: starpu.init(), SpecError))
        for _ in range(3):
            starpu.shutdown()
            starpu.shutdown()
            starpu.init(workers=1)
        print(starpu.workers("cpu"))
    """)
    assert "init: got a second call, expected shutdown() before another init()" in done.stdout
    assert done.stdout.split()[-1] == "1"


def test_a_starpu_that_the_program_started_is_joined_and_left_running(script: Script) -> None:
    done = script("""
        library = starpu_library()
        assert library.starpu_init(None) == 0
        starpu.init()
        q, k, v, o, lse = arrays()
        assert np.allclose(flashtile.attention(q, k, v, engine="starpu"), flashtile.attention(q, k, v), atol=1e-6)
        starpu.shutdown()
        assert library.starpu_is_initialized() == 1
        library.starpu_shutdown()
        print("joined")
    """)
    assert "joined" in done.stdout


def test_a_forked_child_is_refused_and_the_parent_goes_on(script: Script) -> None:
    done = script(
        """
        q, k, v, o, lse = arrays()
        expected = flashtile.attention(q, k, v, engine="starpu")
        child = os.fork()
        if child == 0:
            for call in (lambda: flashtile.attention(q, k, v, engine="starpu"), starpu.wait, starpu.init):
                print(message(call, UnavailableError), flush=True)
            assert np.array_equal(flashtile.attention(q, k, v), flashtile.attention(q, k, v, engine="direct"))
            starpu.shutdown()
            sys.exit(3)  # with the handlers of an ordinary exit
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert np.array_equal(flashtile.attention(q, k, v, engine="starpu"), expected)
        """
    )
    assert done.stdout.count("expected that process") == 3


def test_a_child_may_start_a_starpu_that_its_parent_never_had(script: Script) -> None:
    script("""
        child = os.fork()
        if child == 0:
            starpu.init(workers=1)
            starpu.shutdown()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """)


def test_misuse_of_tensors(script: Script) -> None:
    """After unregistering, while held, twice: one clear error each, and all goes on."""
    done = script("""
        starpu.init()
        given, (q, k, v, o, lse) = registered()
        gone = starpu.register(np.zeros((1, 2, 300, 16), "float32"), 100)
        tile = gone[0, 0, 0]
        gone.unregister()
        calls = [gone.unregister, lambda: gone.acquire((0, 0, 0)).__enter__(), lambda: tile.handle,
                 lambda: starpu.submit_forward(gone, k, v, o, lse), lambda: starpu.submit_merge(gone, lse, o, lse)]
        for call in calls:
            print(message(call, SpecError))
        with o.acquire((0, 0, 1), "RW"):
            for call in (lambda: o.acquire((0, 0, 1)).__enter__(), o.unregister, starpu.shutdown,
                         lambda: starpu.submit_forward(q, k, v, o, lse)):
                print("held:", message(call, SpecError))
        for index in ((0, 0, 3), (0, 2, 0), (0, 0), 0, (0, 0, -1), (0, 0, 0.5)):
            print("index:", message(lambda: o[index], SpecError))
        print(message(lambda: o.acquire((0, 0, 0), "X").__enter__(), SpecError))
        starpu.submit_forward(q, k, v, o, lse)
        starpu.wait()
        o.unregister()
        assert np.allclose(given[3], flashtile.attention(*given[:3]), atol=1e-6)
    """)
    assert done.stdout.count("unregistered") == 5
    assert done.stdout.count("held:") == 4 and done.stdout.count("index:") == 6


def test_tensors_of_an_earlier_start_are_refused(script: Script) -> None:
    done = script("""
        starpu.init()
        _, tensors = registered()
        starpu.shutdown()
        starpu.init()
        print(message(tensors[0].unregister, SpecError), message(lambda: starpu.submit_forward(*tensors), SpecError))
    """)
    assert done.stdout.count("unregistered") == 2


@pytest.mark.parametrize("implicit", [False, True])
def test_exit_without_shutdown(script: Script, implicit: bool, tmp_path: Any) -> None:
    """Registered arrays and tasks in flight at exit: status 0, and the models are on disk."""
    start = "flashtile.attention(*arrays()[:3], engine='starpu')" if implicit else "starpu.init()"
    script(
        f"""
        {start}
        given, tensors = registered(q_len=2000, kv_len=2000)
        for _ in range(5):
            starpu.submit_forward(*tensors)
        held = tensors[0].acquire((0, 0, 0))
        held.__enter__()
        """,
        STARPU_CALIBRATE="1",
        STARPU_PERF_MODEL_DIR=str(tmp_path),
    )
    assert any("flashtile_forward_float32" in file.name for file in tmp_path.rglob("*"))


def test_ctrl_c_while_waiting(script: Script) -> None:
    """Tasks that have not begun are skipped, so most of the work is never done; the engine is usable afterwards."""
    done = script(
        """
        import signal, threading
        q, k, v, o, lse = arrays(q_len=16384, kv_len=16384, heads=8, size=64)
        starpu.init()
        small = arrays()[:3]
        before = flashtile.attention(*small, engine="starpu")
        flashtile.attention(q[:, :1, :2048], k[:, :1, :2048], v[:, :1, :2048], engine="starpu")
        seen, began = [], threading.Event()
        def report(*numbers):
            seen.append(numbers)
            began.set()
        def interrupt():
            began.wait()
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt, daemon=True).start()
        try:
            flashtile.attention(q, k, v, engine="starpu", progress=report)
            print("not interrupted")
        except KeyboardInterrupt:
            print("interrupted", *seen[-1])
        assert np.array_equal(flashtile.attention(*small, engine="starpu"), before)
        """
    )
    word, tasks, total = done.stdout.split()
    assert word == "interrupted" and int(tasks) < int(total)


def test_idle_workers_of_the_engine_take_no_cpu_time(script: Script) -> None:
    done = script("""
        flashtile.attention(*arrays()[:3], engine="starpu")
        begin = time.process_time()
        time.sleep(1)
        print(time.process_time() - begin)
    """)
    assert float(done.stdout) < 0.05


def test_tasks_of_the_program_run_where_a_call_has_started_starpu(script: Script) -> None:
    script("""
        q, k, v, o, lse = arrays()
        expected = flashtile.attention(q, k, v, engine="starpu")
        with starpu.register(o, 100) as out:
            starpu.submit_forward(*(starpu.register(x, 100) for x in (q, k, v)), out, starpu.register(lse, 100))
            starpu.wait()
        assert np.allclose(o, expected, atol=1e-6)
        assert np.array_equal(flashtile.attention(q, k, v, engine="starpu"), expected)
    """)


def test_doctor_tells_version_and_limits() -> None:
    from flashtile import doctor

    rows = {name: (available, remark) for room, name, available, remark in doctor.survey() if room == "engine"}
    available, remark = rows["starpu"]
    assert available and re.match(r"StarPU 1\.\d+\.\d+ \(starpu-1\.\d\); ", remark)
    assert re.search(r"; (\d+ cpu workers, 0 cuda workers|not running, would start 2 CPU workers); ", remark)
    assert re.search(r"; at most \d+ CPU workers, \d+ workers, \d+ handles in a codelet$", remark)


def test_the_build_command_builds(capsys: pytest.CaptureFixture[str]) -> None:
    from flashtile import cli

    assert cli.main(["starpu", "build"]) == 0
    shown = capsys.readouterr().out
    assert "StarPU 1." in shown and os.fspath(build.build()) in shown
