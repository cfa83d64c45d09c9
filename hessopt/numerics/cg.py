"""Conjugate gradients on `H x = g`, for an H that need not be positive definite.

A direction d with `d'H d <= 0` ends the iteration, after a last step along d. Its
length is that of a direction with the positive curvature `|d| |H d|`: the rate is `r.z
/ (|d| |H d|)`.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., algorithms 5.3 and 7.1;
Steihaug, "The conjugate gradient method and trust regions in large scale optimization",
1983.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import divide, or_one, select

Tree = Any
"""A pytree of real arrays."""


class Conjugate(NamedTuple):
    """The state of the iteration."""

    x: Tree
    r: Tree  # g - H x
    d: Tree  # next direction
    rz: jax.Array  # scalar, r.z with z = M r
    residual: jax.Array  # scalar, |r|
    products: jax.Array  # int32 scalar, products with H
    # bool scalar, whether it ended with a direction whose curvature is not positive
    negative: jax.Array
    # bool scalar, whether all numbers were finite; if not, x is the last finite iterate
    finite: jax.Array


def forcing(length: jax.Array, first_length: jax.Array) -> jax.Array:
    """Return the tolerated residual relative to |g|, `min(1/2, sqrt(|g| / |g_0|))`, for
    superlinear convergence."""
    return jnp.minimum(0.5, jnp.sqrt(length / or_one(first_length)))


def conjugate_gradients(
    multiply: Callable[[Tree], Tree],
    g: Tree,
    start: tuple[Tree, Tree] | None,
    *,
    gram: Callable[..., jax.Array],
    precondition: Callable[[Tree], Tree],
    tolerance: jax.Array,
    max_iterations: int,
) -> Conjugate:
    """Solve `H x = g` until `|g - H x| <= tolerance`, or the curvature along a
    direction is not positive.

    Args:
      multiply: v -> H v, for a symmetric H.
      g: pytree of real arrays.
      start: the initial x and H x; None means zero.
      gram: computes the inner products among k trees, `(k, k)`.
      precondition: r -> M r, symmetric positive definite, an approximation of the
        inverse of H.
      tolerance: scalar.
      max_iterations: maximum number of products with H.

    Cost: one product per iteration; memory for four vectors.
    """
    x, q = (jax.tree.map(jnp.zeros_like, g),) * 2 if start is None else start
    r = jax.tree.map(jnp.subtract, g, q)
    d = precondition(r)
    (rr, rz), _ = gram(r, d)
    begin = Conjugate(
        x=x,
        r=r,
        d=d,
        rz=rz,
        residual=jnp.sqrt(rr),
        products=jnp.zeros((), jnp.int32),
        negative=jnp.zeros((), bool),
        finite=jnp.isfinite(rr) & jnp.isfinite(rz),
    )

    def goes_on(now: Conjugate) -> jax.Array:
        unsolved = (now.residual > tolerance) & (now.rz > 0)
        return unsolved & now.finite & ~now.negative & (now.products < max_iterations)

    def iterate(now: Conjugate) -> Conjugate:
        # alpha = r.z / d.H d
        q = multiply(now.d)
        alpha, negative, finite = _rate(now.rz, gram(now.d, q))

        # x + alpha d,  r - alpha H d
        x = _plus(now.x, alpha, now.d)
        r = select(finite, _plus(now.r, -alpha, q), now.r)

        # z = M r,  beta = (new r.z) / r.z,  z + beta d
        z = precondition(r)
        (rr, rz), _ = gram(r, z)
        return Conjugate(
            x=x,
            r=r,
            d=_plus(z, rz / now.rz, now.d),
            rz=rz,
            residual=jnp.sqrt(rr),
            products=now.products + 1,
            negative=finite & negative,
            finite=finite & jnp.isfinite(rr) & jnp.isfinite(rz),
        )

    return jax.lax.while_loop(goes_on, iterate, begin)


class _Rate(NamedTuple):
    """The step along d."""

    alpha: jax.Array  # scalar; 0 if d or H d is not finite
    negative: jax.Array  # bool scalar, whether the curvature along d is not positive
    finite: jax.Array  # bool scalar, whether d and H d are


def _rate(rz: jax.Array, products: jax.Array) -> _Rate:
    """Compute alpha from the inner products among d and `H d`."""
    (dd, dq), (_, qq) = products
    length = jnp.sqrt(dd)

    # |d.H d| <= |d| |H d|: a number much smaller than this bound may be rounding, of
    # either sign
    bound = length * jnp.sqrt(qq)
    negative = dq <= 4 * jnp.finfo(dq.dtype).eps * bound

    # r.z / (|d| |H d|) there, or 1 / |d| if H d = 0, a step of length 1
    curvature = jnp.where(negative, bound, dq)
    alpha = divide(rz, curvature, curvature > 0, 1.0 / or_one(length))
    finite = jnp.isfinite(bound)
    return _Rate(jnp.where(finite, alpha, 0.0), negative, finite)


def _plus(x: Tree, a: jax.Array, y: Tree) -> Tree:
    return jax.tree.map(lambda x, y: x + a * y, x, y)
