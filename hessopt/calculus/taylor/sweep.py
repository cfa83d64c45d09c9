"""One sweep over a program that computes the Taylor terms of phi.

With adjoints lambda of the results of every operation, and tangents x_s of its
operands,

    H_st    = sum over operations  < lambda, op''[x_s, x_t] >
    phi_sss = sum over operations  < lambda, op'''[x_s, x_s, x_s] + 3 op''[x_s, x_ss] >,

where x_ss is the second derivative of the operands along s. Both sums are computed from
the reverse pass r(x) = op'(x)' lambda. Its derivative r' along x_s is `op''[x_s, .]`
contracted with lambda. With its second derivative r'' along `x + e x_s + e^2/2 x_ss`,
the second sum is `< r'', x_s > + 2 < r', x_ss >`. If r' or r'' is zero by construction,
as for every linear operation, JAX represents it as a constant, and nothing is
evaluated.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hessopt.calculus.linearization import linearize
from hessopt.calculus.taylor.pointwise import contract_pointwise, is_pointwise
from hessopt.calculus.taylor.tangents import (
    Contribution,
    Groups,
    Tangents,
    added,
    after,
    gram,
    placed,
    rowwise,
    spread,
    stacked,
    taken,
    total,
)
from hessopt.calculus.taylor.tape import Operation, Tape
from hessopt.trees.sharding import varying
from hessopt.typing import Matrix, Vector

Arrays = tuple[jax.Array, ...]
"""The operands, or the results, of an operation."""
Places = tuple[int, ...]
"""Indices of operands of an operation."""
Stacks = dict[int, jax.Array]
"""Derivatives of some operands, by their indices, with respect to the rates of the same
groups."""
Sums = dict[tuple[str, ...], jax.Array]
"""Sums over operations, by the axes of a shard_map over whose devices the terms are
distributed."""


def sweep(
    tape: Tape,
    updates: Sequence[jax.Array],
    labels: Sequence[int],
    count: int,
    order: int,
    dtype: DTypeLike,
) -> tuple[Vector, Matrix, Vector]:
    """Return the gradient and the Hessian of phi at 0, and the diagonal of its third
    derivative for order 3, else zeros."""
    every = tuple(range(count))
    H, mirrored, third = Sums(), Sums(), Sums()
    first = {
        i: Tangents((label,), u[None])
        for i, (u, label) in enumerate(zip(updates, labels, strict=True))
    }
    second: dict[int, Tangents] = {}
    for operation, adjoint in zip(tape.operations, tape.adjoints, strict=True):
        x, xx = (
            {p: of[i] for p, i in enumerate(operation.operands) if i in of}
            for of in (first, second)
        )
        if adjoint is None or not x:
            continue
        if is_pointwise(operation, adjoint):
            found = contract_pointwise(
                operation, adjoint, x[0], xx.get(0), order, dtype
            )
        else:
            found = _contract(operation, adjoint, x, xx, order, dtype)
        for rows, columns, G in found.hessian:
            _add(
                H if rows == columns else mirrored,
                placed(G, (rows, columns), (every, every)),
            )
        for groups, vector in found.third:
            _add(third, placed(vector, (groups,), (every,)))
        first |= {operation.results[p]: tangents for p, tangents in found.first.items()}
        second |= {
            operation.results[p]: tangents for p, tangents in found.second.items()
        }
    top = None if tape.top is None else first.get(tape.top)
    slopes = (
        jnp.zeros(count, dtype) if top is None else spread(top, every).astype(dtype)
    )
    cross = _collected(mirrored, (count, count), dtype)
    return (
        slopes,
        _collected(H, (count, count), dtype) + cross + cross.T,
        _collected(third, (count,), dtype),
    )


def _add(sums: Sums, term: jax.Array) -> None:
    axes = varying(term)
    sums[axes] = sums[axes] + term if axes in sums else term


def _collected(sums: Sums, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Return the sum over operations, and over devices, each of which holds its own
    terms."""
    parts = (jax.lax.psum(part, axes) if axes else part for axes, part in sums.items())
    return sum(parts, jnp.zeros(shape, dtype))


