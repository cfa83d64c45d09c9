"""Line searches of optax, adapted to any chain.

They are written for a loop without data, NaN or meshes; support for these is added
around them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_transformation
from hessopt.kinds.line_searches import LinesearchState
from hessopt.kinds.protocol import Call, transformation
from hessopt.numerics.guards import select, zero_unless
from hessopt.objective.binding import precompose
from hessopt.trees.sharding import beside, gathered, split_like
from hessopt.trees.vectors import strongly_typed
from hessopt.typing import Params


def fitted(
    linesearch: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Fit one of optax's line searches into any chain; the Wolfe search of hessopt is
    returned unchanged.

    The search gets the bound objective and no other keyword, since optax's searches
    reject keywords that they do not know. Its state is strongly typed: the weakly typed
    state of optax makes a jitted step compile twice. When it gives no step, its old
    state is kept, since optax's searches do not recover from a step of length zero. No
    step is taken from a value that is not finite, where every trial would count as a
    decrease, nor one that goes uphill, as optax's last trial may. On an explicit mesh
    the search sees gathered trees, because it takes inner products of them.
    """
    check_transformation("linesearch", linesearch)
    linesearch = optax.with_extra_args_support(linesearch)
    if isinstance(jax.eval_shape(linesearch.init, jnp.zeros(())), LinesearchState):
        return linesearch
    return transformation(
        "the line search",
        functools.partial(_init, linesearch),
        functools.partial(_step, linesearch),
        needs=("value_fn", "value", "grad"),
    )


def _init(
    linesearch: optax.GradientTransformationExtraArgs, params: Params
) -> optax.OptState:
    # optax's searches read the first leaf: an empty tree, or a placeholder, is replaced
    # by an array
    arrays = jax.tree.map(jnp.asarray, params)
    state = linesearch.init(arrays if jax.tree.leaves(params) else jnp.zeros(()))
    return beside(strongly_typed(state), params)


def _step(
    linesearch: optax.GradientTransformationExtraArgs, call: Call, state: Any
) -> tuple[optax.Updates, Any]:
    if not jax.tree.leaves(call.updates):
        return call.updates, state
    params = jax.tree.map(jnp.asarray, call.params)

    def gather(tree: Any) -> Any:
        return jax.tree.map(gathered, tree)

    def place(tree: Any) -> Any:
        return jax.tree.map(split_like, tree, params)

    # run optax's search on gathered trees; the objective receives them split again
    step, new = linesearch.update(
        gather(call.updates),
        _with_grad(state, gather),
        gather(params),
        value=call.value,
        grad=gather(call.grad),
        value_fn=precompose(call.objective, place),
    )
    step, new = place(step), _with_grad(new, place)

    # take no step from a value that is not finite, and no uphill step; the state is
    # then the old one except its info
    nonzero = [jnp.any(leaf != 0) for leaf in jax.tree.leaves(step)]
    risen = _risen(call.value, getattr(new, "value", call.value))
    moved = jnp.any(jnp.array(nonzero)) & call.finite & ~risen
    step = zero_unless(moved, step)
    kept = select(moved, new, state)
    return step, kept._replace(info=new.info) if hasattr(kept, "info") else kept


def _with_grad(state: Any, change: Callable[[Params], Params]) -> Any:
    """Return the state with its stored gradient changed, if it stores one."""
    if getattr(state, "grad", None) is None:
        return state
    return state._replace(grad=change(state.grad))


def _risen(value: Any, reached: Any) -> jax.Array:
    """Return whether the value has increased by more than rounding, or is not
    finite."""
    value, reached = jnp.asarray(value), jnp.asarray(reached)
    return ~(reached <= value + 10 * jnp.finfo(reached.dtype).eps * jnp.abs(value))
