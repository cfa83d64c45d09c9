"""Rates that find themselves, against the best constant ones, on data and seeds that
chose no default."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits, load_wine

from hessopt import generalized_newton, grouped_newton
from tests.problems import cross_entropy, init_mlp

pytestmark = pytest.mark.usefixtures("optimized")

SEEDS = jnp.arange(100, 105)


class Task(NamedTuple):
    """A classification problem, its tanh network, and how it is trained."""

    x: jax.Array
    y: jax.Array
    sizes: tuple[int, ...]
    batch: int
    epochs: int


def task(name):
    x, y = (
        load_digits(return_X_y=True) if name == "digits" else load_wine(return_X_y=True)
    )
    x = x / 16 if name == "digits" else (x - x.mean(0)) / x.std(0)
    sizes, batch, epochs = (
        ((64, 32, 10), 128, 30) if name == "digits" else ((13, 16, 3), 32, 60)
    )
    return Task(jnp.asarray(x, jnp.float32), jnp.asarray(y), sizes, batch, epochs)


BASES = {
    "sgd": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
    "adam": optax.adam(1.0),
}


def final_losses(name, tx, factor=1.0):
    """The loss on all data after training, for every seed."""
    x, y, sizes, size, epochs = task(name)
    tx = optax.with_extra_args_support(tx)
    turns = len(y) // size

    def run(seed, factor):
        keys = jax.random.split(jax.random.key(seed + 1), epochs)
        shuffled = jax.vmap(
            lambda key: jax.random.permutation(key, len(y))[: turns * size]
        )(keys)

        def step(carry, batch):
            params, state = carry
            loss = lambda p: cross_entropy(p, x[batch], y[batch])
            value, grad = jax.value_and_grad(loss)(params)
            updates, state = tx.update(
                grad, state, params, value=value, grad=grad, value_fn=loss
            )
            return (
                jax.tree.map(lambda p, u: p + factor * u, params, updates),
                state,
            ), None

        params = init_mlp(seed, sizes, np.float32)
        (params, _), _ = jax.lax.scan(
            step, (params, tx.init(params)), shuffled.reshape(-1, size)
        )
        return cross_entropy(params, x, y)

    runs = jax.jit(jax.vmap(run, in_axes=(0, None)))
    return [
        np.asarray(runs(SEEDS, f))
        for f in np.atleast_1d(np.asarray(factor, np.float32))
    ]


@functools.cache
def best_constant(name, base):
    """The lowest median over a grid of rates, which must lie inside of it."""
    low = {"sgd": 2.0**-3, "momentum": 2.0**-6, "adam": 2.0**-9}[base] * (
        8.0 if name == "wine" else 1.0
    )
    medians = [
        float(np.median(losses))
        for losses in final_losses(name, BASES[base], low * 2.0 ** np.arange(8))
    ]
    place = int(np.nanargmin(medians))
    assert 0 < place < 7, medians
    return medians[place]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "wine"])
@pytest.mark.parametrize(
    ("base", "factor"), [("sgd", 1.3), ("momentum", 2.5), ("adam", 3.0)]
)
def test_generalized_newton_ends_near_the_best_constant_rate_from_any_first_rate(
    name, base, factor
):
    for first in (1e-4, 1e-2, 1.0):
        (losses,) = final_losses(
            name, generalized_newton(BASES[base], initial_rate=first)
        )
        assert np.median(losses) < factor * best_constant(name, base)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "wine"])
def test_grouped_newton_over_momentum_ends_near_the_best_constant_rate_and_never_diverges(
    name,
):
    (losses,) = final_losses(name, grouped_newton(BASES["momentum"]))
    assert np.median(losses) < 2.0 * best_constant(name, "momentum")
    assert np.max(losses) < 0.1
