"""The bounded suite: CUTEst problems with bounds, and fits of NIST's data sets with an
active bound, every solver from the same start and to the same end.

A solver that claims convergence where neither criterion is met has made a false claim.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import cutest, race
from benchmarks.problems import bounded

Rows = Sequence[dict[str, Any]]
"""What runs spent and where they ended."""

BASE, FIT_BASE = "SciPy L-BFGS-B", "SciPy trf"
QUICK = (("HATFLDB", "HS3MOD"), ("hessopt lbfgs", BASE))
QUICK_FITS = (("Misra1a",), ("hessopt Gauss-Newton", FIT_BASE))


def measure(quick: bool) -> tuple[dict[str, Any], Any]:
    """Run the suite; return the record and the figure."""
    from benchmarks.bounded_solvers import FIT_SOLVERS, SOLVERS

    names, solvers = QUICK if quick else (bounded.names(), tuple(SOLVERS))
    fits, fitters = (
        QUICK_FITS if quick else (bounded.names(which="fits"), tuple(FIT_SOLVERS))
    )
    rows = race_through(names, solvers)
    title = f"CUTEst, {len(names)} problems with bounds"
    record = {"runs": rows, "fits": race_through(fits, fitters)}
    return record, cutest.profiles(rows, solvers, title)


def race_through(names: Sequence[str], solvers: Sequence[str]) -> list[dict[str, Any]]:
    """Run every solver on every problem; return a row for each run."""
    rows = cutest.race_through(names, solvers, _solve)
    for row in rows:
        row["half"] = bounded.half_of(row["problem"])
        row["false"] = row.get("converged", False) and not (row["a"] or row["b"])
    return rows


def _solve(name: str, solver: str) -> dict[str, Any]:
    """Run a solver on a problem; what it ends at is judged at the nearest point within
    the bounds."""
    import jax
    import jax.numpy as jnp

    from benchmarks.bounded_solvers import FIT_SOLVERS, SOLVERS

    problem = bounded.load(name)
    outcome, claim = (SOLVERS | FIT_SOLVERS)[solver](problem)
    lower, upper = problem.lower, problem.upper
    x = jnp.clip(jnp.asarray(outcome.x), lower, upper)
    value, grad = jax.value_and_grad(problem.value_fn)(x)
    spent = {key: what for key, what in outcome._asdict().items() if key != "x"}
    return {
        "n": x.size,
        "f_ref": problem.f_ref,
        "bound": problem.gradient,
        "f": float(value),
        "g": float(bounded.projected(x, grad, lower, upper)),
        "violation": float(jnp.max(jnp.abs(x - outcome.x))),
        "converged": claim,
    } | spent


def markdown(record: dict[str, Any]) -> list[str]:
    """The tables of a record."""
    lines = [
        "Criteria: (a) projected gradient, (b) value, as in "
        "`benchmarks/problems/bounded.py`. 2000 iterations at most and "
        f"{race.TIME_LIMIT:.0f} s per run. False: claims of convergence that meet "
        "neither.",
        "",
        *_compared(record["runs"], BASE),
        "",
        "## Fits with an active bound",
        "",
        *_compared(record["fits"], FIT_BASE),
        "",
        "## Evaluations per problem",
        "",
        "The letters are the criteria that the run meets.",
        "",
        *_each(record["runs"]),
        "",
        "## Evaluations per fit",
        "",
        *_each(record["fits"]),
    ]
    return lines


def _compared(rows: Rows, base: str) -> list[str]:
    """Table of what the solvers have solved, and of their costs relative to one."""
    halves = [half for half in bounded.HALVES if any(r["half"] == half for r in rows)]
    parts = {half: [row for row in rows if row["half"] == half] for half in halves}
    parts["all"] = list(rows)
    counts = [
        f"{name} {what}" for name in parts for what in ("(a)", "(b)", "both", "false")
    ]
    titles = [*counts, "evaluations", "warm seconds", "violation"]
    solved = {name: cutest.solved(own) for name, own in parts.items()}
    sizes = ", ".join(
        f"{len({row['problem'] for row in own})} ({name})"
        for name, own in parts.items()
    )
    lines = [
        f"Problems: {sizes}. Costs are median ratios to {base} over the problems that "
        "both solve by both criteria (their number in brackets).",
        "",
        f"| | {' | '.join(titles)} |",
        "|---" + "|---:" * len(titles) + "|",
    ]
    for solver in dict.fromkeys(row["solver"] for row in rows):
        cells = []
        for name, own in parts.items():
            false = sum(row["false"] for row in own if row["solver"] == solver)
            cells += [*map(str, solved[name][solver]), str(false)]
        cells += [
            _ratio(rows, solver, base, what) for what in ("evaluations", "warm_s")
        ]
        outside = [r["violation"] for r in rows if r["solver"] == solver and "f" in r]
        cells += [f"{max(outside):.1e}" if outside else ""]
        lines += [f"| {solver} | {' | '.join(cells)} |"]
    return lines


def _ratio(rows: Rows, ours: str, theirs: str, what: str) -> str:
    """The median ratio of a cost over the problems that both have solved."""
    found = {(r["problem"], r["solver"]): r[what] for r in rows if cutest.both(r)}
    shared = [n for n, solver in found if solver == ours and (n, theirs) in found]
    ratios = [found[n, ours] / max(found[n, theirs], 1e-9) for n in shared]
    return f"{np.median(ratios):.2f} ({len(ratios)})" if ratios else ""


def _each(rows: Rows) -> list[str]:
    """Table of the criteria and evaluations of each problem, by solver."""
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    lines = [f"| | half | n | {' | '.join(solvers)} |"]
    lines += ["|---|---" + "|---:" * (1 + len(solvers)) + "|"]
    runs: dict[str, Rows] = {}
    for row in rows:
        runs[row["problem"]] = [*runs.get(row["problem"], []), row]
    for name, own in runs.items():
        size = next((str(row["n"]) for row in own if "n" in row), "")
        cells = [own[0]["half"], size, *map(_cell, own)]
        lines += [f"| {name} | {' | '.join(cells)} |"]
    return lines


def _cell(row: dict[str, Any]) -> str:
    """What a run has met and spent, or why it has not ended."""
    if "f" not in row:
        return row["error"].split(":")[0]
    met = "a" * row["a"] + "b" * row["b"] or "none"
    return f"{met} {row['evaluations']}{', false' if row['false'] else ''}"
