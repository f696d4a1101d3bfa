"""One pass over adapters that keeps all of a merge that does not depend on coefficients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import GROUP_BYTES, Plan, Stack
from ..algebra.host import gather
from ..algebra.roots import column_norms, root
from ..algebra.side import CODES
from ..algebra.threads import in_order, of_parts
from ..engine import transfer
from ..engine.group import measured
from ..engine.interference import InterferenceSums
from ..engine.work import Work
from ..errors import AdapterError
from ..methods.base import Chosen, bare_sides, grams, wide_grams
from ..methods.contract import Batch, batched
from ..methods.do import orthogonalize
from ..methods.spectral import pico, space
from ..methods.weighted import combination
from .densities import by_module
from .kinds.alike import Alike
from .kinds.gains import Arcs, Calibrated, Rows, Shares
from .kinds.joint import Joint
from .kinds.rotated import Cores, Given, Inside
from .kinds.scaled import Columns, Unit
from .part import Bases, Part

__all__ = ["has_parts", "prepared"]

Builder = Callable[[Sequence[Stack], Chosen, Work], list[Part]]


def has_parts(chosen: Chosen) -> bool:
    """Whether there is anything to keep: otherwise every merge is made anew."""
    return _builder(chosen) is not None


def _builder(chosen: Chosen) -> Builder | None:
    row = chosen.method
    if _is_sum(chosen):
        return _rows
    if row.name == "tsvm" and chosen.options.power == 1:
        return _singular
    if row.name == "do":
        return _decoupled if chosen.inner is None or _is_sum(chosen.inner) else None
    named: dict[str, Builder] = {"slerp": _arcs, "multislerp": _arcs, "pico": _calibrated}
    if row.name in named:
        return named[row.name]
    if row.name == "knots" and chosen.inner and _is_sum(chosen.inner):
        return _joint
    if row.basis and chosen.inner:
        keeps = row.name != "knots" or _builder(chosen.inner)  # a basis of one side alone
        return _inside if keeps and _works_inside(chosen.inner) else None
    if row.reduce is not None or row.coefficients is None:
        return None
    return _cores if row.core else _given


def _is_sum(chosen: Chosen) -> bool:
    return chosen.method.name in ("linear", "cat") and bool(chosen.options.power == 1)


def _works_inside(inner: Chosen) -> bool:
    """Whether a method that works in a basis takes each module by itself."""
    return not (inner.method.inner or inner.method.reduce) and by_module(inner)


def prepared(
    plan: Plan,
    work: Work,
    device: torch.device,
    sums: InterferenceSums,
    progress: Callable[[int, int], None],
) -> tuple[list[Alike], dict[str, Part]]:
    """All modules of a plan whose weights are 1: those alike together, and every one by itself.
    progress: is called after every module; an error that it raises stops it. AdapterError for what
    is not finite, or far from 1 in size."""
    parts: dict[str, Part] = {}
    members: dict[tuple, list[Part]] = {}
    for stacks, norms in _groups(plan, work, device, sums):
        for part, own in zip(_built(stacks, work), norms):
            parts[part.stack.name] = part if part.norms else dataclasses.replace(part, norms=own)
            members.setdefault(part.key, []).append(part)
            progress(len(parts), len(plan.names))
    return [_together(group) for group in members.values()], parts


def _built(stacks: Sequence[Stack], work: Work) -> list[Part]:
    """Of modules that one adapter alone has, their update where they are left as they are."""
    build = _cores if work.calibrated else _builder(work.method)
    assert build
    lone = [work.alone and len(s.adapters) == 1 for s in stacks]
    rest = iter(build([s for s, x in zip(stacks, lone) if not x], work.method, work))
    return [_rows([s], work.method, work)[0] if x else next(rest) for s, x in zip(stacks, lone)]


def _groups(
    plan: Plan, work: Work, device: torch.device, sums: InterferenceSums
) -> Iterator[tuple[Sequence[Stack], Sequence[Sequence[float]]]]:
    """Stacks as the method takes them, read into memory of their own, and the ||τ_i||_F of
    each."""
    backend = work.settings.backend
    rooms = torch.tensor(plan.rooms or [0] * len(plan.names), dtype=torch.float64)
    for at in plan.groups(rooms / GROUP_BYTES):
        read = [plan.stack(name) for name in plan.names[at.start : at.stop]]
        stacks = transfer.upload(read, device).wait()
        group = measured(plan, stacks, [True] * len(stacks), sums, backend)
        for s in group.stacks:
            if s.powers != (0, 0) or s.far:
                first = plan.adapters[s.adapters[0]].name
                problem = "the adapters' factors are far from 1, or from each other, in size"
                raise AdapterError(first, s.name, problem, "merge them once (merge)")
        yield work.before(group.stacks), [own for (own,) in group.norms]


def _together(parts: Sequence[Part]) -> Alike:
    first = parts[0]
    tensors = {n: torch.stack([p.tensors[n] for p in parts]) for n in first.tensors}
    return first.cls(
        names=tuple(p.stack.name for p in parts),
        owners=first.stack.adapters,
        ranks=first.ranks or first.stack.a.ranks,
        scale=torch.ones(len(parts), dtype=torch.float64),
        **tensors,
        **first.fields,
    )


def _sizes(stack: Stack) -> Tensor:
    """s_i of every row, [R]."""
    pairs = zip(stack.b.scales, stack.b.ranks)
    return torch.cat([torch.full((r,), c, dtype=torch.float64) for c, r in pairs])


def _given_bases(stack: Stack) -> Bases:
    """The factors as they are, without scalings."""
    a, b = bare_sides([stack])
    dtypes = {x.dtype for x in (*a.blocks, *b.blocks)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dtype = dtype if dtype in CODES else torch.float32
    return a.stack(dtype), b.stack(dtype)


def _rows(stacks: Sequence[Stack], chosen: Chosen, work: Work) -> list[Part]:
    return [Part(s, _given_bases(s), Rows, {"sizes": _sizes(s)}) for s in stacks]


def _joint(stacks: Sequence[Stack], chosen: Chosen, work: Work) -> list[Part]:
    """The left basis that the updates share, and what these are in it."""
    assert chosen.method.basis
    settings = dataclasses.replace(work.settings, inner=chosen.inner)
    small = chosen.method.basis(stacks, chosen.options, settings)
    bare = bare_sides(stacks)[len(stacks) :]
    turns = [x.to_b.float().to(s.device) for x, s in zip(small, bare)]
    bases = ops.apply(turns, bare, torch.float32, backend=work.settings.backend)
    found = []
    for s, x, basis in zip(stacks, small, bases):
        within, fields = x.stack.b.stack(torch.float64), {"rows": s.a.ranks}
        ranks = (len(basis),) * len(s.adapters)
        pair = _given_bases(s)[0], basis
        found.append(Part(s, pair, Joint, {"within": within}, fields, ranks=ranks))
    return found


def _arcs(stacks: Sequence[Stack], chosen: Chosen, work: Work) -> list[Part]:
    products = combination.of_stacks(stacks, work.settings.backend)
    tensors = ({"sizes": _sizes(s), "products": x} for s, x in zip(stacks, products))
    fields = {"method": chosen.method.name}
    return [Part(s, _given_bases(s), Arcs, x, fields) for s, x in zip(stacks, tensors)]


def _calibrated(stacks: Sequence[Stack], chosen: Chosen, work: Work) -> list[Part]:
    """B' = B C with the calibration C of pico."""
    of_a, of_b = (gather(x) for x in wide_grams(stacks, work.settings.backend))
    found: list[Part] = []
    for s, a, b in zip(stacks, of_a, of_b):
        c = pico.calibration(b[None], len(s.adapters))[0]
        bare, backend = bare_sides([s])[1], work.settings.backend
        (rows,) = ops.apply([c.float().to(bare.device)], [bare], torch.float32, backend=backend)
        products = (c @ b @ c.mT) * a
        sizes = _sizes(s)
        own = combination.of_grams(a, sizes[:, None] * b * sizes, s.a.ranks)
        tensors = {"sizes": sizes, "norms": own.diagonal().sqrt(), "products": products}
        found.append(Part(s, (_given_bases(s)[0], rows), Calibrated, tensors))
    return found


