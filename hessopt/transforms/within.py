"""Ends every entry of a step at its bound.

Source: Bertsekas, "Projected Newton methods for optimization problems with simple
constraints", 1982.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt.kinds.protocol import Call, transformation
from hessopt.trees.boxes import Bounds, box_of, check_bounds, step_within
from hessopt.trees.sharding import beside
from hessopt.typing import Params


class WithinState(NamedTuple):
    """State of `keep_within`."""

    count: jax.Array  # int32 scalar, updates so far
    box: Any  # Box, the bounds


def keep_within(bounds: Bounds | None) -> optax.GradientTransformationExtraArgs:
    """Shorten updates, entry by entry, to keep the parameters within bounds."""
    init = functools.partial(_init, check_bounds(bounds))
    return transformation("keep_within", init, _step)


def _init(bounds: Bounds | None, params: Params) -> WithinState:
    box = box_of(bounds, params, caller="keep_within")
    return beside(WithinState(jnp.zeros((), jnp.int32), None), params)._replace(box=box)


def _step(call: Call, state: WithinState) -> tuple[optax.Updates, WithinState]:
    if state.box is None:
        return call.updates, state
    step = step_within(state.box, call.params, call.updates)
    count = jnp.asarray(optax.safe_increment(state.count))
    return step, WithinState(count, state.box)
