"""Expressions as a person would write them, for explain."""

from __future__ import annotations

from collections import Counter

from .builtin import option_name
from .expr import Expr, postorder
from .program import Program

_LONG = 24  # a subexpression that is used again gets a name of its own from this length on
_MOST = 400  # characters in all
_INFIX = {"floordiv": "({0} // {1})", "mod": "({0} % {1})", "shl": "({0} << {1})", "shr": "({0} >> {1})"}


def score_text(program: Program) -> str:
    """What happens to a score s, in one line; "" if nothing does."""
    return "" if program.score is None else readable(program.score, program)


def mask_text(program: Program) -> str:
    """When key j is visible to row i, in one line; "" if always."""
    return "" if program.mask is None else readable(program.mask, program)


def readable(root: Expr, program: Program) -> str:
    """The expression in infix notation, captured numbers by value, captured arrays by name."""
    nodes = list(postorder([root]))
    uses = Counter(a for x in nodes for a in x.args)
    texts: dict[Expr, str] = {}
    shared: list[str] = []
    for x in nodes:
        text = _node(x, [texts[a] for a in x.args], program)
        if x is not root and uses[x] > 1 and len(text) >= _LONG:
            shared.append(f"x{len(shared) + 1} = {_bare(text)}")
            text = f"x{len(shared)}"
        texts[x] = text
    line = "; ".join([_bare(texts[root]), *shared])
    return line if len(line) <= _MOST else line[: _MOST - 3] + "..."


def _node(x: Expr, args: list[str], program: Program) -> str:
    name = x.operation.name
    if name == "var":
        return str(x.data)
    if name == "const":
        return f"{x.data:g}" if x.type == "float" else str(x.data)
    if name == "scalar":
        return f"{program.capture(x.data).value:g}"
    if name == "load":
        label = option_name(program.capture(x.data.source).name)
        return f"{label}[{', '.join(map(_bare, args))}]"
    if name == "cast":
        return args[0] if x.type == "float" else f"{x.type}({_bare(args[0])})"
    if name in ("add", "sub") and args[1] == "0" and x.type == "int":  # an offset of nothing
        return args[0]
    form = _INFIX.get(name) or (x.operation.triton or f"{name}({{0}})").replace("tl.", "")
    inner = args if form.startswith("(") else [_bare(a) for a in args]
    return form.format(*inner)


def _bare(text: str) -> str:
    """Without parentheses around the whole."""
    if not text.startswith("("):
        return text
    depth = 0
    for at, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[1:-1] if at == len(text) - 1 else text
    return text
