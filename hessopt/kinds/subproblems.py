"""The quadratic model in eigenvectors of the curvature: in all of them, or in those of
a Krylov space.

In these a step within a radius, or with a cubic term, costs O(k)
(`hessopt.numerics.secular`), for each radius that is tried. `exact` takes the
eigenvectors of `D^-1 H D^-1`, D equilibrating H by the largest of its scales so far.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt.calculus.curvature import CurvatureFn, block_hessians, product
from hessopt.calculus.krylov import combination, krylov, within
from hessopt.calculus.least_squares import root
from hessopt.numerics import secular
from hessopt.numerics.equilibration import equilibration, unit_power
from hessopt.numerics.guards import divide, matmul
from hessopt.numerics.norms import norm, unit_scale
from hessopt.trees.vectors import all_finite, inner, ravel, solve_dtype, unravel
from hessopt.typing import Vector

DIMENSION = 50
"""Largest Krylov space; each of its vectors is kept."""


class Local(NamedTuple):
    """The quadratic model at a point, over real leaves, and what bounds it."""

    objective: Any
    parts: list[jax.Array]
    gradient: list[jax.Array]
    curvature: str | CurvatureFn
    # (w, z) -> step in the eigenvectors
    minimize: Callable[[Vector, Vector], secular.Shifted]
    tolerance: jax.Array  # what part of |g| an approximate solution may leave
    scales: Any  # of the updates before


class Spectral(NamedTuple):
    """The same in the eigenvectors of the curvature."""

    w: Vector  # (k,), eigenvalues, ascending
    z: Vector  # (k,), coefficients of the gradient
    lift: Callable[[Vector], list[jax.Array]]  # coefficients of a step -> the step
    # what is like a gradient -> its coefficients
    project: Callable[[list[jax.Array]], Vector]
    scales: Any
    products: jax.Array | int = 0  # with the curvature, that it took


class Subproblem(NamedTuple):
    """A way to the eigenvectors."""

    solve: Callable[[Local], Spectral]
    scaled: bool  # whether D is not the identity


def exact(local: Local) -> Spectral:
    """All eigenvectors of the scaled curvature, from its root where there is one."""
    found = (
        root(local.objective, local.parts)
        if local.curvature == "gauss_newton"
        else None
    )
    if found is not None:
        lengths = jnp.sqrt(jnp.sum(found.K**2, axis=0))
        scales, t = _largest(local.scales, unit_power(lengths), lengths > 0)
        K = found.K * t
        finite = all_finite(K)
        rest = jnp.where(finite, t * found.rest, jnp.nan)
        # from inf LAPACK does not return
        U, s, Q = jnp.linalg.svd(jnp.where(finite, K, 0.0), full_matrices=False)
        z = s * matmul(found.r, U) + matmul(Q, rest)
        w, z, Q = s[::-1] ** 2, z[::-1], Q[::-1].T
        # fewer outputs than parameters: of the null space only what the gradient has
        # there
        if Q.shape[1] < len(Q):
            length, q = _outside(Q, rest)
            w, z, Q = (
                jnp.pad(w, (1, 0)),
                jnp.append(length, z),
                jnp.concatenate([q[:, None], Q], axis=1),
            )
    else:
        everything = [0] * len(local.parts)
        (H,) = block_hessians(
            local.objective, local.parts, everything, 1, curvature=local.curvature
        )
        scales, t = _largest(local.scales, equilibration(H), jnp.any(H != 0, axis=1))
        w, Q = jnp.linalg.eigh(H * t * t[:, None], symmetrize_input=False)
        z = matmul(t * ravel(local.gradient), Q)
    return Spectral(
        w,
        z,
        lambda y: unravel(t * matmul(Q, y), local.parts),
        lambda c: matmul(t * ravel(c), Q),
        scales,
    )


def conjugate(local: Local) -> Spectral:
    """The Krylov space of the gradient, unscaled."""
    wide = solve_dtype(local.parts)
    linear = product(local.objective, local.parts, local.curvature)

    def multiply(v: Any) -> Any:
        return optax.tree.cast(linear(optax.tree.cast_like(v, local.parts)), wide)

    g = optax.tree.cast(local.gradient, wide)
    size = min(DIMENSION, sum(part.size for part in local.parts))
    tolerance = local.tolerance * jnp.sqrt(inner(g, g))
    V, _, _, used, _, w, z, S = krylov(multiply, g, size, local.minimize, tolerance)
    lift, project = (
        lambda y: combination(matmul(S, y), V),
        lambda c: matmul(within(V, optax.tree.cast(c, wide)), S),
    )
    return Spectral(w, z, lift, project, local.scales, used)


SUBPROBLEMS = {
    "exact": Subproblem(exact, scaled=True),
    "cg": Subproblem(conjugate, scaled=False),
}


def _outside(Q: jax.Array, c: Vector) -> tuple[jax.Array, Vector]:
    """The length of what c has orthogonal to the columns of Q, and its direction; 0
    where that is rounding."""
    q = c
    for _ in range(2):  # twice is enough
        q = q - matmul(Q, matmul(q, Q))
    length = norm(q)
    length = jnp.where(length > 10 * jnp.finfo(c.dtype).eps * norm(c), length, 0.0)
    return length, divide(q, length, length > 0)


def _largest(scales: Vector, t: Vector, known: jax.Array) -> tuple[Vector, Vector]:
    """The larger of D before and `1/t`, and its inverse; an entry not known yet counts
    as much as the largest."""
    scales = jnp.maximum(scales, jnp.where(known, 1 / t, 0.0))
    largest = unit_scale(scales)
    return scales, 1 / jnp.where(scales > 0, scales, largest)
