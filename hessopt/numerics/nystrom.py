"""A randomized Nystrom approximation of a positive semi-definite matrix, and the
preconditioner made of it.

With `Y = A W` for k orthonormal vectors W, the approximation `Y (W'Y)^+ Y' = U diag(w) U'`
has the k largest eigenvalues of A nearly. For `A + lambda I`, the preconditioner

    P^-1 = (w_k + lambda) U diag(1 / (w + lambda)) U' + (I - U U')

brings them near to the others; w_k is the smallest of w that is not zero.

Source: Frangella, Tropp and Udell, "Randomized Nystrom preconditioning", 2021.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import divide, matmul, or_one, zero_unless
from hessopt.numerics.norms import norm
from hessopt.typing import Vector


class Nystrom(NamedTuple):
    """The approximation `U diag(w) U'`."""

    U: jax.Array  # (M, k), orthonormal columns
    w: Vector  # (k,), at least 0, ascending


def nystrom(test: jax.Array, image: jax.Array) -> Nystrom:
    """Approximate A, given `A W` for orthonormal columns W.

    Args:
      test: W, `(M, k)`.
      image: `A W`, `(M, k)`.

    Cost: `4 M k^2` multiplications. A small shift, which is subtracted again, keeps the
    factorization from failing where A has a smaller rank than k.
    """
    eps = jnp.finfo(image.dtype).eps
    shift = or_one(len(image) ** 0.5 * eps * norm(image))
    Y = image + shift * test
    L = jnp.linalg.cholesky(matmul(test.T, Y))
    B = jax.lax.linalg.triangular_solve(
        L, Y, left_side=False, lower=True, transpose_a=True
    )
    B = zero_unless(
        jnp.all(jnp.isfinite(B)), B
    )  # if the factorization failed all the same
    squares, V = jnp.linalg.eigh(matmul(B.T, B))
    kept = squares > jnp.maximum(10 * eps * squares[-1], 2 * shift)
    U = matmul(B, divide(V, jnp.sqrt(jnp.maximum(squares, 0.0)), kept))
    return Nystrom(U, jnp.where(kept, squares - shift, 0.0))


def preconditioner(found: Nystrom, damping: jax.Array) -> Callable[[Vector], Vector]:
    """Return the map `P^-1` for `A + damping I`; columns with w = 0 are not used."""
    U, w = found
    least = jnp.min(jnp.where(w > 0, w, jnp.inf))
    changes = divide(least - w, w + damping, w > 0)
    return lambda v: v + matmul(U, changes * matmul(v, U))
