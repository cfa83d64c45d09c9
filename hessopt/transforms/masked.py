"""A transformation of some of the parameters; the others are constants in the
objective.

`optax.masked` passes trees with masked leaves to the inner transformation, together
with the objective of all parameters, which cannot be evaluated on such trees. Here the
trees and the objective are restricted together.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hessopt._checks import check_params, check_transformation
from hessopt.objective.binding import of_group, require_params
from hessopt.trees.groups import combine, given_labels, take
from hessopt.typing import Params

_NAME = "masked"


class MaskedState(NamedTuple):
    """State of `masked`."""

    # state of the inner transformation, with None in place of the leaves held fixed
    inner: optax.OptState


def masked(
    inner: optax.GradientTransformation, mask: Any | Callable[[Params], Any]
) -> optax.GradientTransformationExtraArgs:
    """Apply `inner` to the leaves for which `mask` is True, and hold the others fixed.

    Args:
      inner: any transformation or chain. It receives None in place of the leaves that
        are held fixed, and `value_fn` as a function of the other leaves.
      mask: tree of bools like params, or a prefix of such a tree, or a callable `params
        -> tree of bools`.

    Returns:
      A transformation that takes the same arguments as `inner`, and returns updates of
      zero for the leaves that are held fixed.

    Raises:
      ValueError: if the mask does not match params; the message names the path.
      TypeError: if a leaf of the mask is not a bool, or a leaf of params is not an
        array, or not floating or complex where the mask is True; in `update`, for
        missing params.

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
    # every keyword of `update` is for `inner`: nothing is bound here
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

    # restrict the trees and the objective to the leaves that are not held fixed
    chosen = _chosen(options.mask, params)
    part, at = (take(tree, chosen, True) for tree in (updates, params))
    own = of_group(chosen, True, params, keywords, caller=_NAME)
    new, inner_state = options.inner.update(part, state.inner, at, **own)

    still = jax.tree.map(_zeros, updates, params)
    return combine(new, still), MaskedState(inner_state)


def _chosen(mask: Any | Callable[[Params], Any], params: Params) -> Any:
    """Return a tree of bools like params, True for the leaves that `inner` updates.
    Those that are held fixed may be of any dtype, but have to be arrays."""
    check_params(_NAME, params, dtypes=np.generic)
    given = mask(params) if callable(mask) else mask
    leaves = given_labels("mask", given, params)
    for leaf in leaves:
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(f"mask must be a tree of bools, got {leaf!r}")
    chosen = jax.tree.unflatten(jax.tree.structure(params), leaves)
    way = "let mask hold it fixed, or separate it"
    check_params(_NAME, take(params, chosen, True), otherwise=way)
    return chosen


def _zeros(update: Any, leaf: Any) -> jax.Array:
    """Return zeros like the update, or like the leaf if it is an integer, since the
    gradient of an integer has dtype float0."""
    return jnp.zeros_like(
        leaf if jnp.result_type(update) == jax.dtypes.float0 else update
    )
