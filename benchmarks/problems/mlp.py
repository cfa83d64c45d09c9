"""Tanh networks on real and made-up data, in float32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import hessopt


class Problem(NamedTuple):
    """A network with its data bound."""

    name: str
    params: Any
    value_fn: Callable[[Any], jax.Array]  # a hessopt.composite


def init(seed: int, sizes: tuple[int, ...]) -> list[tuple[jax.Array, jax.Array]]:
    """LeCun-normal kernels and zero biases, float32."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    kernel = jax.nn.initializers.lecun_normal()
    return [
        (kernel(key, (m, n), jnp.float32), jnp.zeros(n, jnp.float32))
        for key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply(params: Any, x: jax.Array) -> jax.Array:
    """The outputs `(batch, sizes[-1])`."""
    *hidden, (kernel, bias) = params
    for k, b in hidden:
        x = jnp.tanh(x @ k + b)
    return x @ kernel + bias


def digits(sizes: tuple[int, ...], batch: int) -> Problem:
    """Mean softmax cross-entropy on scikit-learn's digits."""
    images, labels = load_digits(return_X_y=True)
    return _classification(
        sizes,
        jnp.asarray(images[:batch] / 16, jnp.float32),
        jnp.asarray(labels[:batch]),
    )


def noise(sizes: tuple[int, ...], batch: int) -> Problem:
    """The same on normal inputs with random labels, of any size."""
    inputs, labels = noise_data(sizes[0], sizes[-1], batch)
    return _classification(sizes, jnp.asarray(inputs, jnp.float32), jnp.asarray(labels))


def noise_data(
    features: int, classes: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and labels of `noise`."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, features)), rng.integers(classes, size=batch)


def _classification(sizes: tuple[int, ...], x: jax.Array, y: jax.Array) -> Problem:
    def loss_fn(logits: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return Problem(
        _name(sizes, len(x)),
        init(0, sizes),
        hessopt.composite(lambda params: apply(params, x), loss_fn),
    )


def regression(sizes: tuple[int, ...], batch: int) -> Problem:
    """Half the mean squared error on a smooth function of uniform inputs."""
    x = jnp.asarray(
        np.random.default_rng(0).uniform(-1, 1, (batch, sizes[0])), jnp.float32
    )
    y = jnp.sin(3 * x.sum(1, keepdims=True))

    def loss_fn(outputs: jax.Array) -> jax.Array:
        return 0.5 * jnp.mean((outputs - y) ** 2)

    return Problem(
        _name(sizes, batch),
        init(0, sizes),
        hessopt.composite(lambda params: apply(params, x), loss_fn),
    )


def stepper(
    tx: optax.GradientTransformation, value_fn: Callable[[Any], jax.Array]
) -> Callable[[Any], Any]:
    """Return the training step `(params, state) -> (params, state)` on all data."""
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any) -> Any:
        params, state = carry
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state

    return step


def _name(sizes: tuple[int, ...], batch: int) -> str:
    return f"{'-'.join(map(str, sizes))}, batch {batch}"
