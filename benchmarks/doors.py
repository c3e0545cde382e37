"""The doors' targets: existing code on flashtile beside the same code on what it was written for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from .overheads import run_snippet
from .report import Verdict


class Row(NamedTuple):
    """A measurement of door_calls.py, and what it is held to: how many times as fast, or how many us a call takes
    beyond the other's."""

    arguments: tuple[str, ...]
    subject: str
    ratio: float | None = None
    beyond: float | None = None


ROWS = (
    Row(("varlen", "dense"), "varlen, 64 sequences, beside padded sdpa", 2.0),
    Row(("varlen", "causal"), "varlen, 64 causal sequences, beside padded sdpa", 2.0),
    Row(("llama_step", "step"), "Llama, a training step of 4,096 tokens, beside sdpa", 1.3),
    Row(("llama_step", "attention"), "Llama, the attention of that step, beside sdpa"),
    Row(("llama_token", "bfloat16"), "Llama 3 8B, attention of a token after 8,192, bf16, beside sdpa", 4.0),
    Row(("llama_token", "float32"), "Llama 3 8B, attention of a token after 8,192, fp32, beside sdpa", 1.0),
    *(
        Row(("minilm", str(n), kind), f"MiniLM, {n} tokens{', padded' * (kind == 'padded')}, beside sdpa", 1.0)
        for n in (16, 64, 256)
        for kind in ("full", "padded")
    ),
    Row(("call", "plain"), "torch's sdpa at (1, 1, 16, 64)", beyond=0.0),
    Row(("call", "recorded"), "torch's sdpa at (1, 1, 16, 64), gradients recorded", beyond=6.0),
    Row(("call", "backward"), "torch's sdpa at (1, 8, 128, 64), forward and backward", 1.0),
)
NAMES = tuple(dict.fromkeys(row.arguments[0] for row in ROWS))


def measure(names: Collection[str], threads: int) -> Iterator[Verdict]:
    """A verdict on each row of the measurements that are named."""
    for row in ROWS:
        if row.arguments[0] in names:
            yield judge(row, run_snippet("door", *row.arguments, threads=threads))


def judge(row: Row, found: dict[str, float]) -> Verdict:
    """The verdict on what a row's measurement found, or on the error that came instead."""
    if "error" in found:
        note, us = str(found["error"]), {"ours": None, "other": None}
    else:
        us = {name: found[name] * 1e6 for name in ("ours", "other")}
        note = f"{us['ours']:.4g} us beside {us['other']:.4g} us"
    if row.beyond is None:
        return Verdict(row.subject, "times as fast", found.get("ratio"), row.ratio, note)
    limit = None if us["other"] is None else us["other"] + row.beyond
    return Verdict(row.subject, f"us, at most torch's + {row.beyond:g}", us["ours"], limit, note, at_most=True)
