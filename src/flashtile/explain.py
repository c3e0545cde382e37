"""`flashtile.explain`: what a call would do, without doing it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flashtile import engines, kernels
from flashtile.arrays import View, contiguous, device_of, is_torch, plain, view_of
from flashtile.calls import Request, as_name, describe, engine_of
from flashtile.checks import check_flag
from flashtile.dtypes import DTYPES, dtype_of
from flashtile.errors import wrong
from flashtile.hints import check_keywords
from flashtile.kernels import BackwardLayout, Capabilities, Family, Layout
from flashtile.owners import borrow, library_of, owner_of
from flashtile.plan import Coverage, Plan, coverage_of, make_plan
from flashtile.plan.mapped import count_map
from flashtile.plan.tiling import flops_of
from flashtile.score.coverage import Coverage as Map
from flashtile.score.coverage import coverage as map_of
from flashtile.score.expr import Expr, postorder
from flashtile.score.keep import keep_of
from flashtile.score.options import Scoring
from flashtile.score.program import Program
from flashtile.score.readable import mask_text, score_text
from flashtile.signature import Align, Engine, Kernel, Precision, Window
from flashtile.spec import AttentionSpec
from flashtile.threads import get_num_threads

_MANY_QUERIES = 1 << 10  # whose kernel a task has, however few its queries are
_WITHOUT_EFFECT = {"return_lse", "progress", "out"}  # on what explain says


@dataclass(frozen=True)
class Explanation:
    """What `flashtile.explain` found. Sizes in bytes, FLOPs of the products over visible pairs: two in a forward call,
    five in a backward one."""

    spec: AttentionSpec
    kernel: str
    variant: str  # which of the family's kernels, "" if it has but one
    isa: str  # "" if the kernel does not depend on one
    product: str  # how the kernel multiplies, and why so; "" if there is no choice
    engine: str
    threads: int
    plan: Plan
    coverage: Coverage
    score: str  # what changes a score s, as a formula; "" if nothing does
    mask: str  # when key j is visible to row i, as a formula; "" if a band alone, or nothing, decides
    flops: int
    scratch_bytes: int  # of each thread
    workspace_bytes: int  # of the call: results of parts of the keys, before they are merged
    unfused_bytes: int  # of the scores that an unfused attention would store
    passed_over: tuple[tuple[str, str], ...]  # (kernel, why)
    notes: tuple[str, ...]
    direction: str = "forward"
    tasks: bool = False  # whether the engine has tasks of tiles, pairs that meet, in place of the plan's work items

    def __str__(self) -> str:
        s, p, c = self.spec, self.plan, self.coverage
        tiles = c.empty + c.full + c.partial
        rows = [
            (
                "call",
                f"q ({s.batch}, {s.heads}, {s.q_len}, {s.head_size}), k ({s.batch}, {s.kv_heads}, {s.kv_len}, "
                f"{s.head_size}), v (..., {s.value_size}), {s.dtype}, scale {s.scale:.6g}",
            ),
            ("positions", _positions(s) if not self.mask else "as the mask says"),
            *([("score", self.score)] if self.score else ()),
            *([("mask", self.mask)] if self.mask else ()),
            *([("gradients", "of q, k and v")] if self.direction == "backward" else ()),
            *([("sinks", "one more logit in each row's denominator")] if s.sinks else ()),
            *([("dropout", "of the weights, by the seed and position of each")] if s.dropout else ()),
            ("kernel", ", ".join(filter(None, (self.kernel, self.variant, self.isa)))),
            *([("product", self.product)] if self.product else ()),
            ("engine", f"{self.engine}, {self._threads()}"),
            (
                "tiles",
                f"{p.tile_q} queries"
                + (f" of {p.head_block} heads" if p.head_block > 1 else "")
                + f" x {p.tile_k} keys; "
                + ("a task for each pair that meets" if self.tasks else f"{p.items} work items"),
            ),
            *(
                [
                    (
                        "parts",
                        f"keys in {p.splits} parts of {p.split_keys}, merged in order; "
                        f"{_bytes(self.workspace_bytes)} between",
                    )
                ]
                if p.splits > 1
                else ()
            ),
            (
                "coverage",
                f"{c.full} full, {c.partial} partial, {c.empty} empty of {tiles} tiles; "
                f"{100 * c.visible / max(c.pairs, 1):.1f}% of the pairs visible",
            ),
            ("work", f"{self.flops / 1e9:.6g} GFLOP"),
            ("scratch", f"{_bytes(self.scratch_bytes)} per thread; unfused scores take {_bytes(self.unfused_bytes)}"),
            *((f"not {name}", reason) for name, reason in self.passed_over),
            *(("note", note) for note in self.notes),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def _threads(self) -> str:
        if self.plan.at_once:
            return f"all work items at once on {self.spec.device}"
        if self.tasks:
            return "on its workers"
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}"


def explain(
    q: Any,
    k: Any = None,
    v: Any = None,
    *,
    dtype: Any = None,
    device: str | None = None,
    mask: Any = None,
    bias: Any = None,
    score_mod: Any = None,
    causal: bool = False,
    window: Window = None,
    align: Align = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    precision: Precision = "ieee",
    kernel: Kernel = "auto",
    engine: Engine = "auto",
    backward: bool = False,
    **others: Any,
) -> Explanation:
    """Say which kernel, instruction set, tiles, coverage, FLOPs and scratch a call would use, without running it.

    Takes the arguments of `flashtile.attention`; q, k and v may also be shapes, of arrays in row-major order, with
    dtype= (by default float32) and device= ("cpu" by default, "cuda"); k is by default like q, and v like k. With
    backward=True it is about `flashtile.attention_backward`, and the gradients of q, k and v. print() the result.
    Counting the visible pairs of a mask takes time in proportion to the tiles that it cuts; a stored mask cuts all.
    Raises: what attention raises for these arguments, but for `out`, which is not looked at.

    >>> import flashtile
    >>> flashtile.explain((1, 8, 4096, 64), causal=True).flops
    17184063488
    """
    check_keywords(explain, (name for name in others if name not in _WITHOUT_EFFECT))
    check_flag("backward", backward)
    k = q if k is None else k
    v = k if v is None else v
    views = [view_or_shape(x, argument, dtype, device) for argument, x in (("q", q), ("k", k), ("v", v))]
    scores = mask, bias, score_mod, softcap, alibi_slopes, sinks, keep_of(dropout_p, seed)
    request = describe(views[0], scores, (causal, window, align, scale, precision, kernel, engine))
    return _explained(views, request, "backward" if backward else "forward")


def _explained(views: Sequence[View], request: Request, direction: str) -> Explanation:
    """What is to be said of a call that was described."""
    (spec, scoring), options = request.of(*views), request.options
    engine = engine_of(spec, options.engine)
    family = kernels.pick(spec, as_name("kernel", options.kernel), direction)
    backward = direction == "backward"
    # Gradients that are not compiled are computed on the calling thread, whatever the engine.
    tasks = engine.tiles is not None and not (backward and family.compile_backward is None)
    if tasks:
        prepared = _of_tiles(spec, scoring, views, engine, family, direction)
    else:
        prepared = (_prepared_backward if backward else _prepared)(spec, views, family)
    able = family.capabilities(spec.changed(q_len=_MANY_QUERIES) if tasks else prepared.spec)
    plan, program = prepared.plan, scoring.program
    coverage = coverage_of(prepared.spec, plan, offsets_of(spec, request))
    if program is not None and program.mask is not None:
        coverage = count_map(program, tile_map(program, spec, plan.tile_q, plan.tile_k))
    return Explanation(
        spec=spec,
        kernel=family.name,
        variant=direction if backward and able.variant else able.variant,
        isa=able.isa,
        product=able.backward_product if backward else able.product,
        engine=engine.name,
        threads=prepared.threads,
        plan=plan,
        coverage=coverage,
        score=score_text(program) if program else "",
        mask=mask_text(program) if program else "",
        flops=_flops(spec, coverage.visible, direction),
        scratch_bytes=prepared.scratch_bytes,
        workspace_bytes=prepared.workspace_bytes,
        unfused_bytes=coverage.pairs * DTYPES[DTYPES[spec.dtype].accumulator].itemsize,
        passed_over=_passed_over(spec, family.name, options.kernel, direction),
        notes=(*_notes(spec, able, program), *prepared.notes),
        direction=direction,
        tasks=tasks,
    )


class _Prepared(NamedTuple):
    """What a kernel computes for a call, how it cuts that, what memory it takes (as Explanation says), and on how many
    threads it runs."""

    spec: AttentionSpec
    plan: Plan
    scratch_bytes: int
    workspace_bytes: int
    threads: int
    notes: tuple[str, ...] = ()


def _flops(spec: AttentionSpec, visible: int, direction: str) -> int:
    """Of the products over so many pairs: S and O; backward S, dQ, dK, as long as D, and dP, dV, as long as D_v."""
    keys, values = (3, 2) if direction == "backward" else (1, 1)
    return 2 * (keys * spec.head_size + values * spec.value_size) * visible


def _prepared(spec: AttentionSpec, views: Sequence[View], family: Family) -> _Prepared:
    o = contiguous(views[0].shape[:-1] + views[2].shape[-1:], spec.dtype, spec.device)
    given, layout = spec, Layout(*(x.strides4() for x in (*views, o)))
    spec, layout = kernels.stacked(spec, layout, family)
    plan = make_plan(spec, family.capabilities(spec))
    kernel = family.compile(spec, plan, layout)
    # Between a call's launches: of a merge that follows in a stage of its own, or as the kernel says.
    between = kernel.merge_stage.workspace_bytes if kernel.merge_stage else getattr(kernel, "workspace_bytes", 0)
    notes = (
        () if spec is given else (f"the {given.group} heads that share a key/value head are computed as its queries",)
    )
    return _Prepared(spec, plan, kernel.scratch_bytes, between, get_num_threads(), notes)


def _prepared_backward(spec: AttentionSpec, views: Sequence[View], family: Family) -> _Prepared:
    """Of a family that compiles its backward, or that differentiates NumPy arrays, on the calling thread."""
    if family.compile_backward is not None:
        q, k, v = (x.strides4() for x in views)
        o = contiguous(views[0].shape[:-1] + views[2].shape[-1:], spec.dtype, spec.device).strides4()
        fresh = (contiguous(x.shape, spec.dtype, spec.device).strides4() for x in views)
        kernel = family.compile_backward(spec, BackwardLayout(q, k, v, o, o, *fresh), ())
        between = kernel.merge_stage.workspace_bytes if kernel.merge_stage else 0
        return _Prepared(spec, kernel.plan, kernel.scratch_bytes, between, get_num_threads())
    note = "these gradients are computed in NumPy, whose arrays of scores do not count as scratch"
    return _Prepared(spec, make_plan(spec, family.capabilities(spec)), 0, 0, 1, (note,))


def _of_tiles(
    spec: AttentionSpec, scoring: Scoring, views: Sequence[View], engine: engines.Engine, family: Family, direction: str
) -> _Prepared:
    """Of an engine whose tasks are pairs of tiles. Raises: UnavailableError for what it has no tasks for."""
    assert engine.tiles is not None and engine.bind_backward is not None
    q, k, v = (x.strides4() for x in views)
    o = contiguous(views[0].shape[:-1] + views[2].shape[-1:], spec.dtype, spec.device).strides4()
    tile_q, tile_k = engine.tiles(spec, direction)
    tiles = max(1, -(-spec.q_len // max(1, tile_q)))
    plan = Plan(spec.batch, spec.heads, tiles, 1, tile_q, tile_k, flops_of(spec))
    if direction == "backward":
        engine.bind_backward(spec, BackwardLayout(q, k, v, o, o, q, k, v), family, ())
        kernel = kernels.tile_kernels().backward(spec, tile_q, tile_k, scoring=scoring).kernel
    else:
        engine.bind(spec, Layout(q, k, v, o), family)
        if family.name != "cpu":
            note = "each task stores the scores of its tiles, which do not count as scratch"
            return _Prepared(spec, plan, 0, 0, get_num_threads(), (note,))
        kernel = kernels.tile_kernels().forward(spec, tile_q, tile_k, scoring=scoring)
    return _Prepared(spec, plan, kernel.scratch_bytes, 0, get_num_threads())


def offsets_of(spec: AttentionSpec, request: Request) -> list[int] | None:
    """The offsets of batches where they decide which keys are visible."""
    return None if request.offsets is None or spec.offset is not None else [int(x) for x in request.offsets]


def tile_map(program: Program, spec: AttentionSpec, tile_q: int, tile_k: int) -> Map:
    """The map of a program's mask by tiles of these sides, as a kernel of this dtype evaluates it."""
    return map_of(program, tile_q, tile_k, DTYPES[DTYPES[spec.dtype].accumulator].numpy)


