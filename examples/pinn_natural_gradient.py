"""Train a physics-informed network on the 5-D Poisson equation by Gauss-Newton in sample
space, on points that are drawn anew for every step.

    -div grad u = pi^2 sum_i cos(pi x_i) on (0, 1)^5,    u = sum_i cos(pi x_i) on the boundary

The network 5-64-64-48-48-1 with tanh has 10,065 parameters (float64). A step of
Gauss-Newton sees 700 points, so that its system has 700 equations instead of 10,065; the
residual at a point is a `hessopt.rowwise` model, whose rows of the Jacobian are reverse
passes of single points. Adam sees 700 new points at each step too; L-BFGS and SSBroyden,
which compare gradients of successive steps, have 3500 fixed ones. All have the same
time, without compilation. The table and the figure show the relative L2 error on points
that no optimizer has seen.

    python -m examples.pinn_natural_gradient                  # about 25 minutes
    python -m examples.pinn_natural_gradient --seconds 60
"""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import optax
from tqdm import tqdm

import hessopt
from benchmarks.problems import poisson

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is set

DIMENSION = 5
SIZES = (DIMENSION, 64, 64, 48, 48, 1)


class Method(NamedTuple):
    """An optimizer, and the points that it sees."""

    # number of steps -> optimizer
    make: Callable[[jax.Array], optax.GradientTransformation]
    inside: int  # number of points inside
    boundary: int  # and on the boundary
    fixed: bool  # the same points for all steps
    block: int  # number of steps between two measurements of the error


def adam(steps: jax.Array) -> optax.GradientTransformation:
    """Adam, with a rate that falls along half a cosine."""
    return optax.adam(
        lambda count: 1.5e-3 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / steps, 1.0)))
    )


METHODS = {
    "gauss-newton": Method(lambda steps: hessopt.gauss_newton(), 600, 100, False, 5),
    "adam": Method(adam, 600, 100, False, 200),
    "lbfgs": Method(lambda steps: hessopt.lbfgs(), 3000, 500, True, 50),
    "ssbroyden": Method(
        lambda steps: hessopt.bfgs(formula="ssbroyden"), 3000, 500, True, 10
    ),
}


def exact(x: jax.Array) -> jax.Array:
    """The solution at points `(..., 5)`."""
    return jnp.sum(jnp.cos(jnp.pi * x), axis=-1)


def of_equation(params: Any, inside: jax.Array) -> jax.Array:
    """Residual of the equation at one point."""
    source = jnp.pi**2 * exact(inside)
    return poisson.laplacian(params, inside[None])[0] + source


def of_boundary(params: Any, boundary: jax.Array) -> jax.Array:
    """Error of the boundary value at one point."""
    return poisson.apply(params, boundary[None])[0] - exact(boundary)


VALUE_FN = hessopt.composite(
    (hessopt.rowwise(of_equation), hessopt.rowwise(of_boundary)),
    poisson.half_mean_squares,
)


def draw(key: jax.Array, inside: int, boundary: int) -> dict[str, jax.Array]:
    """Uniform points inside, and uniform points on random faces."""
    keys = jax.random.split(key, 4)
    x = jax.random.uniform(keys[0], (boundary, DIMENSION), float)
    axis = jax.random.randint(keys[1], (boundary,), 0, DIMENSION)
    side = jax.random.bernoulli(keys[2], shape=(boundary,)).astype(x.dtype)
    return {
        "inside": jax.random.uniform(keys[3], (inside, DIMENSION), float),
        "boundary": x.at[jnp.arange(boundary), axis].set(side),
    }


@jax.jit
def error(params: Any) -> jax.Array:
    """Relative L2 error on 20,000 random points."""
    x = jax.random.uniform(jax.random.key(2**20), (20_000, DIMENSION), float)
    u = exact(x)
    return jnp.linalg.norm(poisson.apply(params, x) - u) / jnp.linalg.norm(u)


class Run(NamedTuple):
    """The record of a run; lists have one entry per measurement of the error."""

    seconds: list[float]  # compilation and measurements not counted
    steps: list[int]
    errors: list[float]


def train(method: Method, sizes: tuple[int, ...], seed: int, seconds: float) -> Run:
    """Train a network for some seconds."""
    first = draw(jax.random.key(seed), method.inside, method.boundary)

    @jax.jit
    def block(params: Any, state: Any, keys: jax.Array, steps: jax.Array) -> Any:
        tx = optax.with_extra_args_support(method.make(steps))

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            data = first if method.fixed else draw(key, method.inside, method.boundary)
            value, grad = hessopt.value_and_grad_from_state(VALUE_FN)(
                params, state=state if method.fixed else (), **data
            )
            given = {"value": value, "grad": grad, "value_fn": VALUE_FN}
            updates, state = tx.update(grad, state, params, **given, **data)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), keys)[0]

    def keys(start: int) -> jax.Array:
        numbers = jnp.arange(start, start + method.block)
        return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(numbers)

    # the length of the schedule, from the time of a block; the first one compiles
    params, spent = poisson.init(seed, sizes), 0.0
    state = method.make(jnp.ones(())).init(params)
    for _ in range(2):
        began = time.perf_counter()
        jax.block_until_ready(block(params, state, keys(0), jnp.ones(())))
        spent = time.perf_counter() - began
    steps = jnp.full((), method.block * max(seconds / spent, 1.0))

    run, total, count = Run([], [], []), 0.0, 0
    with tqdm(total=round(seconds), unit="s", leave=False) as bar:
        while total < seconds:
            began = time.perf_counter()
            params, state = block(params, state, keys(count), steps)
            jax.block_until_ready(params)
            total, count = total + time.perf_counter() - began, count + method.block
            run.seconds.append(total)
            run.steps.append(count)
            run.errors.append(float(error(params)))
            bar.update(min(round(total), bar.total) - bar.n)
    return run


def print_table(runs: dict[str, Run]) -> None:
    """Print one line per optimizer."""
    print(f"{'optimizer':>12} {'relative error':>15} {'steps':>8} {'seconds':>8}")
    for name, run in runs.items():
        print(
            f"{name:>12} {run.errors[-1]:15.2e} {run.steps[-1]:8d} {run.seconds[-1]:8.0f}"
        )


def draw_figure(runs: dict[str, Run], path: pathlib.Path) -> None:
    """Draw the error against seconds."""
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, run in runs.items():
        ax.plot(run.seconds, run.errors, label=f"{name}, {run.steps[-1]} steps")
    ax.set(
        yscale="log",
        xlabel="seconds, compilation not counted",
        ylabel="relative L2 error",
        title="5-D Poisson, PINN 5-64-64-48-48-1",
    )
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
    )
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="of every optimizer"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the parameters and of the points"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("figures"),
        help="folder for the figure",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few steps on few points, to see that it runs",
    )
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    runs, sizes, seconds = {}, SIZES, args.seconds
    for name in args.optimizers:
        method = METHODS[name]
        if args.quick:
            sizes, seconds = (DIMENSION, 8, 8, 1), 0.01
            method = method._replace(inside=12, boundary=6, block=2)
        runs[name] = train(method, sizes, args.seed, seconds)
        print(f"{name}: {runs[name].errors[-1]:.2e}")
    print_table(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_figure(runs, args.out / "pinn_natural_gradient.png")
    print(f"figure: {args.out / 'pinn_natural_gradient.png'}")


if __name__ == "__main__":
    main()
