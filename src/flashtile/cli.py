"""The command `flashtile`: demo, run, bench, explain, doctor, starpu, mpi, aot. Each imports what it needs then."""

from __future__ import annotations

import argparse
import contextlib
import functools
import operator
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np

import flashtile
from flashtile import threads
from flashtile.errors import FlashtileError, KernelError, UnavailableError, wrong
from flashtile.signature import Alignment, Engine, Kernel, Precision

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Options that name an .npy file, and what is in it.
ARRAY_OPTIONS = {
    "mask": "booleans that broadcast to (B, H, S_q, S_kv): True = attend",
    "lengths": "integers (B,): the keys of each sequence from here on are padding",
    "documents": "integers (S,) or (B, S): a row sees the keys of its own document",
    "bias": "floats that broadcast to (B, H, S_q, S_kv), added to the scores",
    "alibi_slopes": "floats (H,) or (B, H)",
    "sinks": "floats (H,) or (B, H)",
}
MASKS = {  # those of them that hide keys, and intersect
    "mask": flashtile.score.dense,
    "lengths": flashtile.score.padding,
    "documents": flashtile.score.document,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 if a kernel failed, 2 for bad input, 130 after Ctrl-C.

    Wrong options exit with code 2 through SystemExit, as argparse does.
    """
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        return BAD_INPUT
    options = parser.parse_args(arguments)
    try:
        if getattr(options, "threads", None) is not None:
            flashtile.set_num_threads(options.threads)
        return int(options.command(options))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (FlashtileError, OSError, MemoryError) as e:
        message = " ".join(str(e).split()) or type(e).__name__
        print(f"flashtile {options.name}: error: {message}", file=sys.stderr)
        return FAILED if isinstance(e, KernelError) else BAD_INPUT


def demo(options: argparse.Namespace) -> int:
    """Denoise a real photograph by exact non-local means: one attention call over all of its pixels."""
    from flashtile import demo as denoising

    size = None if options.full else denoising.SIZE if options.size is None else options.size
    sigma = denoising.SIGMA if options.sigma is None else options.sigma
    report = denoising.run(options.output, size=size, sigma=sigma, seed=options.seed, progress=not options.quiet)
    print(report, end="")
    print(f"{'written':<14} {', '.join(str(options.output / name) for name in denoising.FILES)}")
    return OK


def run(options: argparse.Namespace) -> int:
    """Attention over arrays in files, and its gradients: q, k, v in one .npz, or in three .npy, mapped into memory."""
    from flashtile import arrayfiles

    wrt = _wrt(options)
    output, beside = _outputs(options, wrt)
    q, k, v, *do = _inputs(options)
    keywords = _keywords(options)
    calls = [flashtile.explain(q, k, v, **keywords)]  # validates: nothing is written for a call that cannot run
    if options.backward:
        calls.append(flashtile.explain(q, k, v, **keywords, backward=True))
        _check_do(do[0], q, v)
    progress = sys.stderr.isatty() and not options.quiet
    start = time.perf_counter()
    with arrayfiles.replacing(output) as temporary, contextlib.ExitStack() as others:
        shape = q.shape[:-1] + v.shape[-1:]
        out = arrayfiles.create_npy(temporary, shape, q.dtype) if output.suffix == ".npy" else None
        o, lse = flashtile.attention(q, k, v, out=out, return_lse=True, progress=progress, **keywords)
        found = {"lse": lse} if options.return_lse else {}
        if options.backward:
            gradients = flashtile.attention_backward(do[0], q, k, v, o, lse, wrt=wrt, **keywords)
            found |= {f"d{name}": getattr(gradients, name) for name in wrt}
        if out is None:
            np.savez(temporary, o=o, **found)
        for name, path in beside.items():
            np.save(others.enter_context(arrayfiles.replacing(path)), found[name])
    if not options.quiet:
        seconds = time.perf_counter() - start
        speed = f"{seconds:.3f} s with files, {sum(call.flops for call in calls) / seconds / 1e9:.4g} GFLOP/s"
        names = "".join(f", d{name}" for name in wrt)
        print(f"{output}: o {tuple(o.shape)} {o.dtype}{names}, {speed}")
    return OK


def bench(options: argparse.Namespace) -> int:
    """Speed of this machine, beside NumPy and, where it is installed, PyTorch."""
    from flashtile import bench as benchmark

    shape = options.shape
    if shape is not None and (len(shape) != 4 or 0 in shape):
        raise wrong("--shape", ",".join(map(str, shape)), "four positive numbers B,H,S,D")
    print(f"{flashtile.get_num_threads()} threads; each result checked, then medians of {benchmark.ROUNDS} rounds")
    cases = list(benchmark.CASES) if shape is None else benchmark.cases_of(shape)
    for line in benchmark.table(cases, backward=options.backward):
        print(line, flush=True)
    return OK


def explain(options: argparse.Namespace) -> int:
    """What a call would use, without running it: kernel, instruction set, tiles, coverage, FLOPs, scratch."""
    q = options.shape
    if not 2 <= len(q) <= 4:
        raise wrong("--shape", ",".join(map(str, q)), "B,H,S,D or H,S,D or S,D")
    if options.kv_heads is not None and len(q) == 2:
        raise wrong("--kv-heads", options.kv_heads, "a --shape with heads: B,H,S,D or H,S,D")
    heads = q[-3:-2] if options.kv_heads is None else (options.kv_heads,)
    rows = q[-2] if options.s_kv is None else options.s_kv
    kv = (*q[:-3], *heads, rows)
    columns = q[-1] if options.d_v is None else options.d_v
    sizes = {"dtype": options.dtype, "device": options.device}
    print(flashtile.explain(q, (*kv, q[-1]), (*kv, columns), **sizes, backward=options.backward, **_keywords(options)))
    return OK


def doctor(options: argparse.Namespace) -> int:
    """What this machine can run: every kernel, instruction set, engine and door, or why not."""
    from flashtile import doctor as examination

    print(examination.text())
    return OK


def starpu(options: argparse.Namespace) -> int:
    """Compile the binding of the StarPU engine against the installed StarPU."""
    from flashtile.engines.starpu import build, report

    print(f"{build.build(force=True)}: {report.remark()}")
    return OK


def mpi(options: argparse.Namespace) -> int:
    """Programs on several ranks (flashtile.starpu_mpi): start one, or try whether two ranks compute."""
    from flashtile import launch

    if options.action == "doctor":
        print(launch.doctor())
        return OK
    return launch.run(options.ranks, [str(options.program), *options.arguments])


def aot(options: argparse.Namespace) -> int:
    """Compile GPU kernels ahead of time: machine code with a manifest, for programs without Python. Needs no GPU."""
    from flashtile.kernels.triton import aot as ahead
    from flashtile.kernels.triton import compiler_missing

    if (missing := compiler_missing()) is not None:
        raise UnavailableError(f"aot: {missing}")
    options_of_all: dict[str, Any] = {
        "precision": options.precision,
        "kernels": options.kernels,
        "states": options.state,
        "bands": options.band,
        "aligned": not options.any_alignment,
    }
    chosen = {a: list(ahead.choose(a, options.dtype, options.head_size, **options_of_all)) for a in options.arch}
    for arch, kernels in chosen.items():
        print(arch, flush=True)
        for entry in ahead.build(options.output / arch, arch, kernels):
            print("  " + ahead.summary(entry), flush=True)
    return OK


def _inputs(options: argparse.Namespace) -> list[np.ndarray]:
    """q, k and v, mapped; and do, where gradients are asked for."""
    from flashtile.arrayfiles import open_npy, open_npz

    paths = options.inputs
    apart = options.backward and options.do is not None
    suffixes = [path.suffix for path in paths]
    if suffixes == [".npz"]:
        found = open_npz(paths[0], ("q", "k", "v", *(["do"] if options.backward and not apart else [])))
    elif suffixes == [".npy"] * 3:
        if options.backward and not apart:
            raise wrong("--do", "nothing", "an .npy file: the gradient that arrives at o")
        found = [open_npy(path) for path in paths]
    else:
        raise wrong("INPUT", " ".join(map(str, paths)), "one .npz with q, k and v, or three .npy files")
    return [*found, open_npy(options.do)] if apart else found


def _wrt(options: argparse.Namespace) -> list[str]:
    """The names of the arrays whose gradients are asked for; none without --backward."""
    if not options.backward:
        for flag, value in (("--do", options.do), ("--wrt", options.wrt)):
            if value is not None:
                raise wrong(flag, value if flag == "--do" else ",".join(value), "it beside --backward only")
        return []
    known = ["q", "k", "v", *(name for name in ("bias", "sinks", "alibi_slopes") if getattr(options, name) is not None)]
    wrt = list(dict.fromkeys(options.wrt or ["q", "k", "v"]))
    if unknown := [name for name in wrt if name not in known]:
        raise wrong("--wrt", ",".join(unknown), f"names among {', '.join(known)}, the arrays of this call")
    return wrt


def _check_do(do: np.ndarray, q: np.ndarray, v: np.ndarray) -> None:
    shape = q.shape[:-1] + v.shape[-1:]
    if do.shape != shape or do.dtype != q.dtype:
        raise wrong("do", f"{do.dtype} of shape {do.shape}", f"{q.dtype} of shape {shape}, as o")


def _outputs(options: argparse.Namespace, wrt: list[str]) -> tuple[Path, dict[str, Path]]:
    """Where o goes, and where lse and gradients go if those are files of their own, by name: none of them is an input,
    unless --overwrite is on."""
    from flashtile import arrayfiles

    output = options.output
    if output.suffix not in (".npy", ".npz"):
        raise wrong("--output", output, "a name that ends in .npy or .npz")
    if not output.parent.is_dir():
        raise wrong("--output", output, f"a name in a folder that exists; {output.parent} does not")
    names = (["lse"] if options.return_lse else []) + [f"d{name}" for name in wrt]
    beside = {name: output.with_suffix(f".{name}.npy") for name in names if output.suffix == ".npy"}
    read = [*options.inputs, *(path for name in ("do", *ARRAY_OPTIONS) if (path := getattr(options, name)) is not None)]
    for target in (output, *beside.values()):
        if not options.overwrite and any(arrayfiles.same(target, path) for path in read):
            raise wrong("--output", output, f"another name: {target} is an input, replaced only with --overwrite")
    return output, beside


def _keywords(options: argparse.Namespace) -> dict[str, Any]:
    """The keywords of flashtile.attention that _add_attention_options offers."""
    from flashtile.arrayfiles import open_npy

    names = ("causal", "window", "align", "softcap", "scale", "precision", "kernel", "engine")
    keywords = {name: getattr(options, name) for name in names}
    if keywords["window"] is not None:
        keywords["window"] = tuple(keywords["window"])
    arrays = {name: open_npy(path) for name in ARRAY_OPTIONS if (path := getattr(options, name)) is not None}
    masks = [MASKS[name](arrays.pop(name)) for name in MASKS if name in arrays]
    return {**keywords, **arrays, **({"mask": functools.reduce(operator.and_, masks)} if masks else {})}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; --help has the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flashtile", description="Exact flash attention on tiles.")
    parser.add_argument("--version", action="version", version=f"flashtile {flashtile.__version__}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def add(command: Any) -> argparse.ArgumentParser:
        summary = command.__doc__.strip()
        sub = commands.add_parser(command.__name__, help=summary, description=summary)
        sub.set_defaults(command=command)
        return sub

    _add_demo_options(add(demo))
    _add_run_options(add(run))
    sub = add(bench)
    sub.add_argument("--shape", type=_numbers, metavar="B,H,S,D", help="measure every dtype at this shape instead")
    sub.add_argument("--backward", action="store_true", help="measure the gradients of q, k and v instead")
    _add_threads(sub)
    _add_explain_options(add(explain))
    add(doctor)
    add(starpu).add_argument("action", choices=("build",), help="compile, whether or not it was compiled before")
    _add_mpi_actions(add(mpi))
    _add_aot_options(add(aot))
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
        ("--kernels", ["forward", "merge"], "of forward, merge, scores, softmax, output (default forward,merge)"),
        ("--state", ["finished"], "what o and lse hold: finished (default), partial, carried"),
        (
            "--band",
            ["band", "causal", "open"],
            "band: causal and windowed calls; causal alone; open: no mask (default all)",
        ),
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
