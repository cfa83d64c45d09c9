"""Tangents of one variable, one for each group that has reached it, on a stack."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.calculus.jaxprs import depends, selected
from hessopt.trees.sharding import contract

Groups = tuple[int, ...]
"""Groups by their numbers, each once, in the order of a stack."""


class Tangents(NamedTuple):
    """The derivatives of a variable in the rates of these groups."""

    groups: Groups
    stack: jax.Array  # (len(groups), *shape of the variable)


class Contribution(NamedTuple):
    """What one operation adds to the Taylor terms, and the tangents of its results."""

    # rows, columns, what stands there; if they differ, mirrored too
    hessian: list[tuple[Groups, Groups, jax.Array]]
    third: list[tuple[Groups, jax.Array]]
    first: dict[int, Tangents]
    second: dict[int, Tangents]


def added(*arrays: jax.Array | None) -> jax.Array | None:
    """Return the sum of those that are not None, None if all are."""
    some = [array for array in arrays if array is not None]
    return sum(some[1:], some[0]) if some else None


def after(done: Sequence[jax.Array | None], result: jax.Array) -> jax.Array:
    """Return the result, not to be computed before all these are done, or what is
    contracted is put off and tangents kept.

    XLA heeds dependences, and no barriers on CPUs.
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
    """Return the stack of all these groups, zero where `part` has none."""
    return placed(part.stack, (part.groups,), (groups,))


def placed(
    array: jax.Array, have: Sequence[Groups], want: Sequence[Groups]
) -> jax.Array:
    """Return an array whose first axes run over some groups, with these axes over
    others, zero for those it has not."""
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
    """Return the stack of these groups out of those that `part` has."""
    if part.groups == groups:
        return part.stack
    begin = part.groups.index(groups[0])
    if part.groups[begin : begin + len(groups)] == groups:
        return part.stack[begin : begin + len(groups)]
    return part.stack[jnp.array([part.groups.index(group) for group in groups])]


def stacked(fun: Callable[..., Any], *stacks: Any) -> list[jax.Array | None]:
    """Return `jax.vmap(fun)(*stacks)` as a list, None for what does not depend on the
    stacks and is zero."""
    one = jax.tree.map(lambda stack: stack[0], stacks)
    program = jax.make_jaxpr(fun)(*one)
    used = depends(program)
    if not any(used):
        return [None] * len(used)
    outputs = iter(jax.vmap(selected(program, used))(*jax.tree.leaves(stacks)))
    return [next(outputs) if u else None for u in used]


def gram(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Real inner products of two stacks, `(j, k)`, not conjugated."""
    if len(a) < len(b):  # XLA transposes the right one
        return gram(b, a, dtype).T
    return _contracted(a, b, dtype)


def rowwise(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Real inner products of the rows of two stacks, `(k,)`, not conjugated."""
    return _contracted(a, b, dtype, rowwise=True)


def _contracted(a: jax.Array, b: jax.Array, dtype: Any, **how: Any) -> jax.Array:
    """Return the sum over all axes but the first, at least in this dtype."""
    product = contract(a, b, a.ndim - 1, dtype=jnp.promote_types(dtype, a.dtype), **how)
    return jnp.real(product).astype(dtype)
