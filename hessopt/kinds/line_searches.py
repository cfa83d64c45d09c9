"""What a line search leaves in its state: the value and gradient at the step it
accepted, and what they cost."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt.kinds.rates import RateInfo
from hessopt.trees.vectors import strongly_typed
from hessopt.typing import Params, StepStatus, ValueFn


class LinesearchInfo(NamedTuple):
    """What the last search found."""

    status: jax.Array  # int32 scalar, StepStatus
    rate: jax.Array  # scalar, t accepted; 0 where there was none
    trials: jax.Array  # int32 scalar, values and gradients evaluated


class LinesearchState(NamedTuple):
    """State of `scale_by_wolfe_linesearch`."""

    count: jax.Array  # int32 scalar, updates so far
    value: jax.Array  # scalar, objective at the point last accepted; inf at the start
    grad: Params  # what `jax.grad` gives there, a tree like params
    # scalar, what the objective fell by in the last step that was taken; 0 at the start
    fall: jax.Array
    info: LinesearchInfo


SEARCH_STATES = (
    LinesearchState,
    optax.ScaleByBacktrackingLinesearchState,
    optax.ScaleByZoomLinesearchState,
)
"""The states of line searches. They are found by type: a parameter may well be named
`value` or `grad`."""


def searches(state: optax.OptState) -> list[Any]:
    """Return the states of the line searches inside an optimizer's state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, SEARCH_STATES))
    return [node for node in nodes if isinstance(node, SEARCH_STATES)]


def accepted(state: optax.OptState, like: Any) -> tuple[jax.Array, Any] | None:
    """Return the value and gradient that the search at the end of a chain accepted;
    None when there is no such pair.

    There is none when anything stands behind the search, since the step was then
    changed, and when what the search keeps has not the tree and shapes of `like`, a
    value and a gradient, or less precise dtypes. What it has not filled in yet is not
    finite.
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


TRIALS = ("trials", "num_linesearch_steps")
"""The fields of an `info` that count trials: of searches and trust regions. `gradients`
are what else is evaluated."""


def evaluations(state: optax.OptState, old: optax.OptState | None = None) -> jax.Array:
    """Return how often the last update evaluated the objective, as far as `state`
    tells, an int32 scalar.

    What tells, and has not been updated since the state `old`, does not count.
    """
    return sum(
        (x for name in (*TRIALS, "gradients") for x in _told(name, state, old)),
        jnp.zeros((), jnp.int32),
    )


def tried(state: optax.OptState, old: optax.OptState, asked: bool) -> jax.Array:
    """Whether an update from `old` to `state` wanted to move: it made trials, or tells
    of a failure.

    A transformation that tells nothing is believed to have, if it asked for the
    objective. What is not finite leaves some counts as they are, and is believed in any
    case.
    """
    failed = [
        status & int(StepStatus.FAILURES) for status in _told("status", state, old)
    ]
    failed += [
        status & int(StepStatus.NONFINITE) for status in _told("status", state, None)
    ]
    facts = [*failed, *(x for name in TRIALS for x in _told(name, state, old))]
    return jnp.any(jnp.stack(facts) > 0) if facts else jnp.asarray(asked)


def _told(
    name: str, state: optax.OptState, old: optax.OptState | None
) -> list[jax.Array]:
    """A field of every `info` in a state that has it, zero where a count says that no
    update has taken place."""

    def tells(node: Any) -> bool:
        return hasattr(getattr(node, "info", None), name)

    nodes, olds = (
        [x for x in jax.tree.leaves(tree, is_leaf=tells) if tells(x)]
        for tree in (state, old)
    )
    facts = [jnp.asarray(getattr(node.info, name), jnp.int32) for node in nodes]
    if old is None:
        return facts

    def is_fresh(new: Any, was: Any) -> Any:
        # tuples have a method count
        return (
            new.count != was.count if "count" in getattr(new, "_fields", ()) else True
        )

    return [
        jnp.where(is_fresh(*pair), fact, 0)
        for *pair, fact in zip(nodes, olds, facts, strict=True)
    ]


def counts_evaluations(state: optax.OptState) -> bool:
    """Whether `evaluations` sees all evaluations of the transformation that has this
    state.

    What says so is a search, or a state of ours, which has a status and evaluates the
    objective in searches alone; a rate evaluates it elsewhere.
    """

    def is_ours(node: Any) -> bool:
        return hasattr(getattr(node, "info", None), "status")

    ours = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    return bool(searches(state) or ours) and not any(
        isinstance(node.info, RateInfo) for node in ours
    )


def value_and_grad_from_state(
    value_fn: ValueFn,
) -> Callable[..., tuple[jax.Array, Any]]:
    """Differentiate the objective, or reuse what a line search has already computed.

    Args:
      value_fn: `value_fn(params, *args, **kwargs)`, a real scalar.

    Returns:
      A function `(params, *args, state, **kwargs) -> (value, grad)` in place of
      `jax.value_and_grad(value_fn)`, that takes both from `state` where a search at the
      end of the chain has left them. Only valid where `params` are the last update
      applied, on the same data.

    Cost: nothing where a search kept the pair, else one value and gradient. Under
    `vmap` always one.

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
        params: Any, *args: Any, state: optax.OptState, **kwargs: Any
    ) -> tuple[jax.Array, Any]:
        pair = accepted(state, jax.eval_shape(compute, params, *args, **kwargs))
        if pair is None:
            return compute(params, *args, **kwargs)
        pair = strongly_typed(pair)
        kept = jnp.isfinite(pair[0])  # searches start from a value of inf
        return jax.lax.cond(
            kept, lambda: pair, lambda: strongly_typed(compute(params, *args, **kwargs))
        )

    return value_and_grad
