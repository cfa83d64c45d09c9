"""Objectives that several tests share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Split(NamedTuple):
    """Inputs `(m, d)` and integer labels `(m,)`, for training and for testing."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array


def digits(dtype: Any = np.float64) -> Split:
    """scikit-learn's digits: 1500 images for training, 297 for testing, pixels in [0,
    1]."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        (x / 16).astype(dtype), y, train_size=1500, stratify=y, random_state=0
    )
    return Split(*map(jnp.asarray, (x, y, x_test, y_test)))


def init_mlp(
    seed: int, sizes: tuple[int, ...], dtype: Any = np.float64
) -> dict[str, Any]:
    """LeCun-normal kernels and zero biases, `{"layer0": {"bias", "kernel"}, ...}`."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    kernel = jax.nn.initializers.lecun_normal()
    return {
        f"layer{i}": {"bias": jnp.zeros(n, dtype), "kernel": kernel(key, (m, n), dtype)}
        for i, (key, m, n) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def mlp(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The logits of a tanh network."""
    *hidden, last = params.values()
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def cross_entropy(
    params: dict[str, Any], x: jax.Array, y: jax.Array, l2: float = 0.0
) -> jax.Array:
    """Mean softmax cross-entropy of `mlp`, with `l2/2 |params|^2`."""
    loss = optax.softmax_cross_entropy_with_integer_labels(mlp(params, x), y).mean()
    return loss + 0.5 * l2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def run_on_noise(
    tx: Any,
    curvature: float = 4.0,
    size: int = 1000,
    steps: int = 600,
    with_grad: bool = True,
) -> Any:
    """Minimize a parabola whose gradient has noise; return the states after every
    step."""

    def f(x: jax.Array, noise: jax.Array) -> jax.Array:
        return 0.5 * curvature * jnp.sum(x**2) + noise @ x

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        x, state = carry
        noise = jax.random.normal(key, (size,))
        value, grad = jax.value_and_grad(f)(x, noise)
        given = {"grad": grad} if with_grad else {}
        updates, state = tx.update(
            grad, state, x, value=value, value_fn=f, noise=noise, **given
        )
        return (x + updates, state), state

    x, keys = jnp.ones(size), jax.random.split(jax.random.key(0), steps)
    return jax.jit(lambda: jax.lax.scan(step, (x, tx.init(x)), keys)[1])()
