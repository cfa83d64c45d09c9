"""Tangents of one variable, one for each group that has reached it, on a stack."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from hessopt.calculus.programs import depends


class Tangents(NamedTuple):
    """The derivatives of a variable in the rates of these groups."""

    groups: tuple[int, ...]
    stack: jax.Array  # (len(groups), *shape of the variable)


class Contribution(NamedTuple):
    """What one operation adds to the Taylor terms, and the tangents of its results."""

    hessian: list[tuple[tuple[int, ...], tuple[int, ...], jax.Array]]  # rows, columns, and what stands there
    third: list[tuple[tuple[int, ...], jax.Array]]
    first: dict[int, Tangents]
    second: dict[int, Tangents]


def added(*arrays: jax.Array | None) -> jax.Array | None:
    """The sum of those that are not None, None if all are."""
    some = [array for array in arrays if array is not None]
    return sum(some[1:], some[0]) if some else None


def after(done: Sequence[jax.Array | None], result: jax.Array) -> jax.Array:
    """The result, not to be computed before all these are done, or what is contracted is put off and tangents kept.

    XLA heeds dependences, and no barriers on CPUs.
    """
    for array in done:
        result = result if array is None else result + (jnp.max(array) > jnp.inf).astype(result.dtype)  # adds 0
    return result


def total(parts: Sequence[Tangents]) -> Tangents:
    """The sum of tangents that need not have the same groups."""
    if len(parts) == 1:
        return parts[0]
    groups = tuple(dict.fromkeys(group for part in parts for group in part.groups))
    if len(groups) == sum(len(part.groups) for part in parts):
        return Tangents(groups, jnp.concatenate([part.stack for part in parts]))
    first, *others = (spread(part, groups) for part in parts)
    return Tangents(groups, sum(others, first))


def spread(part: Tangents, groups: tuple[int, ...]) -> jax.Array:
    """The stack of all these groups, zero where `part` has none."""
    if part.groups == groups:
        return part.stack
    begin = groups.index(part.groups[0])
    end = begin + len(part.groups)
    if groups[begin:end] == part.groups:
        margins = [(begin, len(groups) - end), *[(0, 0)] * (part.stack.ndim - 1)]
        return jnp.pad(part.stack, margins)
    rows = jnp.array([groups.index(group) for group in part.groups])
    return jnp.zeros((len(groups), *part.stack.shape[1:]), part.stack.dtype).at[rows].set(part.stack)


def taken(part: Tangents, groups: tuple[int, ...]) -> jax.Array:
    """The stack of these groups out of those that `part` has."""
    if part.groups == groups:
        return part.stack
    begin = part.groups.index(groups[0])
    if part.groups[begin : begin + len(groups)] == groups:
        return part.stack[begin : begin + len(groups)]
    return part.stack[jnp.array([part.groups.index(group) for group in groups])]


def stacked(fun: Callable[..., Any], *stacks: Any) -> list[jax.Array | None]:
    """`jax.vmap(fun)(*stacks)` as a list, None for what does not depend on the stacks and is zero."""
    one = jax.tree.map(lambda stack: stack[0], stacks)
    program = jax.make_jaxpr(fun)(*one)
    flat = jax.tree.leaves(stacks)
    used = depends(program)
    if not any(used):
        return [None] * len(used)
    kept = program.replace(
        jaxpr=program.jaxpr.replace(outvars=[v for v, u in zip(program.jaxpr.outvars, used, strict=True) if u])
    )
    outputs = iter(jax.vmap(jaxpr_as_fun(kept))(*flat))
    return [next(outputs) if u else None for u in used]


def gram(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Real inner products of two stacks, `(j, k)`, not conjugated."""
    if len(a) < len(b):  # XLA transposes the right one
        return gram(b, a, dtype).T
    axes = list(range(1, a.ndim)), list(range(1, a.ndim))
    wide = _wide(a, dtype)
    return _real(jax.lax.dot_general(a, b, (axes, ((), ())), precision="highest", preferred_element_type=wide), dtype)


def rowwise(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Real inner products of the rows of two stacks, `(k,)`, not conjugated."""
    axes = list(range(1, a.ndim)), list(range(1, a.ndim))
    wide = _wide(a, dtype)
    return _real(jax.lax.dot_general(a, b, (axes, ([0], [0])), precision="highest", preferred_element_type=wide), dtype)


def placed(G: jax.Array, rows: tuple[int, ...], columns: tuple[int, ...], count: int) -> jax.Array:
    """The matrix `(count, count)` with G in these rows and columns, zero elsewhere."""
    every = tuple(range(count))
    return spread(Tangents(columns, spread(Tangents(rows, G), every).T), every).T


def _wide(a: jax.Array, dtype: Any) -> Any:
    return jnp.promote_types(dtype, a.dtype)


def _real(x: jax.Array, dtype: Any) -> jax.Array:
    return jnp.real(x).astype(dtype)
