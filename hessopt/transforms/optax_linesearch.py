"""optax's line searches in any chain.

They are written for a loop without data, NaN or meshes; what they miss is added around
them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_transformation
from hessopt.kinds.line_searches import LinesearchState
from hessopt.numerics.guards import select, zero_unless
from hessopt.objective.binding import bind, precompose, require_given, require_params
from hessopt.trees.sharding import beside, gathered, split_like
from hessopt.trees.vectors import strongly_typed
from hessopt.typing import Params, ValueFn


def fitted(
    linesearch: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Fit one of optax's line searches into any chain; ours fits as it is.

    It gets the bound objective and nothing else, since optax's reject keywords that
    they do not know; a strongly typed state, since theirs starts weakly typed and makes
    a jitted step compile twice; and its old state back when it gives no step, since
    theirs do not recover from a step of length zero. No step is taken from a value that
    is not finite: every trial would be a decrease; nor one uphill, as theirs is when
    trials run out. On an explicit mesh they see trees gathered, of which they take
    inner products.
    """
    check_transformation("linesearch", linesearch)
    linesearch = optax.with_extra_args_support(linesearch)
    if isinstance(jax.eval_shape(linesearch.init, jnp.zeros(())), LinesearchState):
        return linesearch

    def init(params: Params) -> optax.OptState:
        array_params = jax.tree.map(jnp.asarray, params)
        # optax's searches look at a first leaf: of an empty tree or a placeholder, give
        # them one
        state = linesearch.init(
            array_params if jax.tree.leaves(params) else jnp.zeros(())
        )
        return beside(strongly_typed(state), params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        *,
        value: Any = None,
        grad: optax.Updates | None = None,
        value_fn: ValueFn | None = None,
        **data: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        require_params(params, caller="the line search")
        objective = bind(value_fn, data, caller="the line search")
        require_given(value=value, grad=grad, caller="the line search")
        if not jax.tree.leaves(updates):
            return updates, state
        array_params = jax.tree.map(jnp.asarray, params)

        def place(tree: Any) -> Any:
            return jax.tree.map(split_like, tree, array_params)

        def with_grad(state: Any, change: Any) -> Any:
            return (
                state
                if getattr(state, "grad", None) is None
                else state._replace(grad=change(state.grad))
            )

        def gather(tree: Any) -> Any:
            return jax.tree.map(gathered, tree)

        whole, given, at = map(gather, (updates, grad, array_params))
        step, new_state = linesearch.update(
            whole,
            with_grad(state, gather),
            at,
            value=value,
            grad=given,
            value_fn=precompose(objective, place),
        )
        step, new_state = place(step), with_grad(new_state, place)
        moved = jnp.any(
            jnp.array([jnp.any(leaf != 0) for leaf in jax.tree.leaves(step)])
        )
        moved &= jnp.isfinite(value) & ~_risen(
            value, getattr(new_state, "value", value)
        )
        step = zero_unless(moved, step)
        kept: Any = select(moved, new_state, state)
        return step, kept._replace(info=getattr(new_state, "info", None)) if hasattr(
            kept, "info"
        ) else kept

    return optax.GradientTransformationExtraArgs(init, update)


def _risen(value: Any, reached: Any) -> jax.Array:
    """Whether a value is higher than before, by more than rounding, or not finite."""
    value, reached = jnp.asarray(value), jnp.asarray(reached)
    return ~(reached <= value + 10 * jnp.finfo(reached.dtype).eps * jnp.abs(value))
