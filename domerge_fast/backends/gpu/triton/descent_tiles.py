"""The phases of a descent that make R x R matrices: a program makes a tile of each.

Tiles of a phase do not depend on each other. Of what is symmetric, those at or below the diagonal
are made. Products are float32 (three TF32 products); what is summed is kept tile by tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _problem as at

__all__ = [
    "ADVANCE",
    "CHANGES",
    "ENERGIES",
    "FILL",
    "GRADIENT",
    "LEAVE",
    "PRODUCTS",
    "QUARTICS",
    "TURN",
    "descent_tiles_kernel",
]

FILL, ENERGIES, GRADIENT, PRODUCTS, TURN = (tl.constexpr(k) for k in range(5))
CHANGES, QUARTICS, ADVANCE, LEAVE = (tl.constexpr(k) for k in range(5, 9))


@triton.jit
def _fill(problem, gram, sums, i, j, TILE: tl.constexpr):
    """The normalised problem at C = I."""
    m, whole, _, _, _, rank, _, size = problem
    area = size * size
    place, number = tl.arange(0, TILE), tl.arange(0, at.PARTS)
    row, column = (i + place)[:, None], (j + place)[None, :]
    live = (row < rank) & (column < rank)
    x = tl.load(gram + row * rank + column, mask=live, other=0.0)
    x = x / tl.load(whole + at.UNIT).to(tl.float32)
    here = m + row * size + column
    tl.store(here + at.G * area, x)
    tl.store(here + at.H * area, x)
    tl.store(here + at.C * area, ((row == column) & live).to(tl.float32))
    for k in tl.static_range(at.D, at.PG + 1):
        tl.store(here + k * area, tl.zeros((TILE, TILE), tl.float32))
    tl.store(sums + number, number.to(tl.float64) * 0)


@triton.jit
def _gradient(problem, gamma, i, j, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """P = ((V o H) C + 2 gamma (C - I)) / K."""
    m, _, v, owner, _, rank, adapters, size = problem
    _, curvatures, _, _ = at.scalars(problem, TILE)
    area = size * size
    rows, columns = i + tl.arange(0, TILE), j + tl.arange(0, TILE)
    own = tl.load(owner + rows)
    left = m + at.H * area + rows[:, None] * size
    right = m + at.C * area + columns[None, :]
    p = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, rank, CHUNK):
        inner = k + tl.arange(0, CHUNK)
        weight = tl.load(v + own[:, None] * adapters + tl.load(owner + inner)[None, :])
        x, y = tl.load(left + inner[None, :]) * weight, tl.load(right + inner[:, None] * size)
        p = tl.dot(x, y, p, input_precision="tf32x3")
    here = m + rows[:, None] * size + columns[None, :]
    p += 2 * gamma * (tl.load(here + at.C * area) - _one(rows, columns, rank))
    curvature = tl.load(curvatures + own)
    step = tl.where(curvature > 0, 1 / tl.where(curvature > 0, curvature, 1.0), 0.0)
    tl.store(here + at.P * area, step.to(tl.float32)[:, None] * p)


@triton.jit
def _products(problem, sums, i, j, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """P G, and the products of the gradient K P with P, the last P and D in the metric of G."""
    m, _, _, owner, _, rank, _, size = problem
    _, curvatures, _, _ = at.scalars(problem, TILE)
    area = size * size
    rows, columns = i + tl.arange(0, TILE), j + tl.arange(0, TILE)
    left = m + at.P * area + rows[:, None] * size
    right = m + at.G * area + columns[None, :]
    pg = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, rank, CHUNK):
        inner = k + tl.arange(0, CHUNK)
        x, y = tl.load(left + inner[None, :]), tl.load(right + inner[:, None] * size)
        pg = tl.dot(x, y, pg, input_precision="tf32x3")
    here = m + rows[:, None] * size + columns[None, :]
    p = tl.load(here + at.P * area)
    curvature = tl.load(curvatures + tl.load(owner + rows))[:, None]
    tl.store(sums + at.KP_P, _sum(p * pg, curvature))
    tl.store(sums + at.KP_LAST, _sum(p * tl.load(here + at.PG * area), curvature))
    tl.store(sums + at.KP_D, _sum(p * tl.load(here + at.Q * area), curvature))
    tl.debug_barrier()
    tl.store(here + at.PG * area, pg)


@triton.jit
def _turn(problem, sums, i, j, TILE: tl.constexpr):
    """D = -P + beta D and Q = -P G + beta Q; the products of D with itself and with C - I."""
    m, whole, _, _, _, rank, _, size = problem
    area = size * size
    slope, last = at.total(problem, at.KP_P, TILE), tl.load(whole + at.SLOPE)
    beta = slope - at.total(problem, at.KP_LAST, TILE)
    beta = tl.where(last > 0, beta / tl.where(last > 0, last, 1.0), 0.0)
    descends = beta * at.total(problem, at.KP_D, TILE) < slope
    beta = tl.where((beta > 0) & descends, beta, 0.0).to(tl.float32)
    rows, columns = i + tl.arange(0, TILE), j + tl.arange(0, TILE)
    here = m + rows[:, None] * size + columns[None, :]
    d = beta * tl.load(here + at.D * area) - tl.load(here + at.P * area)
    q = beta * tl.load(here + at.Q * area) - tl.load(here + at.PG * area)
    change = tl.load(here + at.C * area) - _one(rows, columns, rank)
    tl.store(sums + at.D_D, _sum(d * q, 1.0))
    tl.store(sums + at.D_CHANGE, _sum(change * q, 1.0))
    tl.debug_barrier()
    tl.store(here + at.D * area, d)
    tl.store(here + at.Q * area, q)


@triton.jit
def _changes(problem, sums, i, j, FROBENIUS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """E = Q C^T + C Q^T and F = Q D^T, and the coefficients of all pairs' weighted quartics."""
    m, _, v, owner, _, rank, adapters, size = problem
    area = size * size
    rows, columns = i + tl.arange(0, TILE), j + tl.arange(0, TILE)
    left, right = m + rows[:, None] * size, m + columns[None, :] * size
    f = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, rank, CHUNK):
        inner = k + tl.arange(0, CHUNK)
        x = tl.load(left + inner[None, :] + at.Q * area)
        y = tl.load(right + inner[:, None] + at.D * area)
        f = tl.dot(x, y, f, input_precision="tf32x3")
    e = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, rank, CHUNK):
        inner = k + tl.arange(0, CHUNK)
        x = tl.load(left + inner[None, :] + at.Q * area)
        y = tl.load(right + inner[:, None] + at.C * area)
        e = tl.dot(x, y, e, input_precision="tf32x3")
        x = tl.load(left + inner[None, :] + at.C * area)
        y = tl.load(right + inner[:, None] + at.Q * area)
        e = tl.dot(x, y, e, input_precision="tf32x3")
    here = m + rows[:, None] * size + columns[None, :]
    tl.store(here + at.E * area, e)
    tl.store(here + at.F * area, f)
    if not FROBENIUS:
        own_i, own_j = tl.load(owner + rows)[:, None], tl.load(owner + columns)[None, :]
        weight = tl.load(v + own_i * adapters + own_j) * 0.25
        weight = tl.where(own_i > own_j, weight, 0.0)
        h = tl.load(here + at.H * area)
        tl.store(sums + at.QUARTIC, _sum(weight * h * h, 1.0))
        tl.store(sums + at.QUARTIC + 1, _sum(weight * h * e, 2.0))
        tl.store(sums + at.QUARTIC + 2, _sum(weight * (e * e + 2 * h * f), 1.0))
        tl.store(sums + at.QUARTIC + 3, _sum(weight * e * f, 2.0))
        tl.store(sums + at.QUARTIC + 4, _sum(weight * f * f, 1.0))


