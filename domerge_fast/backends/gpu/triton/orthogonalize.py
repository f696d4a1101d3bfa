"""C [R, R] with Xhat = C X: the descent of backends/descent.py, a problem a program.

All R x R matrices of a problem, padded with zeros to SIZE, lie in a workspace that only its
program touches. With Q = D G, a step is
    K P = (V o H) C + 2 gamma (C - I)     P G and its products with P, the last P, D and C - I
    D = -P + beta D,  Q = -P G + beta Q   beta by Polak and Ribiere
    E = Q C^T + C Q^T,  F = Q D^T         below the diagonal, with the quartics ||H_ij(eta)||^2
    C += eta D,  H += eta E + eta^2 F     eta from the line search
K are the curvatures of all rows (_find_curvatures), which precondition them.
Products of tiles are float32 (three TF32 products), scalars float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import descent
from .line_search import BLOCK, best_step, point

__all__ = ["SIZES", "orthogonalize"]

SIZES = (16, 32, 64, 128, 256)
TILE = {16: 16, 32: 32, 64: 32, 128: 64, 256: 64}
CHUNK = {16: 16, 32: 32, 64: 32, 128: 32, 256: 32}
WARPS = {16: 2, 32: 4, 64: 4, 128: 8, 256: 8}
WORKSPACE_BYTES = 256 << 20
"""What the matrices of the problems of one launch may hold."""

MATRICES = tl.constexpr(11)
TABLES = tl.constexpr(7)
NEGLIGIBLE = tl.constexpr(descent.NEGLIGIBLE)
EPSILON = tl.constexpr(descent.EPSILON)
LEAST_CURVATURE = tl.constexpr(descent.LEAST_CURVATURE)
GUARD = tl.constexpr(descent.GUARD)
LITTLE = tl.constexpr(descent.LITTLE)


@triton.jit
def _set_up(
    gram, rank, adapters, starts, h, g, c, d, q, p, owner, norms,
    SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The normalised problem at C = I: matrices, the adapter of every row and their norms.

    Returns the mean diagonal of G, the trace of the normalised G, and the largest norm.
    """
    every = tl.arange(0, SIZE)
    diagonal = tl.load(gram + every * (rank + 1), mask=every < rank, other=0.0)
    unit = tl.sum(diagonal.to(tl.float64), 0) / rank.to(tl.float64)
    unit = tl.where(unit > 0, unit, 1.0)
    diagonal = (diagonal / unit.to(tl.float32)).to(tl.float64)
    largest = tl.full((), 0.0, tl.float64)
    owners = tl.zeros((SIZE,), tl.int64)
    for t in range(adapters):
        begin, end = tl.load(starts + t), tl.load(starts + t + 1)
        own = (every >= begin) & (every < end)
        norm = tl.sqrt(tl.maximum(tl.sum(tl.where(own, diagonal, 0.0), 0), 0.0))
        tl.store(norms + t, norm)
        largest = tl.maximum(largest, norm)
        owners = tl.where(own, t, owners)
    tl.store(owner + every, owners)
    place = tl.arange(0, TILE)
    zero = tl.zeros((TILE, TILE), tl.float32)
    for i in range(0, rank, TILE):
        for j in range(0, rank, TILE):
            row, column = (i + place)[:, None], (j + place)[None, :]
            live = (row < rank) & (column < rank)
            x = tl.load(gram + row * rank + column, mask=live, other=0.0) / unit.to(tl.float32)
            at = row * SIZE + column
            tl.store(g + at, x)
            tl.store(h + at, x)
            tl.store(c + at, ((row == column) & live).to(tl.float32))
            tl.store(d + at, zero)
            tl.store(q + at, zero)
            tl.store(p + at, zero)
    tl.debug_barrier()
    return unit, tl.sum(diagonal, 0), largest


