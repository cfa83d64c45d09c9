"""Systems with a positive semi-definite matrix and a damping."""

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import divide, matmul
from hessopt.typing import Matrix, Vector

LEAST_PIVOT = 10
"""Smallest pivot of a factorization that is used, in units of n eps times the diagonal
entry: smaller ones are rounding errors."""


def solve_semidefinite(A: Matrix, b: Vector, damping: jax.Array) -> Vector:
    """Solve `(A + damping I) x = b`.

    If the matrix is singular to working precision, x is the solution of least length in
    the space of the eigenvectors whose eigenvalues exceed rounding errors.

    Args:
      A: symmetric positive semi-definite up to rounding, `(n, n)`, float32 or float64.
      b: `(n,)`.
      damping: scalar, at least 0.

    Cost: n^3/3 multiplications, and `2 n^2` for one step of refinement; for a singular
    matrix, and always under `vmap`, also an eigendecomposition, about `9 n^3`.
    """
    n = len(A)
    least = n * jnp.finfo(A.dtype).eps
    damped = A + damping * jnp.eye(n, dtype=A.dtype)
    L = jax.lax.linalg.cholesky(damped, symmetrize_input=False)
    pivots = jnp.diagonal(L) ** 2
    regular = jnp.all(pivots > LEAST_PIVOT * least * jnp.diagonal(damped))

    def by_factor() -> Vector:
        x = jax.scipy.linalg.cho_solve((L, True), b)
        return x + jax.scipy.linalg.cho_solve((L, True), b - matmul(damped, x))

    def by_eigenvectors() -> Vector:
        w, Q = jnp.linalg.eigh(A, symmetrize_input=False)
        kept = w > least * jnp.max(jnp.abs(w), initial=0.0)
        return matmul(Q, divide(matmul(b, Q), w + damping, kept))

    return jax.lax.cond(regular, by_factor, by_eigenvectors)