def _in_bases(
    stacks: Sequence[Stack], backend: str, turn: Callable[[space.Coordinates], list[dict]]
) -> list[tuple[dict[str, Tensor], Bases]]:
    """turn(coordinates) -> by module its tensors, among them left^T [k, K_B] and right [k, K_A],
    which become the bases; the tensors without them."""
    if not stacks:
        return []
    a, b = (gather(x) for x in wide_grams(stacks, backend))
    parts = [
        (members[at], grams.part(at), weights[at])
        for members, grams, weights in batched(stacks, a, b)
        for at in grams.parts
    ]

    def of_part(
        part: tuple[Sequence[int], Batch, Tensor],
    ) -> list[tuple[dict[str, Tensor], Tensor, Tensor]]:
        x, to_a, to_b = space.coordinates(*part[1:])
        rows = zip(turn(x), to_a, to_b)
        return [(t, t.pop("right") @ p, t.pop("left") @ q) for t, p, q in rows]

    results = of_parts(of_part, parts, a[0].device, lambda part: sum(part[1].ranks))
    found = in_order([members for members, _, _ in parts], results)
    sides = bare_sides(stacks)
    turns = [*(a for _, a, _ in found), *(b for _, _, b in found)]
    made = ops.apply(
        [c.float().to(s.device) for c, s in zip(turns, sides)],
        sides,
        torch.float32,
        backend=backend,
    )
    pairs = zip(made, made[len(stacks) :])
    return [(tensors, pair) for (tensors, _, _), pair in zip(found, pairs)]


