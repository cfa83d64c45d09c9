"""Vector operations on pytrees of parameters; a complex leaf counts as its real and
imaginary parts."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hessopt.numerics.equilibration import unit_power
from hessopt.numerics.norms import unit_scale
from hessopt.numerics.platform import on_cpu
from hessopt.trees.sharding import contract, gathered, split_like
from hessopt.typing import Matrix, Params, Tree, Vector


def real_leaves(
    tree: Params,
) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Params]]:
    """Return the leaves as real arrays, and the function that restores the tree from
    them.

    A complex leaf of shape `s` becomes a real one of shape `(2, *s)`: real parts, then
    imaginary parts. In these coordinates the gradient is that of optax's convention,
    `df/dx + i df/dy`, the conjugate of the result of `jax.grad`.
    """
    leaves, treedef = jax.tree.flatten(tree)
    is_complex = [jnp.iscomplexobj(leaf) for leaf in leaves]

    def restore(parts: Sequence[jax.Array]) -> Params:
        return jax.tree.unflatten(
            treedef,
            [
                jax.lax.complex(p[0], p[1]) if c else p
                for p, c in zip(parts, is_complex, strict=True)
            ],
        )

    parts = [
        jnp.stack([jnp.real(leaf), jnp.imag(leaf)]) if c else jnp.asarray(leaf)
        for leaf, c in zip(leaves, is_complex, strict=True)
    ]
    return parts, restore


def solve_dtype(tree: Params) -> np.dtype:
    """Return the real dtype of inner products and solves over `tree`: the dtype of its
    leaves, at least float32."""
    # from dtypes alone, so that a weakly typed leaf counts like any other
    dtypes = [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(tree)]
    return jnp.finfo(jnp.result_type(jnp.float32, *dtypes)).dtype


def eps(tree: Params) -> float:
    """Return the largest machine epsilon of the leaves of `tree`; 0 for an empty
    tree."""
    return max(
        (float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(tree)),
        default=0.0,
    )


def ravel(tree: Params) -> Vector:
    """Concatenate the real leaves of `tree` into one vector `(n,)` of `solve_dtype`."""
    parts, _ = real_leaves(tree)
    dtype = solve_dtype(tree)
    return jnp.concatenate(
        [jnp.zeros(0, dtype)] + [gathered(part).ravel().astype(dtype) for part in parts]
    )


def ravel_mask(mask: Params) -> Vector:
    """Concatenate a tree of bools like real params into one vector `(n,)` of bools, as
    `ravel` does."""
    return ravel(jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), mask)) > 0


def unravel(vector: Vector, like: Params) -> Params:
    """Return `vector` as a tree like `like`, the inverse of `ravel`: with its structure,
    shapes and dtypes."""
    parts, restore = real_leaves(like)
    pieces, start = [], 0
    for part in parts:
        piece = vector[start : start + part.size].reshape(part.shape)
        pieces.append(split_like(piece.astype(part.dtype), part))
        start += part.size
    return restore(pieces)


LARGE = 2**16
"""Number of entries of a leaf above which memory traffic costs more than additional
kernels."""
MAX_ROWWISE_SIZE = 2**9
"""Number of entries of a leaf up to which inner products on CPUs are computed as
products with one vector, since a product of two matrices is a call of a library."""


def inner_products(*vectors: Params) -> Matrix:
    """Return the real inner products among k trees, `(k, k)`, in `solve_dtype`. They
    are computed leaf by leaf, without resharding."""
    k, dtype = len(vectors), solve_dtype(vectors)

    def products(*xs: jax.Array) -> jax.Array:
        wide = jnp.promote_types(dtype, jnp.result_type(*xs))
        xs = tuple(jnp.asarray(x, wide) for x in xs)
        if xs[0].size < LARGE:
            X = jnp.stack(xs)
            if xs[0].size <= MAX_ROWWISE_SIZE and on_cpu():
                return jnp.stack([_dot(X, x, x.ndim) for x in xs], axis=1)
            # a matrix product compiles faster than sums of products
            return _dot(X, X, X.ndim - 1)
        pairs = itertools.combinations_with_replacement(range(k), 2)
        upper = {(i, j): _dot(xs[i], xs[j], xs[i].ndim) for i, j in pairs}
        return jnp.stack(
            [upper[min(i, j), max(i, j)] for i in range(k) for j in range(k)]
        ).reshape(k, k)

    return sum(
        jax.tree.leaves(jax.tree.map(products, *vectors)), jnp.zeros((k, k), dtype)
    )


def inner(a: Params, b: Params) -> jax.Array:
    """Return the real inner product of two trees, in `solve_dtype`."""
    dtype = solve_dtype((a, b))

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        wide = jnp.promote_types(dtype, jnp.result_type(x, y))
        return _dot(jnp.asarray(x, wide), jnp.asarray(y, wide), jnp.ndim(x))

    return sum(jax.tree.leaves(jax.tree.map(product, a, b)), jnp.zeros((), dtype))


def largest(tree: Params) -> jax.Array:
    """Return the largest magnitude in a tree, in `solve_dtype`; NaN if it has a NaN."""
    dtype = solve_dtype(tree)
    sizes = [
        jnp.max(jnp.abs(leaf), initial=0.0).astype(dtype)
        for leaf in jax.tree.leaves(tree)
    ]
    return jnp.max(jnp.stack([jnp.zeros((), dtype), *sizes]))


def unit_factor(tree: Params) -> jax.Array:
    """Return the power of two that brings the largest magnitude in a tree near 1, so that
    squares neither overflow nor underflow; 1 for zero."""
    return unit_power(largest(tree))


def tree_norm(tree: Params) -> jax.Array:
    """Return the norm of a tree, in `solve_dtype`; inf or NaN only if it has such
    entries."""
    dtype = solve_dtype(tree)
    scale = unit_scale(largest(tree))
    unit = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.promote_types(dtype, leaf.dtype)) / scale,
        tree,
    )
    return scale * jnp.sqrt(inner(unit, unit))


def _dot(x: jax.Array, y: jax.Array, axes: int) -> jax.Array:
    """Contract the last `axes` axes of both arrays, x conjugated; the real part."""
    return jnp.real(contract(jnp.conj(x), y, axes))


def all_finite(tree: Params) -> jax.Array:
    """Return whether all entries of all leaves are finite."""
    return jnp.all(
        jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
    )


def applied(params: Params, updates: Params) -> Params:
    """Return `params + updates`, rounded to the dtypes of params; XLA alone would
    continue with the unrounded sum."""
    return jax.lax.optimization_barrier(optax.apply_updates(params, updates))


def strongly_typed(tree: Tree) -> Tree:
    """Convert the leaves of `tree` to strongly typed arrays."""

    def strong(leaf: jax.typing.ArrayLike) -> jax.Array:
        array = jnp.asarray(leaf)
        # arrays of random keys do not have this attribute
        weak = getattr(array, "weak_type", False)
        return jax.lax.convert_element_type(array, array.dtype) if weak else array

    return jax.tree.map(strong, tree)
