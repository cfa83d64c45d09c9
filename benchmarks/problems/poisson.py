"""The 3-D Poisson equation by a physics-informed network: a smooth loss of 1217
parameters that is hard to minimize.

    -div grad u = f on (0, 1)^3,    u* = sin(pi x) sin(pi y) sin(pi z),    f = 3 pi^2 u*

The network 3-32-32-1 with tanh stands for u; its loss is half the mean squared residual
on 5000 points inside, and half the mean squared error on 800 points of the boundary.
Source: arXiv 2603.10599.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hessopt
from hessopt.typing import Objective

SIZES = (3, 32, 32, 1)


class Points(NamedTuple):
    """Where the equation and the boundary values are asked for; fixed."""

    inside: jax.Array  # (m, 3)
    boundary: jax.Array  # (k, 3)


def points(inside: int = 5000, boundary: int = 800, seed: int = 0) -> Points:
    """Uniform points inside, and uniform points moved onto a random face."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.uniform(keys[0], (boundary, 3), float)
    axis, side = jnp.divmod(jax.random.randint(keys[1], (boundary,), 0, 6), 2)
    faces = x.at[jnp.arange(boundary), axis].set(side.astype(x.dtype))
    return Points(jax.random.uniform(keys[2], (inside, 3), float), faces)


def init(seed: int, sizes: tuple[int, ...] = SIZES) -> list[dict[str, jax.Array]]:
    """Kernels and biases, uniform in +-1/sqrt(fan_in)."""

    def layer(key: jax.Array, fan_in: int, fan_out: int) -> dict[str, jax.Array]:
        keys, bound = jax.random.split(key), fan_in**-0.5
        return {
            "kernel": jax.random.uniform(
                keys[0], (fan_in, fan_out), float, -bound, bound
            ),
            "bias": jax.random.uniform(keys[1], (fan_out,), float, -bound, bound),
        }

    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return [layer(*each) for each in zip(keys, sizes[:-1], sizes[1:], strict=True)]


def apply(params: Any, x: jax.Array) -> jax.Array:
    """u at points `(m, 3)`, `(m,)`."""
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return (x @ last["kernel"] + last["bias"])[:, 0]


def laplacian(params: Any, x: jax.Array) -> jax.Array:
    """The sum of the second derivatives of u, `(m,)`, with value and slopes carried
    forward in one pass."""
    *hidden, last = params
    # (axis, m, width)
    slopes = jnp.broadcast_to(
        jnp.eye(x.shape[1], dtype=x.dtype)[:, None], (x.shape[1], *x.shape)
    )
    second = jnp.zeros_like(x)
    for layer in hidden:
        a = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        slopes, second = slopes @ layer["kernel"], second @ layer["kernel"]
        d = 1.0 - a**2  # tanh' = d, tanh'' = -2 a d
        x, slopes, second = (
            a,
            d * slopes,
            d * second - 2.0 * a * d * jnp.sum(slopes**2, 0),
        )
    return (second @ last["kernel"])[:, 0]


def exact(x: jax.Array) -> jax.Array:
    """u* at points `(m, 3)`, `(m,)`."""
    return jnp.prod(jnp.sin(jnp.pi * x), axis=1)


def residuals(params: Any, where: Points) -> tuple[jax.Array, jax.Array]:
    """What is left of the equation inside, `(m,)`, and the error on the boundary,
    `(k,)`."""
    inside = laplacian(params, where.inside) + 3 * jnp.pi**2 * exact(where.inside)
    return inside, apply(params, where.boundary) - exact(where.boundary)


def of_equation(params: Any, inside: jax.Array) -> jax.Array:
    """What is left of the equation at one point."""
    at = inside[None]
    return (laplacian(params, at) + 3 * jnp.pi**2 * exact(at))[0]


def of_boundary(params: Any, boundary: jax.Array) -> jax.Array:
    """The error at one point of the boundary."""
    at = boundary[None]
    return (apply(params, at) - exact(at))[0]


def half_mean_squares(parts: tuple[jax.Array, ...]) -> jax.Array:
    """Half the mean square of each part, summed."""
    return sum((0.5 * jnp.mean(part**2) for part in parts), jnp.zeros(()))


def by_rows(
    loss_fn: Callable[..., jax.Array] = half_mean_squares,
) -> Objective:
    """The loss as a composite of models of one point, whose data are the fields of
    `Points`."""
    models = hessopt.rowwise(of_equation), hessopt.rowwise(of_boundary)
    return hessopt.composite(models, loss_fn)


def loss(params: Any, where: Points) -> jax.Array:
    """Half the mean squared residual inside, plus half the mean squared error on the
    boundary."""
    return half_mean_squares(residuals(params, where))


def error(params: Any, count: int = 50_000) -> jax.Array:
    """Relative L2 error on random points."""
    x = jax.random.uniform(jax.random.key(2**20), (count, 3), float)
    return jnp.linalg.norm(apply(params, x) - exact(x)) / jnp.linalg.norm(exact(x))
