"""Stacks of m pairs of vectors, stored as trees like params with leaves `(m, 2, ...)`.

A stack is a matrix A with 2 m columns. Its products `A'x` with vectors and the
combinations `A c` of its columns are formed leaf by leaf, in at least float32; a pair
is written in place.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hessopt.numerics.platform import on_cpu
from hessopt.trees import vectors
from hessopt.trees.sharding import contract
from hessopt.typing import Params


def write(
    stack: Params, slot: jax.Array, pair: tuple[Params, Params], where: jax.Array
) -> Params:
    """Return the stack with a pair written into a slot, if the scalar condition holds.

    Only the slot is read and written, so a donated stack is not copied.
    """

    def written(rows: jax.Array, *pair: jax.Array) -> jax.Array:
        for i, x in enumerate(pair):
            origin = [jnp.zeros((), slot.dtype)] * x.ndim
            start = (slot, jnp.asarray(i, slot.dtype), *origin)
            old = jax.lax.dynamic_slice(rows, start, (1, 1, *x.shape))
            new = jnp.where(where, x.astype(rows.dtype), old)
            rows = jax.lax.dynamic_update_slice(rows, new, start)
        return rows

    return jax.tree.map(written, stack, *pair)


def products(zero: jax.Array, stack: Params, *trees: Params) -> list[jax.Array]:
    """Return `A'x` for each vector x, as `(m, 2)`, summed over the leaves. The sum
    starts with `zero`, which determines the shape and the dtype."""
    sums = [zero] * len(trees)
    for rows, *xs in zip(*map(jax.tree.leaves, (stack, *trees)), strict=True):
        terms = _leaf_products(rows, xs)
        sums = [total + term for total, term in zip(sums, terms, strict=True)]
    return sums


def _leaf_products(rows: jax.Array, xs: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Return the products of one leaf of a stack with that of each vector."""
    wide = jnp.promote_types(jnp.float32, xs[0].dtype)

    def product(x: jax.Array) -> jax.Array:
        return jnp.real(contract(rows, jnp.conj(x).astype(rows.dtype), xs[0].ndim))

    # a stack in half precision is widened while it is read
    if jnp.finfo(rows.dtype).bits < jnp.finfo(wide).bits:
        axes = tuple(range(2, rows.ndim))
        return [jnp.sum(rows.astype(wide) * x, axis=axes) for x in xs]
    if _has_few_kernels(xs[0].size):
        return jnp.unstack(product(jnp.stack(xs)), axis=2)
    return [product(x) for x in xs]


def _has_few_kernels(size: int) -> bool:
    """Return whether a leaf of this size is read by as few kernels as possible, on
    accelerators, where launches cost more than memory traffic. On CPUs products with
    one vector and unrolled sums are several times faster than other forms."""
    return size < vectors.LARGE and not on_cpu()


def combination(stack: Params, weights: jax.Array) -> Params:
    """Return `A c`, a tree like params, for weights c of shape `(m, 2)`."""

    def combined(rows: jax.Array) -> jax.Array:
        wide = jnp.promote_types(rows.dtype, weights.dtype)
        if _has_few_kernels(rows[0, 0].size):
            spread = jnp.expand_dims(weights, range(2, rows.ndim))
            return jnp.sum(spread * rows.astype(wide), axis=(0, 1))
        # an unrolled sum is one elementwise pass over the memory
        columns = [(i, j) for i in range(len(rows)) for j in range(2)]
        terms = [weights[column] * rows[column].astype(wide) for column in columns]
        return functools.reduce(jnp.add, terms)

    return jax.tree.map(combined, stack)


def gram(zero: jax.Array, stack: Params, mask: Params) -> jax.Array:
    """Return `A'A` over the entries where a mask holds, `(2 m, 2 m)` with the first
    vectors of all pairs before the second ones, summed over the leaves. `zero` is
    `(m, 2)` and determines the dtype."""
    m, dtype = len(zero), zero.dtype
    total = jnp.zeros((m, 2, m, 2), dtype)
    for rows, chosen in zip(*map(jax.tree.leaves, (stack, mask)), strict=True):
        wide = rows.astype(jnp.promote_types(jnp.float32, rows.dtype))
        part = jnp.where(chosen, wide, 0)
        total += contract(part, part, chosen.ndim).astype(dtype)
    return total.transpose(1, 0, 3, 2).reshape(2 * m, 2 * m)


def by_size(
    stack: Params, *trees: Params
) -> tuple[list[list[jax.Array]], list[list[jax.Array]]]:
    """Return the small leaves of a stack and of vectors, and the large ones, each as
    one list per tree."""
    sizes = [leaf.size for leaf in jax.tree.leaves(trees[0])]

    def part(large: bool) -> list[list[jax.Array]]:
        chosen = [(size >= vectors.LARGE) == large for size in sizes]
        leaves = map(jax.tree.leaves, (stack, *trees))
        return [list(itertools.compress(of_tree, chosen)) for of_tree in leaves]

    return part(False), part(True)
