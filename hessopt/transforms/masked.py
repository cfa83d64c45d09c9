"""A transformation on a part of the parameters, for which the others are constants of
the objective.

`optax.masked` hands the inner transformation trees with holes, and the objective of the
whole: a method that evaluates it then meets the holes. Here trees and objective are
restricted together.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hessopt._checks import check_transformation
from hessopt.objective.binding import of_group, require_params
from hessopt.trees.groups import combine, given_labels, take
from hessopt.typing import Params

_NAME = "masked"


class MaskedState(NamedTuple):
    """State of `masked`."""

    inner: Any  # state of the inner transformation, with None for leaves outside


def masked(
    inner: optax.GradientTransformation, mask: Any | Callable[[Params], Any]
) -> optax.GradientTransformationExtraArgs:
    """Apply `inner` to the leaves that `mask` has, and hold the others.

    Args:
      inner: any transformation or chain, of any kind. It sees None in place of the
        leaves that are held, and `value_fn` of the rest.
      mask: tree of bools like params, or a callable `params -> tree of bools`.

    Returns:
      A transformation that takes what `inner` takes, and gives updates of zero for the
      leaves that are held.

    Raises:
      ValueError: when the mask does not match params, naming the path.
      TypeError: when it has other leaves than bools; in `update`, for missing params.

    Cost per update: that of `inner` on its leaves.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from hessopt import newton
      >>> value_fn = lambda p: jnp.sum((p["a"] * p["b"] - 6.0) ** 2)
      >>> params = {"a": jnp.array(1.0), "b": jnp.array(2.0)}
      >>> tx = masked(newton(linesearch=None), {"a": True, "b": False})
      >>> updates, state = tx.update(jax.grad(value_fn)(params), tx.init(params), params, value_fn=value_fn)
      >>> jax.tree.map(lambda leaf: round(float(leaf), 3), optax.apply_updates(params, updates))
      {'a': 3.0, 'b': 2.0}
    """
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def chosen(params: Params) -> Any:
        """A tree like params of bools."""
        found = given_labels("mask", mask(params) if callable(mask) else mask, params)
        for leaf in found:
            if not isinstance(leaf, bool | np.bool_):
                raise TypeError(f"mask must be a tree of bools, got {leaf!r}")
        return jax.tree.unflatten(jax.tree.structure(params), found)

    def init(params: Params) -> MaskedState:
        return MaskedState(inner.init(take(params, chosen(params), True)))

    def update(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        **keywords: Any,
    ) -> tuple[optax.Updates, MaskedState]:
        require_params(params, caller=_NAME)
        labels = chosen(params)
        own = of_group(labels, True, params, keywords, caller=_NAME)
        new, inner_state = inner.update(
            take(updates, labels, True), state.inner, take(params, labels, True), **own
        )
        still = jax.tree.map(_zeros, updates, params)
        return combine(new, still), MaskedState(inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _zeros(update: Any, leaf: Any) -> jax.Array:
    """Zeros like the update; like the leaf where that is an integer, whose gradient has
    no entries."""
    return jnp.zeros_like(
        leaf if jnp.result_type(update) == jax.dtypes.float0 else update
    )
