"""Train a Flax NNX network by L-BFGS on the full data set, with its first half frozen.

An MLP with BatchNorm is trained on scikit-learn's breast cancer data; only its last
layers are trained, on the features of an untrained layer. `hessopt.nnx.Optimizer`
accepts the model without splitting it: the line search evaluates copies of it, running
statistics are updated once per step, and the frozen layer does not change by one bit.
The program prints the loss and the accuracy on the test data.

    python examples/flax_nnx.py
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import hessopt
import hessopt.nnx


class MLP(nnx.Module):
    """30-64-16-2 with BatchNorm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draw the parameters."""
        self.features = nnx.Linear(30, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.hidden = nnx.Linear(64, 16, rngs=rngs)
        self.last = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits `(batch, 2)` of `(batch, 30)`."""
        x = jnp.tanh(self.norm(self.features(x)))
        return self.last(jnp.tanh(self.hidden(x)))


TRAINED = nnx.All(
    nnx.Param, nnx.Any(nnx.PathContains("hidden"), nnx.PathContains("last"))
)


@nnx.jit
def step(
    model: MLP, optimizer: hessopt.nnx.Optimizer, x: jax.Array, y: jax.Array
) -> jax.Array:
    """Take one step; the model and the optimizer are updated in place."""

    def loss_fn(model: MLP) -> jax.Array:
        weights = sum(
            jnp.sum(leaf**2) for leaf in jax.tree.leaves(nnx.state(model, TRAINED))
        )
        return (
            optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()
            + 1e-3 * weights
        )

    value, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, TRAINED))(model)
    optimizer.update(model, grads, value=value, loss_fn=loss_fn)
    return value


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, to see that it runs"
    )
    args = parser.parse_args()
    x, y = load_breast_cancer(return_X_y=True)
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    x_train, x_test, y_train, y_test = (
        jnp.asarray(a) for a in train_test_split(x, y, test_size=0.3, random_state=0)
    )

    model = MLP(nnx.Rngs(0))
    optimizer = hessopt.nnx.Optimizer(model, hessopt.lbfgs(), wrt=TRAINED)
    for count in range(5 if args.quick else args.steps):
        model.train()
        value = step(model, optimizer, x_train, y_train)
        if count % 10 == 9 or args.quick:
            model.eval()
            accuracy = jnp.mean(jnp.argmax(model(x_test), axis=1) == y_test)
            print(
                f"step {count + 1:3d}  loss {float(value):.5f}  test accuracy {float(accuracy):.3f}"
            )


if __name__ == "__main__":
    main()
