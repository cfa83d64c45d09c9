"""A quadratic model in the space of g, H g, H^2 g, ...: a small tridiagonal matrix in
place of H.

Source: Gould, Lucidi, Roma and Toint, "Solving the trust-region subproblem using the
Lanczos method", 1999.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import matmul, or_one
from hessopt.numerics.secular import Shifted
from hessopt.trees.sharding import contract, stack_of, zeros
from hessopt.trees.vectors import inner
from hessopt.typing import Matrix, Vector


class Krylov(NamedTuple):
    """An orthonormal basis V in which H is tridiagonal, `V'H V = S diag(w) S'` and `V'g
    = |g| e_1`."""

    V: Any  # leaves (m, ...); zeros where not in use
    diagonal: Vector  # (m,)
    # (m,), below the diagonal; the last one in use leads out of the space
    beside: Vector
    used: jax.Array  # int32 scalar, k <= m: products with H
    residual: jax.Array  # scalar, |(H + kappa I) p + g| of the model's minimiser p
    w: Vector  # (m,), eigenvalues, ascending; the k-th again behind it
    z: Vector  # (m,), coefficients of g in the eigenvectors; 0 from the k-th on
    S: Matrix  # (m, m), eigenvectors


def krylov(
    multiply: Callable[[Any], Any],
    g: Any,
    size: int,
    minimize: Callable[[Vector, Vector], Shifted],
    tolerance: jax.Array,
) -> Krylov:
    """Extend the space until the model's minimiser in it has a residual of at most
    `tolerance`.

    Args:
      multiply: v -> H v on trees like g.
      g: pytree of real arrays.
      size: m, bound on the dimension.
      minimize: `(w, z) -> step` of the model.
      tolerance: scalar.

    Cost: a product with H, `4 k n` multiplications (the basis is kept orthogonal) and
    an eigendecomposition of size m per dimension; memory `m n`.
    """
    length = jnp.sqrt(inner(g, g))
    unit = jax.tree.map(lambda leaf: leaf / or_one(length), g)
    none = jnp.zeros(size, length.dtype)
    rows = zeros(jax.tree.map(lambda leaf: stack_of(leaf, size), unit), unit)
    begin = Krylov(
        V=jax.tree.map(lambda rows, leaf: _put(rows, leaf, 0), rows, unit),
        diagonal=none,
        beside=none,
        used=jnp.zeros((), jnp.int32),
        residual=jnp.full((), jnp.inf, length.dtype),
        w=none,
        z=none,
        S=jnp.eye(size, dtype=length.dtype),
    )

    def extend(now: Krylov) -> Krylov:
        k, V = now.used, now.V
        newest = jax.tree.map(
            lambda rows: jax.lax.dynamic_index_in_dim(rows, k, keepdims=False), V
        )
        vector, coefficients = multiply(newest), none
        for _ in range(2):
            step = within(V, vector)
            vector = jax.tree.map(jnp.subtract, vector, combination(step, V))
            coefficients += step
        beta = jnp.sqrt(inner(vector, vector))
        new = jax.tree.map(lambda leaf: leaf / or_one(beta), vector)
        V = jax.tree.map(lambda rows, leaf: _put(rows, leaf, k + 1), V, new)
        diagonal, beside = (
            now.diagonal.at[k].set(coefficients[k]),
            now.beside.at[k].set(beta),
        )

        inside = jnp.arange(size) <= k
        beyond = 1 + 4 * jnp.max(jnp.abs(diagonal) + 2 * beside)
        off = jnp.diag(jnp.where(inside, beside, 0.0)[:-1] * inside[1:], -1)
        T = jnp.diag(jnp.where(inside, diagonal, beyond)) + off + off.T
        w, S = jnp.linalg.eigh(T, symmetrize_input=False)
        w, z = jnp.minimum(w, w[k]), jnp.where(inside, length * S[0], 0.0)
        residual = beta * jnp.abs(matmul(S[k], minimize(w, z).y))
        return Krylov(V, diagonal, beside, k + 1, residual, w, z, S)

    def goes_on(now: Krylov) -> jax.Array:
        # ends where it is no number
        return (now.used < size) & (now.residual > tolerance)

    return jax.lax.while_loop(goes_on, extend, extend(begin))


def within(V: Any, vector: Any) -> Vector:
    """`V'v`, summed over the leaves."""
    products = jax.tree.map(lambda rows, x: contract(rows, x, x.ndim), V, vector)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def combination(y: Vector, V: Any) -> Any:
    """`V y`, leaf by leaf."""
    return jax.tree.map(lambda rows: jnp.tensordot(y, rows, 1, precision="highest"), V)


def _put(rows: jax.Array, leaf: jax.Array, k: Any) -> jax.Array:
    """Write row k, if there is one."""
    last = jax.lax.dynamic_index_in_dim(rows, k, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(
        rows, jnp.where(k < len(rows), leaf, last), k, 0
    )
