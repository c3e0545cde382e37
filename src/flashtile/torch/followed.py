"""Functions of scores that close over values, inside `torch.compile`.

Its tracer follows them as it follows those that torch's own flex_attention is given: with the closures, globals and
attributes that they read, whose changes its guards see. What comes out is a graph of operations on five elements. Here
it is run once more on symbols, which writes the text that `flashtile::attention` takes; what the graph computes of
tensors and numbers alone moves out of it, to run once before the call, and what is left of that are captured arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy
import torch
from torch._dynamo.exc import ObservedException, TorchRuntimeError, UncapturedHigherOrderOpError, Unsupported, UserError
from torch._dynamo.utils import set_example_value
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import construct_tensor_variable, wrap_fx_proxy
from torch._dynamo.variables.higher_order_ops import (
    TorchHigherOrderOperatorVariable,
    _hop_name_to_variable_class,
    discard_graph_changes,
    speculate_subgraph,
)
from torch._ops import HigherOrderOperator

from flashtile.errors import FlashtileError
from flashtile.score.capture import Unread
from flashtile.score.frozen import freeze
from flashtile.score.operations import variable
from flashtile.score.proxies import ArrayProxy, replace_array
from flashtile.score.symbol import Symbol

_NAME = "flashtile_rule"
_ARGUMENTS = {"score_mod": "sbhij", "mask": "bhij"}


class Rule(HigherOrderOperator):
    """rule(function, argument, q) -> (text, arrays) of a mask or score function, by the argument that it came as; None
    where it cannot be followed, which a call outside of any graph cannot either."""

    def __init__(self) -> None:
        super().__init__(_NAME)

    def __call__(self, function: Any, argument: str, q: torch.Tensor) -> Any:
        return None


class _NotFollowed(Exception):
    """The graph holds what has no place in a text."""


class _RuleVariable(TorchHigherOrderOperatorVariable):
    """How the tracer calls `rule`."""

    _HOP_NAME = _NAME

    def _call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        function, argument, q = args
        try:
            found = _followed(self.value, tx, function, argument.as_python_constant(), q)
        except (Unsupported, UserError, ObservedException, UncapturedHigherOrderOpError, TorchRuntimeError):
            found = None  # the call outside of the graph says what is wrong, if anything is
        except (FlashtileError, _NotFollowed):
            found = None
        return VariableTracker.build(tx, None) if found is None else found


def _followed(operator: Any, tx: Any, function: Any, argument: str, q: Any) -> Any:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch._dynamo.variables import ConstantVariable, ListVariable, TensorVariable, TupleVariable

    names = _ARGUMENTS[argument]

    def element(name: str) -> Any:
        dtype = VariableTracker.build(tx, torch.float32 if name == "s" else torch.int32)
        return q.call_method(tx, "new_empty", [VariableTracker.build(tx, [])], {"dtype": dtype})

    with discard_graph_changes(tx):
        given = [element(name) for name in names]
    with TransformGetItemToIndex():
        _, graph, lifted = speculate_subgraph(
            tx, function, given, {}, argument, source_target=operator, set_subgraph_inputs="flatten_manual"
        )
    run = _Run(tx, names, {inner.node: outer for outer, inner in lifted.items()})
    text, arrays = run.of(graph)
    found: list[VariableTracker] = [
        construct_tensor_variable(TensorVariable, tx, x.proxy, x.example, None, {}) for x in arrays
    ]
    return TupleVariable([ConstantVariable.create(text), ListVariable(found)])


class _Outside(NamedTuple):
    """What does not depend on the five elements: a value of the graph around them."""

    proxy: Any
    example: Any


class _Run:
    """A graph of elements, run on symbols."""

    def __init__(self, tx: Any, names: str, outer: Mapping[Any, Any]) -> None:
        self._tx, self._names, self._outer = tx, iter(names), outer
        self._argument = "score_mod" if names[0] == "s" else "mask"
        self._values: dict[Any, Any] = {}  # of the graph's nodes
        self._stand_ins: dict[Any, Any] = {}  # for what it reads, by nodes of the graph around it
        self._read: dict[int, _Outside] = {}  # by the id of the array that stands for it
        self._longer = False  # whether an axis of one may have another length next time

    def of(self, graph: Any) -> tuple[str, list[_Outside]]:
        """The text of the graph's one result, and what fills the slots of its arrays."""
        for node in graph.nodes:
            if node.op == "output":
                result = self._inside(_only(self._values_of(node.args)))
                break
            self._values[node] = self._input(node) if node.op == "placeholder" else self._result(node)
        takes_score = self._argument == "score_mod"
        rule = (lambda s, b, h, i, j: result) if takes_score else (lambda b, h, i, j: result)  # noqa: E731  # one of two
        frozen = freeze(rule)
        return frozen.text, [self._read[id(x)] for x in frozen.arrays]

    def _input(self, node: Any) -> Any:
        if node not in self._outer:
            return Symbol(variable(next(self._names)))
        proxy = self._outer[node]
        return _Outside(proxy, proxy.node.meta["example_value"])

    def _result(self, node: Any) -> Any:
        args, keywords = self._values_of((node.args, node.kwargs))
        if not _any(lambda x: isinstance(x, (Symbol, ArrayProxy)), (args, keywords)):
            return self._moved(node, args, keywords)
        args, keywords = (self._each(self._inside, x) for x in (args, keywords))
        if self._longer and _any(lambda x: type(x) is int and x < 0, args[1:]):
            raise _NotFollowed  # it may count from the end of an axis, wherever that will be
        if node.op == "call_function":
            return _plain(node.target)(*args, **keywords)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **keywords)
        raise _NotFollowed

    def _moved(self, node: Any, args: Any, keywords: Any) -> Any:
        """A node that no element enters, in the graph around it."""
        if node.op not in ("call_function", "call_method"):
            raise _NotFollowed
        args, keywords = (self._each(lambda x: x.proxy if isinstance(x, _Outside) else x, y) for y in (args, keywords))
        proxy = self._tx.output.create_proxy(node.op, node.target, args, keywords)
        set_example_value(proxy.node, node.meta["example_value"])
        return _Outside(proxy, node.meta["example_value"])

    def _inside(self, value: Any) -> Any:
        """A value from around the elements, as what stands for an array or a number."""
        if not isinstance(value, _Outside):
            return value
        node = value.proxy.node
        if node not in self._stand_ins:
            array = self._array(value)
            lengths, dtype = array.example.shape, str(array.example.dtype).removeprefix("torch.")
            self._longer = self._longer or not all(type(n) is int for n in lengths)
            stand_in = Unread(tuple(map(_length, lengths)), dtype)
            self._read[id(stand_in)] = array
            self._stand_ins[node] = replace_array(stand_in, f"{self._argument}: {node.name}")
        return self._stand_ins[node]

    def _array(self, value: _Outside) -> _Outside:
        """Itself, or a number as a tensor of no axes: another number is then no other graph."""
        if isinstance(value.example, torch.Tensor):
            return value
        kinds = {torch.SymFloat: torch.float64, torch.SymInt: torch.int64}
        if type(value.example) not in kinds:
            raise _NotFollowed
        put = self._tx.output.create_proxy
        one = put("call_function", torch.ones, ((),), {"dtype": kinds[type(value.example)]})
        wrap_fx_proxy(self._tx, one)
        proxy = put("call_function", torch.mul, (one, value.proxy), {})  # of few operations torch keeps a number open
        return _Outside(proxy, wrap_fx_proxy(self._tx, proxy).as_proxy().node.meta["example_value"])

    def _values_of(self, nodes: Any) -> Any:
        return self._each(lambda x: self._values[x] if isinstance(x, torch.fx.Node) else x, nodes)

    def _each(self, function: Callable[[Any], Any], x: Any) -> Any:
        """Of what is in tuples, lists, slices and dicts."""
        if isinstance(x, _Outside):
            return function(x)
        if isinstance(x, (tuple, list)):
            return type(x)(self._each(function, y) for y in x)
        if isinstance(x, dict):
            return {name: self._each(function, y) for name, y in x.items()}
        if isinstance(x, slice):
            return slice(*(self._each(function, y) for y in (x.start, x.stop, x.step)))
        return function(x)


def _only(x: Any) -> Any:
    """The one thing in tuples of one."""
    while isinstance(x, (tuple, list)) and not isinstance(x, _Outside):
        (x,) = x
    return x


def _any(holds: Callable[[Any], bool], x: Any) -> bool:
    if isinstance(x, (tuple, list)) and not isinstance(x, _Outside):
        return any(_any(holds, y) for y in x)
    if isinstance(x, dict):
        return any(_any(holds, y) for y in x.values())
    return holds(x)


def _plain(target: Any) -> Callable[..., Any]:
    """What a node calls; where the tracer has NumPy's arrays for tensors, the function that it wraps."""
    if type(target).__name__ == "numpy_method_wrapper":
        return lambda x, *args, **keywords: getattr(x, target.method)(*args, **keywords)
    if type(target).__name__ == "numpy_operator_wrapper":
        return target.op
    if type(target).__name__ == "numpy_to_tensor_wrapper":  # of one of torch._numpy
        return getattr(numpy, target.f.__name__, target.f)
    return target


def _length(n: Any) -> int:
    """Of an axis; one that may be another next time is looked at without a guard."""
    return n if type(n) is int else int(n.node.hint)


rule = Rule()
_hop_name_to_variable_class[_NAME] = _RuleVariable
