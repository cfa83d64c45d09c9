"""The PINN suite: what the BFGS family reaches on the 3-D Poisson problem, what it
costs, and when L-BFGS will do."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first

import hessopt
from benchmarks.problems import poisson
from examples.pinn_poisson import COST, OPTIMIZERS, Run, train

NAMES = tuple(name for name in OPTIMIZERS if name not in COST)
SEEDS = (0, 1, 2)
QUICK = ("adam", "bfgs")
"""Optimizers of a small run, which trains with the others elsewhere."""
HIDDEN = (7, 16, 29, 52, 97)  # widths for 100 to 10,000 parameters


CONCLUSIONS = """
- A step of BFGS costs what one of L-BFGS costs as long as the gradient is most of it: a product with the matrix takes
  n^2 multiplications, a gradient of this problem about 10^5 n. It is dearer where a step reads more than caches hold.
- For that, its error is smaller after as many steps, the more so the more parameters there are. L-BFGS forgets, and on
  a loss as ill-conditioned as this one the curvature that it has forgotten is what is missing.
- What BFGS asks for is memory, 8 n^2 bytes in float64. Where that does not fit, or where reading it takes longer than a
  gradient, L-BFGS remains.
- Self-scaling costs nothing, and gains again.
"""


def measure(quick: bool) -> tuple[dict[str, Any], Any]:
    """Run the suite; return the record and the figure."""
    jax.config.update("jax_enable_x64", True)
    steps, many, short, seeds = (
        (3, 4, 2, SEEDS[:1]) if quick else (2000, 10_000, 500, SEEDS)
    )
    where = poisson.points(50, 20) if quick else poisson.points()
    network = (3, HIDDEN[0], 1) if quick else poisson.SIZES
    runs = {
        f"{name}, seed {seed}": _trained(name, seed, where, steps, network)
        for seed in seeds
        for name in (QUICK if quick else NAMES)
    }
    for name in ("ssbfgs",) if quick else ("ssbfgs", "ssbroyden"):
        runs[f"{name}, {many} steps"] = _trained(name, 0, where, many, network)
    with jax.enable_x64(False):
        single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), where)
        runs["ssbroyden, float32"] = _trained("ssbroyden", 0, single, steps, network)
    beside = _beside_scipy(where, network, 3 if quick else 100, 2 if quick else 7)
    sizes = [
        {"n": n, "optimizer": name}
        | _row(
            _trained(name, 0, where, short, (3, width, width, 1)), _state_mb(name, n)
        )
        for width in (HIDDEN[:1] if quick else HIDDEN)
        for n in [_count((3, width, width, 1))]
        for name in (("lbfgs",) if quick else ("lbfgs", "bfgs", "ssbroyden"))
    ]
    rows = [{"run": name} | _row(each) for name, each in runs.items()]
    return {"runs": rows, "seconds per step": beside, "sizes": sizes}, _figure(runs)


def _trained(
    name: str, seed: int, where: Any, steps: int, sizes: tuple[int, ...]
) -> Run:
    def value_fn(params: Any) -> jax.Array:
        return poisson.loss(params, where)

    jax.clear_caches()
    result = train(
        value_fn,
        poisson.init(seed, sizes),
        OPTIMIZERS[name](steps),
        steps,
        max(steps // 50, 1),
    )
    print(
        f"{name}, seed {seed}, {sizes}: {result.errors[-1]:.2e} in {result.seconds[-1]:.0f} s",
        flush=True,
    )
    return result


def _row(result: Run, state_mb: float | None = None) -> dict[str, Any]:
    steps, solution = result.steps[-1], result.solution
    return {
        "error": result.errors[-1],
        "loss": result.losses[-1],
        "steps": steps,
        "gradients per step": int(solution.evaluations) / steps,
        "ms per step": 1e3 * result.seconds[-1] / steps,
        "ended": solution.reason,
    } | ({} if state_mb is None else {"state MB": state_mb})


def _count(sizes: Sequence[int]) -> int:
    return sum((m + 1) * n for m, n in itertools.pairwise(sizes))


def _state_mb(name: str, n: int) -> float:
    state = jax.eval_shape(OPTIMIZERS[name](1).init, jnp.zeros(n))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / 1e6


def _beside_scipy(
    where: poisson.Points, sizes: tuple[int, ...], steps: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds per step of BFGS, ours and SciPy's over the same compiled loss, in turns."""
    start, restore = ravel_pytree(poisson.init(0, sizes))

    def value_fn(x: jax.Array) -> jax.Array:
        return poisson.loss(restore(x), where)

    value_and_grad = jax.jit(jax.value_and_grad(value_fn))
    tx = hessopt.bfgs()

    def ours() -> int:
        return int(
            hessopt.minimize(value_fn, start, tx, max_steps=steps, gtol=0.0).steps
        )

    def scipys() -> int:
        def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, grad = value_and_grad(x)
            return float(value), np.asarray(grad)

        options = {"gtol": 0.0, "maxiter": steps}
        return scipy.optimize.minimize(
            fun, np.asarray(start), jac=True, method="BFGS", options=options
        ).nit

    def gradients() -> int:
        for _ in range(steps):
            value_and_grad(start)[0].block_until_ready()
        return steps

    contenders: dict[str, Callable[[], int]] = {
        "hessopt": ours,
        "SciPy": scipys,
        "one value and gradient": gradients,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            began = time.perf_counter()
            done = contender()
            if turn:
                seconds[name].append((time.perf_counter() - began) / done)
    return seconds


def of_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs that differ in nothing but the seed, by optimizer."""
    found = {
        name: [row for row in rows if row["run"].startswith(f"{name}, seed ")]
        for name in NAMES
    }
    return {name: own for name, own in found.items() if own}


def markdown(record: dict[str, Any]) -> list[str]:
    """The tables of a record."""
    rows, beside, sizes = (record[key] for key in ("runs", "seconds per step", "sizes"))
    by_seed = of_seeds(rows)
    seeds, steps = len(by_seed[NAMES[0]]), by_seed[NAMES[0]][0]["steps"]
    lines = [
        "The 3-D Poisson problem of `benchmarks/problems/poisson.py`; errors are relative, L2.",
        "",
    ]
    lines += [
        f"## Median of {seeds} seeds, {steps} steps",
        "",
        "| | error | loss | gradients per step |",
    ]
    lines += ["|---" + "|---:" * 3 + "|"]
    for name, own in by_seed.items():
        medians = [
            np.median([row[key] for row in own])
            for key in ("error", "loss", "gradients per step")
        ]
        lines += [
            f"| {name} | {medians[0]:.2e} | {medians[1]:.2e} | {medians[2]:.3f} |"
        ]
    lines += [
        "",
        "## Seconds per step, beside SciPy's BFGS over the same compiled loss, in turns",
        "",
    ]
    lines += ["| | milliseconds per step | ratio to SciPy |", "|---|---:|---:|"]
    for name, seconds in beside.items():
        ratio = np.median(np.array(seconds) / np.array(beside["SciPy"]))
        lines += [f"| {name} | {1e3 * np.median(seconds):.3g} | {ratio:.2f} |"]
    lines += ["", "## BFGS and L-BFGS by the number of parameters", ""]
    lines += [
        "One hidden width each, the same points and seed.",
        "",
        *_table(sizes),
        CONCLUSIONS,
    ]
    return [*lines, "## Every run", "", *_table(rows)]


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| " + " | ".join(rows[0]) + " |",
        "|---" + "|---:" * (len(rows[0]) - 1) + "|",
    ]
    for row in rows:
        cells = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()]
        lines += ["| " + " | ".join(cells) + " |"]
    return lines


def _figure(runs: dict[str, Run]) -> Any:
    """Every error against steps."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colors = {name: f"C{i}" for i, name in enumerate(NAMES)}
    for name, result in runs.items():
        method, what = name.split(", ")
        label = method if what == "seed 0" else what if what == "float32" else None
        axis.plot(
            result.steps,
            result.errors,
            color="black" if what == "float32" else colors[method],
            label=label,
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="steps",
        ylabel="relative L2 error",
        title="3-D Poisson, PINN 3-32-32-1",
    )
    axis.legend()
    axis.grid(alpha=0.3)
    return figure
