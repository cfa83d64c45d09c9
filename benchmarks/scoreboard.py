"""The scoreboard: every method and peer over the four lists of problems, from their
records.

A problem counts as solved by the criteria of its list: gradient and value (`cutest`,
`validation`, `bounded`), or six right digits in every parameter (`nist`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first

from benchmarks import cutest, nist
from benchmarks.problems import nist as fits

Records = Mapping[str, dict[str, Any]]
"""What was measured, by suite."""


class Run(NamedTuple):
    """A run of a solver on a problem."""

    problem: str
    solver: str
    solved: bool
    evaluations: float  # inf where the run raised an error
    size: int  # number of parameters
    false: bool  # claims convergence and meets no criterion


LISTS = {
    "cutest": "CUTEst",
    "validation": "validation",
    "nist": "NIST",
    "bounded": "bounds",
}
"""Suites, and what their columns are called."""

OURS = "hessopt "

COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")
"""Of hessopt's methods; gray is left to other libraries."""


def measured(home: Records) -> dict[str, list[Run]]:
    """The runs of every list; a setting of NIST other than the tight one is left out."""
    runs = {name: _by_criteria(home[name]["runs"]) for name in LISTS if name != "nist"}
    runs["nist"] = [
        _by_digits(row)
        for row in home["nist"]["runs"]
        if not row["solver"].endswith("default gtol")
    ]
    return {name: runs[name] for name in LISTS}


def _by_criteria(rows: Sequence[dict[str, Any]]) -> list[Run]:
    sizes = {row["problem"]: row["n"] for row in rows if "n" in row}
    return [
        Run(
            row["problem"],
            row["solver"],
            cutest.both(row),
            row.get("evaluations", np.inf),
            sizes.get(row["problem"], 1),
            row.get("false", False),
        )
        for row in rows
    ]


def _by_digits(row: dict[str, Any]) -> Run:
    false = row["converged"] and row["digits"] < nist.WRONG
    return Run(
        f"{row['set']} from {row['start']}",
        row["solver"],
        row["digits"] >= nist.RIGHT,
        row["evaluations"],
        fits.size(row["set"]),
        false and row.get("gain", 1.0) > nist.MAX_GAIN,
    )


def solvers(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """All solvers, hessopt's first, each in the order of the lists."""
    names = list(dict.fromkeys(run.solver for own in runs.values() for run in own))
    return sorted(names, key=lambda name: not name.startswith(OURS))


def markdown(home: Records) -> list[str]:
    """The table of all solvers, what one side solves alone, and what each fails."""
    runs = measured(home)
    dates = ", ".join(
        f"{title} {home[name]['machine']['date']}" for name, title in LISTS.items()
    )
    return [
        f"Measured on {home['cutest']['machine']['device']}: {dates}.",
        "",
        *_solved(runs),
        "",
        "## Solved by one side only",
        "",
        *_alone(runs),
        *_failed(runs),
    ]


def _solved(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    counts = {
        name: len({run.problem for run in runs[name]}) for name in LISTS if runs[name]
    }
    titles = [f"{LISTS[name]}, of {count}" for name, count in counts.items()]
    lines = [
        f"| | {' | '.join(titles)} | false claims | evaluations over the fewest |",
        "|---" + "|---:" * (len(titles) + 2) + "|",
    ]
    fewest = {name: _fewest(own) for name, own in runs.items()}
    for solver in solvers(runs):
        own = {name: [r for r in runs[name] if r.solver == solver] for name in LISTS}
        cells = [
            str(sum(r.solved for r in own[name])) if own[name] else ""
            for name in counts
        ]
        judged = [r for name in ("nist", "bounded") for r in own[name]]
        ratios = [
            r.evaluations / fewest[name][r.problem]
            for name in LISTS
            for r in own[name]
            if r.solved
        ]
        cells += [
            str(sum(r.false for r in judged)) if judged else "",
            f"{np.median(ratios):.2f}" if ratios else "",
        ]
        lines += [f"| {solver} | {' | '.join(cells)} |"]
    return lines


def _fewest(runs: Sequence[Run]) -> dict[str, float]:
    """The fewest evaluations by which any solver has solved each problem."""
    fewest: dict[str, float] = {}
    for run in runs:
        if run.solved:
            spent = max(run.evaluations, 1)
            fewest[run.problem] = min(spent, fewest.get(run.problem, np.inf))
    return fewest


def _alone(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """The problems that only peers, only hessopt's methods, and no solver has solved."""
    lines = ["| | only other libraries | only hessopt | nobody |", "|---|---|---|---|"]
    for name, own in runs.items():
        every = list(dict.fromkeys(run.problem for run in own))
        ours = {r.problem for r in own if r.solved and r.solver.startswith(OURS)}
        theirs = {r.problem for r in own if r.solved and not r.solver.startswith(OURS)}
        cells = [
            _named([problem for problem in every if problem in kind])
            for kind in (theirs - ours, ours - theirs, set(every) - ours - theirs)
        ]
        lines += [f"| {LISTS[name]} | {' | '.join(cells)} |"]
    return lines


def _failed(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """A table of the problems that each solver has not solved, for every list."""
    lines: list[str] = []
    for name, own in runs.items():
        lines += [
            "",
            f"## Not solved: {LISTS[name]}",
            "",
            "| | problems |",
            "|---|---|",
        ]
        for solver in solvers({name: own}):
            failed = [r.problem for r in own if r.solver == solver and not r.solved]
            lines += [f"| {solver} | {_named(failed)} |"]
    return lines


def _named(problems: Sequence[str]) -> str:
    return f"{len(problems)}: {', '.join(problems)}" if problems else "none"


def figure(home: Records) -> Any:
    """Performance profile and data profile of every list; hessopt's methods in color,
    other libraries in gray with a mark of their own."""
    runs = measured(home)
    names = solvers(runs)
    styles = {name: _style(i, name) for i, name in enumerate(names)}
    grid, axes = plt.subplots(
        len(LISTS), 2, figsize=(11, 3.4 * len(LISTS)), layout="constrained"
    )
    for row, (name, own) in zip(axes, runs.items(), strict=True):
        count = len({run.problem for run in own})
        fewest = _fewest(own)
        scales: tuple[Callable[[Run], float], ...] = (
            lambda run, fewest=fewest: fewest[run.problem],
            lambda run: run.size + 1,
        )
        for axis, scale in zip(row, scales, strict=True):
            for solver in (s for s in names if any(r.solver == s for r in own)):
                costs = sorted(
                    run.evaluations / scale(run)
                    for run in own
                    if run.solver == solver and run.solved
                )
                shares = np.arange(1, len(costs) + 1) / count
                label = solver.removeprefix(OURS)
                axis.step(costs, shares, where="post", label=label, **styles[solver])
            axis.set(xscale="log", ylim=(0, 1))
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{LISTS[name]}: share solved")
        row[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[-1][0].set_xlabel("evaluations over the fewest of any solver")
    axes[-1][1].set_xlabel("evaluations per n + 1")
    return grid


def _style(index: int, solver: str) -> dict[str, Any]:
    if solver.startswith(OURS):
        return {"color": COLORS[index], "linewidth": 2.0}
    dashes = ("--", "-.", ":")[index % 3]
    return {
        "color": f"{0.1 + 0.08 * (index % 8):.2f}",
        "linestyle": dashes,
        "linewidth": 1.1,
    }
