"""Quasi-Newton updates over sizes: from 10 parameters to 10 million, in both dtypes,
from Python and in a compiled loop."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import hessopt
from benchmarks.harness import Contender, Table, compare, compiled
from benchmarks.kernels import lbfgs_directions

ITERATIONS = 20
"""Updates of a compiled loop."""

LBFGS_SIZES = tuple(10**power for power in range(1, 8))
BFGS_SIZES = (50, 100, 200, 500, 512, 1000, 1024, 2000)
"""Rows whose size in bytes is a power of two compete for the same lines of a cache."""


def tables(quick: bool) -> list[Table]:
    """The ratios of `scale_by_lbfgs` to optax's, and of `scale_by_bfgs` to a product
    with the matrix."""
    lbfgs, bfgs = ((10,), (50,)) if quick else (LBFGS_SIZES, BFGS_SIZES)
    rounds = 2 if quick else 9
    with jax.enable_x64(True):
        return [
            _of_sizes(
                "L-BFGS direction, m = 10: ratios to that of optax",
                lambda size, dtype: [
                    ("from Python", lbfgs_directions(size, dtype)[:2]),
                    ("in a loop", _looped(size, dtype)),
                ],
                lbfgs,
                rounds,
            ),
            _of_sizes(
                "BFGS update, in a loop: ratios to a product with the matrix",
                lambda size, dtype: [("", _products(size, dtype))],
                bfgs,
                rounds,
            ),
        ]


def _of_sizes(
    title: str,
    make: Callable[[int, Any], list[tuple[str, list[Contender]]]],
    sizes: Sequence[int],
    rounds: int,
) -> Table:
    """Compare two contenders for every size and dtype; the rows are those of the
    second."""
    timings = []
    for size in sizes:
        for dtype in (jnp.float32, jnp.float64):
            for how, contenders in make(size, dtype):
                table = compare("", contenders, rounds, 0.0)
                parts = f"n = {size}", jnp.dtype(dtype).name, how
                name = ", ".join(part for part in parts if part)
                timings.append(table.timings[1]._replace(name=name))
    return Table(title, timings)


def _looped(size: int, dtype: Any) -> list[Contender]:
    """Steps on a quadratic, in one program."""
    curvature = jnp.linspace(1.0, 10.0, size, dtype=dtype)

    def contender(name: str, tx: optax.GradientTransformation) -> Contender:
        def step(_: Any, carry: Any) -> Any:
            x, state = carry
            direction, state = tx.update(curvature * x, state, x)
            shorter = optax.tree.scale(-0.3, direction)
            return optax.apply_updates(x, shorter), state

        def steps(x: Any) -> Any:
            return jax.lax.fori_loop(0, ITERATIONS, step, (x, tx.init(x)))[0]

        return compiled(name, steps, jnp.ones(size, dtype))

    return [
        contender("optax", optax.scale_by_lbfgs(10)),
        contender("hessopt", hessopt.scale_by_lbfgs(10)),
    ]


def _products(size: int, dtype: Any) -> list[Contender]:
    """Products with a matrix, and as many updates, each in one program."""
    points = jax.random.normal(jax.random.key(0), (8, size), dtype)
    curvature = jnp.linspace(1.0, 10.0, size, dtype=dtype)
    matrix = jax.random.normal(jax.random.key(1), (size, size), dtype) / size
    tx = hessopt.scale_by_bfgs()
    count = 64

    def multiply(matrix: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, x: matrix @ x, x)

    def update(state: Any, x: Any) -> Any:
        return tx.update(curvature * x, state, x)[::-1]

    def updates(state: Any) -> Any:
        return jax.lax.scan(update, state, jnp.tile(points, (count // 8, 1)))

    carry, step = [tx.init(points[0])], jax.jit(updates, donate_argnums=0)
    found = compiled("update", updates, carry[0])

    def run() -> Any:
        carry[0], direction = step(carry[0])
        return direction

    return [
        compiled("product", multiply, matrix, points[0]),
        found._replace(run=run),
    ]
