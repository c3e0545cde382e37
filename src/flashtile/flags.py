"""The flags of the command `flashtile`, and what may stand behind each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, get_args

import flashtile
from flashtile import threads
from flashtile.signature import Alignment, Engine, Kernel, Precision

BAD_INPUT = 2  # the exit code

# Options that name an .npy file, and what is in it.
ARRAY_OPTIONS = {
    "mask": "booleans that broadcast to (B, H, S_q, S_kv): True = attend",
    "lengths": "integers (B,): the keys of each sequence from here on are padding",
    "documents": "integers (S,) or (B, S): a row sees the keys of its own document",
    "bias": "floats that broadcast to (B, H, S_q, S_kv), added to the scores",
    "alibi_slopes": "floats (H,) or (B, H)",
    "sinks": "floats (H,) or (B, H)",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; --help has the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}\n")


def parser(*offered: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """What the command line takes: these commands, each by its name, with the first line of its docstring as help."""
    parser = _Parser(prog="flashtile", description="Exact flash attention on tiles.")
    parser.add_argument("--version", action="version", version=f"flashtile {flashtile.__version__}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    for command in offered:
        assert command.__doc__ is not None
        summary = command.__doc__.strip()
        sub = commands.add_parser(command.__name__, help=summary, description=summary)
        sub.set_defaults(command=command)
        if add := _FLAGS.get(command.__name__):
            add(sub)
    return parser


def _add_demo_options(sub: argparse.ArgumentParser) -> None:
    extent = sub.add_mutually_exclusive_group()
    extent.add_argument("--size", type=int, metavar="N", help="crop of N x N pixels (default 352: 123,904 tokens)")
    extent.add_argument("--full", action="store_true", help="the whole picture: 307,200 tokens, six times the work")
    sub.add_argument("--sigma", type=float, help="standard deviation of the noise, where white is 1 (default 0.1)")
    sub.add_argument("--seed", type=_natural, default=0, help="of the noise (default 0)")
    sub.add_argument("-o", "--output", type=Path, default=Path("flashtile-demo"), help="folder (default %(default)s)")
    sub.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    _add_threads(sub)


def _add_run_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="one .npz with arrays q, k, v; or q.npy k.npy v.npy"
    )
    sub.add_argument("-o", "--output", type=Path, required=True, help="OUT.npy, or OUT.npz with the array o")
    sub.add_argument(
        "--overwrite", action="store_true", help="the output may have the name of an input, and replace it"
    )
    sub.add_argument("--return-lse", action="store_true", help="also write lse: into OUT.npz, or to OUT.lse.npy")
    sub.add_argument(
        "--backward", action="store_true", help="also write gradients: into OUT.npz as dq ..., or to OUT.dq.npy ..."
    )
    sub.add_argument(
        "--do", type=Path, metavar="FILE.npy", help="the gradient that arrives at o (default: do in INPUT.npz)"
    )
    sub.add_argument(
        "--wrt", type=_words, metavar="A,B", help="among q,k,v (default), bias, sinks, alibi_slopes: whose gradients"
    )
    sub.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no summary")
    _add_attention_options(sub)
    _add_threads(sub)


def _add_bench_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--shape", type=_numbers, metavar="B,H,S,D", help="measure every dtype at this shape instead")
    sub.add_argument("--backward", action="store_true", help="measure the gradients of q, k and v instead")
    _add_threads(sub)


def _add_explain_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--shape", type=_numbers, required=True, metavar="B,H,S,D", help="of q; also H,S,D or S,D")
    sub.add_argument("--s-kv", type=_natural, metavar="N", help="keys (default: as many as queries)")
    sub.add_argument("--kv-heads", type=_natural, metavar="N", help="heads of k and v (default: as many as of q)")
    sub.add_argument("--d-v", type=_natural, metavar="N", help="head size of v (default: as of q)")
    sub.add_argument("--dtype", default="float32", help="float64, float32 (default), float16 or bfloat16")
    sub.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:0 and so on")
    sub.add_argument("--backward", action="store_true", help="of its gradients instead")
    _add_attention_options(sub)
    _add_threads(sub)


def _add_starpu_actions(sub: argparse.ArgumentParser) -> None:
    actions = sub.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("build", help="compile, whether or not it was compiled before")
    what = "time, traffic and idle time of a causal call over many ranks, predicted from its plan"
    more = actions.add_parser("simulate", help=what, description=what)
    more.add_argument("--ranks", type=_numbers, required=True, metavar="A,B", help="how many; several are compared")
    more.add_argument("--seq", type=_length, required=True, metavar="N", help="rows of q, k, v; 1M is 2^20")
    more.add_argument("--weak", action="store_true", help="fewer ranks have fewer rows: equal work a rank")
    for option, default, content in (
        ("--heads", 8, "query heads"),
        ("--kv-heads", None, "heads of k and v (default: as many)"),
        ("--tile", 960, "rows of a tile"),
        ("--exchange", 1, "ranks that exchange heads first"),
        ("--workers", 1, "of a rank"),
        ("--busy", None, "threads that compute while a task is measured (default: as --workers)"),
    ):
        shown = f"{content} (default {default})" if default is not None else content
        more.add_argument(option, type=_natural, default=default, metavar="N", help=shown)
    more.add_argument("--dim", dest="head_size", type=_natural, default=128, metavar="D", help="default 128")
    more.add_argument("--dtype", default="float32", help="default float32")
    more.add_argument("--full", action="store_true", help="not causal")
    more.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help="-1 is open on that side")
    more.add_argument("--distribution", choices=("zigzag", "contiguous"), default="zigzag", help="default zigzag")
    more.add_argument("--order", choices=("needed", "posted"), default="needed", help="in which tiles are sent")
    more.add_argument("--backward", action="store_true", help="the gradients of q, k and v")
    more.add_argument("--bandwidth", type=float, default=12.5, metavar="GB/s", help="of a rank's link (default 12.5)")
    more.add_argument("--latency", type=float, default=2.0, metavar="US", help="microseconds (default 2)")
    more.add_argument("--message", type=float, default=0.0, metavar="US", help="that a message adds (default 0)")
    more.add_argument(
        "--share", type=float, default=0.0, metavar="PERCENT", help="that tasks take longer while tiles travel"
    )
    more.add_argument("--start", type=float, default=0.0, metavar="MS", help="of a call beside its tasks (default 0)")
    more.add_argument(
        "--calibrate", action="store_true", help="measure these five of two ranks of this machine, in their place"
    )
    more.add_argument("--rate", type=float, metavar="FLOP/S", help="of a worker; default: tasks are measured here")
    more.add_argument("--plot", type=Path, metavar="FILE.png", help="efficiency over ranks, in both distributions")


def _length(text: str) -> int:
    """A number with a unit: 1K is 2^10, 1M is 2^20."""
    shift = {"K": 10, "M": 20}.get(text[-1:].upper(), 0)
    return _natural(text[:-1] if shift else text) << shift


def _add_mpi_actions(sub: argparse.ArgumentParser) -> None:
    actions = sub.add_subparsers(dest="action", metavar="ACTION", required=True)
    start = actions.add_parser("run", help="start a Python program on ranks of this machine, through mpirun")
    start.add_argument("-n", "--ranks", type=_natural, required=True, metavar="N", help="how many")
    start.add_argument("program", type=Path, metavar="PROGRAM.py")
    start.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the program")
    actions.add_parser("doctor", help="what is missing, or what two ranks compute")


def _add_aot_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--arch", type=_words, required=True, metavar="A,B", help="sm_80, sm_90, sm_100, ..., gfx942")
    sub.add_argument("-o", "--output", type=Path, required=True, help="folder; each architecture has its own in it")
    sub.add_argument("--dtype", type=_words, default=["bfloat16"], metavar="A,B", help="default bfloat16")
    sub.add_argument("--head-size", type=_numbers, default=(64, 128), metavar="A,B", help="default 64,128")
    sub.add_argument("--precision", default="ieee", help=f"of float32 inputs: {_names(Precision, 'ieee')}")
    for option, default, content in (
        ("--kernels", ["forward", "merge"], "of forward, merge, backward, scores, softmax, output (default: two)"),
        ("--state", ["finished"], "what o and lse hold: finished (default), partial, carried, updated"),
        ("--band", ["band", "causal", "open"], "band: causal and windowed calls; causal alone; open: no mask"),
    ):
        sub.add_argument(option, type=_words, default=default, metavar="A,B", help=content)
    sub.add_argument("--any-alignment", action="store_true", help="addresses and strides need not be multiples of 16")


def _add_attention_options(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("attention", "as the keywords of flashtile.attention; arrays from files, mapped")
    group.add_argument("--causal", action="store_true")
    group.add_argument("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help="-1 is open on that side")
    group.add_argument("--align", type=_align, help=f"{_names(Alignment)}, or an integer")
    for name, content in ARRAY_OPTIONS.items():
        group.add_argument("--" + name.replace("_", "-"), type=Path, metavar="FILE.npy", help=content)
    group.add_argument("--softcap", type=float, metavar="CAP", help="scores become CAP * tanh(score / CAP)")
    group.add_argument("--scale", type=float, help="default 1 / sqrt(D)")
    group.add_argument("--precision", default="ieee", help=f"of float32 inputs: {_names(Precision, 'ieee')}")
    group.add_argument("--kernel", default="auto", help=_names(Kernel, "auto"))
    group.add_argument("--engine", default="auto", help=_names(Engine, "auto"))


def _add_threads(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--threads", type=_threads, metavar="N", help="default: the CPUs that this process may use")


_FLAGS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "demo": _add_demo_options,
    "run": _add_run_options,
    "bench": _add_bench_options,
    "explain": _add_explain_options,
    "starpu": _add_starpu_actions,
    "mpi": _add_mpi_actions,
    "aot": _add_aot_options,
}


def _names(literal: Any, default: str = "") -> str:
    """The names of a Literal, for help."""
    return ", ".join(f"{name} (default)" if name == default else name for name in get_args(literal))


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers with commas, as 1,8,4096,64")
    return tuple(map(int, parts))


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 0")
    return int(text)


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= threads.MOST:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer from 1 to {threads.MOST}")
    return int(text)


def _align(text: str) -> str | int:
    try:
        return int(text)
    except ValueError:
        return text
