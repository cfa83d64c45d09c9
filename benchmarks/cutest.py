"""The CUTEst suite: 63 small unconstrained problems, every solver from the same start
and to the same end."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first

from benchmarks import race
from benchmarks.problems import cutest

QUICK = (("ROSENBR", "BARD"), ("hessopt lbfgs", "SciPy L-BFGS-B"))


def measure(quick: bool) -> tuple[dict[str, Any], Any]:
    """Run the suite; return the record and the figure."""
    from benchmarks.solvers import SOLVERS

    names, solvers = QUICK if quick else (cutest.names(), tuple(SOLVERS))
    rows = race_through(names, solvers)
    worker = race.Worker()
    singles = [{"problem": name} | worker.ask(_single, name) for name in names]
    worker.close()
    title = f"CUTEst, {len(names)} unconstrained problems"
    return {"runs": rows, "float32": singles}, profiles(rows, solvers, title)


def _solve(name: str, solver: str) -> dict[str, Any]:
    problem = cutest.load(name)
    row, x = race.ran(problem, solver)
    if solver.startswith("hessopt") and not (
        race.flat(row) and race.low(row, problem.f_ref)
    ):
        row["beyond"] = _beyond(problem.value_fn, x)
    return row


def _beyond(value_fn: Any, x: Any) -> float:
    """The value that many more steps lead to."""
    import hessopt

    tx = hessopt.trust_region_newton()
    return float(hessopt.minimize(value_fn, x, tx, max_steps=10_000, gtol=1e-12).value)


def race_through(
    names: Sequence[str],
    solvers: Sequence[str],
    solve: Callable[[str, str], dict[str, Any]] = _solve,
) -> list[dict[str, Any]]:
    """Run every solver on every problem; return a row for each run."""
    worker, rows = race.Worker(), []
    for name in names:
        own = [
            {"problem": name, "solver": solver} | worker.ask(solve, name, solver)
            for solver in solvers
        ]
        race.judge(own)
        rows += own
        print(
            f"{name:12}",
            *(f"{row['solver']} {_mark(row)}" for row in own),
            sep="  ",
            flush=True,
        )
    worker.close()
    return rows


def _single(name: str) -> dict[str, Any]:
    """Run `hessopt.lbfgs` in float32 without a bound on the gradient, and compare its
    end with the rounding floor.

    The floor is the median, over 21 points that differ from the solution in float64 by
    one rounding, of the largest entry of the gradient in float32.
    """
    import jax
    import jax.numpy as jnp

    import hessopt

    problem = cutest.load(name)
    exact = hessopt.minimize(
        problem.value_fn, problem.start, hessopt.newton(), max_steps=2000, gtol=1e-14
    ).params
    exact = np.asarray(exact)
    with jax.enable_x64(False):
        value_fn = cutest.load(name).value_fn
        start = jnp.asarray(problem.start, jnp.float32)
        solution = hessopt.minimize(
            value_fn, start, hessopt.lbfgs(), max_steps=2000, gtol=0.0
        )
        size = jax.jit(lambda x: jnp.max(jnp.abs(jax.grad(value_fn)(x))))
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (21, len(exact)))
        near = exact * (1 + np.finfo(np.float32).eps * signs)
        floor = np.median([float(size(jnp.asarray(x, jnp.float32))) for x in near])
        size_here, value = float(size(solution.params)), float(solution.value)
    said = solution.reason
    return {
        "g": size_here,
        "floor": floor,
        "f": value,
        "f_ref": problem.f_ref,
        "said": said,
    }


def _single_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the runs in float32 came to."""
    ran = [row for row in rows if "g" in row]
    within = [row for row in ran if row["g"] <= 10 * row["floor"]]
    bad = [row["problem"] for row in ran if not np.isfinite([row["g"], row["f"]]).all()]
    false = [
        row["problem"] for row in ran if row["said"] == "GRADIENT" and row["g"] > 0
    ]
    lines = [
        "",
        "## hessopt lbfgs in float32",
        "",
        "Without a bound on the gradient. The floor is the gradient one ",
    ]
    lines[-1] += (
        "rounding away from the solution in float64, in float32 (median of 21 points). "
    )
    lines[-1] += (
        f"Within 10 floors: {len(within)} of {len(rows)}. Not finite: {', '.join(bad) or 'none'}. "
    )
    lines[-1] += (
        f"Success reported at a gradient that is not zero: {', '.join(false) or 'none'}."
    )
    lines += [
        "",
        "| | f | lowest known | max abs g | floor | ended |",
        "|---" + "|---:" * 4 + "|---|",
    ]
    for row in rows:
        numbers = [
            f"{row[key]:.6g}" if key in row else ""
            for key in ("f", "f_ref", "g", "floor")
        ]
        lines += [
            f"| {row['problem']} | {' | '.join(numbers)} | {row.get('said') or row.get('error', '')} |"
        ]
    return lines


def _why(row: dict[str, Any]) -> str:
    """Why a run is not solved, by where more steps would have led."""
    if "beyond" not in row:
        return row.get("error", "")
    if race.low(row, row["best"], "beyond"):
        return (
            "(a) was met before (b)"
            if row["a"]
            else "late: more steps end at the lowest value"
        )
    where = "in another minimum" if row["a"] else "not there yet"
    return f"{where}: more steps end at {row['beyond']:.6g}"


