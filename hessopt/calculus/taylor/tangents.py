"""Tangents of one variable, one for each group on which it depends, as a stack."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.calculus.jaxprs import depends, selected
from hessopt.trees.sharding import contract

Groups = tuple[int, ...]
"""Numbers of groups, each once, in the order of a stack."""


class Tangents(NamedTuple):
    """The derivatives of a variable with respect to the rates of these groups."""

    groups: Groups
    stack: jax.Array  # (len(groups), *shape of the variable)


class Contribution(NamedTuple):
    """The contribution of one operation to the Taylor terms, and the tangents of its
    results."""

    # rows, columns and their block; if rows and columns differ, also its transpose
    hessian: list[tuple[Groups, Groups, jax.Array]]
    third: list[tuple[Groups, jax.Array]]
    first: dict[int, Tangents]
    second: dict[int, Tangents]


def added(*arrays: jax.Array | None) -> jax.Array | None:
    """Return the sum of the arrays that are not None, or None if there are none."""
    some = [array for array in arrays if array is not None]
    return sum(some[1:], some[0]) if some else None


def after(done: Sequence[jax.Array | None], result: jax.Array) -> jax.Array:
    """Return the result with a dependence on all arrays in `done`. Otherwise XLA could
    delay the contractions and keep the tangents in memory.

    XLA respects dependences, but ignores optimization barriers on CPUs.
    """
    for array in done:
        # adds 0
        result = (
            result
            if array is None
            else result + (jnp.max(array) > jnp.inf).astype(result.dtype)
        )
    return result


def total(parts: Sequence[Tangents]) -> Tangents:
    """Return the sum of tangents that need not have the same groups."""
    if len(parts) == 1:
        return parts[0]
    groups = tuple(dict.fromkeys(group for part in parts for group in part.groups))
    if len(groups) == sum(len(part.groups) for part in parts):
        return Tangents(groups, jnp.concatenate([part.stack for part in parts]))
    first, *others = (spread(part, groups) for part in parts)
    return Tangents(groups, sum(others, first))


def spread(part: Tangents, groups: Groups) -> jax.Array:
    """Return the stack of all these groups, with zeros for groups that `part` lacks."""
    return placed(part.stack, (part.groups,), (groups,))


def placed(
    array: jax.Array, have: Sequence[Groups], want: Sequence[Groups]
) -> jax.Array:
    """Return an array whose first axes run over the groups `have`, with these axes
    extended to the groups `want` by zeros."""
    margins = [(0, 0, 0)] * array.ndim
    for axis, (old, new) in enumerate(zip(have, want, strict=True)):
        begin = new.index(old[0])
        if new[begin : begin + len(old)] == old:
            margins[axis] = (begin, len(new) - begin - len(old), 0)
        else:
            rows = jnp.array([new.index(group) for group in old])
            shape = (*array.shape[:axis], len(new), *array.shape[axis + 1 :])
            array = (
                jnp.zeros(shape, array.dtype)
                .at[(slice(None),) * axis + (rows,)]
                .set(array)
            )
    return (
        jax.lax.pad(array, jnp.zeros((), array.dtype), margins)
        if any(map(any, margins))
        else array
    )


def taken(part: Tangents, groups: Groups) -> jax.Array:
    """Return the part of the stack that belongs to these groups."""
    if part.groups == groups:
        return part.stack
    begin = part.groups.index(groups[0])
    if part.groups[begin : begin + len(groups)] == groups:
        return part.stack[begin : begin + len(groups)]
    return part.stack[jnp.array([part.groups.index(group) for group in groups])]


def stacked(fun: Callable[..., Any], *stacks: Any) -> list[jax.Array | None]:
    """Return `jax.vmap(fun)(*stacks)` as a list, with None for outputs that do not
    depend on the stacks and are zero."""
    one = jax.tree.map(lambda stack: stack[0], stacks)
    program = jax.make_jaxpr(fun)(*one)
    used = depends(program)
    if not any(used):
        return [None] * len(used)
    outputs = iter(jax.vmap(selected(program, used))(*jax.tree.leaves(stacks)))
    return [next(outputs) if u else None for u in used]


def gram(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Return the real parts of the inner products of two stacks, `(j, k)`, without
    conjugation."""
    if len(a) < len(b):  # XLA transposes the right factor
        return gram(b, a, dtype).T
    return _contracted(a, b, dtype)


def rowwise(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Return the real parts of the inner products of the rows of two stacks, `(k,)`,
    without conjugation."""
    return _contracted(a, b, dtype, rowwise=True)


def _contracted(a: jax.Array, b: jax.Array, dtype: Any, **how: Any) -> jax.Array:
    """Return the real part of the product summed over all axes except the first,
    computed in at least this dtype."""
    product = contract(a, b, a.ndim - 1, dtype=jnp.promote_types(dtype, a.dtype), **how)
    return jnp.real(product).astype(dtype)
