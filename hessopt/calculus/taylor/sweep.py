"""One sweep over a program that contracts the Taylor terms of phi as it goes.

With adjoints lambda of the results of every operation, and tangents x_s of its operands,

    H_st    = sum over operations  < lambda, op''[x_s, x_t] >
    phi_sss = sum over operations  < lambda, op'''[x_s, x_s, x_s] + 3 op''[x_s, x_ss] >,

x_ss being the second derivative of the operands along s. All of it comes from the reverse pass r(x) = op'(x)' lambda:
`op''[x_s, .]` in lambda is its derivative along x_s, and with r'' its second one along `x + e x_s + e^2/2 x_ss`, the
second sum is `< r'', x_s > + 2 < r', x_ss >`. Where r' or r'' is zero by construction, as for every linear operation,
JAX writes it down as a constant, and nothing is evaluated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hessopt.calculus.taylor.pointwise import contract as pointwise
from hessopt.calculus.taylor.pointwise import is_pointwise
from hessopt.calculus.taylor.tangents import (
    Contribution,
    Tangents,
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
from hessopt.typing import Matrix, Vector

Places = tuple[int, ...]
"""Which of the operands of an operation."""


def sweep(
    tape: Tape, updates: Sequence[jax.Array], labels: Sequence[int], count: int, order: int, dtype: Any
) -> tuple[Matrix, Vector]:
    """The Hessian `(count, count)` of phi at 0 and, for order 3, the diagonal of its third derivative, else zeros."""
    H, third = jnp.zeros((count, count), dtype), jnp.zeros(count, dtype)
    first = {i: Tangents((label,), u[None]) for i, (u, label) in enumerate(zip(updates, labels, strict=True))}
    second: dict[int, Tangents] = {}
    for operation, adjoint in zip(tape.operations, tape.adjoints, strict=True):
        x, xx = ({p: of[i] for p, i in enumerate(operation.operands) if i in of} for of in (first, second))
        if adjoint is None or not x:
            continue
        if is_pointwise(operation):
            found = pointwise(operation, adjoint, x[0], xx.get(0), order, dtype)
        else:
            found = _contract(operation, adjoint, x, xx, order, dtype)
        H = sum((placed(G, rows, columns, count) for rows, columns, G in found.hessian), H)
        third = sum((spread(Tangents(groups, v), tuple(range(count))) for groups, v in found.third), third)
        first |= {operation.results[p]: tangents for p, tangents in found.first.items()}
        second |= {operation.results[p]: tangents for p, tangents in found.second.items()}
    return H, third


def _contract(
    operation: Operation,
    adjoint: tuple[jax.Array, ...],
    x: dict[int, Tangents],
    xx: dict[int, Tangents],
    order: int,
    dtype: Any,
) -> Contribution:
    """What any operation adds, and the tangents of its results."""
    reverse = lambda *values: jax.vjp(operation.fun, *values)[1](adjoint)
    hessian = _hessian(operation, reverse, x, dtype)
    third, second = _bends(operation, reverse, x, xx, dtype) if order == 3 else ([], {})
    done = [*(G for _, _, G in hessian), *(v for _, v in third)]
    settled = lambda new: {p: Tangents(groups, after(done, stack)) for p, (groups, stack) in new.items()}
    return Contribution(hessian, third, settled(_tangents(operation, x)), settled(second))


def _at(fun: Callable[..., Any], operation: Operation, places: Places) -> tuple[Callable[..., Any], Any]:
    """`fun` of the operands in these places, the others held, and their values."""

    def moving(*some: jax.Array) -> Any:
        now = dict(zip(places, some, strict=True))
        return fun(*(now.get(p, value) for p, value in enumerate(operation.values)))

    return moving, tuple(operation.values[p] for p in places)


def _along(fun: Callable[..., Any], operation: Operation, places: Places) -> Callable[..., Any]:
    """The derivative of `fun` along tangents of the operands in these places."""
    moving, values = _at(fun, operation, places)
    return lambda *tangents: jax.jvp(moving, values, tangents)[1]


def _forward(operation: Operation, places: Places) -> Callable[..., Any]:
    """The same of the operation itself: where it has a reverse rule only, the transpose of that."""
    if not operation.custom:
        return _along(operation.fun, operation, places)
    moving, values = _at(operation.fun, operation, places)
    outputs, pull = jax.vjp(moving, *values)
    return lambda *tangents: jax.linear_transpose(pull, outputs)(tangents)[0]


def _curve(fun: Callable[..., Any], operation: Operation, places: Places, bent: Places) -> Callable[..., Any]:
    """The second derivative of `fun` along `x + e x_s + e^2/2 x_ss`, of x_s in these places and x_ss in those bent."""
    moving, values = _at(fun, operation, places)

    def derivative(tangents: Any, bends: Any) -> Any:
        def along(now: Any, changing: Any) -> Any:
            changed = dict(zip(bent, changing, strict=True))
            full = tuple(changed.get(p, tangent) for p, tangent in zip(places, tangents, strict=True))
            return jax.jvp(moving, now, full)[1]

        changing = tuple(tangents[places.index(p)] for p in bent)
        return jax.jvp(along, (values, changing), (tangents, bends))[1]

    return derivative


def _hessian(operation: Operation, reverse: Any, x: dict[int, Tangents], dtype: Any) -> list[Any]:
    """What an operation adds to the Hessian."""
    parts: dict[tuple[int, ...], Places] = {}
    for place, tangents in x.items():
        parts[tangents.groups] = (*parts.get(tangents.groups, ()), place)
    order = sorted(parts, key=len)
    found = []
    for n, groups in enumerate(order):  # a product of two operands is taken from the side with fewer groups
        turned = stacked(_along(reverse, operation, parts[groups]), *(x[p].stack for p in parts[groups]))
        for others in order[n:]:
            grams = [gram(turned[p], x[p].stack, dtype) for p in parts[others] if turned[p] is not None]
            if grams:
                G = sum(grams)
                found += [(groups, others, G)] if others is groups else [(groups, others, G), (others, groups, G.T)]
    return found


def _tangents(operation: Operation, x: dict[int, Tangents]) -> dict[int, Tangents]:
    """The tangents of the results."""
    parts: dict[tuple[int, ...], Places] = {}
    for place, tangents in x.items():
        parts[tangents.groups] = (*parts.get(tangents.groups, ()), place)
    found: dict[int, list[Tangents]] = {}
    for groups, places in parts.items():
        for result, stack in enumerate(stacked(_forward(operation, places), *(x[p].stack for p in places))):
            if stack is not None:
                found.setdefault(result, []).append(Tangents(groups, stack))
    return {result: total(some) for result, some in found.items()}


def _bends(
    operation: Operation, reverse: Any, x: dict[int, Tangents], xx: dict[int, Tangents], dtype: Any
) -> tuple[list[Any], dict[int, Tangents]]:
    """What an operation adds to the third derivative, and the second-order tangents of its results."""
    if operation.custom:
        raise TypeError(
            f"taylor(order=3) needs forward derivatives, but {operation.custom} has a jax.custom_vjp; order=2 does not"
        )
    classes: dict[Places, tuple[int, ...]] = {}
    for group in dict.fromkeys(group for tangents in x.values() for group in tangents.groups):
        places = tuple(p for p, tangents in x.items() if group in tangents.groups)
        classes[places] = (*classes.get(places, ()), group)
    third, found = [], {}
    for places, groups in classes.items():
        tangents = tuple(taken(x[p], groups) for p in places)
        bends = {p: _within(xx[p], groups) for p in places if p in xx}
        bends = {p: stack for p, stack in bends.items() if stack is not None}
        bent, curved = tuple(bends), tuple(bends.values())
        twice = stacked(_curve(reverse, operation, places, bent), tangents, curved)
        once = stacked(_along(reverse, operation, places), *tangents) if bent else []
        terms = [rowwise(twice[p], t, dtype) for p, t in zip(places, tangents, strict=True) if twice[p] is not None]
        terms += [2 * rowwise(once[p], bends[p], dtype) for p in bent if once[p] is not None]
        third += [(groups, sum(terms))] if terms else []
        for result, stack in enumerate(stacked(_curve(operation.fun, operation, places, bent), tangents, curved)):
            if stack is not None:
                found.setdefault(result, []).append(Tangents(groups, stack))
    return third, {result: total(some) for result, some in found.items()}


def _within(part: Tangents, groups: tuple[int, ...]) -> jax.Array | None:
    """The stack of these groups, zero where `part` has none; None where it has none of them."""
    common = tuple(group for group in groups if group in part.groups)
    return spread(Tangents(common, taken(part, common)), groups) if common else None
