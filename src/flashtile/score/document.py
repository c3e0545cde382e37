"""Documents packed into one sequence: a row sees only the keys of its own document."""

from __future__ import annotations

from typing import Any

from ..errors import SpecError
from .capture import capture
from .mask import Mask


def document(ids: Any, key_ids: Any = None) -> Mask:
    """Key j is visible to row i iff their document (segment) numbers are equal.

    Shapes:  ids (S_q,) or (B, S_q); key_ids (S_kv,) or (B, S_kv), the same as ids unless given.
    Raises:  SpecError for other ranks and for numbers that are not integers.
    """
    key_ids = ids if key_ids is None else key_ids
    for name, value in (("document ids", ids), ("document key_ids", key_ids)):
        found = capture(value, name)
        if found.rank not in (1, 2) or found.type != "int":
            got = f"{found.element} of shape {found.array.shape}"
            raise SpecError(f"{name}: got {got}, expected integers (S,) or (B, S)")

    def build(offset: Any) -> Any:
        return lambda b, h, i, j: _at(ids, b, i) == _at(key_ids, b, j)

    return Mask(build, name="document")


def _at(ids: Any, b: Any, position: Any) -> Any:
    return ids[b, position] if len(ids.shape) == 2 else ids[position]
