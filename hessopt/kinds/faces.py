"""Updates within bounds: an update restricted to the entries that are free, and the box
that a state holds.

Entries that are held at a bound become constants of the objective, so that a curvature
matrix has rows of zeros for them and a method of unbounded problems finds the direction
of the others.
"""

import jax
import jax.numpy as jnp
import optax

from hessopt.kinds.protocol import Call
from hessopt.numerics.guards import divide
from hessopt.objective.binding import precompose
from hessopt.trees.boxes import Box, Face, free_part
from hessopt.trees.vectors import inner_products, unit_factor
from hessopt.typing import Params


def on_face(call: Call, face: Face) -> Call:
    """Return the call with gradient, updates and objective restricted to the free
    entries."""

    def fixed(params: Params) -> Params:
        return jax.tree.map(jnp.where, face.held, call.params, params)

    updates = free_part(face.held, call.updates)
    same = call.grad is None or call.is_gradient
    return call._replace(
        updates=updates,
        grad=None if same else free_part(face.held, call.grad),
        bound_objective=precompose(call.objective, fixed),
    )


def short_reach(g: Params, Hg: Params) -> jax.Array:
    """Return the length `|g.H g| / |H g|^2` of a gradient step, which is shorter than
    that to the minimum along the gradient; 0 for a zero or infinite H g."""
    scale = unit_factor(Hg)
    Hg = jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), Hg)
    (_, gHg), (_, HgHg) = inner_products(g, Hg)
    sound = jnp.isfinite(HgHg) & (HgHg > 0)
    return divide(scale * jnp.abs(gHg), HgHg, sound)


def box_in(state: optax.OptState, params: Params) -> Box | None:
    """Return the box within which the transformations of a state keep params, or None.

    A state of some of the parameters, as of `hessopt.masked`, bounds these alone; the
    boxes of several states are intersected.
    """
    nodes = jax.tree.leaves(state, is_leaf=_has_box)
    boxes = [node.box for node in nodes if _has_box(node)]
    if not boxes:
        return None

    def side(box_side: Params, infinite: float) -> Params:
        def bound(leaf: jax.Array, found: object) -> jax.Array:
            if isinstance(found, jax.Array):
                return found
            return jnp.full_like(leaf, infinite)

        # a part of the parameters has None, or a node without leaves, for the others
        return jax.tree.map(bound, params, box_side)

    sides = [(side(box.lower, -jnp.inf), side(box.upper, jnp.inf)) for box in boxes]
    lower, upper = sides[0]
    for low, up in sides[1:]:
        lower = jax.tree.map(jnp.maximum, lower, low)
        upper = jax.tree.map(jnp.minimum, upper, up)
    return Box(lower, upper)


def has_box(state: optax.OptState) -> bool:
    """Return whether a transformation of a state has bounds."""
    return any(map(_has_box, jax.tree.leaves(state, is_leaf=_has_box)))


def _has_box(node: object) -> bool:
    return hasattr(node, "_fields") and getattr(node, "box", None) is not None
