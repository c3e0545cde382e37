"""Documents packed into one sequence: a row sees only the keys of its own document."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import SpecError
from .capture import capture
from .mask import Mask


def document(ids: Any, key_ids: Any = None) -> Mask:
    """Key j is visible to row i iff their document (segment) numbers are equal.

    Shapes:  ids (S_q,) or (B, S_q); key_ids (S_kv,) or (B, S_kv). Without key_ids, ids are those of both, and as many
             as the longer of S_q and S_kv. Lists are taken as arrays.
    Raises:  SpecError for other shapes and for numbers that are not integers.
    """
    ids, key_ids = (np.asarray(x) if isinstance(x, (list, tuple)) else x for x in (ids, key_ids))
    alone = key_ids is None
    key_ids = ids if alone else key_ids
    for name, value in (("document ids", ids), ("document key_ids", key_ids)):
        found = capture(value, name)
        if found.rank not in (1, 2) or found.type != "int":
            got = f"{found.dtype} of shape {found.array.shape}"
            raise SpecError(f"{name}: got {got}, expected integers (S,) or (B, S)")

    def build(offset: Any) -> Any:
        return lambda b, h, i, j: _at(ids, b, i) == _at(key_ids, b, j)

    def fits(shape: tuple[int, int, int, int]) -> None:
        queries, keys = shape[2:]
        _check(ids, shape[0], max(queries, keys) if alone else queries, "document ids")
        _check(key_ids, shape[0], max(queries, keys) if alone else keys, "document key_ids")

    return Mask(build, name="document", fits=fits)


def _check(ids: Any, batch: int, length: int, name: str) -> None:
    got = tuple(ids.shape)
    if got not in ((length,), (batch, length)):
        raise SpecError(f"{name}: got shape {got}, expected (S,) = ({length},) or (B, S) = ({batch}, {length})")


def _at(ids: Any, b: Any, position: Any) -> Any:
    return ids[b, position] if len(ids.shape) == 2 else ids[position]
