"""The ratio of actual to predicted decrease, and the adaptation of the bound on steps
to it.

Source: Conn, Gould and Toint, "Trust-Region Methods", 2000, sections 6.1 and 17.4.2;
Cartis, Gould and Toint, "Adaptive cubic regularisation methods for unconstrained
optimization", part I, 2011.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessopt.numerics import secular
from hessopt.numerics.guards import or_one
from hessopt.typing import Vector

TAKEN_RATIO = 1e-4
"""Smallest ratio at which a step is taken."""
POOR_RATIO = 0.1
"""Ratio below which the bound is tightened."""
GOOD_RATIO = 0.5
"""Ratio above which the bound is relaxed."""


def gain_ratio(actual: jax.Array, predicted: jax.Array, noise: jax.Array) -> jax.Array:
    """Return `(actual + noise) / (predicted + noise)`; -inf where this is not a finite
    number or the denominator is not positive.

    The ratio is near 1 if both decreases are small compared to `noise`.
    """
    promised = predicted + noise
    ratio = (actual + noise) / or_one(promised)
    return jnp.where(jnp.isfinite(ratio) & (promised > 0), ratio, -jnp.inf)


class StepBound(NamedTuple):
    """A bound on steps with one positive parameter, its size: the radius or sigma."""

    # (w, z, size) -> step, as in `secular`
    minimize: Callable[[Vector, Vector, jax.Array], secular.Shifted]
    # (w, step within the radius of the Cauchy step) -> size
    first: Callable[[Vector, secular.Shifted], jax.Array]
    adapt: Callable[[Vector, Vector, jax.Array, jax.Array, secular.Shifted], jax.Array]
    """`(w, z, size, ratio, step) -> size`"""


def _adapt_radius(
    w: Vector, z: Vector, size: jax.Array, ratio: jax.Array, step: secular.Shifted
) -> jax.Array:
    """Set the radius to half of the length of a poor step, or to at least twice the
    length of a good step that the radius limited. In a curved valley every second step
    is poor, and a smaller factor makes all others too short."""
    larger = jnp.where(step.shift > 0, jnp.maximum(size, 2 * step.length), size)
    return jnp.where(
        ratio < POOR_RATIO, step.length / 2, jnp.where(ratio > GOOD_RATIO, larger, size)
    )


def _sigma(step: secular.Shifted) -> jax.Array:
    """Return the sigma that yields a step found within a radius."""
    return step.shift / or_one(step.length)


def _first_sigma(w: Vector, ball: secular.Shifted) -> jax.Array:
    """Return the sigma that yields a step of the same length, for a shift of at least a
    thousandth of the curvature."""
    least = 1e-3 * jnp.max(jnp.abs(w))
    return _sigma(ball._replace(shift=jnp.maximum(ball.shift, least)))


def _adapt_sigma(
    w: Vector, z: Vector, size: jax.Array, ratio: jax.Array, step: secular.Shifted
) -> jax.Array:
    """Increase sigma after a poor step to the value that halves the step, at least by a
    factor of two; divide it by four after a good step, but not below rounding."""
    eps = jnp.finfo(size.dtype).eps
    least = _sigma(
        step._replace(shift=eps * jnp.maximum(w[0], eps * jnp.max(jnp.abs(w))))
    )
    half = _sigma(
        secular.within_radius(w, z, jnp.where(step.length > 0, step.length / 2, 1.0))
    )
    more, less = jnp.maximum(2 * size, half), jnp.maximum(size / 4, least)
    return jnp.where(
        ratio < POOR_RATIO, more, jnp.where(ratio > GOOD_RATIO, less, size)
    )


RADIUS = StepBound(secular.within_radius, lambda w, ball: ball.length, _adapt_radius)
"""The quadratic model within a ball; the size is the radius."""

CUBIC = StepBound(secular.with_cubic_term, _first_sigma, _adapt_sigma)
"""The quadratic model with the term `sigma/3 |p|^3`; the size is sigma."""

STEP_BOUNDS = {"radius": RADIUS, "cubic": CUBIC}
