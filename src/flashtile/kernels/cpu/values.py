"""Output tiles: O^T[column][query] = alpha O^T + V^T P^T for a few value columns by one panel of queries."""

from __future__ import annotations

from flashtile.kernels.cpu.config import Config
from flashtile.kernels.cpu.scores import contract
from flashtile.kernels.cpu.softmax import words_seen
from flashtile.llvm.ir import Function, Module, Value


def emit_values(module: Module, c: Config, vectors: int) -> str:
    """A function for one tile of ``rows`` value columns; its name.

    Arguments: output tile (updated), alpha, values at the tile's first column, bytes between (pairs of) keys,
    weights, number of keys, and how many of them the first register of queries may see; each further register may see
    those of ``lanes`` more keys.  Sums of one key block are formed apart and then added to what was there: blocked
    summation, whose error grows with the number of blocks, not of keys.

    Along a diagonal the first registers are done while the others go on: each one's keys end where all its weights are
    0, which saves a tenth of the products of a causal call with 512 keys.
    """
    name = f"values_{vectors}"
    f = Function(module, name, "void", ["ptr", "ptr", "ptr", "i64", "ptr", "i64", "i64"], internal=True,
                 names=["o", "alpha", "v", "stride", "p", "keys", "reach"])  # fmt: skip
    o, alpha, v, stride, p, keys, reach = f.args

    def step(word: Value, acc: list[Value], live: range) -> list[Value]:
        weights = [f.load(c.words, p + (word * c.line + j * c.register), align=c.register) for j in live]
        row = v + word * stride
        out = []
        for r in range(c.rows):
            value = f.splat(f.load(c.word, row + r * c.size, align=1), c.lanes)
            sums = acc[r * len(live) : (r + 1) * len(live)]
            out += [contract(f, c, sum_, value, weight) for sum_, weight in zip(sums, weights, strict=True)]
        return out

    def add(first: Value, stop: Value, acc: list[Value], live: range) -> list[Value]:
        """The products of the words [first, stop) for the registers ``live``."""

        def steps(word: Value, acc: list[Value]) -> list[Value]:
            for u in range(c.unroll):
                acc = step(word + u, acc, live)
            return acc

        whole = stop - (stop - first) % c.unroll
        acc = f.fold(first, whole, c.unroll, acc, steps)
        return f.fold(whole, stop, 1, acc, lambda word, acc: step(word, acc, live))

    done = f.const("i64", 0)
    acc = [f.const(c.vector, 0.0)] * (c.rows * vectors)
    for j in range(vectors):
        stop = words_seen(f, c, reach + j * c.lanes, keys)
        live = range(j, vectors)
        acc = add(done, stop, acc, live)
        factor = f.load(c.vector, alpha + j * c.register, align=c.register)
        for r in range(c.rows):
            at = o + (r * c.line + j * c.register)
            before = f.load(c.vector, at, align=c.register)
            f.store(c.isa.multiply_add(f, before, factor, acc[r * len(live)]), at, align=c.register)
        acc = [sum_ for n, sum_ in enumerate(acc) if n % len(live)]
        done = stop
    f.ret()
    return name