@triton.jit
def _set_up_pairs(norms, adapters, largest, v, table, FROBENIUS: tl.constexpr):
    """V of the squared penalty, or what is under the root besides ||H_ij||^2; 0: no pair."""
    pairs = adapters * adapters
    for first in range(0, pairs, BLOCK):
        place = first + tl.arange(0, BLOCK)
        live = place < pairs
        i, j = place // adapters, place % adapters
        n_i = tl.load(norms + i, mask=live, other=0.0)
        n_j = tl.load(norms + j, mask=live, other=0.0)
        counts = live & (tl.minimum(n_i, n_j) > NEGLIGIBLE * largest)
        product = tl.where(counts, n_i * n_j, 1.0)
        if FROBENIUS:
            floor = EPSILON * product
            tl.store(table + place, tl.where(counts & (i > j), floor * floor, 0.0), mask=live)
            for k in range(1, 6):
                tl.store(table + k * pairs + place, floor * 0.0, mask=live)
        else:
            weight = tl.where(counts & (i != j), 4.0 / product, 0.0)
            tl.store(v + place, weight.to(tl.float32), mask=live)
    tl.debug_barrier()


@triton.jit
def _follow(v, table, adapters, eta):
    """At the point eta of the last line: every ||H_ij||^2, V from it, and sums that are 0 again."""
    pairs = adapters * adapters
    energies = table + 6 * pairs
    for first in range(0, pairs, BLOCK):
        place = first + tl.arange(0, BLOCK)
        live = place < pairs
        at = table + place
        energy = tl.zeros((BLOCK,), tl.float64)
        for k in range(5, 0, -1):
            energy = energy * eta + tl.load(at + k * pairs, mask=live, other=0.0)
        tl.store(energies + place, tl.maximum(energy, 0.0), mask=live)
    tl.debug_barrier()
    for first in range(0, pairs, BLOCK):
        place = first + tl.arange(0, BLOCK)
        live = place < pairs
        i, j = place // adapters, place % adapters
        pair = tl.maximum(i, j) * adapters + tl.minimum(i, j)
        floor = tl.load(table + pair, mask=live, other=0.0)
        energy = tl.load(energies + pair, mask=live, other=0.0)
        root = tl.sqrt(tl.where(floor > 0, energy + floor, 1.0))
        # Here, after the barrier: other threads may have read them above.
        for k in range(1, 6):
            tl.store(table + k * pairs + place, tl.zeros((BLOCK,), tl.float64), mask=live)
        tl.store(v + place, tl.where(floor > 0, 2.0 / root, 0.0).to(tl.float32), mask=live)
    tl.debug_barrier()


@triton.jit
def _add_to_pairs(x, k, rows, columns, owner, adapters, table, rank, TILE: tl.constexpr):
    """Adds the sums of x [TILE, TILE] over the blocks of pairs i > j to coefficient k of all."""
    place = tl.arange(0, TILE)
    first_i, first_j = tl.load(owner + tl.min(rows, 0)), tl.load(owner + tl.min(columns, 0))
    member_i = (tl.load(owner + rows) - first_i)[None, :] == place[:, None]
    member_j = (tl.load(owner + columns) - first_j)[:, None] == place[None, :]
    member_i = (member_i & (rows < rank)[None, :]).to(tl.float32)
    member_j = (member_j & (columns < rank)[:, None]).to(tl.float32)
    sums = tl.dot(member_i, x, input_precision="tf32x3")
    sums = tl.dot(sums, member_j, input_precision="tf32x3")
    i, j = (first_i + place)[:, None], (first_j + place)[None, :]
    at = table + (k + 1) * adapters * adapters + i * adapters + j
    live = (j < i) & (i < adapters)
    tl.store(at, tl.load(at, mask=live, other=0.0) + sums.to(tl.float64), mask=live)


@triton.jit
def _cross(
    h, owner, v, table, adapters, rank, PAIRS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr
):
    """The sum of ||H_ij||^2 over the pairs i > j, and the one weighted with V / 4.

    PAIRS: every pair's is added to the constant coefficients too.
    """
    place = tl.arange(0, TILE)
    plain = tl.zeros((TILE,), tl.float64)
    weighted = tl.zeros((TILE,), tl.float64)
    for i in range(0, rank, TILE):
        # Not pipelined: a tile adds to what the one before has stored.
        for j in tl.range(0, i + TILE, TILE, num_stages=1):
            rows, columns = i + place, j + place
            x = tl.load(h + rows[:, None] * SIZE + columns[None, :])
            own_i, own_j = tl.load(owner + rows)[:, None], tl.load(owner + columns)[None, :]
            x = tl.where(own_i > own_j, x * x, 0.0)
            plain += tl.sum(x.to(tl.float64), 1)
            if PAIRS:
                _add_to_pairs(x, 0, rows, columns, owner, adapters, table, rank, TILE)
                tl.debug_barrier()
            else:
                weight = tl.load(v + own_i * adapters + own_j)
                weighted += tl.sum((x * weight).to(tl.float64), 1)
    return tl.sum(plain, 0), tl.sum(weighted, 0) / 4


