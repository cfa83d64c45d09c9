"""The ends of the Hessian's spectrum by Lanczos iteration.

An orthonormal basis V of a Krylov space of H grows by one product at a time. Every new
vector is orthogonalised against all others, twice, so that no eigenvalue of `T = V H
V'` is a ghost. The basis doubles until the residual of every wanted pair is small, or
no more is allowed to be stored.

Source: Golub and Van Loan, "Matrix Computations", 4th ed., chapter 10; Parlett, "The
Symmetric Eigenvalue Problem".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessopt._checks import check_range
from hessopt.calculus.curvature import curvature_product
from hessopt.numerics.guards import matmul, or_one
from hessopt.numerics.norms import norm
from hessopt.trees.vectors import ravel, unravel
from hessopt.typing import Matrix, Params, ValueFn, Vector

FIRST_BASIS = 32
BASIS_ENTRIES = 2**24
"""Numbers that the basis may hold, 64 vectors at least: the whole space up to n = 4096."""


class _Krylov(NamedTuple):
    V: Matrix  # (m, n), orthonormal rows, zero where not yet filled
    T: Matrix  # (m, m), V H V'
    beta: jax.Array  # norm of what the last product left outside the basis
    smallest: Vector  # (k,), Ritz values, ascending
    largest: Vector  # (k,)
    converged: jax.Array  # bool scalar


def spectrum(
    value_fn: ValueFn, params: Params, *, k: int = 1, seed: int = 0
) -> tuple[Vector, Vector]:
    """Compute the smallest and the largest eigenvalues of the Hessian of `value_fn` at
    `params`.

    Args:
      value_fn: `value_fn(params)`, a real scalar.
      params: pytree of arrays with n real entries.
      k: eigenvalues wanted at each end, 1 to n.
      seed: of the random first vector.

    Returns:
      `(smallest, largest)`, each `(k,)` and ascending, in the dtype of `params` and at
      least float32. Their ratio, for k = 1 and a positive definite Hessian, is the
      condition number. Up to n = 4096 the relative error is below the root of the
      dtype's resolution (1.5e-8, 3.5e-4 in float32), or at rounding in the largest
      eigenvalue if that is more; beyond, the basis is limited to 2^24 numbers (at least
      64 vectors), and what has not converged by then lies inside the true spectrum.
      Non-finite where the Hessian is. Copies of a multiple eigenvalue enter one by one;
      the basis grows until a doubling brings no more.

    Raises:
      ValueError: for k outside [1, n].

    Cost: 32, 64, 128, ... products of about two gradients each, n at most; as many
    passes over the basis.

    Example:
      >>> import jax.numpy as jnp
      >>> smallest, largest = spectrum(lambda x: x[0] ** 2 + 50.0 * x[1] ** 2, jnp.ones(2))
      >>> round(float(largest[0] / smallest[0]), 3)
      50.0

    Source: Golub and Van Loan, "Matrix Computations", 4th ed., chapter 10; Parlett,
    "The Symmetric Eigenvalue Problem".
    """
    like = ravel(params)
    n = like.size
    check_range("k", k, 1, n)
    linear = curvature_product(value_fn, params)

    def multiply(vector: Vector) -> Vector:
        return ravel(linear(unravel(vector, params)))

    m = min(n, max(64, 2 * k, BASIS_ENTRIES // n))
    key = jax.random.key(seed)

    @jax.jit
    def run() -> _Krylov:
        V = jnp.zeros((m, n), like.dtype)
        state = _Krylov(
            V=V.at[0].set(_orthonormal(jax.random.normal(key, (n,), like.dtype), V)[0]),
            T=jnp.zeros((m, m), like.dtype),
            beta=jnp.zeros((), like.dtype),
            smallest=jnp.zeros(k, like.dtype),
            largest=jnp.zeros(k, like.dtype),
            converged=jnp.zeros((), bool),
        )
        begin, end = 0, min(m, max(FIRST_BASIS, 2 * k))
        while begin < m:

            def grow(state: _Krylov, begin: int = begin, end: int = end) -> _Krylov:
                state = jax.lax.fori_loop(
                    begin, end, lambda j, s: _extend(s, j, multiply, key), state
                )
                return _ritz(state, end, k)

            state = jax.lax.cond(state.converged, lambda s: s, grow, state)
            begin, end = end, min(m, 2 * end)
        return state

    found = run()
    return found.smallest, found.largest


def _orthonormal(vector: Vector, V: Matrix) -> tuple[Vector, Vector, jax.Array]:
    """Remove from `vector` its part in the rows of V; return the unit rest, the
    coefficients, the rest's norm."""
    coefficients = jnp.zeros(len(V), V.dtype)
    for _ in range(2):
        step = matmul(V, vector)
        vector = vector - matmul(step, V)
        coefficients = coefficients + step
    length = norm(vector)
    return vector / or_one(length), coefficients, length


def _extend(
    state: _Krylov, j: jax.Array, multiply: Callable[[Vector], Vector], key: jax.Array
) -> _Krylov:
    """Multiply the basis vector j, store its row of T, and append what is new as vector
    j + 1."""
    V, T = state.V, state.T
    image = multiply(V[j])
    unit, row, beta = _orthonormal(image, V)
    T = T.at[j].set(row).at[:, j].set(row)
    # nothing new: the basis spans an invariant subspace, and a random vector finds what
    # lies outside of it
    rounding = jnp.finfo(V.dtype).eps * jnp.max(jnp.abs(T))
    exhausted = beta <= 100 * rounding
    fresh = jax.random.normal(jax.random.fold_in(key, j + 1), image.shape, V.dtype)
    unit = jax.lax.cond(exhausted, lambda: _orthonormal(fresh, V)[0], lambda: unit)
    # next to an invariant subspace residuals say nothing of what lies outside: nothing
    # counts as converged there
    beta = jnp.where((beta <= 10_000 * rounding) & (j + 1 < V.shape[1]), jnp.inf, beta)
    return state._replace(V=V.at[j + 1].set(unit, mode="drop"), T=T, beta=beta)


def _ritz(state: _Krylov, size: int, k: int) -> _Krylov:
    """The ends of the spectrum of T, and whether the residuals `beta |s_last|` are
    small."""
    T = state.T[:size, :size]
    values, vectors = jnp.linalg.eigh(T, symmetrize_input=False)
    residuals = state.beta * jnp.abs(vectors[-1])
    eps = jnp.finfo(T.dtype).eps
    small = residuals <= jnp.maximum(
        jnp.sqrt(eps) * jnp.abs(values), 10 * eps * jnp.max(jnp.abs(values))
    )
    converged = jnp.all(small[:k]) & jnp.all(small[-k:])
    # a copy of a multiple eigenvalue enters late, with rounding: wait until a doubling
    # brings none
    if k > 1:
        ends, before = (
            jnp.append(values[:k], values[-k:]),
            jnp.append(state.smallest, state.largest),
        )
        converged &= jnp.all(
            jnp.abs(ends - before) <= jnp.sqrt(eps) * jnp.max(jnp.abs(values))
        )
    return state._replace(smallest=values[:k], largest=values[-k:], converged=converged)
