"""The kernel in Gluon: what its machine code has, what its launch tells the driver, and that no call takes it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from devices import DeviceArray
from inputs import Shape, uniform
from test_triton_code import SHARED
from test_triton_launch import ARCH, Gpu, fake_driver, gpu, read  # noqa: F401  # fixtures

from flashtile import current
from flashtile.arrays import contiguous
from flashtile.errors import UnavailableError
from flashtile.kernels import Layout
from flashtile.kernels.triton import cuda, gluon, release
from flashtile.kernels.triton.compiler import compiled
from flashtile.kernels.triton.resources import resources_of
from flashtile.spec import AttentionSpec

pytestmark = pytest.mark.skipif((release() or (0,)) < (3, 9), reason="Gluon of Triton 3.9")
SHAPE = Shape(2, 4, 2, 200, 300, 128, 128)


def spec_of(size: int = 128, dtype: str = "bfloat16", **options: Any) -> AttentionSpec:
    q, k = contiguous((2, 4, 200, size), dtype, "cuda:0"), contiguous((2, 2, 300, size), dtype, "cuda:0")
    return AttentionSpec.of(q, k, k, **{"align": "top_left", **options})


CASES = [(128, "bfloat16", True), (128, "float16", False), (64, "bfloat16", True), (64, "bfloat16", False)]


@pytest.mark.parametrize(
    ("size", "storage", "causal"),
    [pytest.param(*case, marks=() if case == CASES[0] else pytest.mark.slow) for case in CASES],
)
def test_the_machine_code(size: int, storage: str, causal: bool) -> None:
    """Two groups with both products, no spill, tiles by the memory unit, registers that a processor has."""
    kernel = compiled(gluon.specialised(spec_of(size, storage, causal=causal)), "sm_90")
    used, meta = resources_of(kernel), kernel.metadata
    steps = Counter({f"64x{gluon.KEYS}x16": 2 * size // 16})
    steps[f"64x{size}x16"] += 2 * gluon.KEYS // 16
    assert {name.split(".")[1]: n for name, n in used.tensor.items()} == steps
    assert all(name.startswith("HGMMA.") for name in used.tensor) and used.spills == 0
    assert used.instructions["UTMALDG"] >= 4 and meta.num_warps == 12
    assert used.registers * 32 * meta.num_warps <= 65536 and meta.shared <= SHARED["sm_90"]


def test_a_launch(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    q, k, v = (DeviceArray(x) for x in uniform(SHAPE, "float16"))
    o, lse = DeviceArray(q.array.copy()), DeviceArray(q.array[..., 0].astype("float32"))
    spec = spec_of(128, "bfloat16", causal=True, align=40, scale=0.3)
    layout = Layout(*(contiguous(x.shape, "bfloat16").strides4() for x in (q, k, v, o)))
    at = [x.data.ptr for x in (q, k, v, o, lse)]

    def launch() -> None:
        with current.calling(gpu.owner, q):
            gluon.attend(spec, layout, *at, cuda.Gpu(), ARCH)

    with pytest.raises(UnavailableError, match="in Gluon has never run on a GPU; FLASHTILE_GLUON=1 tries it"):
        launch()
    monkeypatch.setenv(gluon.VARIABLE, "1")
    launch()
    (launched,) = gpu.launches()
    assert launched.grid == (2 * 4 * 2, 1, 1) and launched.block == (384, 1, 1) and launched.shared > 48 << 10
    values = read(launched, gpu.specialisations[0])
    assert [values[name] for name in ("q", "k", "v", "o", "lse")] == at
    assert (values["k_h"], values["q_s"], values["right"], values["query_tiles"]) == (300 * 128, 128, 40, 2)
    assert values["global_scratch"], "descriptors are made there"
    at[0] += 2
    with pytest.raises(UnavailableError, match="takes arrays aligned to 16 bytes"):
        launch()


@pytest.mark.parametrize(
    ("arch", "spec", "reason"),
    [
        ("sm_100", spec_of(), "is for sm_90, not for sm_100"),
        ("sm_90", spec_of(dtype="float32"), "takes 16 bits and head sizes 64 and 128, not float32 and 128, 128"),
        ("sm_90", spec_of(96), "not bfloat16 and 96, 96"),
        ("sm_90", spec_of(window=(5, 0)), "takes no window"),
        ("sm_90", spec_of(causal=True), "has never run on a GPU"),
    ],
)
def test_what_it_refuses(arch: str, spec: AttentionSpec, reason: str) -> None:
    assert reason in str(gluon.refusal(spec, arch))


def test_an_older_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon, "release", lambda: (3, 6))
    monkeypatch.setattr(gluon, "installed_version", lambda: "3.6.0")
    assert gluon.refusal(spec_of(), ARCH) == "wants Triton 3.9, this is 3.6.0"
