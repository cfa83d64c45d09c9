"""A quadratic model in the Krylov space of g, H g, H^2 g, ..., in a basis V for which
`T = V'H V` is tridiagonal.

Source: Gould, Lucidi, Roma and Toint, "Solving the trust-region subproblem using the
Lanczos method", 1999.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import matmul, or_one
from hessopt.numerics.secular import Shifted
from hessopt.trees.sharding import contract, stack_of, zeros
from hessopt.trees.vectors import inner
from hessopt.typing import Matrix, Vector

Tree: TypeAlias = Any
"""A pytree of real arrays."""


class Krylov(NamedTuple):
    """An orthonormal basis with `V'H V = T = S diag(w) S'` and `V'g = |g| e_1`, T
    tridiagonal. V is stored transposed."""

    V: Tree  # leaves (m, ...), a vector per row: k used ones, the next one, then zeros
    diagonal: Vector  # (m,)
    # (m,), entries below the diagonal; the last used one couples to the next vector
    beside: Vector
    used: jax.Array  # int32 scalar, k <= m: products with H
    # scalar, |(H + kappa I) p + g| of the model's minimizer p, with its shift kappa
    residual: jax.Array
    w: Vector  # (m,), k eigenvalues, ascending, padded with the k-th
    z: Vector  # (m,), coefficients of g in the eigenvectors; 0 after the k-th
    S: Matrix  # (m, m), eigenvectors


def krylov(
    multiply: Callable[[Tree], Tree],
    g: Tree,
    size: int,
    minimize: Callable[[Vector, Vector], Shifted],
    tolerance: jax.Array,
) -> Krylov:
    """Extend the space until the model's minimizer in it has a residual of at most
    `tolerance`, or the dimension is `size`.

    Args:
      multiply: v -> H v on trees like g.
      g: pytree of real arrays.
      size: m, maximum dimension.
      minimize: `(w, z) -> step`, the minimizer of the model.
      tolerance: scalar.

    Cost per dimension: a product with H, `4 m n` multiplications (to keep the basis
    orthogonal) and an eigendecomposition of size m. Memory: `m n`.
    """
    length = jnp.sqrt(inner(g, g))

    def extend(now: Krylov) -> Krylov:
        # H v_k = beta_(k-1) v_(k-1) + alpha_k v_k + beta_k v_(k+1), v_k in row k from 0
        V, diagonal, beside = _append(multiply, now)

        # V'H V = T = S diag(w) S'  and  z = S'V'g = |g| S'e_1
        k, inside = now.used, jnp.arange(size) <= now.used
        w, S = _eigenvectors(diagonal, beside, inside)
        w, z = jnp.minimum(w, w[k]), jnp.where(inside, length * S[0], 0.0)

        # H V = V T + beta_k v_(k+1) e_k': the residual of (H + kappa I) p = -g at
        # p = V S y is beta_k |e_k'S y|
        y = minimize(w, z).y
        residual = beside[k] * jnp.abs(matmul(S[k], y))
        return Krylov(V, diagonal, beside, k + 1, residual, w, z, S)

    def goes_on(now: Krylov) -> jax.Array:
        # a residual that is NaN ends the iteration
        return (now.used < size) & (now.residual > tolerance)

    return jax.lax.while_loop(goes_on, extend, extend(_begin(g, length, size)))


def _begin(g: Tree, length: jax.Array, size: int) -> Krylov:
    """Return the space spanned by `v_0 = g / |g|`, before the first product."""
    unit = jax.tree.map(lambda leaf: leaf / or_one(length), g)
    rows = zeros(jax.tree.map(lambda leaf: stack_of(leaf, size), unit), unit)
    none = jnp.zeros(size, length.dtype)
    return Krylov(
        V=_put(rows, unit, 0),
        diagonal=none,
        beside=none,
        used=jnp.zeros((), jnp.int32),
        residual=jnp.full((), jnp.inf, length.dtype),
        w=none,
        z=none,
        S=jnp.eye(size, dtype=length.dtype),
    )


def _append(
    multiply: Callable[[Tree], Tree], now: Krylov
) -> tuple[Tree, Vector, Vector]:
    """Return V with the next vector from `H v_k`, and the diagonal and subdiagonal of T
    with entry k set."""
    k = now.used
    newest = jax.tree.map(
        lambda rows: jax.lax.dynamic_index_in_dim(rows, k, keepdims=False), now.V
    )
    rest, coefficients = orthogonalized(
        multiply(newest),
        lambda v: within(now.V, v),
        lambda y: combination(y, now.V),
    )
    beta = jnp.sqrt(inner(rest, rest))
    unit = jax.tree.map(lambda leaf: leaf / or_one(beta), rest)
    V = _put(now.V, unit, k + 1)
    return V, now.diagonal.at[k].set(coefficients[k]), now.beside.at[k].set(beta)


def _eigenvectors(
    diagonal: Vector, beside: Vector, inside: jax.Array
) -> tuple[Vector, Matrix]:
    """Return the eigenvalues, ascending, and eigenvectors of T. Unused diagonal entries
    are set to a number above all eigenvalues of the used part."""
    beyond = 1 + 4 * jnp.max(jnp.abs(diagonal) + 2 * beside)
    off = jnp.diag(jnp.where(inside, beside, 0.0)[:-1] * inside[1:], -1)
    T = jnp.diag(jnp.where(inside, diagonal, beyond)) + off + off.T
    return jnp.linalg.eigh(T, symmetrize_input=False)


def orthogonalized(
    vector: Tree,
    project: Callable[[Tree], Vector],
    combine: Callable[[Vector], Tree],
) -> tuple[Tree, Vector]:
    """Remove from a vector its component in the span of an orthonormal basis; return
    the rest, and the coefficients of the component.

    Args:
      vector: pytree of real arrays.
      project: `v -> V'v` for a V of m vectors that are orthonormal or zero.
      combine: `y -> V y`.

    Cost: `4 m n` multiplications.
    """
    # the first pass leaves the rounding errors of the component that it removes, which
    # are large if the rest is small; the second pass removes them: "twice is enough"
    # (Parlett, "The Symmetric Eigenvalue Problem", section 6.9)
    parts = []
    for _ in range(2):
        parts.append(project(vector))
        vector = jax.tree.map(jnp.subtract, vector, combine(parts[-1]))
    return vector, jnp.add(*parts)


def within(V: Tree, vector: Tree) -> Vector:
    """Return `V'v`, summed over the leaves."""
    products = jax.tree.map(lambda rows, x: contract(rows, x, x.ndim), V, vector)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def combination(y: Vector, V: Tree) -> Tree:
    """Return `V y`, leaf by leaf."""
    return jax.tree.map(lambda rows: jnp.tensordot(y, rows, 1, precision="highest"), V)


def _put(V: Tree, vector: Tree, k: Any) -> Tree:
    """Write row k, if there is such a row."""

    def put(rows: jax.Array, leaf: jax.Array) -> jax.Array:
        last = jax.lax.dynamic_index_in_dim(rows, k, keepdims=False)
        row = jnp.where(k < len(rows), leaf, last)
        return jax.lax.dynamic_update_index_in_dim(rows, row, k, 0)

    return jax.tree.map(put, V, vector)
