"""Train a physics-informed network on the 3-D Poisson equation, and compare optimizers.

The network 3-32-32-1 (1217 parameters, float64) approximates the solution of
-div grad u = f in the unit cube. The loss is its residual on fixed points
(`benchmarks/problems/poisson.py`). Every optimizer starts from the same parameters and
takes the same number of steps at a cost of about one gradient each; Gauss-Newton takes a
fortieth of the steps. The residual at one point is a `hessopt.rowwise` model, so that
Gauss-Newton computes its Jacobian by rows, for the price of a few gradients. The table shows the
relative L2 error compared to the exact solution: Adam reaches one digit, BFGS three,
SSBroyden four. The figure shows the error against steps and seconds, and the best
network and its error on a slice through the middle of the cube.

    python -m examples.pinn_poisson                                    # all optimizers, about 7 minutes
    python -m examples.pinn_poisson --optimizers ssbroyden --steps 10000
"""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

import hessopt
from benchmarks.problems import poisson

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is set

OPTIMIZERS: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "adam": lambda steps: optax.adam(optax.cosine_decay_schedule(1e-2, steps)),
    "lbfgs": lambda steps: hessopt.lbfgs(),
    "bfgs": lambda steps: hessopt.bfgs(),
    "dfp": lambda steps: hessopt.bfgs(formula="dfp"),
    "ssbfgs": lambda steps: hessopt.bfgs(formula="ssbfgs"),
    "ssbroyden": lambda steps: hessopt.bfgs(formula="ssbroyden"),
    "gauss-newton": lambda steps: hessopt.trust_region_newton(
        curvature="gauss_newton", geodesic_acceleration=True
    ),
}

COST = {"gauss-newton": 40}
"""Number of steps that one step of a method counts for, if not one."""


class Run(NamedTuple):
    """The record of a run; lists have one entry per evaluation of the error."""

    steps: list[int]
    seconds: list[float]  # compilation not counted
    losses: list[float]
    errors: list[float]  # relative, L2
    solution: hessopt.Solution


def train(
    value_fn: Callable[..., jax.Array],
    params: Any,
    tx: optax.GradientTransformation,
    steps: int,
    every: int,
    data: dict[str, jax.Array] | None = None,
) -> Run:
    """Minimize with one optimizer, and record the error at regular intervals."""

    def look(solution: hessopt.Solution) -> None:
        nonlocal looking
        began = time.perf_counter()
        looks.append(
            (
                int(solution.steps),
                began - start - looking,
                float(solution.value),
                float(error(solution.params)),
            )
        )
        looking += time.perf_counter() - began

    error = jax.jit(poisson.error)
    for most in (1, steps):  # the first time to compile
        looks: list[tuple[int, float, float, float]] = []
        looking, start = 0.0, time.perf_counter()
        solution = hessopt.minimize(
            value_fn,
            params,
            tx,
            data=data,
            max_steps=most,
            gtol=0.0,
            log_every=every,
            callback=look,
        )
    at, seconds, losses, errors = (list(column) for column in zip(*looks, strict=True))
    return Run(at, seconds, losses, errors, solution)


def print_table(runs: dict[str, Run]) -> None:
    """Print one line per optimizer."""
    titles = (
        "optimizer",
        "relative error",
        "loss",
        "steps",
        "gradients",
        "seconds",
        "ended",
    )
    print(("{:>10}" + " {:>14}" * 5 + "  {}").format(*titles))
    for name, run in runs.items():
        ended = run.solution.reason
        print(
            f"{name:>10} {run.errors[-1]:14.2e} {run.losses[-1]:14.2e} {run.steps[-1]:14d} "
            f"{int(run.solution.evaluations):14d} {run.seconds[-1]:14.1f}  {ended}"
        )


def draw(runs: dict[str, Run], path: pathlib.Path) -> None:
    """Draw the error against steps and seconds, and the best network and its error on
    the slice z = 1/2."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    for name, run in runs.items():
        axes[0, 0].plot(run.steps, run.errors, label=name)
        axes[0, 1].plot(run.seconds, run.errors, label=name)
    for ax, label in zip(
        axes[0], ("steps", "seconds, compilation not counted"), strict=True
    ):
        ax.set(yscale="log", xlabel=label, ylabel="relative L2 error")
        ax.grid(alpha=0.3)
    axes[0, 0].legend()

    best = min(runs, key=lambda name: runs[name].errors[-1])
    line = jnp.linspace(0.0, 1.0, 101)
    x, y = jnp.meshgrid(line, line)
    slice_points = jnp.stack([x.ravel(), y.ravel(), jnp.full(x.size, 0.5)], axis=1)
    u = poisson.apply(runs[best].solution.params, slice_points)
    titles = (f"u by {best}, z = 1/2", "u - u*")
    for ax, field, title in zip(
        axes[1], (u, u - poisson.exact(slice_points)), titles, strict=True
    ):
        image = ax.pcolormesh(
            line, line, np.reshape(field, x.shape), shading="gouraud", rasterized=True
        )
        figure.colorbar(image, ax=ax)
        ax.set(title=title, xlabel="x", ylabel="y", aspect="equal")
    figure.suptitle("3-D Poisson, PINN 3-32-32-1")
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
        choices=OPTIMIZERS,
        default=list(OPTIMIZERS),
        metavar="NAME",
    )
    parser.add_argument("--steps", type=int, default=2000, help="of every optimizer")
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("figures"),
        help="folder for the figure",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few steps on few points, to see that it runs",
    )
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    where = poisson.points(50, 20) if args.quick else poisson.points()
    steps = min(args.steps, 4) if args.quick else args.steps

    value_fn, runs = poisson.by_rows(), {}
    for name in tqdm(args.optimizers, desc="optimizers"):
        own = max(steps // COST.get(name, 1), 1)
        runs[name] = train(
            value_fn,
            poisson.init(args.seed),
            OPTIMIZERS[name](own),
            own,
            max(own // 50, 1),
            where._asdict(),
        )
    print_table(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(runs, args.out / "pinn_poisson.png")
    print(f"figure: {args.out / 'pinn_poisson.png'}")


if __name__ == "__main__":
    main()
