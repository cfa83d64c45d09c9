"""A rate over an optimizer, its base: the chain of both, with the momentum of the base.

The momentum is the share of an update that is left of the one before, 0.9 for
`optax.sgd(1.0, momentum=0.9)`. It is measured as the length of the update of the base for
a gradient of zero, relative to that of its update before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hessopt._checks import check_params, check_transformation
from hessopt.numerics.guards import divide, select
from hessopt.objective.binding import require_params
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import all_finite, inner, solve_dtype, tree_norm
from hessopt.typing import Params

MOMENTUM_STEPS = 50
"""Number of steps at the start in which the momentum is measured."""


class RatedState(NamedTuple):
    """State of an optimizer with a rate."""

    base: optax.OptState
    rate: optax.OptState
    momentum: jax.Array  # scalar, share of an update that is left of the one before
    length: jax.Array  # scalar, norm of the last update of base


def over_base(
    name: str,
    base: optax.GradientTransformation,
    rate: Callable[..., optax.GradientTransformationExtraArgs],
    momentum: ArrayLike | None,
    measures: bool,
) -> optax.GradientTransformationExtraArgs:
    """Chain an optimizer with `rate(momentum=...)`, and keep its old state if its update
    or the value is not finite. A momentum of None is measured, or 0."""
    check_transformation("base", base)
    base = optax.with_extra_args_support(base)
    measures &= momentum is None

    def rate_for(m: jax.Array) -> optax.GradientTransformationExtraArgs:
        return rate(momentum=m if measures else momentum)

    def init(params: Params) -> RatedState:
        check_params(name, params)
        m = jnp.asarray(0.0 if momentum is None else momentum, solve_dtype(params))
        scalars = beside((m, jnp.zeros_like(m)), params)
        return RatedState(base.init(params), rate_for(m).init(params), *scalars)

    def update(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        **keywords: object,
    ) -> tuple[optax.Updates, RatedState]:
        require_params(params, caller=name)
        check_params(name, params)
        u, new = base.update(updates, state.base, params, **keywords)
        m, before = state.momentum, state.length
        # the rate computes these products as well
        length = jnp.sqrt(inner(u, u)).astype(before.dtype)
        sound = jnp.isfinite(length) & all_finite(keywords.get("value"))

        def measured() -> jax.Array:
            none = jax.tree.map(jnp.zeros_like, updates)
            rest = tree_norm(base.update(none, state.base, params, **keywords)[0])
            # after an update of zero, as from a base that accumulates gradients, 0
            share = divide(rest.astype(m.dtype), before, before > 0, 0.0)
            return jnp.where(jnp.isfinite(share), jnp.minimum(share, 1), m)

        if measures:
            early = sound & (state.rate.count < MOMENTUM_STEPS)
            m = jax.lax.cond(early, measured, lambda: m)
        step, own = rate_for(m).update(u, state.rate, params, **keywords)
        kept, length = select(sound, (new, length), (state.base, before))
        return step, RatedState(kept, own, m, length)

    return optax.GradientTransformationExtraArgs(init, update)