@triton.jit
def _pairs(problem, i, j, COUNT: tl.constexpr, TILE: tl.constexpr):
    """The first coefficients of the squares of H + eta E + eta^2 F, summed over the part that the
    tile holds of the blocks of any two adapters.

    An adapter's row in the tile of sums is its number less that of the tile's first; so its column.
    """
    m, _, _, owner, _, rank, _, size = problem
    area = size * size
    place = tl.arange(0, TILE)
    rows, columns = i + place, j + place
    own_i = tl.load(owner + rows) - tl.load(owner + i)
    own_j = tl.load(owner + columns) - tl.load(owner + j)
    member_i = ((own_i[None, :] == place[:, None]) & (rows < rank)[None, :]).to(tl.float32)
    member_j = ((own_j[:, None] == place[None, :]) & (columns < rank)[:, None]).to(tl.float32)
    here = m + rows[:, None] * size + columns[None, :]
    h = tl.load(here + at.H * area)
    e, f = h, h
    if COUNT > 1:
        e, f = tl.load(here + at.E * area), tl.load(here + at.F * area)
    for k in range(COUNT):
        x = tl.where(k == 0, h * h, 2 * h * e)
        x = tl.where(k == 2, e * e + 2 * h * f, x)
        x = tl.where(k == 3, 2 * e * f, x)
        x = tl.where(k == 4, f * f, x)
        x = tl.dot(member_i, x, input_precision="tf32x3")
        x = tl.dot(x, member_j, input_precision="tf32x3")
        tl.store(here + (at.SUMS + k) * area, x)


