"""Real data, full batch, in float64: a linear model or a tanh network, and L2 on its
kernels.

    f = mean loss of mlp(params, x) against y  +  l2/2 sum |kernel|^2

A run has solved a problem when the largest entry of the gradient is 1e-6 of what it is
at the start.
"""

from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris

from benchmarks.problems import Problem


class Task(NamedTuple):
    """Data and model."""

    x: np.ndarray  # (m, features), of mean 0 and variance 1
    y: np.ndarray  # (m,): labels, or values of mean 0 and variance 1
    sizes: tuple[int, ...]
    kind: str  # of the loss: "logistic", "softmax", "squares"
    l2: float


def _of(load: Any) -> tuple[np.ndarray, np.ndarray]:
    return load(return_X_y=True)


def standardised(x: np.ndarray) -> np.ndarray:
    """Return the columns with mean 0 and variance 1; constant ones become 0."""
    return (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)


def breast_cancer() -> Task:
    """Logistic regression, 31 parameters."""
    x, y = _of(load_breast_cancer)
    return Task(standardised(x), y, (30, 1), "logistic", 1e-3)


def iris() -> Task:
    """A network with 268 parameters."""
    x, y = _of(load_iris)
    return Task(standardised(x), y, (4, 15, 10, 3), "softmax", 1e-3)


def diabetes() -> Task:
    """A regression with 193 parameters."""
    x, y = _of(load_diabetes)
    return Task(standardised(x), standardised(y), (10, 16, 1), "squares", 1e-2)


def digits() -> Task:
    """A network with 2410 parameters."""
    x, y = _of(load_digits)
    return Task(x / 16, y, (64, 32, 10), "softmax", 1e-3)


TASKS = {
    "breast cancer": breast_cancer,
    "iris": iris,
    "diabetes": diabetes,
    "digits": digits,
}


def load(name: str) -> Problem:
    """Build one problem."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.flatten_util import ravel_pytree

    import hessopt
    from benchmarks.problems import mlp

    task = TASKS[name]()
    x, y = jnp.asarray(task.x), jnp.asarray(task.y)
    start, restore = ravel_pytree(
        jax.tree.map(lambda leaf: leaf.astype(float), mlp.init(0, task.sizes))
    )

    def model_fn(flat: Any) -> tuple[Any, Any]:
        params = restore(flat)
        return mlp.apply(params, x), [kernel for kernel, _ in params]

    def loss_fn(outputs: tuple[Any, Any]) -> Any:
        outs, kernels = outputs
        if task.kind == "softmax":
            losses = optax.softmax_cross_entropy_with_integer_labels(outs, y)
        elif task.kind == "logistic":
            losses = jnp.logaddexp(0.0, jnp.where(y > 0, -1.0, 1.0) * outs[:, 0])
        else:
            losses = (outs[:, 0] - y) ** 2
        return losses.mean() + 0.5 * task.l2 * sum(
            jnp.sum(kernel**2) for kernel in kernels
        )

    value_fn = hessopt.composite(model_fn, loss_fn)
    bound = 1e-6 * float(jnp.max(jnp.abs(jax.grad(value_fn)(start))))
    return Problem(name, value_fn, start, bound, float("inf"))
