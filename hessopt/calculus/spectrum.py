"""The extreme eigenvalues of the Hessian by Lanczos iteration.

An orthonormal basis V of a Krylov space of H is extended by one product at a time.
Every new vector is orthogonalized twice against all others, so that `T = V H V'` has no
spurious copies of eigenvalues. The basis is doubled until the residuals of all wanted
pairs are small or the limit on its size is reached.

Source: Golub and Van Loan, "Matrix Computations", 4th ed., 2013, chapter 10; Parlett,
"The Symmetric Eigenvalue Problem", 1980.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessopt._checks import check_range
from hessopt.calculus.curvature import curvature_product
from hessopt.calculus.krylov import orthogonalized
from hessopt.numerics.guards import matmul, or_one
from hessopt.numerics.norms import norm
from hessopt.trees.vectors import ravel, unravel
from hessopt.typing import Matrix, Params, ValueFn, Vector

FIRST_BASIS = 32
BASIS_ENTRIES = 2**24
"""Maximum number of entries of the basis, which may always have 64 vectors; it can be
complete up to n = 4096."""


class _Krylov(NamedTuple):
    V: Matrix  # (m, n), orthonormal rows, zero where not yet filled
    T: Matrix  # (m, m), V H V'
    beta: jax.Array  # norm of the last product's component outside of the basis
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
      k: number of eigenvalues at each end, 1 to n.
      seed: seed of the random first vector.

    Returns:
      `(smallest, largest)`, each `(k,)` and ascending, in the dtype of `params` and at
      least float32. Their ratio, for k = 1 and a positive definite Hessian, is the
      condition number. Up to n = 4096 the relative error is below the square root of
      the machine epsilon (1.5e-8, 3.5e-4 in float32), or the absolute error is at the
      rounding of the largest eigenvalue if that is more. For larger n the basis is
      limited to 2^24 entries (at least 64 vectors); eigenvalues that have not converged
      by then lie inside the true spectrum. The result is not finite if the Hessian is
      not finite. Copies of a multiple eigenvalue are found one by one; the basis grows
      until a doubling finds no further copy. The products are those of `hvp`, which
      need no forward derivatives of `value_fn`.

    Raises:
      ValueError: for k outside [1, n].

    Cost: 32, 64, 128, ... products of about two gradients each, at most n; one pass
    over the basis per product.

    Example:
      >>> import jax.numpy as jnp
      >>> smallest, largest = spectrum(lambda x: x[0] ** 2 + 50.0 * x[1] ** 2, jnp.ones(2))
      >>> round(float(largest[0] / smallest[0]), 3)
      50.0

    Source: Golub and Van Loan, "Matrix Computations", 4th ed., 2013, chapter 10;
    Parlett, "The Symmetric Eigenvalue Problem", 1980.
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
    """Orthogonalize `vector` against the rows of V; return the normalized remainder,
    the coefficients, and the norm of the remainder."""
    rest, coefficients = orthogonalized(
        vector, lambda v: matmul(V, v), lambda y: matmul(y, V)
    )
    length = norm(rest)
    return rest / or_one(length), coefficients, length


def _extend(
    state: _Krylov, j: jax.Array, multiply: Callable[[Vector], Vector], key: jax.Array
) -> _Krylov:
    """Multiply the basis vector j, store its row of T, and append the component outside
    of the basis as vector j + 1."""
    V, T = state.V, state.T
    image = multiply(V[j])
    unit, row, beta = _orthonormal(image, V)
    T = T.at[j].set(row).at[:, j].set(row)
    # without such a component the basis spans an invariant subspace, and a random
    # vector extends it
    rounding = jnp.finfo(V.dtype).eps * jnp.max(jnp.abs(T))
    exhausted = beta <= 100 * rounding
    fresh = jax.random.normal(jax.random.fold_in(key, j + 1), image.shape, V.dtype)
    unit = jax.lax.cond(exhausted, lambda: _orthonormal(fresh, V)[0], lambda: unit)
    # near an invariant subspace small residuals do not exclude eigenvalues outside of
    # it, so no pair counts as converged
    beta = jnp.where((beta <= 10_000 * rounding) & (j + 1 < V.shape[1]), jnp.inf, beta)
    return state._replace(V=V.at[j + 1].set(unit, mode="drop"), T=T, beta=beta)


def _ritz(state: _Krylov, size: int, k: int) -> _Krylov:
    """Compute the extreme eigenvalues of T, and whether the residuals `beta |s_last|`
    are small."""
    T = state.T[:size, :size]
    values, vectors = jnp.linalg.eigh(T, symmetrize_input=False)
    residuals = state.beta * jnp.abs(vectors[-1])
    eps = jnp.finfo(T.dtype).eps
    small = residuals <= jnp.maximum(
        jnp.sqrt(eps) * jnp.abs(values), 10 * eps * jnp.max(jnp.abs(values))
    )
    converged = jnp.all(small[:k]) & jnp.all(small[-k:])
    # rounding introduces copies of a multiple eigenvalue late: continue until a
    # doubling of the basis adds none
    if k > 1:
        ends, before = (
            jnp.append(values[:k], values[-k:]),
            jnp.append(state.smallest, state.largest),
        )
        converged &= jnp.all(
            jnp.abs(ends - before) <= jnp.sqrt(eps) * jnp.max(jnp.abs(values))
        )
    return state._replace(smallest=values[:k], largest=values[-k:], converged=converged)