def _mark(row: dict[str, Any]) -> str:
    return row.get("error", "")[:12] or ("a" if row["a"] else "-") + (
        "b" if row["b"] else "-"
    )


def both(row: dict[str, Any]) -> bool:
    """Whether a run has solved its problem by both criteria."""
    return row["a"] and row["b"]


def _mean_ratio(
    rows: Sequence[dict[str, Any]], ours: str, theirs: str, what: str
) -> str:
    """The geometric mean of ours over theirs, over the problems that both have solved."""
    found = {(row["problem"], row["solver"]): row for row in rows if both(row)}
    shared = [
        name for name, solver in found if solver == ours and (name, theirs) in found
    ]
    ratios = [
        found[name, ours][what] / max(found[name, theirs][what], 1e-9)
        for name in shared
    ]
    return f"{np.exp(np.mean(np.log(ratios))):.2f} ({len(ratios)})" if ratios else ""


def markdown(record: dict[str, Any]) -> list[str]:
    """The tables of a record."""
    return [*compared(record["runs"]), *_single_lines(record["float32"])]


def compared(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The tables of the solvers side by side."""
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    return [*_solved(rows), *_ratios(rows, solvers), *_unsolved(rows, solvers)]


def solved(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[int, int, int]]:
    """How many problems each solver has solved by criterion (a), by (b) and by both."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["solver"], []).append(row)
    return {
        name: (sum(r["a"] for r in own), sum(r["b"] for r in own), sum(map(both, own)))
        for name, own in runs.items()
    }


def _solved(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "Criteria: (a) gradient, (b) value, as in `benchmarks/problems/cutest.py`. 2000 iterations at most and "
    ]
    lines[-1] += f"{race.TIME_LIMIT:.0f} s per run."
    lines += [
        "",
        "| | (a) | (b) | both | median compile s |",
        "|---" + "|---:" * 4 + "|",
    ]
    for solver, counts in solved(rows).items():
        compile_s = [
            row["compile_s"]
            for row in rows
            if row["solver"] == solver and "compile_s" in row
        ]
        cells = [*map(str, counts), f"{np.median(compile_s):.2f}" if compile_s else ""]
        lines += [f"| {solver} | " + " | ".join(cells) + " |"]
    return lines


def _ratios(rows: Sequence[dict[str, Any]], solvers: Sequence[str]) -> list[str]:
    lines: list[str] = []
    ours = [solver for solver in solvers if solver.startswith("hessopt")]
    for what, title in (
        ("evaluations", "Evaluations"),
        ("warm_s", "Seconds of a second run"),
    ):
        lines += ["", f"## {title}: ratio of each column to each row", ""]
        lines += [
            "Geometric means over the problems that both solve by both criteria (their number in brackets).",
            "",
        ]
        lines += [f"| | {' | '.join(ours)} |", "|---" + "|---:" * len(ours) + "|"]
        for solver in solvers:
            lines += [
                f"| {solver} | "
                + " | ".join(_mean_ratio(rows, own, solver, what) for own in ours)
                + " |"
            ]
    return lines


def _unsolved(rows: Sequence[dict[str, Any]], solvers: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for solver in solvers:
        if solver.startswith("hessopt"):
            lines += [
                "",
                f"## Not solved by {solver}",
                "",
                "| | f | lowest known | max abs g | bound | ended | why | solved by |",
            ]
            lines += ["|---" + "|---:" * 4 + "|---|---|---|"]
            for row in rows:
                if row["solver"] == solver and not both(row):
                    peers = [
                        r["solver"]
                        for r in rows
                        if r["problem"] == row["problem"] and both(r)
                    ]
                    numbers = [
                        f"{row[key]:.6g}" if key in row else ""
                        for key in ("f", "best", "g", "bound")
                    ]
                    words = [
                        row.get("said") or row.get("error", ""),
                        _why(row),
                        ", ".join(peers) or "none",
                    ]
                    lines += [
                        f"| {row['problem']} | {' | '.join([*numbers, *words])} |"
                    ]
    return lines


def profiles(rows: Sequence[dict[str, Any]], solvers: Sequence[str], title: str) -> Any:
    """Performance profile (evaluations over the fewest) and data profile (evaluations
    per n + 1)."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    spent = {
        (row["problem"], row["solver"]): row["evaluations"] for row in rows if both(row)
    }
    size = {row["problem"]: row["n"] for row in rows if "n" in row}
    figure, axes = plt.subplots(
        1, 2, figsize=(12, 4.5), sharey=True, layout="constrained"
    )
    fewest = {
        name: min((spent.get((name, s), np.inf) for s in solvers), default=np.inf)
        for name in names
    }
    scales: tuple[Callable[[str], float], ...] = (
        lambda name: fewest[name],
        lambda name: size.get(name, 1) + 1,
    )
    for axis, scale in zip(axes, scales, strict=True):
        for solver in solvers:
            costs = sorted(
                spent[name, solver] / scale(name)
                for name in names
                if (name, solver) in spent
            )
            width = 2.5 if solver.startswith("hessopt") else 1.2
            axis.step(
                costs,
                np.arange(1, len(costs) + 1) / len(names),
                where="post",
                label=solver,
                linewidth=width,
            )
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0].set(
        xlabel="evaluations over the fewest of any solver",
        ylabel="problems solved by both criteria",
    )
    axes[1].set(xlabel="evaluations per n + 1")
    axes[1].legend(fontsize=8)
    figure.suptitle(title)
    return figure
