"""A transformation on a part of the parameters, for which the others are constants of
the objective.

`optax.masked` hands the inner transformation trees with holes, and the objective of all
parameters, which cannot be evaluated on them. Here trees and objective are restricted
together.
"""

import functools
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

    # state of the inner transformation, with None in place of the leaves that are held
    inner: optax.OptState


def masked(
    inner: optax.GradientTransformation, mask: Any | Callable[[Params], Any]
) -> optax.GradientTransformationExtraArgs:
    """Apply `inner` to the leaves for which `mask` is True, and hold the others.

    Args:
      inner: any transformation or chain, of any kind. It sees None in place of the
        leaves that are held, and `value_fn` of the rest.
      mask: tree of bools like params or a prefix of it, or a callable `params -> tree
        of bools`.

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
      >>> grads, state = jax.grad(value_fn)(params), tx.init(params)
      >>> updates, state = tx.update(grads, state, params, value_fn=value_fn)
      >>> params = optax.apply_updates(params, updates)
      >>> jax.tree.map(lambda leaf: round(float(leaf), 3), params)
      {'a': 3.0, 'b': 2.0}
    """
    check_transformation("inner", inner)
    options = _Options(optax.with_extra_args_support(inner), mask)
    # every keyword of `update` is for `inner`: there is nothing to bind here
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, options), functools.partial(_update, options)
    )


class _Options(NamedTuple):
    """The arguments of `masked`, checked."""

    inner: optax.GradientTransformationExtraArgs
    mask: Any | Callable[[Params], Any]


def _init(options: _Options, params: Params) -> MaskedState:
    chosen = _chosen(options.mask, params)
    return MaskedState(options.inner.init(take(params, chosen, True)))


def _update(
    options: _Options,
    updates: optax.Updates,
    state: Any,  # MaskedState
    params: Params | None = None,
    **keywords: Any,
) -> tuple[optax.Updates, MaskedState]:
    require_params(params, caller=_NAME)

    # the trees without the leaves that are held, and the objective of the others
    chosen = _chosen(options.mask, params)
    part, at = (take(tree, chosen, True) for tree in (updates, params))
    own = of_group(chosen, True, params, keywords, caller=_NAME)
    new, inner_state = options.inner.update(part, state.inner, at, **own)

    still = jax.tree.map(_zeros, updates, params)
    return combine(new, still), MaskedState(inner_state)


def _chosen(mask: Any | Callable[[Params], Any], params: Params) -> Any:
    """A tree like params of bools, True for the leaves that `inner` sees."""
    given = mask(params) if callable(mask) else mask
    leaves = given_labels("mask", given, params)
    for leaf in leaves:
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(f"mask must be a tree of bools, got {leaf!r}")
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _zeros(update: Any, leaf: Any) -> jax.Array:
    """Zeros like the update; like the leaf where that is an integer, whose gradient has
    no entries."""
    return jnp.zeros_like(
        leaf if jnp.result_type(update) == jax.dtypes.float0 else update
    )
