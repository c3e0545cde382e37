"""Gradients of captured arrays: what every score gives to the element that it read, whoever else read it.

Any number of scores may have read one element, from any program, and floats added as they come would give other bits at
every run. Here they are added as integers, whose sum has no order: one pass finds the largest term, by which a second
one scales all of them to whole numbers of 64 bits. What is not finite is noted beside them. What a tile gives along an
axis on which the element does not depend is summed within the tile first.

Source: Demmel and Nguyen 2013, Fast reproducible floating-point summation, for sums scaled by their largest term.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.kernels.triton.backward import over_keys, row_values
from flashtile.kernels.triton.backward_q import tile_of_rows, weighed
from flashtile.kernels.triton.language import number, over, spread
from flashtile.kernels.triton.rows import key_limits, locate, number_of_head

NAN, PLUS, MINUS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)  # what an element was given beside numbers
WORD_BITS = tl.constexpr(62)  # of a sum: one is the sign's, and a term is rounded up by half
LARGEST_POWER = tl.constexpr(960)  # of two that scales a term: what it leaves is far below the smallest float64


@triton.jit
def array_sums(
    q, k, v, do, lse, delta, largest, totals, flags,
    q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d,
    first, heads, group, q_len, kv_len, head_size, value_size, query_tiles, splits, split_keys, elements, terms_bits,
    scale, left, right, offset, offsets, rows, runs, rows_b, rows_h, captures, origin, threshold, seed, box,
    SCORE: tl.constexpr, MASK: tl.constexpr, GIVES: tl.constexpr, PLACE: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr, WHOLE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BAND: tl.constexpr, BY_ROW: tl.constexpr, BY_KEY: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Work items first, first + 1, ..., tiles of query rows, of one load of a score program.

    GIVES, PLACE: d score / d load, and which of the array's `elements` was loaded; BY_ROW and BY_KEY: whether that
    depends on the row, and on the key. Without `totals`: the largest term, as the bits of a float, joins `largest`.
    Else terms join totals (WORDS, elements), and flags (elements,); 2^terms_bits terms at most meet in one. box: where
    q and its kin are tiles of larger arrays, the elements that they reach, as `counted` takes it.
    """
    ACC: tl.constexpr = lse.dtype.element_ty
    item = first + tl.program_id(0)
    split, item = item % splits, item // splits  # sums of integers: parts of the keys join as other tiles do
    begin = split * split_keys
    end = tl.minimum(begin + split_keys, kv_len)
    tile = item % query_tiles
    b, h, kv, i, inside = locate(item // query_tiles, tile, heads, group, q_len, TILE_Q, False)
    low, high = key_limits(i, b, begin, end, left, right, offset, offsets, BAND)
    high = tl.where(inside, high, low)
    loads, at = tile_of_rows(
        q, k, v, do, q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, do_b, do_h, do_s, do_d,
        b, h, kv, i, inside, kv_len, head_size, value_size, TILE_K, HEAD, VALUE, OPERAND,
    )  # fmt: skip
    nats, row_delta = row_values(lse, delta, (b.to(tl.int64) * heads + h) * q_len + i, inside)
    of_rows = (i[:, None], nats[:, None], row_delta[:, None], low[:, None], high[:, None], number(scale, ACC))
    table = (rows, runs) if rows is None else (rows + 2 * (b * rows_b + h * rows_h + tile), runs)
    sums = tl.zeros([TILE_Q if BY_ROW else 1, TILE_K if BY_KEY else 1], ACC)
    into = largest  # not read
    if totals is not None:
        into = (totals, flags, tl.exp2(power_of(largest, terms_bits)), tl.exp2(_room(terms_bits)), elements, box)
    most = over_keys(
        sums, (low, high, begin, end), table, of_rows, loads, at,
        (captures, threshold, seed, number_of_head(b, h, heads, origin), origin, into), _key_tile,
        (BY_ROW, BY_KEY, WORDS if totals is not None else 0), TILE_K, WHOLE, OPERAND, PRECISION, SCORE, MASK,
        None, GIVES, PLACE, ACC,
    )  # fmt: skip
    if totals is None:
        top = tl.max(tl.max(most, 1), 0).to(tl.float64)
        tl.atomic_max(largest, top.to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def _room(terms_bits):
    """Bits of a word for a term, as a float64."""
    return tl.full((), WORD_BITS, tl.float64) - terms_bits.to(tl.float64)


@triton.jit
def power_of(largest, terms_bits):
    """The power of two, as a float64, that makes whole numbers of terms, 2^terms_bits of which fit into a word."""
    exponent = ((tl.load(largest) >> 52) & 0x7FF) - 1022  # the largest term is below 2^exponent
    return tl.minimum(_room(terms_bits) - exponent.to(tl.float64), LARGEST_POWER)


@triton.jit
def _key_tile(
    most, n0, rows, loads, at, where, FULL: tl.constexpr, HOW: tl.constexpr, TILE_K: tl.constexpr,
    WHOLE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr,
    SLOPE: tl.constexpr, GIVES: tl.constexpr, PLACE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The terms of one key tile join the largest so far, or, HOW[2] words each, the totals."""
    found, _ = weighed(
        n0, rows, loads, at, where, FULL, True, TILE_K, WHOLE, OPERAND, PRECISION, SCORE, MASK, GIVES, ACC
    )
    term, raw = found[2], found[4]
    if not HOW[0]:
        term = tl.sum(term, 0)[None, :]
    if not HOW[1]:
        term = tl.sum(term, 1)[:, None]
    finite = tl.abs(term) < float("inf")
    clean = tl.where(finite, term, 0.0)
    if HOW[2] == 0:
        return tl.maximum(most, tl.abs(clean))
    else:
        origin = where[4]
        totals, flags, unit, rest_unit, elements, box = where[5]
        b, h, i, j = spread(at[0]), spread(at[1]), rows[0], n0 + tl.arange(0, TILE_K)[None, :]
        if not FULL:
            j = tl.minimum(j, at[4] - 1)
        if origin is not None:
            b, h, i, j = b + origin[0], h + origin[1], i + origin[2], j + origin[3]
        place = over(PLACE(raw, b, h, i, j, where[0], box, ACC), raw)
        if not HOW[0] and not HOW[1]:
            place = tl.max(tl.max(place, 1), 0) + tl.zeros(term.shape, tl.int64)
        elif not HOW[0]:
            place = tl.max(place, 0)[None, :]
        elif not HOW[1]:
            place = tl.max(place, 1)[:, None]
        scaled = clean.to(tl.float64) * unit
        whole = tl.floor(scaled + 0.5)
        tl.atomic_add(totals + place, whole.to(tl.int64), mask=whole != 0.0, sem="relaxed")
        if HOW[2] == 2:
            rest = tl.floor((scaled - whole) * rest_unit + 0.5)
            tl.atomic_add(totals + elements + place, rest.to(tl.int64), mask=rest != 0.0, sem="relaxed")
        kind = tl.where(term != term, NAN, tl.where(term > 0.0, PLUS, MINUS))
        tl.atomic_or(flags + place, kind, mask=finite == 0, sem="relaxed")
        return most


@triton.jit
def array_finish(
    largest, totals, flags, out, elements, terms_bits, first,
    WORDS: tl.constexpr, JOINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums as floats: out (elements,), or, JOINS, added to what out holds."""
    at = (first + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < elements
    total = tl.load(totals + at, mask=there, other=0).to(tl.float64)
    if WORDS == 2:
        rest = tl.load(totals + elements + at, mask=there, other=0).to(tl.float64)
        total += rest * tl.exp2(0.0 - _room(terms_bits))
    total *= tl.exp2(0.0 - power_of(largest, terms_bits))
    kinds = tl.load(flags + at, mask=there, other=0)
    total = tl.where(kinds == PLUS, float("inf"), total)
    total = tl.where(kinds == MINUS, float("-inf"), total)
    total = tl.where((kinds & NAN) != 0, float("nan"), tl.where(kinds == PLUS | MINUS, float("nan"), total))
    found = total.to(out.dtype.element_ty)
    if JOINS:
        found += tl.load(out + at, mask=there, other=0.0)
    tl.store(out + at, found, mask=there)


@triton.jit
def clear(words, count, first, BLOCK: tl.constexpr):
    """Zeros in `count` words of 32 bits."""
    at = (first + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(words + at, tl.zeros([BLOCK], tl.int32), mask=at < count)
