"""The states of line searches: the value and gradient at the accepted step, and their
cost."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt.trees.vectors import strongly_typed
from hessopt.typing import Params, ValueFn


class LinesearchInfo(NamedTuple):
    """The result of the last search."""

    status: jax.Array  # int32 scalar, StepStatus
    rate: jax.Array  # scalar, accepted t; 0 if no trial was accepted
    trials: jax.Array  # int32 scalar
    evaluations: jax.Array  # int32 scalar, value and gradient: one per trial


class LinesearchState(NamedTuple):
    """State of `scale_by_wolfe_linesearch`."""

    count: jax.Array  # int32 scalar, updates so far
    value: jax.Array  # scalar, objective at the point last accepted; inf at the start
    grad: Params  # result of `jax.grad` at that point, a tree like params
    # scalar, decrease of the objective in the last nonzero step; 0 at the start
    fall: jax.Array
    box: Any  # Box, the bounds; None without bounds
    info: LinesearchInfo


OPTAX_SEARCH_STATES = (
    optax.ScaleByBacktrackingLinesearchState,
    optax.ScaleByZoomLinesearchState,
)
"""The states of optax's line searches."""

SEARCH_STATES = (LinesearchState, *OPTAX_SEARCH_STATES)
"""The states of line searches. They are recognized by type, since a parameter may be
named `value` or `grad`."""


def accepted(
    state: optax.OptState, like: tuple[jax.Array, Params]
) -> tuple[jax.Array, Params] | None:
    """Return the value and gradient that the search at the end of a chain accepted, or
    None if there is no such pair.

    The result is None if another transformation follows the search, since it may have
    changed the step, and if the pair in the state differs from `like`, a value and a
    gradient, in tree structure or shapes, or has less precise dtypes. Before the first
    step the pair is not finite.
    """
    while type(state) is tuple and state:
        state = state[-1]
    if not isinstance(state, SEARCH_STATES) or state.grad is None:
        return None
    pair = jnp.asarray(state.value), state.grad
    if jax.tree.structure(pair) != jax.tree.structure(like):
        return None
    for kept, x in zip(*map(jax.tree.leaves, (pair, like)), strict=True):
        if (
            kept.shape != x.shape
            or jnp.promote_types(kept.dtype, x.dtype) != kept.dtype
        ):
            return None
    return optax.tree.cast_like(pair, like)


def value_and_grad_from_state(
    value_fn: ValueFn,
) -> Callable[..., tuple[jax.Array, Params]]:
    """Differentiate the objective, or reuse the value and gradient of a line search.

    Args:
      value_fn: `value_fn(params, *args, **kwargs)`, a real scalar.

    Returns:
      A function `(params, *args, state, **kwargs) -> (value, grad)` that replaces
      `jax.value_and_grad(value_fn)`. It takes value and gradient from `state` if a
      search at the end of the chain has stored them. This is valid only if `params` are
      the result of the last update and the data are the same.

    Cost: none if a search stored the pair, else one value and gradient. Under `vmap`
    always one value and gradient.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.lbfgs()
      >>> x, value_fn = jnp.array([3.0, 4.0]), lambda x: jnp.sum(x**2)
      >>> state = tx.init(x)
      >>> value, grad = value_and_grad_from_state(value_fn)(x, state=state)
      >>> float(value)
      25.0
    """
    compute = jax.value_and_grad(value_fn)

    def value_and_grad(
        params: Params, *args: Params, state: optax.OptState, **kwargs: Params
    ) -> tuple[jax.Array, Params]:
        pair = accepted(state, jax.eval_shape(compute, params, *args, **kwargs))
        if pair is None:
            return compute(params, *args, **kwargs)
        pair = strongly_typed(pair)
        kept = jnp.isfinite(pair[0])  # searches start from a value of inf
        return jax.lax.cond(
            kept, lambda: pair, lambda: strongly_typed(compute(params, *args, **kwargs))
        )

    return value_and_grad