@triton.jit
def _find_curvatures(
    h, v, owner, norms, starts, curvatures, adapters, rank, gamma,
    SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """2 gamma + sum_j V_ij ||H_ij||^2 / n_i^2 of every row; 0 of one that overlaps with none."""
    place = tl.arange(0, TILE)
    for i in range(0, SIZE, TILE):
        rows = i + place
        own = tl.load(owner + rows)[:, None] * adapters
        total = tl.zeros((TILE,), tl.float64)
        for j in range(0, rank, TILE):
            columns = j + place
            live = (rows < rank)[:, None] & (columns < rank)[None, :]
            x = tl.load(h + rows[:, None] * SIZE + columns[None, :], mask=live, other=0.0)
            weight = tl.load(v + own + tl.load(owner + columns)[None, :])
            total += tl.sum((weight * x * x).to(tl.float64), 1)
        tl.store(curvatures + rows, total)
    tl.debug_barrier()
    every = tl.arange(0, SIZE)
    pulls = tl.load(curvatures + every)
    means = tl.zeros((SIZE,), tl.float64)
    largest = tl.full((), 0.0, tl.float64)
    for t in range(adapters):
        own = (every >= tl.load(starts + t)) & (every < tl.load(starts + t + 1))
        norm = tl.load(norms + t)
        square = tl.where(norm > 0, norm * norm, 1.0)
        mean = tl.sum(tl.where(own, pulls, 0.0), 0) / square
        largest = tl.maximum(largest, mean)
        means = tl.where(own, mean, means)
    bounded = 2 * gamma + tl.maximum(means, LEAST_CURVATURE * largest)
    tl.debug_barrier()
    tl.store(curvatures + every, tl.where(means > 0, bounded, 0.0))
    tl.debug_barrier()


@triton.jit
def _find_gradient(
    h, c, p, v, owner, curvatures, adapters, rank, gamma,
    SIZE: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """P = ((V o H) C + 2 gamma (C - I)) / K."""
    place, inner = tl.arange(0, TILE), tl.arange(0, CHUNK)
    for i in range(0, rank, TILE):
        rows = i + place
        own = tl.load(owner + rows)[:, None] * adapters
        curvature = tl.load(curvatures + rows)
        step = tl.where(curvature > 0, 1 / tl.where(curvature > 0, curvature, 1.0), 0.0)
        step = step.to(tl.float32)[:, None]
        for j in range(0, rank, TILE):
            columns = j + place
            total = tl.zeros((TILE, TILE), tl.float32)
            for k in range(0, rank, CHUNK):
                others = k + inner
                x = tl.load(h + rows[:, None] * SIZE + others[None, :])
                x = x * tl.load(v + own + tl.load(owner + others)[None, :])
                y = tl.load(c + others[:, None] * SIZE + columns[None, :])
                total = tl.dot(x, y, total, input_precision="tf32x3")
            row, column = rows[:, None], columns[None, :]
            at = row * SIZE + column
            one = ((row == column) & (row < rank)).to(tl.float32)
            tl.store(p + at, step * (total + 2 * gamma * (tl.load(c + at) - one)))
    tl.debug_barrier()


@triton.jit
def _find_products(
    p, last_p, g, d, c, pg, curvatures, rank,
    SIZE: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """P G, and products in the metric of G: of the gradient K P with P, the last P and D, and of P
    with P, D and C - I."""
    place, inner = tl.arange(0, TILE), tl.arange(0, CHUNK)
    kp_p = tl.zeros((TILE,), tl.float64)
    kp_last = tl.zeros((TILE,), tl.float64)
    kp_d = tl.zeros((TILE,), tl.float64)
    with_p = tl.zeros((TILE,), tl.float64)
    with_d = tl.zeros((TILE,), tl.float64)
    with_change = tl.zeros((TILE,), tl.float64)
    for i in range(0, rank, TILE):
        rows = i + place
        curvature = tl.load(curvatures + rows)
        for j in range(0, rank, TILE):
            columns = j + place
            total = tl.zeros((TILE, TILE), tl.float32)
            for k in range(0, rank, CHUNK):
                others = k + inner
                x = tl.load(p + rows[:, None] * SIZE + others[None, :])
                y = tl.load(g + others[:, None] * SIZE + columns[None, :])
                total = tl.dot(x, y, total, input_precision="tf32x3")
            row, column = rows[:, None], columns[None, :]
            at = row * SIZE + column
            tl.store(pg + at, total)
            one = ((row == column) & (row < rank)).to(tl.float32)
            p_p = tl.sum((total * tl.load(p + at)).to(tl.float64), 1)
            p_d = tl.sum((total * tl.load(d + at)).to(tl.float64), 1)
            p_last = tl.sum((total * tl.load(last_p + at)).to(tl.float64), 1)
            kp_p += curvature * p_p
            kp_last += curvature * p_last
            kp_d += curvature * p_d
            with_p += p_p
            with_d += p_d
            with_change += tl.sum((total * (tl.load(c + at) - one)).to(tl.float64), 1)
    tl.debug_barrier()
    kp = tl.sum(kp_p, 0), tl.sum(kp_last, 0), tl.sum(kp_d, 0)
    return kp[0], kp[1], kp[2], tl.sum(with_p, 0), tl.sum(with_d, 0), tl.sum(with_change, 0)


@triton.jit
def _turn(p, pg, d, q, beta, rank, SIZE: tl.constexpr, TILE: tl.constexpr):
    """D = -P + beta D and Q = -P G + beta Q."""
    place = tl.arange(0, TILE)
    beta = beta.to(tl.float32)
    for i in range(0, rank, TILE):
        for j in range(0, rank, TILE):
            at = (i + place)[:, None] * SIZE + (j + place)[None, :]
            tl.store(d + at, beta * tl.load(d + at) - tl.load(p + at))
            tl.store(q + at, beta * tl.load(q + at) - tl.load(pg + at))
    tl.debug_barrier()


@triton.jit
def _find_changes(
    c, d, q, h, e, f, v, owner, table, adapters, rank,
    FROBENIUS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """E and F, and the quartics: their weighted sum, or every pair's in the table."""
    place, inner = tl.arange(0, TILE), tl.arange(0, CHUNK)
    q0 = tl.zeros((TILE,), tl.float64)
    q1 = tl.zeros((TILE,), tl.float64)
    q2 = tl.zeros((TILE,), tl.float64)
    q3 = tl.zeros((TILE,), tl.float64)
    q4 = tl.zeros((TILE,), tl.float64)
    for i in range(0, rank, TILE):
        rows = i + place
        for j in range(0, i + TILE, TILE):
            columns = j + place
            change = tl.zeros((TILE, TILE), tl.float32)
            square = tl.zeros((TILE, TILE), tl.float32)
            for k in range(0, rank, CHUNK):
                left = rows[:, None] * SIZE + (k + inner)[None, :]
                right = columns[None, :] * SIZE + (k + inner)[:, None]
                q_i = tl.load(q + left)
                change = tl.dot(q_i, tl.load(c + right), change, input_precision="tf32x3")
                change = tl.dot(
                    tl.load(c + left), tl.load(q + right), change, input_precision="tf32x3"
                )
                square = tl.dot(q_i, tl.load(d + right), square, input_precision="tf32x3")
            at = rows[:, None] * SIZE + columns[None, :]
            tl.store(e + at, change)
            tl.store(f + at, square)
            x = tl.load(h + at)
            if FROBENIUS:
                for k in range(5):
                    # Coefficient k of (H + eta E + eta^2 F)^2, entry by entry.
                    product = tl.where(k == 0, x * x, 2 * x * change)
                    product = tl.where(k == 2, change * change + 2 * x * square, product)
                    product = tl.where(k == 3, 2 * change * square, product)
                    product = tl.where(k == 4, square * square, product)
                    _add_to_pairs(product, k, rows, columns, owner, adapters, table, rank, TILE)
                tl.debug_barrier()
            else:
                own_i, own_j = tl.load(owner + rows)[:, None], tl.load(owner + columns)[None, :]
                weight = tl.load(v + own_i * adapters + own_j) * 0.25
                weight = tl.where(own_i > own_j, weight, 0.0)
                wx, wc = weight * x, weight * change
                q0 += tl.sum((wx * x).to(tl.float64), 1)
                q1 += tl.sum((wx * change).to(tl.float64), 1)
                q2 += tl.sum((wc * change + 2 * wx * square).to(tl.float64), 1)
                q3 += tl.sum((wc * square).to(tl.float64), 1)
                q4 += tl.sum((weight * square * square).to(tl.float64), 1)
    tl.debug_barrier()
    return tl.sum(q0, 0), 2 * tl.sum(q1, 0), tl.sum(q2, 0), 2 * tl.sum(q3, 0), tl.sum(q4, 0)


@triton.jit
def _advance(c, d, h, e, f, eta, rank, SIZE: tl.constexpr, TILE: tl.constexpr):
    """C += eta D and H += eta E + eta^2 F, with H's mirror image."""
    place = tl.arange(0, TILE)
    step, square = eta.to(tl.float32), (eta * eta).to(tl.float32)
    for i in range(0, rank, TILE):
        for j in range(0, rank, TILE):
            row, column = (i + place)[:, None], (j + place)[None, :]
            at = row * SIZE + column
            tl.store(c + at, tl.load(c + at) + step * tl.load(d + at))
            if j <= i:
                x = tl.load(h + at) + step * tl.load(e + at) + square * tl.load(f + at)
                # Nobody else reads or writes these two tiles in this pass.
                tl.debug_barrier()
                tl.store(h + at, x, mask=column <= row)
                tl.store(h + column * SIZE + row, x, mask=column <= row)
    tl.debug_barrier()


@triton.jit
def enough(gain, gain_1, gain_2, taken, allowed):
    """descent.enough of the last three gains: 1 or 0."""
    allowed = tl.maximum(allowed, 0.0)
    now = gain / tl.where(gain_1 > 0, gain_1, 1.0)
    ratio = tl.maximum(now, gain_1 / tl.where(gain_2 > 0, gain_2, 1.0))
    falling = (taken > 2) & (gain_1 > 0) & (gain_2 > 0) & (ratio < 1)
    falls = falling & (GUARD * gain * ratio <= allowed * (1 - ratio))
    return ((gain <= LITTLE * allowed) | falls).to(tl.int32)


@triton.jit(do_not_specialize=["steps"])
def orthogonalize_kernel(
    work,
    starts,
    matrices,
    tables,
    owners,
    out,
    stats,
    gamma,
    steps,
    tol,
    FROBENIUS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    TABLE_SIZE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    one = work + 6 * program
    gram = tl.load(one).to(tl.pointer_type(tl.float32))
    rank, adapters = tl.load(one + 1), tl.load(one + 2)
    starts += tl.load(one + 3)
    owner = owners + program * SIZE
    norms = tables + program * TABLE_SIZE
    curvatures = norms + SIZE
    table = curvatures + SIZE
    pairs = adapters * adapters
    area: tl.constexpr = SIZE * SIZE
    g = matrices + program * MATRICES * area
    h, c, d, q, pg = g + area, g + 2 * area, g + 3 * area, g + 4 * area, g + 5 * area
    e, f, v, ps = g + 6 * area, g + 7 * area, g + 8 * area, g + 9 * area

    unit, total, largest = _set_up(
        gram, rank, adapters, starts, h, g, c, d, q, ps + area, owner, norms, SIZE, TILE
    )
    _set_up_pairs(norms, adapters, largest, v, table, FROBENIUS)
    cross, weighted = _cross(h, owner, v, table, adapters, rank, FROBENIUS, SIZE, TILE)
    zero = tl.full((), 0.0, tl.float64)
    before, _, _ = point(
        zero, weighted, zero, zero, zero, zero, zero, zero, zero, table, pairs, FROBENIUS
    )
    if FROBENIUS:
        _follow(v, table, adapters, zero)

    _find_curvatures(
        h, v, owner, norms, starts, curvatures, adapters, rank, zero + gamma, SIZE, TILE
    )

    after, moved, kpp_old, dd, d_change = before, zero, zero, zero, zero
    gain_1, gain_2 = zero, zero
    pull = zero + gamma
    taken = tl.full((), 0, tl.int32)
    running = taken < steps
    while running:
        p, last_p = ps + taken % 2 * area, ps + (taken + 1) % 2 * area
        _find_gradient(h, c, p, v, owner, curvatures, adapters, rank, gamma, SIZE, TILE, CHUNK)
        kpp, kp_last, kp_d, pp, p_d, p_change = _find_products(
            p, last_p, g, d, c, pg, curvatures, rank, SIZE, TILE, CHUNK
        )
        beta = tl.where(kpp_old > 0, (kpp - kp_last) / tl.where(kpp_old > 0, kpp_old, 1.0), 0.0)
        beta = tl.where((beta > 0) & (beta * kp_d - kpp < 0), beta, 0.0)
        dd = pp - 2 * beta * p_d + beta * beta * dd
        d_change = beta * d_change - p_change
        kpp_old = kpp
        _turn(p, pg, d, q, beta, rank, SIZE, TILE)
        q0, q1, q2, q3, q4 = _find_changes(
            c, d, q, h, e, f, v, owner, table, adapters, rank, FROBENIUS, SIZE, TILE, CHUNK
        )
        # fmt: off
        eta, here, there = best_step(
            q0, q1, q2, q3, q4, pull * moved, pull * 2 * d_change, pull * dd,
            table, pairs, FROBENIUS)
        # fmt: on
        running = (kpp > 0) & (eta > 0)
        if running:
            _advance(c, d, h, e, f, eta, rank, SIZE, TILE)
            if FROBENIUS:
                _follow(v, table, adapters, eta)
            moved += eta * (2 * d_change + eta * dd)
            d_change += eta * dd
            after = there
            taken += 1
            gain = here - there
            done = enough(gain, gain_1, gain_2, taken, (zero + tol) * there)
            gain_1, gain_2 = gain, gain_1
            running = (taken < steps) & (done == 0)

    left, _ = _cross(h, owner, v, table, adapters, rank, False, SIZE, TILE)
    stats += 5 * tl.load(one + 5)
    tl.store(stats, taken.to(tl.float64))
    tl.store(stats + 1, before * unit)
    tl.store(stats + 2, after * unit)
    tl.store(stats + 3, tl.where(cross > 0, left / tl.where(cross > 0, cross, 1.0), 0.0))
    change = tl.maximum(moved, 0.0) / tl.where(total > 0, total, 1.0)
    tl.store(stats + 4, tl.where(total > 0, tl.sqrt(change), 0.0))
    place = tl.arange(0, TILE)
    result = out + tl.load(one + 4)
    for i in range(0, rank, TILE):
        for j in range(0, rank, TILE):
            row, column = (i + place)[:, None], (j + place)[None, :]
            live = (row < rank) & (column < rank)
            x = tl.load(c + row * SIZE + column)
            tl.store(result + row * rank + column, x, mask=live)


def orthogonalize(
    size: int,
    work: Tensor,
    starts: Tensor,
    out: Tensor,
    stats: Tensor,
    frobenius: bool,
    gamma: float,
    steps: int,
    tol: float,
) -> None:
    """See Kernels.orthogonalize."""
    area = size * size
    table_size = 2 * size + (TABLES.value * area if frobenius else 0)
    bytes_each = 4 * MATRICES.value * area + 8 * table_size
    count = min(len(work), max(1, WORKSPACE_BYTES // bytes_each))
    matrices = torch.empty(count, MATRICES.value, area, device=out.device)
    tables = torch.empty(count, table_size, dtype=torch.float64, device=out.device)
    owners = torch.empty(count, size, dtype=torch.int32, device=out.device)
    for batch in work.split(count):
        orthogonalize_kernel[(len(batch),)](
            batch,
            starts,
            matrices,
            tables,
            owners,
            out,
            stats,
            gamma,
            steps,
            tol,
            FROBENIUS=frobenius,
            SIZE=size,
            TILE=TILE[size],
            CHUNK=CHUNK[size],
            TABLE_SIZE=table_size,
            num_warps=WARPS[size],
            num_stages=2,
        )
