"""Factors of any size in, results that keep their digits out, by exact powers of two.

What is read. Grams, norms and updates are float32 in the kernels, so factors have to be near 1.
The diagonal of a module's Grams, there anyway, tells whether they are. If a side is not,
`centred` takes a power of two out of all its blocks and scales; the Stack remembers it as
`powers`, and the Grams are made again, in float64. Every method is homogeneous in either side,
but for what compares the two, or modules with each other: those read `powers`. Weights and λ of
extreme sizes give up a power in the same way.

What is written. The powers come back where the result becomes factors of its dtype (`fitted`).
They may go to A or to B, row by row: 2^k a_k and 2^-k b_k are the same update. Where a result is
in range as it is, nothing is shared and nothing changes by a bit. Rounding that moves an update by
more than LIMIT, most of all in float16, whose smallest numbers have few digits, is refused as
values that are too large are.

    error^2 = sum_k ||δa_k||^2 ||b_k||^2 + ||a_k||^2 ||δb_k||^2  over  sum_k ||a_k||^2 ||b_k||^2

over the rows a_k of A and the columns b_k of B. Only in float16 can it be large without a
power of two: bfloat16 has the exponents of float32. `fits` finds from few columns whether it may
be, and such modules are merged again in float32. Adapters of a module that are more than
2^FARTHEST apart are refused: float32 has no room for both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Plan, Stack
from ..algebra.powers import EXTREME, MOST, USUAL, exponent, exponents, extreme, times
from ..algebra.side import Side
from ..errors import AdapterError, OptionError

__all__ = ["Diagonals", "calm", "centred", "fits", "of_weights", "usual", "weighted"]

CENTRE = 25
"""log2 of the largest entries that are left as they are."""

GRID = 32
"""Powers taken out are multiples of it, so that modules of like sizes have the same."""

FARTHEST = 105
"""log2 of how far below the largest A times the largest B of a module an adapter's may be."""


SAMPLE = 4, 32
"""Pieces of a result, and columns of each, that are looked at to see if rounding may matter."""


ROUNDING = 2.0**-24 / math.sqrt(12)
"""Root mean square error of a float16 below 2^-14."""

CALM = -23, 15
"""log2 of the sizes of blocks that are left as they are whatever the norms of their rows, which are
between 2^-2 and 2^10 times as large: these are within 2^CENTRE of 1."""

APART = 13
"""log2 of how far blocks of a side may be apart for none to be far below another, in norms too."""

WIDEST = 1 << 20
"""Numbers in a row for which that holds."""

Diagonals = tuple[Tensor, Tensor]
"""Squared norms of the rows of A and of B^T of a stack."""


def usual(squares: Tensor) -> Tensor:
    """Whether all rows of a module have a usual size, by their squared norms [..., R]: none is zero
    or not finite."""
    low, high = USUAL
    least, most = squares.aminmax(dim=-1)
    return (least >= low) & (most <= high)


def calm(stack: Stack, tops: Tensor) -> Tensor:
    """Whether `centred` leaves the modules as they are for sure, [P]. tops: the largest magnitude
    in every block, A's before B's, [P, 2T]."""
    scales = torch.tensor([*stack.a.scales, *stack.b.scales], dtype=torch.float64)
    of_scale = torch.frexp(scales)[1]
    usual = tops.isfinite() & (of_scale.abs() <= EXTREME) & (scales != 0)
    size = torch.where(usual, (torch.frexp(tops)[1] + of_scale).double(), math.inf)
    near = torch.full((len(tops),), max(stack.a.d, stack.b.d) <= WIDEST)
    live = tops != 0
    for own, present in zip(size.chunk(2, 1), live.chunk(2, 1)):
        low = own.where(present, math.inf).amin(1)
        high = own.where(present, -math.inf).amax(1)
        near &= (low >= CALM[0]) & (high <= CALM[1]) & (high - low <= APART)
    return near


def centred(plan: Plan, stack: Stack, diagonals: Diagonals) -> Stack:
    """The stack with both sides near 1; the same one where they are, or are not finite.

    AdapterError for adapters that are too far apart, or an update that is beyond float32.
    """
    sides = stack.a, stack.b
    sizes = [exponents(side, diagonal) for side, diagonal in zip(sides, diagonals)]
    pairs = list(zip(*sizes))
    if any(math.isinf(e) and e > 0 for pair in pairs for e in pair):
        return stack
    _check_size(plan, stack, [a + b for a, b in pairs])
    bare = [exponent(block, 1.0) for block in stack.b.blocks]
    _check_apart(plan, stack, "lora_A and lora_B are", sizes)
    _check_apart(plan, stack, "lora_B without its scaling is", [bare])
    far = any(map(_is_far, sizes))
    (a, power_a), (b, power_b) = (_near_one(side, size, far) for side, size in zip(sides, sizes))
    if a is stack.a and b is stack.b and not far:
        return stack
    return dataclasses.replace(stack, a=a, b=b, powers=(power_a, power_b), far=far)


def _is_far(sizes: Sequence[float]) -> bool:
    """Whether an adapter that is not zero vanishes beside another in a float32 Gram."""
    return min((s for s in sizes if s > -math.inf), default=0.0) < max(sizes) - CENTRE


def _check_size(plan: Plan, stack: Stack, sizes: Sequence[float]) -> None:
    for size, i in zip(sizes, stack.adapters):
        if size > -math.inf and abs(size) > MOST / 2:
            problem = f"its update is of size 2^{size:.0f}, which float32 factors cannot hold"
            remedy = "correct its alpha, or leave it out"
            raise AdapterError(plan.adapters[i].name, stack.name, problem, remedy)


