"""Scaling of the rows and columns of a symmetric matrix to size 1, by powers of two,
which cause no rounding.

Source: Ruiz, "A scaling algorithm to equilibrate both rows and columns norms in
matrices", 2001.
"""

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import or_one
from hessopt.typing import Matrix, Vector

EQUILIBRATION_ROUNDS = 10
"""Number of rounds; each reduces the ratios of the row sizes to their square roots."""


def equilibration(H: Matrix) -> Vector:
    """Return powers of two t such that the largest entry of every row of `t H t` is
    near 1; 1 for a row of zeros."""

    def improve(_: int, t: Vector) -> Vector:
        return t * unit_power(
            jnp.max(jnp.abs(H) * t * t[:, None], axis=1, initial=0.0) ** 0.5
        )

    # starting from the diagonal, the scales follow a change of units exactly
    return jax.lax.fori_loop(
        0, EQUILIBRATION_ROUNDS, improve, unit_power(jnp.sqrt(jnp.abs(jnp.diagonal(H))))
    )


def unit_power(sizes: Vector) -> Vector:
    """Return the powers of two that bring each of `sizes` near 1; 1 for zero."""
    exponent = -jnp.round(jnp.log2(or_one(sizes)))
    # ldexp, since exp2 rounds even for whole exponents
    return jnp.ldexp(jnp.ones_like(sizes), _held(exponent).astype(jnp.int32))


def power(exponent: jax.Array) -> jax.Array:
    """Return `2^exponent` for a real exponent, limited to the range of the dtype."""
    return jnp.where(exponent == -jnp.inf, 0.0, jnp.exp2(_held(exponent)))


def _held(exponent: jax.Array) -> jax.Array:
    info = jnp.finfo(exponent.dtype)
    return jnp.clip(exponent, info.minexp + 2, info.maxexp - 2)
