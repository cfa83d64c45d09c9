"""Train a Flax Linen network with BatchNorm and Dropout with automatic learning rates.

A CNN is trained on scikit-learn's digits in mini-batches. `hessopt.linen.TrainState`
passes the objective to the optimizer, stores BatchNorm's running statistics, and uses
the dropout mask of the gradient in every evaluation. The program prints, for each
epoch, the loss, the rates of grouped Newton for the first and the last tensor, and the
accuracy on 297 test images.

    python examples/flax_linen.py
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import hessopt
from hessopt.linen import TrainState


class CNN(nn.Module):
    """Two convolutions, BatchNorm, Dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return the logits `(batch, 10)` of images `(batch, 8, 8, 1)`."""
        x = nn.tanh(nn.Conv(8, (3, 3))(x))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.tanh(nn.Conv(16, (3, 3), strides=2)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


MODEL = CNN()


def loss_fn(params: Any, x: Any, y: Any, *, collections: Any, rngs: Any) -> Any:
    """Return the cross-entropy and the new running statistics."""
    logits, new = MODEL.apply(
        {"params": params, **collections},
        x,
        train=True,
        rngs=rngs,
        mutable=["batch_stats"],
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new


@jax.jit
def step(state: TrainState, x: Any, y: Any, key: jax.Array) -> Any:
    """Take one step with new dropout masks."""
    return state.step_with(
        loss_fn, x, y, rngs={"dropout": jax.random.fold_in(key, state.step)}
    )


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one epoch on few images, to see that it runs",
    )
    args = parser.parse_args()
    epochs, count = (1, 300) if args.quick else (args.epochs, 1500)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)

    variables = MODEL.init(jax.random.key(0), images[:1], train=False)
    tx = hessopt.grouped_newton(optax.sgd(1.0, momentum=0.9))
    state = TrainState.create(
        apply_fn=MODEL.apply,
        params=variables["params"],
        tx=tx,
        collections={"batch_stats": variables["batch_stats"]},
    )
    rng, key = np.random.default_rng(0), jax.random.key(1)
    for epoch in range(epochs):
        losses = []
        for batch in np.split(rng.permutation(count), count // 100):
            state, value, _ = step(state, images[batch], labels[batch], key)
            losses.append(float(value))
        logits = MODEL.apply(
            {"params": state.params, **state.collections}, images[1500:], train=False
        )
        accuracy = jnp.mean(jnp.argmax(jnp.asarray(logits), axis=1) == labels[1500:])
        rates = [x for name, x in hessopt.diagnostics(state).items() if "rate" in name]
        print(
            f"epoch {epoch + 1:2d}  loss {np.mean(losses):.4f}  rates {float(rates[0]):.3g}, {float(rates[-1]):.3g}  "
            f"test accuracy {float(accuracy):.3f}"
        )


if __name__ == "__main__":
    main()
