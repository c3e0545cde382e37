"""The score program of one row, lanes over keys: what it hides, before K is read, and what it makes of the scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.steps.frame import Frame
from flashtile.llvm.ir import Function, Module, Value
from flashtile.llvm.routines import Operand, Routine
from flashtile.llvm.types import vector
from flashtile.score.emit import Emission
from flashtile.score.expr import Expr, postorder
from flashtile.score.operations import variable


@dataclass(frozen=True)
class SeenKeys(Operand):
    """Which keys of a block rows see: a bit for each lane, 32 bits for each register of a row's keys."""

    WORDS: ClassVar = {"at": "ptr"}
    at: Value

    @staticmethod
    def bytes(c: Config) -> int:
        """Bytes of a row."""
        return c.key_block // c.lanes * 4

    def row(self, c: Config, n: Value) -> SeenKeys:
        return SeenKeys(self.at + n * self.bytes(c))

    def key(self, c: Config, n: Value) -> SeenKeys:
        """The same from a key on that begins a register."""
        return SeenKeys(self.at + n // c.lanes * 4)

    def read(self, c: Config) -> Value:
        """The first register's lanes."""
        f = self.function
        bits = f.cast("trunc", f.load("i32", self.at), f"i{c.lanes}")
        return f.cast("bitcast", bits, vector(c.lanes, "i1"))

    def write(self, c: Config, seen: Value) -> Value:
        """The first register's lanes; returns whether there is one that sees its key."""
        f = self.function
        bits = f.cast("zext", f.cast("bitcast", seen, f"i{c.lanes}"), "i32")
        f.store(bits, self.at)
        return bits.ne(0)


class RowProgram:
    """Emits expressions of the program for the row that a frame names: what keys do not change at once, the rest where
    a register of keys is known.

    Lanes past the last key repeat it: what is loaded for them exists.
    """

    def __init__(self, f: Function, c: Config, frame: Frame, *roots: Expr) -> None:
        assert c.code
        self.f, self.c = f, c
        self.row = frame.program(f, c).inner({"i": frame.integer("row")})
        self.row.prepare(*roots)
        self.block, self.last_key = frame.integer("block"), frame.integer("last_key")
        used = set(postorder(roots))
        self.loads = [x for x in c.code.key_loads if x in used]

    def keys(self, first: Value, variables: Mapping[str, Value]) -> Emission:
        """The place where a register of keys is known, counted from the block, and variables that go with it."""
        f, c = self.f, self.c
        first = self.block + f.cast("trunc", first, "i32")
        lanes = f.splat(first, c.lanes) + f.iota(vector(c.lanes, "i32"))
        j = f.minimum(lanes, f.splat(self.last_key, c.lanes))
        inside = first + (c.lanes - 1) <= self.last_key
        given = {load: self._load(load, inside, first, j) for load in self.loads}
        return self.row.inner({"j": j, **variables}, given)

    def _load(self, load: Expr, inside: Value, first: Value, j: Value) -> Value:
        """A load along the keys: one register where its elements are adjacent and there, else lane by lane."""
        f, row, access = self.f, self.row.inner({}), load.data
        axis = load.args.index(variable("j"))

        def index(of_key: Value) -> list[Value]:
            return [of_key if n == axis else row.value(x) for n, x in enumerate(load.args)]

        whole = inside & row.block.adjacent(row, access, axis)
        none = f.const(vector(self.c.lanes, row.scalar(load.type)), 0)
        run = f.value_when(whole, lambda: row.block.run(row, access, index(first)), none)
        return f.value_when(whole.eq(0), lambda: row.inner({}).load(load, index(j)), run)


def emit_see(module: Module, c: Config) -> Routine:
    """Which of ``count`` keys the row of a frame sees. Returns a bit for each register of keys: whether it sees any."""
    assert c.code and c.code.mask
    mask = c.code.mask
    f = Routine(module, "see", "i64", frame=Frame.kind(), count="i64", seen=SeenKeys.kind())
    frame, count, seen = f.parameters
    program = RowProgram(f, c, frame, mask)

    def one_register(key: Value, found: list[Value]) -> list[Value]:
        visible = program.keys(key, {}).vector(mask)
        any_ = seen.key(c, key).write(c, visible)
        return [found[0] | f.select(any_, f.const("i64", 1) << key // c.lanes, 0)]

    f.ret(*f.fold(0, count, c.lanes, [f.const("i64", 0)], one_register))
    return f


def score_change(f: Function, c: Config, frame: Frame) -> Callable[[Value, Value], Value]:
    """(first key, products) -> scores of a register, by the program of the row of a frame; as they are without one."""
    root = c.code.score if c.code else None
    if root is None:
        return lambda key, raw: raw
    program = RowProgram(f, c, frame, root)
    scale = f.splat(f.cast("fptrunc", frame.read("scale"), c.acc), c.lanes)
    return lambda key, raw: program.keys(key, {"s": raw * scale}).vector(root)