def _contract(
    operation: Operation,
    adjoint: Arrays,
    x: dict[int, Tangents],
    xx: dict[int, Tangents],
    order: int,
    dtype: DTypeLike,
) -> Contribution:
    """Return the contribution of any operation to the sums, and the tangents of its
    results."""

    def reverse(*values: jax.Array) -> Arrays:
        own = (
            _held(adjoint, values)
            if operation.name == "custom_linear_solve"
            else adjoint
        )
        return jax.vjp(operation.fun, *values)[1](own)

    hessian = _hessian(operation, reverse, x, dtype)
    third = _third(operation, reverse, x, xx, dtype) if order == 3 else []
    done = [*(G for _, _, G in hessian), *(vector for _, vector in third)]
    operation = operation._replace(
        values=tuple(after(done, value) for value in operation.values)
    )
    return Contribution(
        hessian,
        third,
        _first(operation, x),
        _second(operation, x, xx) if order == 3 else {},
    )


@jax.custom_jvp
def _held(adjoint: Arrays, values: Arrays) -> Arrays:
    """Return the adjoint, with explicit zeros as tangents: JAX cannot transpose a
    linear solve with symbolic zeros."""
    return adjoint


@_held.defjvp
def _(
    primals: tuple[Arrays, Arrays], tangents: tuple[Arrays, Arrays]
) -> tuple[Arrays, Arrays]:
    return _held(*primals), _held(jax.tree.map(jnp.zeros_like, primals[0]), primals[1])


def _hessian(
    operation: Operation,
    reverse: Callable[..., Arrays],
    x: dict[int, Tangents],
    dtype: DTypeLike,
) -> list[tuple[Groups, Groups, jax.Array]]:
    """Return the contribution of an operation to the Hessian."""
    parts, found = _parts(x), []
    order = sorted(parts, key=len)
    # products of two operands are computed from the side with fewer groups
    for n, groups in enumerate(order):
        turned = stacked(
            _turning(reverse, operation, parts[groups]),
            *(x[p].stack for p in parts[groups]),
        )
        for others in order[n:]:
            pairs = [(turned[p], x[p].stack) for p in parts[others]]
            G = added(*(None if a is None else gram(a, b, dtype) for a, b in pairs))
            if G is not None:
                found.append((groups, others, G))
    return found


def _third(
    operation: Operation,
    reverse: Callable[..., Arrays],
    x: dict[int, Tangents],
    xx: dict[int, Tangents],
    dtype: DTypeLike,
) -> list[tuple[Groups, jax.Array]]:
    """Return the contribution of an operation to the third derivative."""
    found = []
    for groups, tangents, bends in _movements(x, xx):
        twice = stacked(
            _curve(reverse, operation, tangents, bends), *_arguments(tangents, bends)
        )
        once = (
            stacked(_along(reverse, operation, tuple(tangents)), *tangents.values())
            if bends
            else []
        )
        pairs = [(twice[p], tangents[p]) for p in tangents] + [
            (once[p], 2 * bends[p]) for p in bends
        ]
        vector = added(*(None if a is None else rowwise(a, b, dtype) for a, b in pairs))
        found += [] if vector is None else [(groups, vector)]
    return found


def _first(operation: Operation, x: dict[int, Tangents]) -> dict[int, Tangents]:
    """Return the tangents of the results."""
    return _summed(
        (groups, stacked(_forward(operation, places), *(x[p].stack for p in places)))
        for groups, places in _parts(x).items()
    )


def _second(
    operation: Operation, x: dict[int, Tangents], xx: dict[int, Tangents]
) -> dict[int, Tangents]:
    """Return the second derivatives of the results."""
    return _summed(
        (
            groups,
            stacked(
                _curve(operation.fun, operation, tangents, bends),
                *_arguments(tangents, bends),
            ),
        )
        for groups, tangents, bends in _movements(x, xx)
    )


def _summed(
    parts: Iterable[tuple[Groups, list[jax.Array | None]]],
) -> dict[int, Tangents]:
    """Return the sum over parts, each with a stack for every result."""
    found: dict[int, list[Tangents]] = {}
    for groups, stacks in parts:
        for result, stack in enumerate(stacks):
            if stack is not None:
                found.setdefault(result, []).append(Tangents(groups, stack))
    return {result: total(some) for result, some in found.items()}


def _parts(x: dict[int, Tangents]) -> dict[Groups, Places]:
    """Return the indices of the operands that depend on the same groups, by these
    groups."""
    parts: dict[Groups, Places] = {}
    for place, tangents in x.items():
        parts[tangents.groups] = (*parts.get(tangents.groups, ()), place)
    return parts


