"""Boxes: lower and upper bounds of every entry of a tree, `lower <= x <= upper`.

A step of an entry ends at its bound, and a gradient is restricted to the entries that
are free. An entry is held at its bound if the gradient points outward there.

Source: Bertsekas, "Projected Newton methods for optimization problems with simple
constraints", 1982.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hessopt.trees.groups import given_labels
from hessopt.trees.sharding import beside
from hessopt.typing import Params

Bounds = tuple[Any, Any]
"""`(lower, upper)`, each a number, a tree like params or a prefix of one, with arrays
that can be broadcast to the leaves and None for leaves without bounds, or None. Entries
with an infinite bound are free on that side, and those with `lower == upper` are fixed.
The values may be traced, as under `vmap`."""


class Box(NamedTuple):
    """Lower and upper bounds, trees like params."""

    lower: Params
    upper: Params


class Face(NamedTuple):
    """The entries that a direction holds at their bounds, trees like params."""

    held: Params  # bools
    # the step of each held entry to its bound, with the sign of a gradient: params minus
    # the bound; 0 for the other entries
    ahead: Params


def check_bounds(bounds: Bounds | None) -> Bounds | None:
    """Return the bounds, or None if they are known to leave every entry free; raise an
    error for anything but a pair of numbers and trees of numbers."""
    if bounds is None:
        return None
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(
            f"bounds must be a pair (lower, upper) of numbers, trees like params or None, got {bounds!r}"
        )
    lower, upper = (
        _without_none(side, infinite)
        for side, infinite in zip(bounds, (-math.inf, math.inf), strict=True)
    )
    leaves = jax.tree.leaves((lower, upper))
    for leaf in leaves:
        if not (isinstance(leaf, int | float) or hasattr(leaf, "dtype")):
            raise TypeError(f"bounds must be numbers or arrays, got {leaf!r}")
        if not isinstance(leaf, Tracer) and np.any(np.isnan(np.asarray(leaf))):
            raise ValueError(
                f"bounds must not be NaN, got {leaf}: use -inf and inf for no bound"
            )
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return lower, upper
    is_free = all(np.all(np.asarray(low) == -np.inf) for low in jax.tree.leaves(lower))
    is_free &= all(np.all(np.asarray(up) == np.inf) for up in jax.tree.leaves(upper))
    return None if is_free else (lower, upper)


def _without_none(side: Any, infinite: float) -> Any:
    return jax.tree.map(
        lambda x: infinite if x is None else x, side, is_leaf=lambda x: x is None
    )


def box_of(bounds: Bounds | None, params: Params, *, caller: str) -> Box | None:
    """Return the box of params, a fresh copy with their dtypes and shardings, or None
    without bounds.

    Raises:
      ValueError: if a lower bound exceeds the upper one, if the trees or shapes do not
        fit, or if params, where they are known, are outside.
      TypeError: for complex params.
    """
    if bounds is None:
        return None
    paths = jax.tree_util.tree_leaves_with_path(params)
    if not paths:  # no parameters, or the placeholder of `optax.tree.map_params`
        return Box(params, params)
    sides = [_leaves(side, params, caller) for side in bounds]
    lowers, uppers = [], []
    for (path, leaf), lower, upper in zip(paths, *sides, strict=True):
        name = f"params{jax.tree_util.keystr(path)}"
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{caller} takes bounds for real params only, but {name} is complex: "
                "bound its real and imaginary parts as two leaves"
            )
        low, up = (_like(side, leaf, caller, name) for side in (lower, upper))
        _check_order(low, up, leaf, caller, name)
        lowers.append(low)
        uppers.append(up)
    treedef = jax.tree.structure(params)
    box = Box(*(jax.tree.unflatten(treedef, side) for side in (lowers, uppers)))
    return beside(box, params)


def _leaves(side: Any, params: Params, caller: str) -> list[Any]:
    """Return one side of the bounds for each leaf of params."""
    try:
        return given_labels("bounds", side, params)
    except ValueError:
        raise ValueError(
            f"{caller} needs bounds that are numbers, arrays, or trees like params "
            f"(an array in place of a list), got {side!r} for params of structure "
            f"{jax.tree.structure(params)}"
        ) from None


def _like(side: Any, leaf: Any, caller: str, name: str) -> jax.Array:
    """Return a bound as an array like a leaf, sharded as the leaf is."""
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    given = np.shape(side)
    aligned = zip(given[::-1], shape[::-1], strict=False)
    if len(given) > len(shape) or any(a not in (1, b) for a, b in aligned):
        raise ValueError(
            f"{caller} needs bounds that can be broadcast to {name} of shape {shape}, "
            f"got shape {given}"
        )
    return jnp.zeros_like(leaf, dtype) + jnp.asarray(side, dtype)


def _check_order(
    lower: jax.Array, upper: jax.Array, leaf: Any, caller: str, name: str
) -> None:
    """Raise an error for bounds in the wrong order, and for a leaf outside of them, as
    far as their values are known."""
    if not _is_known(lower, upper):
        return
    if bool(jnp.any(lower > upper)):
        raise ValueError(
            f"{caller} needs lower bounds of at most the upper ones, but for {name} "
            f"bounds are {lower} and {upper}"
        )
    if _is_known(leaf) and bool(jnp.any((leaf < lower) | (leaf > upper))):
        raise ValueError(
            f"{caller} needs params within the bounds, but {name} is {leaf} with bounds "
            f"{lower} and {upper}: start from `jnp.clip(params, lower, upper)`"
        )


def _is_known(*leaves: Any) -> bool:
    """Return whether all entries of arrays can be read here."""
    return all(
        not isinstance(leaf, Tracer) and getattr(leaf, "is_fully_addressable", True)
        for leaf in leaves
    )


def projected(box: Box, params: Params) -> Params:
    """Return the nearest params within the box."""
    return jax.tree.map(
        lambda x, low, up: jnp.clip(x, low, up).astype(jnp.result_type(x)), params, *box
    )


def is_outside(box: Box, params: Params) -> jax.Array:
    """Return whether an entry is outside of its bounds, a bool scalar."""
    return holds_any(
        jax.tree.map(lambda x, low, up: (x < low) | (x > up), params, *box)
    )


def step_within(box: Box, params: Params, step: Params) -> Params:
    """Return the step, with every entry ended at its bound.

    The sum of params and step, rounded to the dtype of params, is within the box: a
    step to a bound that rounding carries beyond it is shortened by one unit in the last
    place.
    """

    def one(x: jax.Array, d: jax.Array, low: jax.Array, up: jax.Array) -> jax.Array:
        def reached(d: jax.Array) -> jax.Array:
            return jnp.asarray(x + d, low.dtype)

        ahead = reached(d)
        d = jnp.where(ahead < low, low - x, jnp.where(ahead > up, up - x, d)).astype(
            d.dtype
        )
        ahead = reached(jax.lax.optimization_barrier(d))
        shorter = jnp.where(ahead < low, jnp.inf, -jnp.inf).astype(d.dtype)
        is_within = (ahead >= low) & (ahead <= up) | jnp.isnan(ahead)
        return jnp.where(is_within, d, jnp.nextafter(d, shorter))

    # XLA would compute the sum without rounding the step
    step = jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, step))
    return jax.tree.map(one, params, step, *box)


def ended(box: Box, params: Params, step: Params) -> Params:
    """Return which entries of a step reach or pass their bound, a tree of bools."""

    def one(x: jax.Array, d: jax.Array, low: jax.Array, up: jax.Array) -> jax.Array:
        ahead = jnp.asarray(x + d, low.dtype)
        return ((ahead <= low) & (d < 0)) | ((ahead >= up) & (d > 0))

    return jax.tree.map(one, params, step, *box)


def outward(box: Box, params: Params, grad: Params) -> Params:
    """Return which entries are held: at a bound with the gradient pointing outward, or
    fixed; a tree of bools."""

    def one(x: jax.Array, g: jax.Array, low: jax.Array, up: jax.Array) -> jax.Array:
        return ((x <= low) & (g > 0)) | ((x >= up) & (g < 0)) | (low == up)

    return jax.tree.map(one, params, grad, *box)


def face(box: Box, params: Params, grad: Params, reach: Params) -> Face:
    """Return the entries that a gradient step of length `reach` leads to a bound.

    Args:
      box: the bounds.
      params: tree of arrays.
      grad: tree like params.
      reach: inverse curvature, a tree like params, or one scalar for all entries; with
        0 an entry is held only where it is at its bound.

    An entry near its bound is moved there, separately from the others: otherwise a step
    of all would end after the short distance of that entry.
    """

    def held(x: Any, g: Any, low: jax.Array, up: jax.Array, a: Any) -> jax.Array:
        ends = _ends(x, g, low, up, a)
        return ends[0] | ends[1] | (low == up) | (x < low) | (x > up)

    def ahead(x: Any, g: Any, low: jax.Array, up: jax.Array, a: Any) -> jax.Array:
        at_low = _ends(x, g, low, up, a)[0] | (x < low)
        step = x - jnp.where(at_low, low, up)
        return jnp.where(held(x, g, low, up, a), step, 0).astype(low.dtype)

    if jax.tree.structure(reach) != jax.tree.structure(params):
        reach = jax.tree.map(lambda _: reach, params)
    trees = params, grad, *box, reach
    return Face(jax.tree.map(held, *trees), jax.tree.map(ahead, *trees))


def _ends(
    x: Any, g: Any, low: jax.Array, up: jax.Array, a: Any
) -> tuple[jax.Array, jax.Array]:
    """Return whether the step `-a g` of a leaf leads to the lower and to the upper
    bound."""
    target = x - jnp.asarray(a, low.dtype) * jnp.asarray(g, low.dtype)
    is_finite = jnp.isfinite(g)
    return (target <= low) & (g > 0) & is_finite, (target >= up) & (g < 0) & is_finite


def free_part(held: Params, tree: Params) -> Params:
    """Return the tree with zeros in place of held entries."""
    return jax.tree.map(lambda h, x: jnp.where(h, 0, x), held, tree)


def completed(face: Face, direction: Params) -> Params:
    """Return the direction with held entries led to their bounds."""
    return jax.tree.map(
        lambda h, b, p: jnp.where(h, b, p).astype(jnp.result_type(p)), *face, direction
    )


def count(held: Params) -> jax.Array:
    """Return the number of held entries, an int32 scalar."""
    counts = [jnp.sum(leaf, dtype=jnp.int32) for leaf in jax.tree.leaves(held)]
    return sum(counts, jnp.zeros((), jnp.int32))


def holds_any(tree: Params) -> jax.Array:
    """Return whether an entry of a tree of bools holds, a bool scalar."""
    leaves = [jnp.any(leaf) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_or, leaves, jnp.zeros((), bool))