def _check_apart(plan: Plan, stack: Stack, what: str, sides: Sequence[Sequence[float]]) -> None:
    """How far all sides of an adapter together are below the largest ones, if it is not zero."""
    tops = [max(sizes) for sizes in sides]
    for i, own in zip(stack.adapters, zip(*sides)):
        below = sum(top - size for top, size in zip(tops, own) if top > -math.inf)
        if FARTHEST < below < math.inf:
            problem = f"its {what} 2^{below:.0f} times smaller than the module's largest"
            remedy = "leave it out, or bring the adapters to like sizes"
            raise AdapterError(plan.adapters[i].name, stack.name, problem, remedy)


def _near_one(side: Side, sizes: Sequence[float], far: bool) -> tuple[Side, int]:
    """The side with a power of two taken out of all blocks, and of all scales, and the power; the
    same side where neither is needed. far: whether there is room for the largest entry at 1 only.
    """
    top, raw = max(sizes), max(exponent(block, 1.0) for block in side.blocks)
    narrow = all(abs(math.frexp(scale)[1]) <= FARTHEST for scale in side.scales)
    if math.isinf(top) or (abs(top) <= CENTRE and narrow and not far):
        return side, 0
    grid = 1 if far else GRID
    of_blocks = grid * round(raw / grid)
    # The scales of A are 1, and stay so: methods do not look at them.
    of_scales = grid * round((top - of_blocks) / grid) if set(side.scales) != {1.0} else 0
    blocks = tuple(times(block, -of_blocks).to(_wide(block.dtype)) for block in side.blocks)
    scales = tuple(
        1.0 if math.isinf(size) else math.ldexp(scale, -of_scales)
        for scale, size in zip(side.scales, sizes)
    )
    return Side(blocks if of_blocks else side.blocks, scales), of_blocks + of_scales


def _wide(dtype: torch.dtype) -> torch.dtype:
    """One with the exponents of float32."""
    return torch.float32 if dtype == torch.float16 else dtype


def of_weights(weights: Sequence[float], by_ratio: bool) -> int:
    """The power of two to take out of all weights. OptionError for weights that no result with
    their size could be written with."""
    largest = max(map(abs, weights))
    power = extreme(largest)
    if abs(power) > MOST / 2 and not by_ratio:
        problem = f"{largest!r} is beyond what float32 factors hold"
        raise OptionError("weights", problem, "give weights nearer to 1")
    return power


def weighted(stack: Stack, power: int, by_ratio: bool) -> Stack:
    """The stack with a power of two taken out of its weights; B has it then, unless only the
    ratios of weights count."""
    if not power:
        return stack
    weights = tuple(math.ldexp(w, -power) for w in stack.weights)
    power_a, power_b = stack.powers
    powers = stack.powers if by_ratio else (power_a, power_b + power)
    return dataclasses.replace(stack, weights=weights, powers=powers)


def fits(
    merged: Sequence[tuple[Tensor, ...]], backend: str, finite: Sequence[Tensor] = ()
) -> list[list[bool]]:
    """Whether every merged module is finite and, in float16, rounded by little for sure. merged:
    what one module became, or, with P before all shapes, several. finite: those that are known to
    be."""
    known = {*map(id, finite)}
    rest = [x for tensors in merged for x in tensors if id(x) not in known]
    looked_at = dict(zip(map(id, rest), _finite(rest, backend)))
    found = []
    for tensors in merged:
        count = 1 if tensors[0].dim() == 2 else tensors[0].shape[0]
        flags = [looked_at.get(id(x), True) for x in tensors]
        whole = [True] * count
        if flags.count(True) < len(flags):
            rows = [x if isinstance(x, list) else [x] * count for x in flags]
            whole = [all(row) for row in zip(*rows)]
        if len(tensors) == 2 and tensors[0].dtype == torch.float16:
            a, b = tensors
            errors = _expected_errors(_sample(a), _sample(b.mT)).reshape(-1).tolist()
            most = torch.finfo(torch.float16).eps
            whole = [fit and error <= most for fit, error in zip(whole, errors)]
        found.append(whole)
    return found


def _finite(tensors: Sequence[Tensor], backend: str) -> list[bool | list[bool]]:
    """Whether all of each is; of those that are not, whether every matrix is."""
    if not tensors:
        return []
    found: list[bool | list[bool]] = ops.largest(tensors, backend=backend).isfinite().tolist()
    for k, x in enumerate(tensors):
        if not found[k] and x.dim() == 3:
            found[k] = ops.largest(x.unbind(), backend=backend).isfinite().tolist()
    return found


def _sample(x: Tensor) -> Tensor:
    """Some columns of x [..., R, d]: whole cache lines of it, [..., R, pieces, width]."""
    pieces = min(SAMPLE[0], x.shape[-1])
    whole = x[..., : x.shape[-1] // pieces * pieces]
    return whole.unflatten(-1, (pieces, -1))[..., : SAMPLE[1]]


def _expected_errors(a: Tensor, b: Tensor) -> Tensor:
    """The errors that rounding to float16 would have if all numbers were small, [...], from columns
    of A and of B^T."""
    rows, columns = (x.float().square().mean((-2, -1)) for x in (a, b))
    errors = ROUNDING * ((rows + columns).sum(-1) / (rows * columns).sum(-1)).sqrt()
    return errors.nan_to_num(nan=math.inf, posinf=math.inf)
