"""Steps of a bounded model within bounds on the parameters.

Entries that are held have no coupling to the others in the model, and a trial step ends
at the bounds entry by entry. If the bounds cut off too much of its decrease, shorter
steps are projected: as in a line search, the decrease must be a share of that which the
gradient promises for the step.

Source: Bertsekas, "Projected Newton methods for optimization problems with simple
constraints", 1982; Lin and More, "Newton's method for large bound-constrained
optimization problems", 1999, section 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.kinds.subproblems import EigenModel, Leaves
from hessopt.numerics import secular
from hessopt.numerics.guards import divide, select
from hessopt.numerics.norms import norm
from hessopt.trees.boxes import Box, projected, step_within
from hessopt.trees.vectors import inner, ravel, tree_norm, unravel
from hessopt.typing import Vector

PROMISED_SHARE = 0.01
"""Smallest share of the decrease promised by the gradient that the model must confirm
for a step within bounds."""
MIN_PROJECTED = 2.0**-10
"""Smallest factor of a step that is projected to bounds."""


class BoundedStep(NamedTuple):
    """The bounds on a step, and what they leave of the model, over real leaves."""

    box: Box
    gradient: Leaves  # of all entries
    held: jax.Array  # int32 scalar, entries without coupling to the others
    # scalar, decrease that held entries promise on the way to their bounds
    promise: jax.Array
    w: Vector  # eigenvalues of the curvature of the free entries
    z: Vector  # coefficients of their gradient
    outside: jax.Array  # bool scalar, whether params are outside of the box
    product: Callable[[Leaves], Leaves]  # with the curvature of all entries


class SingleEntries(NamedTuple):
    """Entries without coupling, vectors `(n,)`."""

    held: Vector  # bools
    slopes: Vector  # gradient of those that are not at their bound yet, else 0
    reach: Vector  # length of the gradient step that minimizes the model


def with_single_entries(
    model: EigenModel, parts: Leaves, single: SingleEntries, finite: jax.Array
) -> EigenModel:
    """Return the model with single entries for n more eigenvectors; without slopes if
    the scalar condition `finite` does not hold."""
    held, slopes, reach = single
    k, used, dtype = len(model.w), slopes != 0, model.w.dtype
    # in the units of D, in which lengths of steps are measured
    t = jnp.ones_like(slopes)
    if model.scales is not None:
        t = divide(1.0, model.scales, used)
    w = divide(t**2, reach, used, jnp.max(jnp.abs(model.w))).astype(dtype)
    z = jnp.where(finite, t * slopes, 0.0).astype(dtype)

    def lift(y: Vector) -> Leaves:
        # rounding must not move an entry off its bound
        others = ravel(model.lift(y[:k]))
        return unravel(jnp.where(held, t * y[k:], others), parts)

    def project(c: Leaves) -> Vector:
        return jnp.append(model.project(c), jnp.zeros_like(z))

    return model._replace(
        w=jnp.append(model.w, w),
        z=jnp.append(model.z, z),
        lift=lift,
        project=project,
    )


def projected_step(
    bounded: BoundedStep,
    parts: Leaves,
    scales: Vector | None,
    p: Leaves,
    step: secular.Shifted,
) -> tuple[Leaves, secular.Shifted]:
    """Return the step p within the bounds, and its length, in units of the scales D, and
    predicted decrease; from params outside, the step to the nearest point within."""
    box, gradient = bounded.box, bounded.gradient
    nearest = jax.tree.map(jnp.subtract, projected(box, parts), parts)

    def along(t: jax.Array) -> tuple[Leaves, jax.Array, jax.Array]:
        u = [(t * leaf).astype(leaf.dtype) for leaf in p]
        s = step_within(box, parts, select(bounded.outside, nearest, u))
        promise = -inner(gradient, s)
        return s, promise, promise - inner(s, bounded.product(s)) / 2

    def too_long(carry: tuple[jax.Array, Any]) -> jax.Array:
        t, (_, promise, decrease) = carry
        return (t > MIN_PROJECTED) & ~(decrease >= PROMISED_SHARE * promise)

    def shorter(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return carry[0] / 2, along(carry[0] / 2)

    one = jnp.ones_like(step.length)
    _, (s, _, decrease) = jax.lax.while_loop(too_long, shorter, (one, along(one)))
    length = tree_norm(s) if scales is None else norm(scales * ravel(s))
    length, decrease = (x.astype(step.length.dtype) for x in (length, decrease))
    sound = jnp.isfinite(step.length)
    return s, step._replace(
        length=jnp.where(sound, length, step.length), decrease=decrease
    )
