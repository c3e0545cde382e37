"""What the demo found, as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """One run of the demo. Times in seconds, memory in bytes, PSNR in dB, errors in units of the colours (0 ... 1)."""

    photo: str
    rows: int
    columns: int
    tokens: int  # one a pixel: queries and keys
    head_size: int  # D: a patch
    value_size: int  # D_v: a colour
    sigma: float  # of the noise
    seed: int
    cpu: str
    threads: int
    kernel: str
    isa: str
    first_call_seconds: float  # of a tiny call: generating or loading the kernel
    seconds: float  # of the attention call
    gflop: float  # 2 * tokens^2 * (D + D_v) / 1e9: the two products, the softmax not counted
    gflop_per_second: float
    extra_bytes: int | None  # resident memory that the call needed beyond its inputs and outputs
    scratch_bytes: int  # of it, scratch of all threads, as flashtile.explain says
    unfused_bytes: int  # of the scores that an unfused attention stores
    sample_rows: int
    largest_error: float  # of o, on the sample of rows, against float64
    allowed_error: float  # by the accuracy rule: twice an unfused float32 attention's, see flashtile.testing
    psnr_noisy: float
    psnr_denoised: float

    def json(self) -> str:
        """One JSON object, one member per field."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        if self.extra_bytes is None:
            extra = "not measured on this system:"
        else:  # the meter does not tell fractions of a megabyte
            extra = "less than 1 MB" if self.extra_bytes < 1e6 else f"{self.extra_bytes / 1e6:.0f} MB"
        kernel = ", ".join(filter(None, (self.kernel, self.isa)))
        allowed = f"{self.allowed_error:.2g} allowed"
        lines = [
            ("picture", f"{self.photo}, {self.columns} x {self.rows}, noise sigma {self.sigma:g}, seed {self.seed}"),
            ("tokens", f"{self.tokens:,} queries and keys, D = {self.head_size}, D_v = {self.value_size}, float32"),
            ("machine", f"{self.cpu}, {self.threads} thread{'s' if self.threads > 1 else ''}"),
            ("kernel", f"{kernel}; first call {self.first_call_seconds:.2f} s"),
            ("time", f"{self.seconds:.2f} s for {self.gflop:,.0f} GFLOP: {self.gflop_per_second:.1f} GFLOP/s"),
            ("extra memory", f"{extra} beyond inputs and outputs; scratch {self.scratch_bytes / 1e6:.2f} MB"),
            ("unfused", f"would store {self.unfused_bytes / 1e9:,.1f} GB of scores"),
            ("largest error", f"{self.largest_error:.2g} on {self.sample_rows} rows against float64 ({allowed})"),
            ("PSNR", f"{self.psnr_noisy:.2f} dB noisy -> {self.psnr_denoised:.2f} dB denoised"),
        ]
        return "".join(f"{name:<14} {text}\n" for name, text in lines)
