"""f along a direction, by scalars in float64, and its first minimum. See descent.Line."""

from __future__ import annotations

import triton
import triton.language as tl

from ._problem import BLOCK

__all__ = ["best_step"]

MAX_DOUBLINGS = tl.constexpr(60)
MAX_STEPS = tl.constexpr(100)

START = tl.constexpr(0)
BRACKET = tl.constexpr(1)
NARROW = tl.constexpr(2)
CHECK = tl.constexpr(3)
FOUND = tl.constexpr(4)


@triton.jit
def _point(eta, q0, q1, q2, q3, q4, m0, m1, m2, table, pairs, FROBENIUS: tl.constexpr):
    """Value, slope and curvature of f at eta.

    q0 to q4: the weighted sum of all pairs' quartics; for Frobenius norms they stand in `table`
    [6, pairs] in float64: the coefficients, then what is under the root besides (0: no pair).
    m0 to m2: gamma times the coefficients of ||Xhat - X||^2.
    """
    if FROBENIUS:
        value = tl.zeros((BLOCK,), tl.float64)
        slope = tl.zeros((BLOCK,), tl.float64)
        curvature = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, pairs, BLOCK):
            place = first + tl.arange(0, BLOCK)
            at = table + place
            floor = tl.load(at + 5 * pairs, mask=place < pairs, other=0.0)
            live = floor > 0
            energy = tl.zeros((BLOCK,), tl.float64)
            rise = tl.zeros((BLOCK,), tl.float64)
            bend = tl.zeros((BLOCK,), tl.float64)
            for k in range(4, -1, -1):
                bend = bend * eta + 2 * rise
                rise = rise * eta + energy
                energy = energy * eta + tl.load(at + k * pairs, mask=live, other=0.0)
            norm = tl.sqrt(tl.where(live, tl.maximum(energy, 0.0) + floor, 1.0))
            first_order = rise / (2 * norm)
            value += tl.where(live, norm, 0.0)
            slope += first_order
            curvature += (bend / 2 - first_order * first_order) / norm
        value, slope, curvature = tl.sum(value, 0), tl.sum(slope, 0), tl.sum(curvature, 0)
    else:
        value = q0 + eta * (q1 + eta * (q2 + eta * (q3 + eta * q4)))
        slope = q1 + eta * (2 * q2 + eta * (3 * q3 + eta * 4 * q4))
        curvature = 2 * q2 + eta * (6 * q3 + eta * 12 * q4)
    return (
        2 * value + m0 + eta * (m1 + eta * m2),
        2 * slope + m1 + 2 * eta * m2,
        2 * curvature + 2 * m2,
    )


@triton.jit
def best_step(q0, q1, q2, q3, q4, m0, m1, m2, table, pairs, FROBENIUS: tl.constexpr):
    """The first minimum eta, f at 0 and f at eta; eta is 0 where no step lowers f.

    A root of the slope: bracketed by doubling, then Newton's steps, bisection where they leave the
    bracket. One loop for all phases, because every call of `_point` is compiled anew.
    """
    low = tl.full((), 0.0, tl.float64)
    high = tl.full((), 1.0 / 64, tl.float64)
    eta, before, after = low, low, low
    phase = tl.full((), START, tl.int32)
    count = tl.full((), 0, tl.int32)
    while phase != FOUND:
        value, slope, curvature = _point(
            eta, q0, q1, q2, q3, q4, m0, m1, m2, table, pairs, FROBENIUS
        )
        count += 1
        if phase == START:
            before = value
            eta = high
            phase = tl.full((), BRACKET, tl.int32)
        elif phase == BRACKET:
            if (slope < 0) & (count <= MAX_DOUBLINGS):
                low = high
                high = 2 * high
                eta = high
            else:
                eta = (low + high) / 2
                count = tl.full((), 0, tl.int32)
                phase = tl.full((), NARROW, tl.int32)
        elif phase == NARROW:
            low = tl.where(slope < 0, eta, low)
            high = tl.where(slope < 0, high, eta)
            newton = eta - slope / tl.where(curvature == 0, 1.0, curvature)
            target = tl.where((newton > low) & (newton < high), newton, (low + high) / 2)
            close = (tl.abs(target - eta) <= 1e-10 * eta) | (high - low <= 1e-9 * high)
            eta = target
            if close | (count == MAX_STEPS):
                count = tl.full((), 0, tl.int32)
                phase = tl.full((), CHECK, tl.int32)
        else:
            after = value
            if after <= before:
                phase = tl.full((), FOUND, tl.int32)
            elif count == MAX_DOUBLINGS:
                eta = low * 0
                phase = tl.full((), FOUND, tl.int32)
            else:
                eta = eta / 2
    return eta, before, after