def view_or_shape(x: Any, argument: str, dtype: Any, device: str | None = None) -> View:
    """What is known of an array, or of a row-major array of this shape, dtype and device that does not exist."""
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise wrong("device", repr(device), "'cpu', 'cuda' or 'cuda:0' and so on")
    if device == "cuda":
        device = "cuda:0"
    if isinstance(x, (tuple, list)) and all(isinstance(n, (int, np.integer)) and n >= 0 for n in x):
        row = dtype_of("float32" if dtype is None else dtype)
        return contiguous(tuple(int(n) for n in x), row.name, device or "cpu")
    if device_of(x) != "cpu":
        owner = owner_of(library_of(x))
        view = owner.view(borrow(owner, x))
    else:
        view = view_of(x if is_torch(x) else plain(x, argument))
    if device not in (None, view.device):
        raise wrong("device", repr(device), f"{view.device!r} as {argument}, or None")
    if dtype is not None and dtype_of(dtype) is not dtype_of(view.dtype, argument):
        raise wrong("dtype", dtype_of(dtype).name, f"{dtype_of(view.dtype).name} as in {argument}, or None")
    return view


def _passed_over(spec: AttentionSpec, chosen: str, requested: str, direction: str) -> tuple[tuple[str, str], ...]:
    rows = []
    for name, family in kernels.families():
        if name == chosen:
            continue
        reason = kernels.objection(family, spec.filled, direction)
        if reason is None and requested == "auto":
            reason = f"can do it, but {kernels.reserved(family) or 'comes later in the order'}"
        elif reason is None:
            reason = f"can do it, but {requested} was asked for"
        rows.append((name, reason))
    return tuple(rows)


def _notes(spec: AttentionSpec, able: Capabilities, program: Program | None) -> tuple[str, ...]:
    notes = []
    if spec.precision not in able.precisions:
        notes.append(f"precision {spec.precision!r} is honoured at higher precision: this kernel has no such unit here")
    if program is not None and program.mask is not None and _reads_arrays(program.mask):
        notes.append("coverage and FLOPs are those of the arrays given; they are read anew at every call")
    elif spec.offset is None:
        notes.append("coverage and FLOPs are those of the offsets given; they are read anew at every call")
    return tuple(notes)


def _reads_arrays(mask: Expr) -> bool:
    return any(x.operation.name == "load" for x in postorder([mask]))


def _positions(spec: AttentionSpec) -> str:
    if spec.band is None:
        return "every key is visible to every row"
    low = "" if spec.band.left is None else f"{-spec.band.left} <= "
    high = "" if spec.band.right is None else f" <= {spec.band.right}"
    offset = "per batch" if spec.offset is None else spec.offset
    return f"key j is visible to row i iff {low}j - (i + offset){high}; offset {offset}"


def _bytes(n: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.4g} {unit}"
    return f"{n} B"
