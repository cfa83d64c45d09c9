"""The `update` function that all methods share: it checks the arguments and binds the
objective to the data.

A method consists of a record of its options and two functions,

    init(params) -> state,        step(call, state) -> (updates, state),

and `transformation` makes an optax transformation of them. A step does not receive
keywords that it does not use.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_params
from hessopt.objective.binding import Objective, bind, require_given, require_params
from hessopt.trees.vectors import LARGE, unit_factor
from hessopt.typing import Params, ValueFn


class Call(NamedTuple):
    """The arguments of one `update`."""

    updates: Params
    params: Params
    grad: Params | None  # gradient at params in optax's convention, if given
    value: jax.Array | None  # scalar, objective at params, if given
    # value_fn with its data bound; None for a method that does not need it
    bound_objective: Objective | None
    finite: jax.Array | bool  # bool scalar, whether the value, if given, is finite

    @property
    def objective(self) -> Objective:
        """The objective as a function of params alone, for a method that needs it."""
        assert self.bound_objective is not None, "needs must name value_fn"
        return self.bound_objective

    @property
    def gradient(self) -> Params:
        """The gradient: `grad` if it was given, else the updates."""
        return self.updates if self.grad is None else self.grad

    @property
    def is_gradient(self) -> bool:
        """Whether the updates are known to be the gradient while tracing. A product
        with the gradient is then also the product with the updates."""
        leaves = map(jax.tree.leaves, (self.updates, self.gradient))
        return all(u is g for u, g in zip(*leaves, strict=True))


def in_own_unit(call: Call, factor: jax.Array) -> tuple[Call, jax.Array]:
    """Return the call with gradient and updates multiplied by a power of two, and that
    power; value and objective are not changed.

    The power is that of earlier updates, or for a factor of zero the one that brings
    the largest entry of the gradient near 1. Inner products of gradients then neither
    overflow nor underflow, whatever the unit of the objective is.
    """

    def first() -> jax.Array:
        return unit_factor(call.gradient).astype(factor.dtype)

    known = factor > 0
    if sum(map(jnp.size, jax.tree.leaves(call.gradient))) <= LARGE:
        # a branch costs more than the maximum of a small gradient
        factor = jnp.where(known, factor, first())
    else:
        factor = jax.lax.cond(known, lambda factor: factor, lambda _: first(), factor)

    def scaled(tree: Params) -> Params:
        return jax.tree.map(lambda x: (x * factor).astype(jnp.result_type(x)), tree)

    updates = scaled(call.updates)
    same = call.grad is None or call.is_gradient
    return call._replace(
        updates=updates, grad=None if same else scaled(call.grad)
    ), factor


Step = Callable[[Call, Any], tuple[optax.Updates, optax.OptState]]
"""`(call, state) -> (updates, state)`."""


def transformation(
    name: str, init: optax.TransformInitFn, step: Step, *, needs: Sequence[str] = ()
) -> optax.GradientTransformationExtraArgs:
    """Make an optax transformation of the `init` and `step` of a method.

    Args:
      name: name of the public function, for error messages.
      init: `params -> state`.
      step: `(call, state) -> (updates, state)`.
      needs: keywords of `update` that the method requires, a subset of `"value"`,
        `"grad"` and `"value_fn"`.

    Raises:
      TypeError: in `init` and `update`, for params that are not floating or complex
        arrays; in `update`, for missing params, for a missing keyword of needs, and for
        missing data of value_fn. The message names the leaf, or the call to write.
    """

    def checked_init(params: Params) -> optax.OptState:
        check_params(name, params)
        return init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: Params | None = None,
        *,
        value: jax.Array | None = None,
        grad: optax.Updates | None = None,
        value_fn: ValueFn | None = None,
        **data: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        require_params(params, caller=name)
        check_params(name, params)
        objective = bind(value_fn, data, caller=name) if "value_fn" in needs else None
        given = {"value": value, "grad": grad, "value_fn": value_fn}
        require_given(caller=name, **{keyword: given[keyword] for keyword in needs})
        finite = True if value is None else jnp.isfinite(value)
        return step(Call(updates, params, grad, value, objective, finite), state)

    return optax.GradientTransformationExtraArgs(checked_init, update)


def scheduled(number: optax.ScalarOrSchedule, count: jax.Array) -> jax.typing.ArrayLike:
    """Return a number as it is, or the value of a schedule at this count."""
    return number(count) if callable(number) else number
