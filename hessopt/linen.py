"""Flax Linen: a train state that passes the objective to its optimizer (`pip install
hessopt[flax]`)."""

from collections.abc import Mapping
from typing import Self

import jax
import optax
from flax import struct
from flax.training import train_state

from hessopt.objective.binding import as_objective, informed_update, without_aux
from hessopt.typing import Aux, ObjectiveFn, Params, ValueFn


class TrainState(train_state.TrainState):
    """Flax's train state, extended to pass the value and the objective to its
    optimizer.

    `tx` can be any optax transformation. Create the state with
    `TrainState.create(apply_fn=..., params=..., tx=...)`. For a model with other
    variables, such as BatchNorm's running statistics, add
    `collections={"batch_stats": ...}`. `step_with` passes them to the loss and stores
    the new ones that the evaluation of the gradient returns. Evaluations by the
    optimizer do not change them.

    Example:
      >>> import jax, jax.numpy as jnp, hessopt
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(1), jnp.array([[0.0], [1.0], [2.0]])
      >>> state = TrainState.create(
      ...     apply_fn=model.apply, params=model.init(jax.random.key(0), x), tx=hessopt.newton()
      ... )
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((model.apply(params, x) - y) ** 2)
      >>> @jax.jit
      ... def step(state, x, y):
      ...     return state.step_with(loss_fn, x, y)
      >>> state, value, _ = step(state, x, 3.0 * x + 1.0)
      >>> round(float(state.params["params"]["kernel"][0, 0]), 3)
      3.0
    """

    collections: Mapping[str, Params] = struct.field(default_factory=dict)

    def apply_gradients(
        self,
        *,
        grads: optax.Updates,
        value: jax.Array | None = None,
        value_fn: ValueFn | None = None,
        **replace: object,
    ) -> Self:
        """Update the parameters, the optimizer's state and the step count.

        Args:
          grads: gradient at `params`, a tree like `params`.
          value: the objective at `params`, for optimizers with a line search.
          value_fn: `value_fn(params)`, the objective, for optimizers that evaluate it.
          **replace: other fields to replace.

        Returns:
          The new state.

        Raises:
          TypeError: if the optimizer requires an argument that is missing; the message
            names it.

        Cost: the optimizer's update.
        """
        given = {"value": value, "value_fn": value_fn}
        extra = {name: thing for name, thing in given.items() if thing is not None}
        inner = informed_update(self.tx)

        def update(
            updates: optax.Updates, state: optax.OptState, params: Params | None = None
        ) -> tuple[optax.Updates, optax.OptState]:
            try:
                return inner(updates, state, params, grad=updates, **extra)
            except TypeError as error:
                if len(extra) < len(given):
                    error.add_note(
                        "With a TrainState: apply_gradients(grads=..., value=..., value_fn=...), or step_with"
                    )
                raise

        informed = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        new = train_state.TrainState.apply_gradients(informed, grads=grads)
        return self.replace(
            step=new.step, params=new.params, opt_state=new.opt_state, **replace
        )

    def step_with(
        self,
        loss_fn: ObjectiveFn,
        *data: Params,
        rngs: dict[str, jax.Array] | None = None,
    ) -> tuple[Self, jax.Array, Aux]:
        """Take one training step: value, gradient and update in one call.

        Args:
          loss_fn: `loss_fn(params, *data)`, called with `rngs=rngs` if rngs are given
            and `collections=collections` if the state has collections. It returns the
            loss or `(loss, aux)`; with collections it returns `(loss, new)` or `(loss,
            (new, aux))`, where new is the dictionary that `apply_fn(..., mutable=...)`
            returns along with its outputs. A `hessopt.composite` keeps model and loss
            separate for Gauss-Newton.
          *data: positional data of loss_fn.
          rngs: random keys, used for the gradient and for every evaluation by the
            optimizer.

        Returns:
          `(state, value, aux)`: the new state, and the loss and aux (None if loss_fn
          returns none) at the old parameters.

        Raises:
          TypeError: if loss_fn does not return collections with the structure of those
            of the state.

        Cost: one value and gradient, and the optimizer's update.
        """
        named: dict[str, Params] = {} if rngs is None else {"rngs": rngs}
        if self.collections:
            named["collections"] = self.collections

        def loss(params: Params) -> tuple[jax.Array, Aux]:
            out = loss_fn(params, *data, **named)
            return out if isinstance(out, tuple) else (out, None)

        value_fn = without_aux(as_objective(loss_fn).close(*data, **named))
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(self.params)
        replace = {}
        if self.collections:
            new, aux = aux if isinstance(aux, tuple) else (aux, None)
            if jax.tree.structure(new) != jax.tree.structure(self.collections):
                raise TypeError(
                    f"loss_fn must return (loss, collections) or (loss, (collections, aux)) with collections like "
                    f"those it is given, {jax.tree.structure(self.collections)}, got {jax.tree.structure(new)}"
                )
            replace["collections"] = new
        grads = optax.tree.conj(grads)
        return (
            self.apply_gradients(
                grads=grads, value=value, value_fn=value_fn, **replace
            ),
            value,
            aux,
        )
