"""Flax NNX: an optimizer that passes the objective to its transformation (`pip install
hessopt[flax]`)."""

from typing import TYPE_CHECKING, Any, TypeGuard

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.filterlib import Filter

from hessopt.objective.binding import (
    Objective,
    informed_update,
    precompose,
    without_aux,
)
from hessopt.typing import ObjectiveFn, Params

if TYPE_CHECKING:
    from flax.nnx import Pytree as _Base
else:
    _Base = getattr(nnx, "Pytree", None) or nnx.Object  # Flax 0.12 renamed it
# VariableState exists up to Flax 0.11
_VARIABLES: tuple[type, ...] = (
    nnx.Variable,
    vars(nnx).get("VariableState", nnx.Variable),
)


class OptState(nnx.Variable[jax.Array]):
    """An array of the optimizer's state."""


class Optimizer(_Base):
    """Update the parameters of a model by any optax transformation, which may evaluate
    the objective.

    Args:
      model: an NNX module.
      tx: the transformation.
      wrt: filter for the variables to update; all others are held fixed. It must be the
        filter of the gradients.

    Example:
      >>> import jax, jax.numpy as jnp, hessopt
      >>> from flax import nnx
      >>> model, x = nnx.Linear(1, 1, rngs=nnx.Rngs(0)), jnp.array([[0.0], [1.0], [2.0]])
      >>> optimizer = Optimizer(model, hessopt.newton())
      >>> @nnx.jit
      ... def step(model, optimizer, x, y):
      ...     def loss_fn(model):
      ...         return jnp.mean((model(x) - y) ** 2)
      ...     value, grads = nnx.value_and_grad(loss_fn)(model)
      ...     optimizer.update(model, grads, value=value, loss_fn=loss_fn)
      ...     return value
      >>> value = step(model, optimizer, x, 3.0 * x + 1.0)
      >>> jnp.round(model(jnp.ones((1, 1))), 3).tolist()
      [[4.0]]
    """

    def __init__(
        self,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        wrt: Filter = nnx.Param,
    ) -> None:
        """Initialize the transformation at the model's parameters."""
        # since Flax 0.12, a tree that contains variables is marked by `nnx.data`
        data = getattr(nnx, "data", lambda tree: tree)
        self.tx: optax.GradientTransformation = tx
        self.wrt: Filter = wrt
        self.step: OptState = OptState(jnp.zeros((), jnp.uint32))
        self.opt_state: optax.OptState = data(
            jax.tree.map(OptState, tx.init(_arrays(nnx.state(model, wrt))))
        )

    def update(
        self,
        model: nnx.Module,
        grads: "nnx.State[Any, Any] | nnx.Module",
        /,
        *,
        value: jax.Array | None = None,
        loss_fn: ObjectiveFn | None = None,
    ) -> None:
        """Update the parameters of the model, the optimizer's state and the step count,
        in place.

        Args:
          model: the module, after the call of `nnx.value_and_grad(loss_fn)(model)`.
          grads: the gradients that this call returned.
          value: the loss that this call returned, for optimizers with a line search.
          loss_fn: the objective, for optimizers that evaluate it: `loss_fn(model)`
            returns the loss or `(loss, aux)`. It is evaluated on copies of the model,
            with the running statistics after the gradient's evaluation and the random
            numbers, such as Dropout's masks, of the gradient's evaluation. A
            `hessopt.composite` keeps model and loss separate for Gauss-Newton.

        Raises:
          TypeError: if the transformation requires an argument that is missing; the
            message names it.

        Cost: the optimizer's update; one more forward pass for a model that draws
        random numbers, when not compiled.
        """
        state = nnx.state(model, self.wrt)
        gradients = (
            grads if isinstance(grads, nnx.State) else nnx.state(grads, self.wrt)
        )
        params, updates = _arrays(state), _arrays(gradients)
        given: dict[str, object] = {"value": value, "grad": updates}
        if loss_fn is not None:
            given["value_fn"] = _objective(loss_fn, model, self.wrt)
        extra = {name: thing for name, thing in given.items() if thing is not None}
        update = informed_update(self.tx)
        try:
            updates, opt_state = update(
                updates, _arrays(self.opt_state), params, **extra
            )
        except TypeError as error:
            if loss_fn is None or value is None:
                error.add_note(
                    "In NNX: optimizer.update(model, grads, value=value, loss_fn=loss_fn)"
                )
            raise
        new = jax.tree.leaves(optax.apply_updates(params, updates))
        nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), new))
        for variable, leaf in zip(
            _variables(self.opt_state), jax.tree.leaves(opt_state), strict=True
        ):
            _set(variable, leaf)
        _set(self.step, _get(self.step) + 1)


def _objective(loss_fn: ObjectiveFn, model: nnx.Module, wrt: Filter) -> Objective:
    """Return the loss as a function of parameters like `_arrays(state)`, with the
    random numbers that the gradient has drawn."""
    graph, state, counts, rest = nnx.split(model, wrt, nnx.RngCount, ...)

    def at(params: Params, counts: Params) -> nnx.Module:
        fresh = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params))
        return nnx.merge(graph, fresh, *jax.tree.map(lambda leaf: leaf, (counts, rest)))

    if jax.tree.leaves(counts):
        again = at(state, counts)
        loss_fn(again)
        drawn = jax.tree.map(jnp.subtract, nnx.state(again, nnx.RngCount), counts)
        counts = jax.tree.map(jnp.subtract, counts, drawn)
    return without_aux(precompose(loss_fn, lambda params: at(params, counts)))


def _arrays(tree: Params) -> Params:
    """Replace the variables of a tree by their arrays."""
    return jax.tree.map(
        lambda leaf: _get(leaf) if _is_variable(leaf) else leaf,
        tree,
        is_leaf=_is_variable,
    )


def _variables(tree: Params) -> list[nnx.Variable[jax.Array]]:
    return [
        leaf
        for leaf in jax.tree.leaves(tree, is_leaf=_is_variable)
        if _is_variable(leaf)
    ]


def _is_variable(leaf: object) -> TypeGuard[nnx.Variable[jax.Array]]:
    return isinstance(leaf, _VARIABLES)


def _get(variable: nnx.Variable[jax.Array]) -> jax.Array:
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def _set(variable: nnx.Variable[jax.Array], value: jax.Array) -> None:
    if hasattr(variable, "set_value"):
        variable.set_value(value)
    else:
        variable.value = value
