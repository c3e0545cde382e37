"""From a `Specialisation` to what Triton takes: the function, its constants, and the source for its compiler."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from flashtile.kernels.triton import (
    backward,
    backward_arrays,
    backward_kv,
    backward_q,
    forward,
    gluon,
    merge,
    program,
    vanilla,
)
from flashtile.kernels.triton.specialisation import Specialisation

FUNCTIONS: dict[str, Any] = {
    "forward": forward.forward,
    "merge": merge.merge,
    "scores": vanilla.scores,
    "softmax": vanilla.softmax,
    "output": vanilla.output,
    "row_deltas": backward.row_deltas,
    "add_parts": backward.add_parts,
    "sink_sums": backward.sink_sums,
    "backward_q": backward_q.backward_q,
    "backward_kv": backward_kv.backward_kv,
    "array_sums": backward_arrays.array_sums,
    "array_finish": backward_arrays.array_finish,
    "clear": backward_arrays.clear,
}

_TYPES = {"fp64": tl.float64, "fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}


def constants(specialisation: Specialisation) -> dict[str, Any]:
    """The compile-time parameters by name: functions in place of SCORE, MASK and SLOPE, and, for an array's gradient by
    its number, of GIVES and PLACE; a Triton type as OPERAND."""
    code = specialisation.code
    values: dict[str, Any] = dict(specialisation.constants)
    functions = {"SCORE": program.score_function, "MASK": program.mask_function, "SLOPE": program.slope_function}
    for name, function in functions.items():
        if name in values:
            values[name] = function(code) if values[name] and code is not None else None
    if "GIVES" in values and code is not None:
        values["GIVES"], values["PLACE"] = program.gradient_functions(code, values["GIVES"])
    if "OPERAND" in values:
        values["OPERAND"] = _TYPES[values["OPERAND"]]
    return values


def source_of(specialisation: Specialisation) -> Any:
    """The `triton.compiler.ASTSource` of a kernel; `triton.compile` takes it with num_warps and num_stages."""
    from triton.compiler import ASTSource

    if specialisation.kernel == gluon.KERNEL:
        from flashtile.kernels.triton import gluon_forward  # not every Triton in the range has what it needs

        return gluon_forward.source_of(specialisation)
    function = FUNCTIONS[specialisation.kernel]
    known, types = constants(specialisation), dict(specialisation.signature)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    place = {name: n for n, name in enumerate(function.arg_names)}
    attributes = {(place[name],): [["tt.divisibility", 16]] for name in specialisation.divisible}
    return ASTSource(function, signature, constexprs=known, attrs=attributes)
