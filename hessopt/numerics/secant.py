"""The curvature test of secant pairs, and the length of a step without pairs."""

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
    """Return whether `s.y > 1e-8 |s.g_old|` and `s.y > 10 eps |s| (|g| + |g_old|)`,
    given the inner products; False for s = 0."""
    noise = 10 * eps * jnp.sqrt(ss) * (jnp.sqrt(gg) + jnp.sqrt(gg_old))
    return (ss > 0) & (sy > 1e-8 * jnp.abs(sg_old)) & (sy > noise)


def to_unit_length(square: jax.Array) -> jax.Array:
    """Return the factor that scales a vector of this squared length to length 1; 1 for
    a length of zero."""
    return jax.lax.rsqrt(or_one(square))


def first_scale(gamma: jax.Array, square: jax.Array) -> jax.Array:
    """Return the scale of a step without pairs: gamma if it is known, but at most the
    factor that scales the step to length 1."""
    unit = to_unit_length(square)
    return jnp.where(gamma > 0, jnp.minimum(gamma, unit), unit)
