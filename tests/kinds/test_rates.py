import jax
import jax.numpy as jnp
import optax
import pytest

from hessopt import generalized_newton, grouped_newton


@pytest.mark.parametrize("method", [generalized_newton, grouped_newton])
def test_evaluations_are_not_counted(method):
    tx, x = method(optax.sgd(1.0), update_every=2), jnp.ones(2)
    step = jax.jit(lambda s: tx.update(2 * x, s, x, value_fn=lambda x: jnp.sum(x**2)))
    state = tx.init(x)
    for _ in range(6):  # measured ones, and others after them
        evaluations = state[1].info.evaluations
        assert (evaluations, evaluations.dtype) == (-1, jnp.int32)
        _, state = step(state)
