"""The Gauss-Newton suite: Levenberg and Marquardt's method on the 3-D Poisson problem,
and what its parts give."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import optax

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first

import hessopt
from benchmarks.problems import poisson
from examples.pinn_poisson import Run, train
from hessopt.kinds import subproblems

AIM = 4.1e-6
"""Relative L2 error that SSBroyden is published to reach in 10,000 iterations."""

SMALL = (3, 16, 16, 1)


def of_this_iterate(local: subproblems.LocalModel) -> subproblems.EigenModel:
    """The exact subproblem with a D that forgets."""
    nothing = jax.tree.map(jnp.zeros_like, local.scales)
    return subproblems.exact(local._replace(scales=nothing))


def gauss_newton(**arguments: Any) -> optax.GradientTransformation:
    """All of it, but for what arguments say."""
    options = {"curvature": "gauss_newton", "geodesic_acceleration": True} | arguments
    return hessopt.trust_region_newton(**options)


WHOLE = "all of it"
WITHOUT_ROOT = "eigenvectors of J'J instead of singular vectors of J"
VARIANTS: dict[str, Callable[[], optax.GradientTransformation]] = {
    WHOLE: gauss_newton,
    "no geodesic acceleration": lambda: gauss_newton(geodesic_acceleration=False),
    "a radius instead of the cubic term": lambda: gauss_newton(step_bound="radius"),
    "D of the iterate instead of the largest so far": lambda: gauss_newton(
        subproblem=subproblems.SubproblemSolver(
            of_this_iterate, scaled=True, complete=True
        )
    ),
    WITHOUT_ROOT: gauss_newton,
    "the Hessian instead of J'J": hessopt.trust_region_newton,
}
QUICK = (WHOLE, "D of the iterate instead of the largest so far", WITHOUT_ROOT)
"""Variants of a small run: those that are more than an option."""


def measure(quick: bool) -> tuple[dict[str, Any], Any]:
    """Run the suite; return the record and the figure."""
    jax.config.update("jax_enable_x64", True)
    sizes, where, steps, every = poisson.SIZES, poisson.points(), 360, 20
    small, fewer, short = SMALL, poisson.points(1000, 200), 200
    if quick:
        sizes, where, steps, every = (3, 4, 1), poisson.points(50, 20), 4, 2
        small, fewer, short = sizes, where, steps
    ablation = {
        name: _trained(name, small, fewer, short, every)
        for name in (QUICK if quick else VARIANTS)
    }
    # a small run has one problem
    whole = ablation[WHOLE] if quick else _trained(WHOLE, sizes, where, steps, every)
    record = {
        "problem": _problem(sizes, where),
        "whole": _row(WHOLE, whole),
        "small problem": _problem(small, fewer),
        "ablation": [_row(name, each) for name, each in ablation.items()],
    }
    return record, _figure({f"{WHOLE}, {'-'.join(map(str, sizes))}": whole} | ablation)


def _problem(sizes: Sequence[int], where: poisson.Points) -> str:
    network = "-".join(map(str, sizes))
    inside, boundary = len(where.inside), len(where.boundary)
    return f"network {network}, {inside} points inside, {boundary} on the boundary"


def _trained(
    name: str, sizes: tuple[int, ...], where: poisson.Points, steps: int, every: int
) -> Run:
    def loss_fn(parts: tuple[jax.Array, ...]) -> jax.Array:
        if name == WITHOUT_ROOT:
            parts = tuple(part[::-1] for part in parts)  # no longer seen to be diagonal
        return poisson.half_mean_squares(parts)

    jax.clear_caches()
    result = train(
        poisson.by_rows(loss_fn),
        poisson.init(0, sizes),
        VARIANTS[name](),
        steps,
        every,
        where._asdict(),
    )
    print(
        f"{name}, {sizes}: {result.errors[-1]:.2e} in {result.seconds[-1]:.0f} s",
        flush=True,
    )
    return result


def _row(name: str, result: Run) -> dict[str, Any]:
    return {
        "run": name,
        "steps": result.steps,
        "errors": result.errors,
        "losses": result.losses,
        "seconds": result.seconds,
        "values": int(result.solution.evaluations),
        "ended": result.solution.reason,
    }


def markdown(record: dict[str, Any]) -> list[str]:
    """The tables of a record."""
    whole = record["whole"]
    reached = [
        step
        for step, error in zip(whole["steps"], whole["errors"], strict=True)
        if error <= AIM
    ]
    lines = [
        "The 3-D Poisson problem of `benchmarks/problems/poisson.py`, float64, one seed, by"
    ]
    lines += [
        '`trust_region_newton(curvature="gauss_newton", geodesic_acceleration=True)`. Errors are relative, L2.',
        "",
    ]
    lines += [
        f"## The whole problem: {record['problem']}",
        "",
        "| steps | error | loss | seconds |",
    ]
    lines += ["|---:" * 4 + "|"]
    for row in zip(
        *(whole[key] for key in ("steps", "errors", "losses", "seconds")), strict=True
    ):
        lines += ["| {} | {:.2e} | {:.2e} | {:.0f} |".format(*row)]
    lines += [
        "",
        f"{AIM:.1e} is reached by step {reached[0]}."
        if reached
        else f"{AIM:.1e} is not reached.",
        "",
    ]
    lines += [f"## What each part gives: {record['small problem']}", ""]
    lines += [
        "| | error | loss | steps | trials per step | ms per step | ended |",
        "|---" + "|---:" * 5 + "|---|",
    ]
    for row in record["ablation"]:
        steps = row["steps"][-1]
        # each step also takes the gradient where it ends
        trials = (row["values"] - 1) / steps - 1
        cells = [
            f"{row['errors'][-1]:.2e}",
            f"{row['losses'][-1]:.2e}",
            f"{steps}",
            f"{trials:.2f}",
        ]
        lines += [
            f"| {row['run']} | {' | '.join(cells)} | {1e3 * row['seconds'][-1] / steps:.0f} | {row['ended']} |"
        ]
    return lines


def _figure(runs: dict[str, Run]) -> Any:
    """Every error against steps."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, result in runs.items():
        axis.plot(result.steps, result.errors, label=name)
    axis.axhline(AIM, color="black", linewidth=0.8, linestyle=":")
    axis.set(
        yscale="log",
        xlabel="steps",
        ylabel="relative L2 error",
        title="3-D Poisson by Gauss-Newton",
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure
