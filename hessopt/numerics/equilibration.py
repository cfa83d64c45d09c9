"""Scaling of the rows and columns of a symmetric matrix to size 1.

Source: Ruiz, "A scaling algorithm to equilibrate both rows and columns norms in
matrices", 2001.
"""

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import or_one
from hessopt.numerics.norms import unit_scale
from hessopt.typing import Matrix, Vector

EQUILIBRATION_ROUNDS = 10
"""Largest number of rounds; each reduces the ratios of the row sizes to their square
roots. A positive definite matrix needs none after the scaling by its diagonal, since
no entry exceeds the geometric mean of two diagonal entries."""


def equilibration(H: Matrix) -> Vector:
    """Return scales t such that the largest entry of every row of `t H t` is between
    1/2 and 2; 1 for a row of zeros.

    The scales are not rounded to powers of two: a change of the unit of the objective
    or of any parameter then changes them exactly by that unit.
    """

    def sizes(t: Vector) -> Vector:
        return or_one(jnp.max(jnp.abs(H) * t * t[:, None], axis=1, initial=0.0))

    def improve(
        carry: tuple[jax.Array, Vector, Vector],
    ) -> tuple[jax.Array, Vector, Vector]:
        rounds, t, rows = carry
        t = t * jax.lax.rsqrt(rows)
        return rounds + 1, t, sizes(t)

    def goes_on(carry: tuple[jax.Array, Vector, Vector]) -> jax.Array:
        rounds, _, rows = carry
        return (rounds < EQUILIBRATION_ROUNDS) & jnp.any((rows < 0.5) | (rows > 2.0))

    t = jax.lax.rsqrt(or_one(jnp.abs(jnp.diagonal(H))))
    return jax.lax.while_loop(
        goes_on, improve, (jnp.zeros((), jnp.int32), t, sizes(t))
    )[1]


def largest_scales(
    scales: Vector | None, t: Vector, known: jax.Array
) -> tuple[Vector, Vector]:
    """Return the diagonal of D, the larger of its previous value and `1/t`, and 1/D.

    Args:
      scales: `(n,)`, the previous diagonal of D, 0 for an entry that is not known; None
        if no entry is.
      t: `(n,)`, the scales that equilibrate the matrix, as `equilibration` returns.
      known: `(n,)` bools, whether t is known: a row of zeros does not determine it.

    In 1/D, an entry that is not known yet is replaced by that of the largest one.
    """
    found = jnp.where(known, 1 / t, 0.0)
    scales = found if scales is None else jnp.maximum(scales, found)
    largest = unit_scale(scales)
    return scales, 1 / jnp.where(scales > 0, scales, largest)


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
