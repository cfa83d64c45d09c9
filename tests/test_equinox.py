"""Equinox needs nothing of ours: `eqx.partition` makes a tree of arrays and an
objective of it."""

import equinox as eqx
import jax
import jax.numpy as jnp

import hessopt


def test_an_equinox_model_trains():
    x = jax.random.normal(jax.random.key(1), (40, 2))
    y = jnp.sin(x[:, 0]) + x[:, 1] ** 2
    model = eqx.nn.MLP(2, "scalar", 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x, y):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

    solution = hessopt.minimize(
        loss, params, hessopt.lbfgs(), data={"x": x, "y": y}, max_steps=100
    )
    trained = eqx.combine(solution.params, static)
    assert jnp.mean((jax.vmap(trained)(x) - y) ** 2) < 0.05