def _singular(stacks: Sequence[Stack], chosen: Chosen, work: Work) -> list[Part]:
    """Of `tsvm`: the orthogonalized singular vectors, and S as sizes."""

    def turn(x: space.Coordinates) -> list[dict]:
        parts = [space.svd(b, a, size) for (b, a), size in zip(x.tasks(), x.norms.T)]
        widths = [s.shape[1] for _, s, _ in parts]
        u, s, v = (torch.cat(part, -1) for part in zip(*parts))
        # A K below r_i leaves fewer triplets than rows: the others are zeros.
        rows = torch.cat([torch.arange(w) + sum(x.ranks[:k]) for k, w in enumerate(widths)])

        def placed(y: Tensor) -> Tensor:
            full = y.new_zeros(len(y), sum(x.ranks), *y.shape[2:])
            full[:, rows.to(y.device)] = y
            return full

        pairs = zip(placed(s), placed(space.polar(u).mT), placed(space.polar(v).mT))
        return [{"sizes": size, "left": left, "right": right} for size, left, right in pairs]

    found = _in_bases(stacks, work.settings.backend, turn)
    return [Part(s, bases, Rows, tensors) for s, (tensors, bases) in zip(stacks, found)]


def _turned(x: space.Coordinates) -> list[dict]:
    eyes = (torch.eye(y.shape[2], dtype=y.dtype, device=y.device) for y in (x.bare, x.a))
    left, right = eyes
    sizes = x.gains[..., 0]
    return [
        {"a": a, "bare": b, "sizes": s, "left": left, "right": right}
        for a, b, s in zip(x.a, x.bare, sizes)
    ]


def _cores(stacks: Sequence[Stack], chosen: Chosen, work: Work) -> list[Part]:
    found = _in_bases(stacks, work.settings.backend, _turned)
    fields = {"method": chosen, "rank": work.cut.rank, "calibrated": work.calibrated}
    return [Part(s, bases, Cores, tensors, fields) for s, (tensors, bases) in zip(stacks, found)]


