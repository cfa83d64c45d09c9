"""Shifted systems `(H + kappa I) p = -g` with an unknown shift, in the eigenvectors of
H.

With `H = Q diag(w) Q'`, `z = Q'g` and `p = Q y` the cost per shift is proportional to
the number of eigenvalues:

    y = -z / (w + kappa),    kappa >= max(0, -min(w)),

and one scalar equation determines the shift: for the minimizer of the quadratic model
within a ball, `|y| = radius`, unless `|y| <= radius` at kappa = 0; for that of the
model with the term `sigma/3 |p|^3`, `kappa = sigma |y|`. Both are global minimizers of
models that need not be convex. The unknown is the distance from the singular shift; all
terms are positive in it, and there is no cancellation. In the hard case, g orthogonal
to the eigenvector of the lowest eigenvalue, z is changed there by less than rounding:
the solution of the equation then has the component along it that the step needs.

Source: More and Sorensen, "Computing a trust region step", 1983; Cartis, Gould and
Toint, "Adaptive cubic regularisation methods for unconstrained optimization", part I,
2011.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import divide, select
from hessopt.numerics.norms import norm, unit_scale
from hessopt.typing import Vector

TURNS = 80
"""Maximum number of iterations of Newton's method on the scalar equation; about six are
typical."""


class Shifted(NamedTuple):
    """The minimizer of a model."""

    y: Vector  # (k,), in the eigenvectors
    shift: jax.Array  # scalar, kappa
    length: jax.Array  # scalar, |y|
    decrease: jax.Array  # scalar, decrease of the quadratic model


ShiftRule = Callable[[Vector, Vector, jax.Array], Shifted]
"""`(w, z, size) -> step`, where size is the radius or sigma."""


def within_radius(w: Vector, z: Vector, radius: jax.Array) -> Shifted:
    """Minimize `z.y + y.(w y)/2` over `|y| <= radius`.

    Args:
      w: `(k,)`, eigenvalues, ascending.
      z: `(k,)`, coefficients of the gradient.
      radius: positive scalar.
    """
    inside = _step(w, z, jnp.zeros_like(w[0]))
    bounded = (w[0] >= 0) & (inside.length <= radius)
    outside = _solve(w, z, lambda kappa: (radius, jnp.zeros_like(kappa)))
    return select(bounded, inside, outside)


def with_cubic_term(w: Vector, z: Vector, sigma: jax.Array) -> Shifted:
    """Minimize `z.y + y.(w y)/2 + (sigma/3) |y|^3`, arguments as in
    `within_radius`."""
    return _solve(w, z, lambda kappa: (kappa / sigma, jnp.ones_like(kappa)))


def _solve(
    w: Vector, z: Vector, length: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
) -> Shifted:
    """Return the step for which `|y(kappa)| = length(kappa)`; `length` returns its
    value and its logarithmic derivative."""
    info = jnp.finfo(z.dtype)
    unit_w, unit_z = unit_scale(w), unit_scale(z)
    lowest = jnp.maximum(-w[0], 0.0)
    # the first gap is exactly 0, however XLA rounds the division
    gaps, lowest, z = (w + lowest) / unit_w, lowest / unit_w, z / unit_z
    z = without_hard_case(z, 0, lowest > 0)

    def excess(u: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = jnp.exp(u)
        y = z / (gaps + t)
        largest = unit_scale(y)
        squares = (y / largest) ** 2
        total = jnp.sum(squares)
        wanted, power = length((t + lowest) * unit_w)
        value = (
            jnp.log(largest) + jnp.log(total) / 2 - jnp.log(wanted * (unit_w / unit_z))
        )
        return value, -t * (
            jnp.sum(squares / (gaps + t)) / total + power / (t + lowest)
        )

    ends = jnp.log(jnp.asarray([info.tiny, float(info.max) ** 0.5], z.dtype))
    u = decreasing_root(excess, ends[0], ends[1])
    t = jnp.exp(u)
    y = -z / (gaps + t) * (unit_z / unit_w)
    return _measured(w, y, (t + lowest) * unit_w)


def divided(w: Vector, z: Vector, kappa: jax.Array) -> Vector:
    """Return `-z / (w + kappa)`, infinite if `w + kappa <= 0` and z is not 0."""
    below = w + kappa
    return divide(-z, below, below > 0, jnp.where(z == 0, 0.0, jnp.inf))


def _step(w: Vector, z: Vector, kappa: jax.Array) -> Shifted:
    return _measured(w, divided(w, z, kappa), kappa)


def _measured(w: Vector, y: Vector, kappa: jax.Array) -> Shifted:
    return Shifted(y, kappa, norm(y), jnp.sum((w / 2 + kappa) * y**2))


def without_hard_case(z: Vector, lowest: int, singular: jax.Array) -> Vector:
    """Return z, of size 1, with a component along the eigenvector of the lowest
    eigenvalue, if it has none and the matrix is singular at an admissible shift.

    At that shift the step is then unbounded, and the secular equation has a root near
    it. The component is the square root of the smallest normal number of the dtype, far
    below rounding.

    Args:
      z: `(k,)`, coefficients of the gradient.
      lowest: index of the lowest eigenvalue.
      singular: bool scalar, whether there is such a shift.
    """
    tiny = float(jnp.finfo(z.dtype).tiny) ** 0.5
    hard = singular & (jnp.abs(z[lowest]) < tiny)
    signed = jnp.where(z[lowest] < 0, -tiny, tiny)
    return z.at[lowest].set(jnp.where(hard, signed, z[lowest]))


def decreasing_root(
    excess: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    low: jax.Array,
    high: jax.Array,
) -> jax.Array:
    """Return the root of a decreasing function by Newton's method, restricted to a
    bracket; `excess` returns the value and the derivative."""

    def improve(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        turn, low, high, u, _ = carry
        value, slope = excess(u)
        low, high = select(value > 0, (u, high), (low, u))
        new = u - value / slope
        new = jnp.where((new >= low) & (new <= high), new, (low + high) / 2)
        return turn + 1, low, high, new, jnp.abs(new - u) / jnp.maximum(jnp.abs(u), 1.0)

    def goes_on(carry: tuple[jax.Array, ...]) -> jax.Array:
        return (carry[0] < TURNS) & (carry[4] > 2 * float(jnp.finfo(high.dtype).eps))

    start = jnp.zeros((), jnp.int32), low, high, high, jnp.ones_like(high)
    return jax.lax.while_loop(goes_on, improve, start)[3]
