"""The phases of a descent that make scalars: one program a problem, in float64."""

from __future__ import annotations

import triton
import triton.language as tl

from ... import descent
from . import _problem as at
from .line_search import best_step

__all__ = ["BEGIN", "FINISH", "SEARCH", "START", "descent_scalars_kernel"]

START, BEGIN, SEARCH, FINISH = (tl.constexpr(k) for k in range(4))

BLOCK = at.BLOCK
NEGLIGIBLE = tl.constexpr(descent.NEGLIGIBLE)
EPSILON = tl.constexpr(descent.EPSILON)
LEAST_CURVATURE = tl.constexpr(descent.LEAST_CURVATURE)
GUARD = tl.constexpr(descent.GUARD)
LITTLE = tl.constexpr(descent.LITTLE)
SLOWING = tl.constexpr(descent.SLOWING)


@triton.jit
def _start(problem, gram, FROBENIUS: tl.constexpr, TILE: tl.constexpr):
    """The unit of G, the adapter of every row, norms, and V or what is under the roots."""
    _, whole, v, owner, starts, rank, adapters, _ = problem
    norms, _, _, table = at.scalars(problem, TILE)
    every = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, rank, BLOCK):
        rows = first + every
        sums += tl.load(gram + rows * (rank + 1), mask=rows < rank, other=0.0).to(tl.float64)
    unit = tl.sum(sums, 0) / rank.to(tl.float64)
    unit = tl.where(unit > 0, unit, 1.0)
    trace = unit * 0
    largest, widest = trace, rank * 0
    for t in range(adapters):
        begin, end = tl.load(starts + t), tl.load(starts + t + 1)
        sums = tl.zeros((BLOCK,), tl.float64)
        for first in range(begin, end, BLOCK):
            rows = first + every
            x = tl.load(gram + rows * (rank + 1), mask=rows < end, other=0.0)
            sums += (x / unit.to(tl.float32)).to(tl.float64)
            tl.store(owner + rows, tl.zeros((BLOCK,), tl.int32) + t, mask=rows < end)
        square = tl.sum(sums, 0)
        norm = tl.sqrt(tl.maximum(square, 0.0))
        tl.store(norms + t, norm)
        trace += square
        largest, widest = tl.maximum(largest, norm), tl.maximum(widest, end - begin)
    # Rows from R on, to the end of their tile, are of the first adapter: zeros.
    rows = rank + tl.arange(0, TILE)
    tl.store(owner + rows, rows.to(tl.int32) * 0, mask=rows < (rank + TILE - 1) // TILE * TILE)
    number = tl.arange(0, at.WHOLE)
    tl.store(whole + number, number.to(tl.float64) * 0)
    tl.debug_barrier()
    tl.store(whole + at.UNIT, unit)
    tl.store(whole + at.TRACE, trace)
    tl.store(whole + at.WIDEST, widest.to(tl.float64))
    pairs = adapters * adapters
    for first in range(0, pairs, BLOCK):
        pair = first + every
        i, j = pair // adapters, pair % adapters
        live = pair < pairs
        n_i = tl.load(norms + i, mask=live, other=0.0)
        n_j = tl.load(norms + j, mask=live, other=0.0)
        counts = live & (i != j) & (tl.minimum(n_i, n_j) > NEGLIGIBLE * largest)
        product = tl.where(counts, n_i * n_j, 1.0)
        if FROBENIUS:
            for k in range(5):
                tl.store(table + k * pairs + pair, product * 0, mask=live)
            floor = EPSILON * product
            floor = tl.where(counts & (i > j), floor * floor, 0.0)
            tl.store(table + 5 * pairs + pair, floor, mask=live)
        else:
            tl.store(v + pair, tl.where(counts, 4.0 / product, 0.0).to(tl.float32), mask=live)


@triton.jit
def _gather(problem, which, TILE: tl.constexpr, SMALL: tl.constexpr):
    """Into a table, every pair's sum over the tiles [SMALL, SMALL] that its block lies in."""
    m, whole, _, owner, starts, _, adapters, size = problem
    _, _, _, table = at.scalars(problem, TILE)
    sums, pairs = m + (at.SUMS + which) * size * size, adapters * adapters
    span = (tl.load(whole + at.WIDEST).to(tl.int32) + SMALL - 2) // SMALL + 1
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        i, j = pair // adapters, pair % adapters
        live = (pair < pairs) & (i > j)
        begin_i = tl.load(starts + i, mask=live, other=0) // SMALL * SMALL
        begin_j = tl.load(starts + j, mask=live, other=0) // SMALL * SMALL
        end_i = tl.load(starts + i + 1, mask=live, other=0)
        end_j = tl.load(starts + j + 1, mask=live, other=0)
        found = tl.zeros((BLOCK,), tl.float64)
        for k in range(span * span):
            at_i, at_j = begin_i + k // span * SMALL, begin_j + k % span * SMALL
            inside = live & (at_i < end_i) & (at_j < end_j)
            row = at_i + i - tl.load(owner + at_i, mask=inside, other=0)
            column = at_j + j - tl.load(owner + at_j, mask=inside, other=0)
            found += tl.load(sums + row * size + column, mask=inside, other=0.0)
        tl.store(table + which * pairs + pair, found, mask=live)


@triton.jit
def _couple(v, table, adapters, eta):
    """V of the Frobenius norms at the point eta of the last line."""
    pairs = adapters * adapters
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        i, j = pair // adapters, pair % adapters
        lower = table + tl.maximum(i, j) * adapters + tl.minimum(i, j)
        floor = tl.load(lower + 5 * pairs, mask=pair < pairs, other=0.0)
        counts = floor > 0
        energy = tl.zeros((BLOCK,), tl.float64)
        for k in range(4, -1, -1):
            energy = energy * eta + tl.load(lower + k * pairs, mask=counts, other=0.0)
        root = tl.sqrt(tl.where(counts, tl.maximum(energy, 0.0) + floor, 1.0))
        tl.store(v + pair, tl.where(counts, 2 / root, 0.0).to(tl.float32), mask=pair < pairs)


@triton.jit
def _begin(problem, gamma, FROBENIUS: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr):
    """f at X, and the curvature of every adapter: 2 gamma + sum_j V_ij ||H_ij||^2 / n_i^2; 0 of
    one that overlaps with none."""
    _, whole, v, _, _, _, adapters, _ = problem
    norms, curvatures, _, table = at.scalars(problem, TILE)
    _gather(problem, 0, TILE, SMALL)
    tl.debug_barrier()
    zero = tl.full((), 0.0, tl.float64)
    if FROBENIUS:
        _couple(v, table, adapters, zero)
        tl.debug_barrier()
    every = tl.arange(0, BLOCK)
    value, cross, largest = zero, zero, zero
    for i in range(adapters):
        pulls = tl.zeros((BLOCK,), tl.float64)
        values = tl.zeros((BLOCK,), tl.float64)
        crosses = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, adapters, BLOCK):
            j = first + every
            live = (j < adapters) & (j != i)
            pair = tl.maximum(i, j) * adapters + tl.minimum(i, j)
            energy = tl.load(table + pair, mask=live, other=0.0)
            weight = tl.load(v + i * adapters + j, mask=live, other=0.0).to(tl.float64)
            crosses += energy
            pulls += weight * energy
            # V is 4 / (n_i n_j), or two over the norm.
            inverse = 1 / tl.where(weight > 0, weight, 1.0)
            values += tl.where(weight > 0, 2 * inverse if FROBENIUS else weight * energy / 4, 0.0)
        norm = tl.load(norms + i)
        mean = tl.sum(pulls, 0) / tl.where(norm > 0, norm * norm, 1.0)
        tl.store(curvatures + i, mean)
        largest = tl.maximum(largest, mean)
        value += tl.sum(values, 0)
        cross += tl.sum(crosses, 0) / 2
    tl.debug_barrier()
    for first in range(0, adapters, BLOCK):
        own, live = curvatures + first + every, first + every < adapters
        mean = tl.load(own, mask=live, other=0.0)
        bounded = 2 * (zero + gamma) + tl.maximum(mean, LEAST_CURVATURE * largest)
        tl.debug_barrier()
        tl.store(own, tl.where(mean > 0, bounded, 0.0), mask=live)
    tl.store(whole + at.CROSS, cross)
    tl.store(whole + at.BEFORE, value)
    tl.store(whole + at.AFTER, value)
    tl.store(whole + at.RUNNING, 1.0)


