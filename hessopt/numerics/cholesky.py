"""Cholesky factorization with the shift that makes a matrix positive definite.

Finds `L L' = A + s I` for a shift `s >= 0` at most four times the smallest sufficient one,
or a small one. The trials `s/4, s, 4s, ...` start from a quarter of the shift of the last
call, at most the norm. If the matrix changes little from call to call, one or two
factorizations suffice.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., algorithm 3.3, with a
memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessopt.numerics.norms import norm
from hessopt.typing import Matrix, Vector

FIRST_SHIFT = 1e-4
"""First nonzero shift, in units of the Frobenius norm, which bounds all eigenvalues."""

LEAST_SHIFT = 1e-10
"""Smallest nonzero shift, in the same units: a smaller one would only slow the final
convergence."""

FACTOR = 4.0
"""Ratio of a trial to the one before. With 2 instead, the sum is more often nearly
singular and its steps too long, which took more evaluations on CUTEst."""

MAX_ATTEMPTS = 10
"""Number of trials: the remembered shift, `FIRST_SHIFT`, and its multiples by powers of
`FACTOR`. The last one exceeds the norm, so every finite matrix is factorized."""


class ShiftedCholesky(NamedTuple):
    """A Cholesky factorization of `A + shift I`."""

    factor: Matrix  # lower triangular L, (n, n); valid only if ok
    pivots: Vector  # squared diagonal of L, (n,)
    shift: jax.Array  # scalar
    attempts: jax.Array  # int32 scalar, factorizations tried
    ok: jax.Array  # bool scalar


def shifted_cholesky(matrix: Matrix, shift: jax.Array) -> ShiftedCholesky:
    """Factorize `matrix + s I` with the first s of `shift/4, shift, 4 shift, ...` for
    which it is positive definite.

    Args:
      matrix: symmetric `(n, n)`, float32 or float64.
      shift: scalar, the shift of an earlier call, or 0.

    Returns:
      The factorization. The matrix counts as positive definite if every pivot exceeds
      10 eps times its diagonal entry, a test that does not depend on scale. A matrix
      with a non-finite entry, or of norm zero, is not `ok`.

    Cost: n^3/3 multiplications per attempt, at most 10.
    """
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    diagonal = jnp.diagonal(matrix)
    size = norm(matrix)
    lower = shift / FACTOR
    first = jnp.minimum(jnp.where(lower < LEAST_SHIFT * size, 0.0, lower), size)

    def attempt(last: ShiftedCholesky) -> ShiftedCholesky:
        shift = jnp.where(
            last.attempts == 0,
            first,
            jnp.maximum(FACTOR * last.shift, FIRST_SHIFT * size),
        )
        factor = jax.lax.linalg.cholesky(matrix + shift * eye, symmetrize_input=False)
        pivots = jnp.diagonal(factor) ** 2
        ok = jnp.all(
            pivots > 10 * jnp.finfo(matrix.dtype).eps * jnp.abs(diagonal + shift)
        )
        return ShiftedCholesky(factor, pivots, shift, last.attempts + 1, ok)

    def unsettled(last: ShiftedCholesky) -> jax.Array:
        return (
            ~last.ok & (last.attempts < MAX_ATTEMPTS) & jnp.isfinite(size) & (size > 0)
        )

    nothing_to_do = jnp.asarray(len(matrix) == 0)
    start = ShiftedCholesky(
        matrix, diagonal, first, jnp.zeros((), jnp.int32), nothing_to_do
    )
    return jax.lax.while_loop(unsettled, attempt, start)


def cholesky_solve(factor: Matrix, vector: Vector) -> Vector:
    """Solve `L L' x = vector`."""
    return jax.scipy.linalg.cho_solve((factor, True), vector)
