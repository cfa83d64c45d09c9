"""The quadratic model in coordinates of eigenvectors of the curvature: all of them, or
those of a Krylov space.

In these coordinates a step within a radius, or with a cubic term, costs O(k)
(`hessopt.numerics.secular`) for each radius or sigma. `exact` uses the eigenvectors of
`D^-1 H D^-1`, where D equilibrates H by the largest of its scales so far.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt.calculus.curvature import Curvature, block_hessians, curvature_product
from hessopt.calculus.krylov import combination, krylov, orthogonalized, within
from hessopt.calculus.least_squares import Root
from hessopt.numerics import secular
from hessopt.numerics.equilibration import equilibration, largest_scales
from hessopt.numerics.guards import divide, matmul, or_one
from hessopt.numerics.norms import norm
from hessopt.objective.binding import Objective
from hessopt.trees.vectors import (
    all_finite,
    inner,
    ravel,
    solve_dtype,
    unit_factor,
    unravel,
)
from hessopt.typing import Vector

MAX_KRYLOV_DIMENSION = 50
"""Largest dimension of the Krylov space; all of its vectors are stored."""


Leaves = list[jax.Array]
"""The real leaves of a tree like params."""


class LocalModel(NamedTuple):
    """The quadratic model at a point, over real leaves, and the bound on its steps."""

    objective: Objective  # of the leaves
    parts: Leaves  # params
    gradient: Leaves
    curvature: Curvature
    # (w, z) -> bounded step in the eigenvectors
    minimize: Callable[[Vector, Vector], secular.Shifted]
    tolerance: jax.Array  # residual of an approximate solution, relative to |g|
    scales: Vector | None  # D of the previous updates; None where D = 1
    # (n,) bools, entries held at bounds, in which gradient and curvature are zero; None
    # without bounds
    held: Vector | None = None


class EigenModel(NamedTuple):
    """The quadratic model in coordinates of k eigenvectors of the curvature."""

    w: Vector  # (k,), eigenvalues, ascending
    z: Vector  # (k,), coefficients of the gradient
    lift: Callable[[Vector], Leaves]  # coefficients of a step -> the step
    project: Callable[[Leaves], Vector]  # a gradient -> its coefficients
    scales: Vector | None  # D of this update
    products: jax.Array | int = 0  # products with the curvature that were computed


class SubproblemSolver(NamedTuple):
    """A method to compute the eigenvectors."""

    solve: Callable[[LocalModel], EigenModel]
    scaled: bool  # whether D is not the identity
    complete: bool  # whether the eigenvectors span the whole space


def exact(local: LocalModel) -> EigenModel:
    """Compute all eigenvectors of the scaled curvature, from its root if it has one."""
    root = local.curvature.root
    found = None if root is None else root(local.objective, local.parts)
    factored = _of_matrix(local) if found is None else _of_root(local, found)
    w, z, Q, t, scales = factored
    return EigenModel(
        w,
        z,
        lambda y: unravel(t * matmul(Q, y), local.parts),
        lambda c: matmul(t * ravel(c), Q),
        scales,
    )


class _Factored(NamedTuple):
    """`D^-1 H D^-1 = Q diag(w) Q'` and `z = Q' D^-1 g`."""

    w: Vector
    z: Vector
    Q: jax.Array  # (n, k)
    t: Vector  # (n,), 1 / D
    scales: Vector


def _of_matrix(local: LocalModel) -> _Factored:
    """Compute the eigenvectors of the dense matrix."""
    (H,) = block_hessians(
        local.objective,
        local.parts,
        [0] * len(local.parts),
        1,
        curvature=local.curvature,
    )
    scales, t = largest_scales(local.scales, equilibration(H), jnp.any(H != 0, axis=1))
    scaled = H * t * t[:, None]
    if local.held is not None:  # rounding could make their eigenvalues negative
        scaled += jnp.diag(local.held.astype(H.dtype))
    w, Q = jnp.linalg.eigh(scaled, symmetrize_input=False)
    return _Factored(w, matmul(t * ravel(local.gradient), Q), Q, t, scales)


def _of_root(local: LocalModel, root: Root) -> _Factored:
    """Compute the right singular vectors of `K D^-1`, for `H = K'K` and
    `g = K'r + rest`."""
    lengths = jnp.sqrt(jnp.sum(root.K**2, axis=0))
    scales, t = largest_scales(local.scales, 1 / or_one(lengths), lengths > 0)
    K = root.K * t
    finite = all_finite(K)
    rest = jnp.where(finite, t * root.rest, jnp.nan)

    # K D^-1 = U diag(s) Q'; a K that is not finite is replaced by zeros, on which LAPACK
    # returns
    U, s, Q = jnp.linalg.svd(jnp.where(finite, K, 0.0), full_matrices=False)
    z = s * matmul(root.r, U) + matmul(Q, rest)
    w, z, Q = s[::-1] ** 2, z[::-1], Q[::-1].T

    # with fewer outputs than parameters K has a null space: the component of the
    # gradient in it is one more eigenvector, with eigenvalue 0
    if Q.shape[1] < len(Q):
        length, q = _outside(Q, rest)
        w, z = jnp.pad(w, (1, 0)), jnp.append(length, z)
        Q = jnp.concatenate([q[:, None], Q], axis=1)
    return _Factored(w, z, Q, t, scales)


def conjugate(local: LocalModel) -> EigenModel:
    """Compute the eigenvectors in the Krylov space of the gradient, without scaling of
    the parameters; the objective is multiplied by a power of two, so that squares of the
    gradient neither overflow nor underflow."""
    wide = solve_dtype(local.parts)
    factor = unit_factor(local.gradient).astype(wide)
    linear = curvature_product(local.objective, local.parts, local.curvature)

    def multiply(v: Leaves) -> Leaves:
        image = linear(optax.tree.cast_like(v, local.parts))
        return [x.astype(wide) * factor for x in image]

    def minimize(w: Vector, z: Vector) -> secular.Shifted:
        return local.minimize(w / factor, z / factor)

    g = [leaf.astype(wide) * factor for leaf in local.gradient]
    size = min(MAX_KRYLOV_DIMENSION, sum(part.size for part in local.parts))
    tolerance = local.tolerance * jnp.sqrt(inner(g, g))
    space = krylov(multiply, g, size, minimize, tolerance)
    return EigenModel(
        space.w / factor,
        space.z / factor,
        lambda y: combination(matmul(space.S, y), space.V),
        lambda c: matmul(within(space.V, optax.tree.cast(c, wide)), space.S),
        local.scales,
        space.used,
    )


SUBPROBLEMS = {
    "exact": SubproblemSolver(exact, scaled=True, complete=True),
    "cg": SubproblemSolver(conjugate, scaled=False, complete=False),
}


def _outside(Q: jax.Array, c: Vector) -> tuple[jax.Array, Vector]:
    """Return the length and the direction of the component of c orthogonal to the
    columns of Q; 0 if it is below rounding."""
    q, _ = orthogonalized(c, lambda q: matmul(q, Q), lambda y: matmul(Q, y))
    length = norm(q)
    length = jnp.where(length > 10 * jnp.finfo(c.dtype).eps * norm(c), length, 0.0)
    return length, divide(q, length, length > 0)