@triton.jit
def _enough(gain, gain_1, gain_2, taken, allowed):
    """descent.enough of the last three gains."""
    allowed = tl.maximum(allowed, 0.0)
    now = gain / tl.where(gain_1 > 0, gain_1, 1.0)
    before = gain_1 / tl.where(gain_2 > 0, gain_2, 1.0)
    following = now * now / tl.where(before > 0, before, 1.0) / SLOWING
    ratio = tl.maximum(tl.maximum(now, before), following)
    falling = (taken > 2) & (gain_1 > 0) & (gain_2 > 0) & (ratio < 1)
    return (gain <= LITTLE * allowed) | (falling & (GUARD * gain * ratio <= allowed * (1 - ratio)))


@triton.jit
def _search(problem, gamma, tol, FROBENIUS: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr):
    """The step along D, whether it is the last, and V where it ends."""
    _, whole, v, _, _, _, adapters, _ = problem
    _, _, _, table = at.scalars(problem, TILE)
    zero = tl.full((), 0.0, tl.float64)
    q0, q1, q2, q3, q4 = zero, zero, zero, zero, zero
    if FROBENIUS:
        for k in range(5):
            _gather(problem, k, TILE, SMALL)
        tl.debug_barrier()
    else:
        q0, q1 = at.total(problem, at.QUARTIC, TILE), at.total(problem, at.QUARTIC + 1, TILE)
        q2, q3 = at.total(problem, at.QUARTIC + 2, TILE), at.total(problem, at.QUARTIC + 3, TILE)
        q4 = at.total(problem, at.QUARTIC + 4, TILE)
    slope, pull = at.total(problem, at.KP_P, TILE), zero + gamma
    m0 = tl.load(whole + at.MOVED)
    m1, m2 = 2 * at.total(problem, at.D_CHANGE, TILE), at.total(problem, at.D_D, TILE)
    # fmt: off
    eta, here, there = best_step(
        q0, q1, q2, q3, q4, pull * m0, pull * m1, pull * m2,
        table, adapters * adapters, FROBENIUS)
    # fmt: on
    eta = tl.where(slope > 0, eta, 0.0)
    gain, gain_1, gain_2 = here - there, tl.load(whole + at.GAIN_1), tl.load(whole + at.GAIN_2)
    taken, after = tl.load(whole + at.TAKEN), tl.load(whole + at.AFTER)
    taken += (eta > 0).to(tl.float64)
    last = _enough(gain, gain_1, gain_2, taken, (zero + tol) * there)
    tl.debug_barrier()
    tl.store(whole + at.ETA, eta)
    tl.store(whole + at.TAKEN, taken)
    tl.store(whole + at.RUNNING, tl.where((eta > 0) & (last == 0), 1.0, 0.0))
    tl.store(whole + at.AFTER, tl.where(eta > 0, there, after))
    tl.store(whole + at.MOVED, m0 + eta * (m1 + eta * m2))
    tl.store(whole + at.SLOPE, slope)
    tl.store(whole + at.GAIN_1, gain)
    tl.store(whole + at.GAIN_2, gain_1)
    if FROBENIUS:
        _couple(v, table, adapters, eta)


