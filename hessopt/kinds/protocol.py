"""The `update` of every method, written once: what it was called with, checked and
bound to the data.

A method is a record of its options and two functions,

    init(params) -> state,        step(call, state) -> (updates, state),

and `transformation` makes of them what optax expects. A step never sees a keyword that
is not its business.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt.objective.binding import Objective, bind, require_given, require_params
from hessopt.typing import Params, ValueFn


class Call(NamedTuple):
    """The arguments of one `update`."""

    updates: Params
    params: Params
    grad: Params | None  # gradient at params, in optax's convention, if it was given
    value: jax.Array | None  # scalar, objective at params, if it was given
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
        """The gradient: `grad`, or the updates where it was not given."""
        return self.updates if self.grad is None else self.grad

    @property
    def is_gradient(self) -> bool:
        """Whether the updates are the gradient itself, as seen while tracing: products
        with one then serve both."""
        leaves = map(jax.tree.leaves, (self.updates, self.gradient))
        return all(u is g for u, g in zip(*leaves, strict=True))


Step = Callable[[Call, Any], tuple[optax.Updates, Any]]
"""`(call, state) -> (updates, state)`."""


def transformation(
    name: str, init: optax.TransformInitFn, step: Step, *, needs: Sequence[str] = ()
) -> optax.GradientTransformationExtraArgs:
    """Make an optax transformation of a method's `init` and `step`.

    Args:
      name: of the public function, for errors.
      init: `params -> state`.
      step: `(call, state) -> (updates, state)`.
      needs: keywords of `update` without which the method cannot work, of `"value"`,
        `"grad"` and `"value_fn"`.

    Raises:
      TypeError: in `update`, for missing params, for a keyword in needs that is
        missing, and for data that value_fn requires, each naming the call to write.
    """

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
        require_params(params, caller=name)
        objective = bind(value_fn, data, caller=name) if "value_fn" in needs else None
        given = {"value": value, "grad": grad, "value_fn": value_fn}
        require_given(caller=name, **{keyword: given[keyword] for keyword in needs})
        finite = True if value is None else jnp.isfinite(value)
        return step(Call(updates, params, grad, value, objective, finite), state)

    return optax.GradientTransformationExtraArgs(init, update)


def scheduled(number: optax.ScalarOrSchedule, count: jax.Array) -> jax.typing.ArrayLike:
    """Return a number, or what a schedule says at this count."""
    return number(count) if callable(number) else number
