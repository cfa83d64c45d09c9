"""Factorizations of a symmetric matrix for Newton's step, with several treatments of a
matrix that is not positive definite."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessopt.numerics.cholesky import cholesky_solve, shifted_cholesky
from hessopt.numerics.guards import matmul
from hessopt.typing import Matrix, Params, Vector

ABSOLUTE_FLOOR = 1e-8
"""Smallest absolute value of an eigenvalue, relative to the largest, after
`absolute`."""


class Factorization(NamedTuple):
    """A symmetric `(n, n)` matrix A, ready for solves."""

    factor: Params  # pytree of arrays, for `IndefiniteTreatment.solve`
    # (n,), absolute values; the smallest one measures how nearly singular the
    # factorized matrix is
    pivots: Vector
    # scalar, added to the diagonal of A; passed to the next factorization
    shift: jax.Array
    attempts: jax.Array  # int32 scalar, attempted factorizations
    indefinite: jax.Array  # bool scalar, A is known not to be positive definite
    ok: jax.Array  # bool scalar, the factor can be used


class IndefiniteTreatment(NamedTuple):
    """A method of solving with a matrix that need not be positive definite."""

    # (matrix, shift of the last factorization) -> Factorization
    factorize: Callable[[Matrix, jax.Array], Factorization]
    solve: Callable[[Params, Vector], Vector]  # (factor, vector) -> vector


def _shift(matrix: Matrix, shift: jax.Array) -> Factorization:
    found = shifted_cholesky(matrix, shift)
    # a remembered shift may hide an indefinite matrix; these signs of it remain
    indefinite = (found.attempts > 1) | jnp.any(jnp.diagonal(matrix) <= 0)
    return Factorization(
        found.factor, found.pivots, found.shift, found.attempts, indefinite, found.ok
    )


def _absolute(matrix: Matrix, shift: jax.Array) -> Factorization:
    eigenvalues, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    magnitudes = jnp.abs(eigenvalues)
    magnitudes = jnp.maximum(
        magnitudes, ABSOLUTE_FLOOR * jnp.max(magnitudes, initial=0.0)
    )
    ok = jnp.all(jnp.isfinite(eigenvalues)) & jnp.all(magnitudes > 0)
    return Factorization(
        (vectors, magnitudes),
        magnitudes,
        shift,
        jnp.ones((), jnp.int32),
        jnp.any(eigenvalues <= 0),
        ok,
    )


def _solve_absolute(factor: tuple[Matrix, Vector], vector: Vector) -> Vector:
    vectors, magnitudes = factor
    coefficients = matmul(vector, vectors) / magnitudes
    return matmul(vectors, coefficients)


def _none(matrix: Matrix, shift: jax.Array) -> Factorization:
    lu, permutation = jax.scipy.linalg.lu_factor(matrix)
    pivots = jnp.abs(jnp.diagonal(lu))
    definite = jnp.all(
        jnp.isfinite(jax.lax.linalg.cholesky(matrix, symmetrize_input=False))
    )
    ok = jnp.all(jnp.isfinite(lu)) & jnp.all(pivots > 0)
    return Factorization(
        (lu, permutation), pivots, shift, jnp.ones((), jnp.int32), ~definite, ok
    )


SHIFT = IndefiniteTreatment(_shift, cholesky_solve)
"""`A + s I` with a remembered s, which is divided by four, then multiplied by four until
the matrix is positive definite. Cost: Cholesky, n^3/3 multiplications per attempt."""

ABSOLUTE = IndefiniteTreatment(_absolute, _solve_absolute)
"""`|A|`, with the absolute values of the eigenvalues, so that saddles do not attract
the iterates. Cost: `eigh`, about 9 n^3 multiplications."""

NONE = IndefiniteTreatment(_none, jax.scipy.linalg.lu_solve)
"""A itself, whether definite or not. Cost: LU, and a Cholesky factorization that only
determines whether A is definite, n^3 multiplications."""

INDEFINITE_TREATMENTS = {"shift": SHIFT, "absolute": ABSOLUTE, "none": NONE}