@triton.jit
def _finish(problem, stats, TILE: tl.constexpr, SMALL: tl.constexpr):
    """The statistics: see descent.STATS."""
    _, whole, _, _, _, _, adapters, _ = problem
    _, _, _, table = at.scalars(problem, TILE)
    _gather(problem, 0, TILE, SMALL)
    tl.debug_barrier()
    energies = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, adapters * adapters, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        live = (pair < adapters * adapters) & (pair // adapters > pair % adapters)
        energies += tl.load(table + pair, mask=live, other=0.0)
    unit = tl.load(whole + at.UNIT)
    tl.store(stats, tl.load(whole + at.TAKEN))
    tl.store(stats + 1, tl.load(whole + at.BEFORE) * unit)
    tl.store(stats + 2, tl.load(whole + at.AFTER) * unit)
    tl.store(stats + 3, _share(tl.sum(energies, 0), tl.load(whole + at.CROSS)))
    moved = tl.maximum(tl.load(whole + at.MOVED), 0.0)
    tl.store(stats + 4, tl.sqrt(_share(moved, tl.load(whole + at.TRACE))))


@triton.jit
def _share(part, every):
    return tl.where(every > 0, part / tl.where(every > 0, every, 1.0), 0.0)


@triton.jit
def descent_scalars_kernel(
    work, starts, memory, each, size, stats, gamma, tol,
    PHASE: tl.constexpr, FROBENIUS: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """A phase of every problem."""
    number = tl.program_id(0)
    problem = at.find(number, work, starts, memory, each, size, FROBENIUS)
    _, whole, _, _, _, _, _, _ = problem
    one = work + 6 * number
    if PHASE == START:
        _start(problem, tl.load(one).to(tl.pointer_type(tl.float32)), FROBENIUS, TILE)
    elif PHASE == BEGIN:
        _begin(problem, gamma, FROBENIUS, TILE, SMALL)
    elif PHASE == FINISH:
        _finish(problem, stats + 5 * tl.load(one + 5), TILE, SMALL)
    elif tl.load(whole + at.RUNNING) > 0:
        _search(problem, gamma, tol, FROBENIUS, TILE, SMALL)
    else:
        tl.store(whole + at.ETA, 0.0)