def _given(stacks: Sequence[Stack], chosen: Chosen, work: Work) -> list[Part]:
    needs = chosen.method.takes(chosen.options)
    found = _in_bases(stacks, work.settings.backend, _turned)
    of_a, of_b = (gather(x) for x in wide_grams(stacks, work.settings.backend, needs.bare))
    parts = []
    for s, (tensors, bases), a, b in zip(stacks, found, of_a, of_b):
        sides = min(s.rank, s.a.d), min(s.rank, s.b.d)
        tensors = {**tensors, "grams_a": a, "grams_b": b}
        parts.append(Part(s, bases, Given, tensors, {"method": chosen, "sides": sides}))
    return parts


def _decoupled(stacks: Sequence[Stack], chosen: Chosen, work: Work) -> list[Part]:
    """Of `do`: the factors after the descents, A's of unit columns where it decouples."""
    given, backend = chosen.options, work.settings.backend
    wanted = [chosen.method.needs_grams(s, given, backend) for s in stacks]
    of_a, of_b = grams(stacks, wanted, backend)
    a, b = orthogonalize(stacks, of_a, of_b, given, backend)
    sides = [*a, *b]
    hats = ops.apply(
        [x.c for x in sides], [x.problem for x in sides], torch.float32, backend=backend
    )
    pairs = zip(stacks, hats, hats[len(stacks) :])
    if not given.decouple:
        ones = (torch.ones(s.rank, dtype=torch.float64) for s in stacks)
        return [Part(s, (x, y), Shares, {"sizes": e}) for (s, x, y), e in zip(pairs, ones)]
    return [_apart(s, x, y, given.renormalize) for s, x, y in pairs]


def _apart(stack: Stack, a: Tensor, bt: Tensor, renormalize: bool) -> Part:
    ranks = list(stack.a.ranks)
    rows, columns = a.split(ranks), bt.split(ranks)
    lengths = torch.stack(
        [column_norms(root(y.double() @ y.double().T), x) for x, y in zip(rows, columns)]
    )
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    directions = torch.cat([x * c for x, c in zip(rows, inverse)])
    norms = lengths.double().norm(dim=1).tolist()
    if not renormalize:
        return Part(stack, (directions, bt), Columns, {"lengths": lengths}, norms=norms)
    wide = bt.double()
    tensors = {"lengths": lengths, "directions": directions, "squares": wide @ wide.T}
    return Part(stack, (directions, bt), Unit, tensors, norms=norms)


def _inside(stacks: Sequence[Stack], chosen: Chosen, work: Work) -> list[Part]:
    """Of updates in a basis what the method inside keeps, its bases turned back."""
    inner, backend = chosen.inner, work.settings.backend
    assert inner
    assert chosen.method.basis
    settings = dataclasses.replace(work.settings, inner=inner)
    small = chosen.method.basis(stacks, chosen.options, settings)
    build = _builder(inner) or _anew
    parts = build([x.stack for x in small], inner, dataclasses.replace(work, method=inner))
    found, sides = [], bare_sides(stacks)
    for k, (part, x) in enumerate(zip(parts, small)):
        bases = []
        for basis, turn, side in zip(part.bases, (x.to_a, x.to_b), (k, k + len(stacks))):
            if turn is None:
                bases.append(basis)
                continue
            c = (basis.double() @ turn.double()).float()
            bases += ops.apply([c], [sides[side]], torch.float32, backend=backend)
        found.append(dataclasses.replace(part, stack=stacks[k], bases=(bases[0], bases[1])))
    return found


def _anew(stacks: Sequence[Stack], chosen: Chosen, work: Work) -> list[Part]:
    """Of small updates all, which is merged with every coefficient."""
    fields = {"method": chosen, "rank": work.settings.rank, "backend": work.settings.backend}
    found = []
    for s in stacks:
        a, b = s.a.stack(torch.float32), s.b.stack(torch.float32)
        units = torch.eye(s.a.d).to(a), torch.eye(s.b.d).to(b)
        found.append(Part(s, units, Inside, {"a": a, "b": b}, fields))
    return found
