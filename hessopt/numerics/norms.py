"""Norms that neither overflow nor underflow where the entries themselves do not."""

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import or_one


def unit_scale(x: jax.Array) -> jax.Array:
    """Return the largest magnitude in `x`, or 1 where that is zero: what to divide by
    before squaring."""
    largest = jnp.max(jnp.abs(x), initial=0.0)
    return or_one(largest)


def norm(x: jax.Array) -> jax.Array:
    """Return the root of the sum of squares of all entries of `x`; inf or NaN only
    where `x` has such entries."""
    scale = unit_scale(x)
    return scale * jnp.linalg.norm((x / scale).ravel())