@triton.jit
def _advance(problem, i, j, TILE: tl.constexpr):
    """C += eta D and H += eta E + eta^2 F, with H's mirror image."""
    m, whole, _, _, _, _, _, size = problem
    area = size * size
    eta = tl.load(whole + at.ETA)
    once, twice = eta.to(tl.float32), (eta * eta).to(tl.float32)
    row, column = (i + tl.arange(0, TILE))[:, None], (j + tl.arange(0, TILE))[None, :]
    here = m + row * size + column
    c = tl.load(here + at.C * area) + once * tl.load(here + at.D * area)
    tl.debug_barrier()
    tl.store(here + at.C * area, c)
    if j <= i:
        h = tl.load(here + at.H * area) + once * tl.load(here + at.E * area)
        h += twice * tl.load(here + at.F * area)
        tl.debug_barrier()
        tl.store(here + at.H * area, h, mask=column <= row)
        tl.store(m + at.H * area + column * size + row, h, mask=column <= row)


@triton.jit
def _leave(problem, out, i, j, TILE: tl.constexpr):
    """C into the results."""
    m, _, _, _, _, rank, _, size = problem
    row, column = (i + tl.arange(0, TILE))[:, None], (j + tl.arange(0, TILE))[None, :]
    c = tl.load(m + at.C * size * size + row * size + column)
    tl.store(out + row * rank + column, c, mask=(row < rank) & (column < rank))


@triton.jit
def _one(rows, columns, rank):
    """The tile of the unit matrix."""
    return ((rows[:, None] == columns[None, :]) & (rows < rank)[:, None]).to(tl.float32)


@triton.jit
def _sum(x, factor):
    """The sum of a tile, in float64."""
    return tl.sum(tl.sum(x.to(tl.float64) * factor, 1), 0)


@triton.jit
def descent_tiles_kernel(
    work, starts, memory, each, size, out, gamma,
    PHASE: tl.constexpr, FROBENIUS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A phase of every problem: a tile of one."""
    number, tile = tl.program_id(1), tl.program_id(0)
    problem = at.find(number, work, starts, memory, each, size, FROBENIUS)
    _, whole, _, _, _, rank, _, _ = problem
    one = work + 6 * number
    tiles = (rank + TILE - 1) // TILE
    i, j = tile // tiles * TILE, tile % tiles * TILE
    _, _, sums, _ = at.scalars(problem, TILE)
    sums += tile * at.PARTS
    if PHASE == FILL:
        if i < rank:
            _fill(problem, tl.load(one).to(tl.pointer_type(tl.float32)), sums, i, j, TILE)
    elif PHASE == ENERGIES:
        if (i < rank) & (j <= i):
            _pairs(problem, i, j, 1, TILE)
    elif PHASE == LEAVE:
        if i < rank:
            _leave(problem, out + tl.load(one + 4), i, j, TILE)
    elif PHASE == ADVANCE:
        if (i < rank) & (tl.load(whole + at.ETA) > 0):
            _advance(problem, i, j, TILE)
    elif (i < rank) & (tl.load(whole + at.RUNNING) > 0):
        if PHASE == GRADIENT:
            _gradient(problem, gamma, i, j, TILE, CHUNK)
        elif PHASE == PRODUCTS:
            _products(problem, sums, i, j, TILE, CHUNK)
        elif PHASE == TURN:
            _turn(problem, sums, i, j, TILE)
        elif j <= i:
            if PHASE == CHANGES:
                _changes(problem, sums, i, j, FROBENIUS, TILE, CHUNK)
            else:
                _pairs(problem, i, j, 5, TILE)
