"""Secant pairs: which of them tell of curvature, and how long a step is without any."""

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import or_one


def accepts(
    ss: jax.Array,
    sy: jax.Array,
    sg_old: jax.Array,
    gg: jax.Array,
    gg_old: jax.Array,
    eps: float,
) -> jax.Array:
    """Whether `s.y > 1e-8 |s.g_old|` and `s.y > 10 eps |s| (|g| + |g_old|)`, of inner
    products; not so for s = 0."""
    noise = 10 * eps * jnp.sqrt(ss) * (jnp.sqrt(gg) + jnp.sqrt(gg_old))
    return (ss > 0) & (sy > 1e-8 * jnp.abs(sg_old)) & (sy > noise)


def to_unit_length(square: jax.Array) -> jax.Array:
    """What makes a vector of this squared length one of length 1; 1 for zero."""
    return jax.lax.rsqrt(or_one(square))


def first_scale(gamma: jax.Array, square: jax.Array) -> jax.Array:
    """What stands in for H without pairs: gamma, where known, but at most what makes
    the step one of length 1."""
    unit = to_unit_length(square)
    return jnp.where(gamma > 0, jnp.minimum(gamma, unit), unit)
