"""The command `flashtile`: demo, run, bench, explain, doctor, starpu, mpi, aot. Each imports what it needs then."""

from __future__ import annotations

import argparse
import contextlib
import functools
import operator
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import flashtile
from flashtile import flags
from flashtile.errors import FlashtileError, KernelError, UnavailableError, wrong
from flashtile.flags import ARRAY_OPTIONS, BAD_INPUT

OK, FAILED, INTERRUPTED = 0, 1, 130

MASKS = {  # of the arrays those that hide keys, and intersect
    "mask": flashtile.score.dense,
    "lengths": flashtile.score.padding,
    "documents": flashtile.score.document,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 if a kernel failed, 2 for bad input, 130 after Ctrl-C.

    Wrong options exit with code 2 through SystemExit, as argparse does.
    """
    parser = flags.parser(demo, run, bench, explain, doctor, starpu, mpi, aot)
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
    """The StarPU engine: compile its binding, or simulate a call over many ranks."""
    if options.action == "simulate":
        return _simulate(options)
    from flashtile.engines.starpu import build, report

    print(f"{build.build(force=True)}: {report.remark()}")
    return OK


def _simulate(options: argparse.Namespace) -> int:
    """Print what calls over so many ranks would take, and draw them."""
    from flashtile import scaling

    most = max(options.ranks)
    names = (
        "heads",
        "kv_heads",
        "head_size",
        "dtype",
        "window",
        "tile",
        "order",
        "exchange",
        "workers",
        "rate",
        "busy",
        "backward",
    )
    keywords = {name: getattr(options, name) for name in names} | {"causal": not options.full}
    keywords |= {"bandwidth": options.bandwidth * 1e9, "latency": options.latency * 1e-6}
    keywords |= {"message": options.message * 1e-6, "share": options.share / 100, "start": options.start * 1e-3}
    if options.calibrate:
        from flashtile.calibration import calibrate

        costs = calibrate(options.head_size, options.dtype, options.tile, options.workers)
        keywords |= costs._asdict()
        print(f"measured     {costs}\n")
    if keywords["window"] is not None:
        keywords["window"] = tuple(keywords["window"])

    def found(distribution: str) -> list[scaling.Simulation]:
        of = [(n, round(options.seq * (n / most) ** 0.5) if options.weak else options.seq) for n in options.ranks]
        return [scaling.simulate(n, length, distribution=distribution, **keywords) for n, length in of]

    if options.plot is not None:
        curves = {name: found(name) for name in ("zigzag", "contiguous")}
        simulations = curves[options.distribution]
        grows = "with the root of the ranks, to" if options.weak else "of"
        scaling.plot(
            options.plot, curves, f"{options.heads} heads, D = {options.head_size}, rows {grows} {options.seq}"
        )
    else:
        simulations = found(options.distribution)
    print("\n\n".join(map(str, simulations)))
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
    """The keywords of flashtile.attention that `flags` offers."""
    from flashtile.arrayfiles import open_npy

    names = ("causal", "window", "align", "softcap", "scale", "precision", "kernel", "engine")
    keywords = {name: getattr(options, name) for name in names}
    if keywords["window"] is not None:
        keywords["window"] = tuple(keywords["window"])
    arrays = {name: open_npy(path) for name in ARRAY_OPTIONS if (path := getattr(options, name)) is not None}
    masks = [MASKS[name](arrays.pop(name)) for name in MASKS if name in arrays]
    return {**keywords, **arrays, **({"mask": functools.reduce(operator.and_, masks)} if masks else {})}