def _movements(
    x: dict[int, Tangents], xx: dict[int, Tangents]
) -> Iterator[tuple[Groups, Stacks, Stacks]]:
    """Yield the groups on which the same operands depend, with the first derivatives of
    these operands and their second derivatives, if any."""
    movements: dict[Places, Groups] = {}
    for group in dict.fromkeys(
        group for tangents in x.values() for group in tangents.groups
    ):
        places = tuple(p for p, tangents in x.items() if group in tangents.groups)
        movements[places] = (*movements.get(places, ()), group)
    for places, groups in movements.items():
        bends = ((p, _within(xx[p], groups)) for p in places if p in xx)
        yield (
            groups,
            {p: taken(x[p], groups) for p in places},
            {p: stack for p, stack in bends if stack is not None},
        )


def _within(part: Tangents, groups: Groups) -> jax.Array | None:
    """Return the stack of these groups, with zeros for groups that `part` lacks, or
    None if it lacks all of them."""
    common = tuple(group for group in groups if group in part.groups)
    return spread(Tangents(common, taken(part, common)), groups) if common else None


def _at(
    fun: Callable[..., Arrays], operation: Operation, places: Places
) -> tuple[Callable[..., Arrays], Arrays]:
    """Return `fun` as a function of the operands with these indices, the others held
    fixed, and the values of these operands."""

    def moving(*some: jax.Array) -> Arrays:
        now = dict(zip(places, some, strict=True))
        return fun(*(now.get(p, value) for p, value in enumerate(operation.values)))

    return moving, tuple(operation.values[p] for p in places)


def _along(
    fun: Callable[..., Arrays], operation: Operation, places: Places
) -> Callable[..., Arrays]:
    """Return the derivative of `fun` along tangents of the operands with these
    indices."""
    moving, values = _at(fun, operation, places)
    return lambda *tangents: jax.jvp(moving, values, tangents)[1]


def _turning(
    reverse: Callable[..., Arrays], operation: Operation, places: Places
) -> Callable[..., Arrays]:
    """Return this derivative of the reverse pass. Its matrix is symmetric, so its own
    reverse pass replaces a forward derivative that does not exist."""
    if not operation.reverse_only:
        return _along(reverse, operation, places)

    def turned(*tangents: jax.Array) -> Arrays:
        moved = dict(zip(places, tangents, strict=True))
        along = (
            moved.get(p, jnp.zeros_like(v)) for p, v in enumerate(operation.values)
        )
        return jax.vjp(reverse, *operation.values)[1](tuple(along))

    return turned


def _forward(operation: Operation, places: Places) -> Callable[..., Arrays]:
    """Return this derivative of the operation itself; for a `jax.custom_vjp`, JAX's
    derivative of its forward pass, or the transpose of its reverse pass."""
    if not operation.custom:
        return _along(operation.fun, operation, places)
    if operation.reverse_only:
        moving, values = _at(operation.fun, operation, places)
        linear = linearize(lambda some: moving(*some), values)[1]
        return lambda *tangents: linear(tangents)
    return _along(lambda *values: jax.vjp(operation.fun, *values)[0], operation, places)


def _arguments(tangents: Stacks, bends: Stacks) -> tuple[Arrays, Arrays]:
    return tuple(tangents.values()), tuple(bends.values())


def _curve(
    fun: Callable[..., Arrays],
    operation: Operation,
    places: Iterable[int],
    bent: Iterable[int],
) -> Callable[[Arrays, Arrays], Arrays]:
    """Return the second derivative of `fun` along `x + e x_s + e^2/2 x_ss`, as a
    function of x_s at the indices `places` and x_ss at the indices `bent`."""
    places, bent = tuple(places), tuple(bent)
    moving, values = _at(fun, operation, places)

    def derivative(tangents: Arrays, bends: Arrays) -> Arrays:
        def along(now: Arrays, changing: Arrays) -> Arrays:
            changed = dict(zip(bent, changing, strict=True))
            full = tuple(
                changed.get(p, tangent)
                for p, tangent in zip(places, tangents, strict=True)
            )
            return jax.jvp(moving, now, full)[1]

        changing = tuple(tangents[places.index(p)] for p in bent)
        return jax.jvp(along, (values, changing), (tangents, bends))[1]

    return derivative
