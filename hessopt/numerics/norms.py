"""Norms that do not overflow or underflow unless the entries do."""

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import or_one


def unit_scale(x: jax.Array) -> jax.Array:
    """Return the largest magnitude in `x`, or 1 if it is zero, as a divisor before
    squaring."""
    largest = jnp.max(jnp.abs(x), initial=0.0)
    return or_one(largest)


def norm(x: jax.Array) -> jax.Array:
    """Return the square root of the sum of squares of all entries of `x`; inf or NaN
    only if `x` has such entries."""
    scale = unit_scale(x)
    return scale * jnp.linalg.norm((x / scale).ravel())
