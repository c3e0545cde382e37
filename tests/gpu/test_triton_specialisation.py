"""What a kernel is compiled for: one value, whose arguments are the kernel's parameters in order."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from flashtile.kernels.triton import backward_forms as forms
from flashtile.kernels.triton import jit
from flashtile.kernels.triton import specialisation as special
from flashtile.kernels.triton.specialisation import Memory, Specialisation, Tile, padded
from flashtile.score import Program
from flashtile.spec import AttentionSpec, Band

SPEC = AttentionSpec(2, 4, 2, 100, 200, 64, 40, "bfloat16", "ieee", None, 0, 0.125)
SLOPES, TABLE, factor = np.ones(4, np.float32), np.zeros((100, 3), bool), 0.3
CODE = Program.of(
    (2, 4, 100, 200),
    score_mod=lambda s, b, h, i, j: s * factor + SLOPES[h],
    mask=lambda b, h, i, j: TABLE[i, b] | (j < 7),
).code
SPECS = {
    "plain": SPEC,
    "band": replace(SPEC, band=Band(None, 0)),
    "offsets": replace(SPEC, band=Band(3, 0), offset=None),
    "program": replace(SPEC, program=CODE),
    "sinks": replace(SPEC, sinks=True),
    "dropout": replace(SPEC, dropout=True),
    "float64": replace(SPEC, dtype="float64"),
    "float32 as fp16": replace(SPEC, dtype="float32", precision="fp16"),
}
TILE, MEMORIES = Tile(64, 32), [Memory(*known) for known in itertools.product((True, False), repeat=2)]


def every(spec: AttentionSpec) -> list[Specialisation]:
    """Every kernel of a spec, in all its variants."""
    found = [special.softmax(spec, TILE), forms.sink_sums(spec), forms.array_finish(spec), forms.clear()]
    for memory in MEMORIES:
        found += [special.scores(spec, TILE, memory=memory), special.output(spec, TILE, memory=memory)]
        found += [special.merge(spec, TILE, finished=done, memory=memory) for done in (True, False)]
        variants = itertools.product(special.STATES, *((True, False),) * 3)
        found += [
            special.forward(spec, TILE, state=state, packed=packed, contain=contain, spans=spans, memory=memory)
            for state, packed, contain, spans in variants
        ]
        found += backward(spec, memory)
    return found


def backward(spec: AttentionSpec, memory: Memory) -> list[Specialisation]:
    """Those of gradients."""
    found = [forms.row_deltas(spec, dlse, memory) for dlse in (True, False)]
    found += [forms.backward_q(spec, TILE, contain=contain, memory=memory) for contain in (True, False)]
    for dk, dv, contain in ((True, True, True), (True, False, False), (False, True, False)):
        found.append(forms.backward_kv(spec, TILE, contain=contain, dk=dk, dv=dv, memory=memory))
    for number in range(len(spec.program.array_gradients) if spec.program else 0):
        found += [forms.array_sums(spec, TILE, number, totals=x, memory=memory) for x in (True, False)]
    return found


@pytest.mark.parametrize("name", SPECS)
def test_arguments_are_the_parameters_in_order(name: str) -> None:
    for s in every(SPECS[name]):
        parameters = jit.FUNCTIONS[s.kernel].arg_names
        constants = [constant for constant, _ in s.constants]
        assert sorted([*s.names, *constants]) == sorted(parameters)
        assert list(s.names) == [p for p in parameters if p in s.names]
        assert set(s.divisible) <= set(s.names)


@pytest.mark.parametrize("name", SPECS)
def test_equal_parts_make_equal_values(name: str) -> None:
    ours, again = every(SPECS[name]), every(replace(SPECS[name]))
    assert ours == again and len(set(ours)) == len({*ours, *again})


def test_lengths_and_scale_are_not_compiled_in() -> None:
    """Nor are head sizes that are padded alike; one that fills its tile needs no column mask, and is another kernel."""
    base = special.forward(SPEC, TILE)
    other = replace(SPEC, batch=7, heads=8, kv_heads=8, q_len=3, kv_len=9, value_size=63, scale=3.0)
    assert special.forward(other, TILE) == base
    assert special.forward(replace(SPEC, scale=-1.0), TILE) != base  # a maximum becomes a minimum
    assert special.forward(replace(SPEC, value_size=64), TILE) != base


def test_only_sums_of_full_precision_over_many_keys_have_spans() -> None:
    """A call's length tells two kernels apart, no more."""

    def spans(dtype: str, keys: int, precision: str = "ieee") -> bool:
        return special.has_spans(replace(SPEC, dtype=dtype, precision=precision), TILE, keys)

    most = special.SPAN * TILE.tile_k
    assert spans("float32", most + 1) and spans("float64", most + 1)
    assert not spans("float32", most) and not spans("bfloat16", 10**6) and not spans("float32", 10**6, "tf32")
    one, other = (special.forward(SPEC, TILE, spans=on) for on in (False, True))
    assert one != other and one.signature == other.signature


def test_a_programs_structure_is_compiled_in_and_its_values_are_not() -> None:
    def code(cap: float, structure: str = "softcap") -> object:
        return Program.of((2, 4, 100, 200), **{structure: cap if structure == "softcap" else SLOPES * cap}).code

    one, two = (special.forward(replace(SPEC, program=code(cap)), TILE) for cap in (1.0, 2.0))
    assert one == two and hash(one) == hash(two)
    assert special.forward(replace(SPEC, program=code(1.0, "alibi_slopes")), TILE) != one


def test_captured_values_are_passed_in_place() -> None:
    s = special.forward(SPECS["program"], TILE)
    types = ("i64", "*fp32", "i32", "i64", "*u8", "i32", "i64", "i32", "i64")  # a number, an array, an array of rank 2
    assert dict(s.signature)["captures"] == types
    at = s.names.index("captures")
    assert s.flat_types()[at : at + len(types)] == types


def test_padded_head_sizes() -> None:
    assert [padded(n) for n in (1, 15, 16, 17, 64, 65, 256)] == [16, 16, 16, 32, 64, 128, 256]
