"""The NIST suite: nonlinear regression from both starts of each data set, by every
method, SciPy and optimistix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first

import hessopt
from benchmarks.problems import nist

MAX_STEPS = 2000
GTOL = 1e-12
RIGHT, WRONG = 6, 4
"""Digits from which a fit counts as solved, and below which a claim of convergence is
examined."""

MAX_GAIN = 1e-6
"""Largest relative gain of a further run from another stationary point."""

QUICK = (("Misra1a", "Rat42"), ("hessopt Gauss-Newton", "SciPy lm"))


class Result(NamedTuple):
    """The end of a run."""

    b: np.ndarray  # parameters
    evaluations: int  # of the residuals, with or without derivatives
    ended: str
    converged: bool  # the solver's own verdict


Solver = Callable[[nist.Fit, Any], Callable[[np.ndarray], Result]]
"""`(fit, value_fn) -> run`, where `run(start)` is called for each start."""


def driven(
    make: Callable[[], optax.GradientTransformation], gtol: float = GTOL
) -> Solver:
    """Return the solver of a transformation in `hessopt.minimize`."""

    def prepare(fit: nist.Fit, value_fn: Any) -> Callable[[np.ndarray], Result]:
        tx = make()

        def run(start: np.ndarray) -> Result:
            solution = hessopt.minimize(
                value_fn, jnp.asarray(start), tx, max_steps=MAX_STEPS, gtol=gtol
            )
            return Result(
                np.asarray(solution.params),
                int(solution.evaluations),
                str(solution.reason),
                bool(solution.converged),
            )

        return run

    return prepare


def scipy_solver(method: str) -> Solver:
    """Return `scipy.optimize.least_squares` with exact Jacobians and its tightest
    tolerances."""

    def prepare(fit: nist.Fit, value_fn: Any) -> Callable[[np.ndarray], Result]:
        from scipy.optimize import least_squares

        residuals = jax.jit(lambda b: fit.model_fn(b) - fit.y)
        jacobian = jax.jit(jax.jacfwd(lambda b: fit.model_fn(b) - fit.y))

        def finite_jacobian(b: np.ndarray) -> Any:
            return np.nan_to_num(jacobian(b))

        options: dict[str, Any] = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15)
        options |= {"jac": finite_jacobian, "max_nfev": 10 * MAX_STEPS}

        def run(start: np.ndarray) -> Result:
            with np.errstate(all="ignore"):
                found = least_squares(
                    lambda b: np.nan_to_num(residuals(b), posinf=1e200, neginf=-1e200),
                    start,
                    method=method,
                    x_scale="jac",
                    **options,
                )
            return Result(found.x, found.nfev, f"status {found.status}", found.success)

        return run

    return prepare


def levenberg_marquardt(fit: nist.Fit, value_fn: Any) -> Callable[[np.ndarray], Result]:
    """Levenberg and Marquardt's method of optimistix; a step evaluates once."""
    import optimistix

    solver = optimistix.LevenbergMarquardt(rtol=1e-12, atol=1e-12)

    @jax.jit
    def solve(start: Any) -> Any:
        found = optimistix.least_squares(
            lambda b, _: fit.model_fn(b) - fit.y,
            solver,
            start,
            max_steps=10 * MAX_STEPS,
            throw=False,
        )
        converged = found.result == optimistix.RESULTS.successful
        return found.value, found.stats["num_steps"], converged

    def run(start: np.ndarray) -> Result:
        b, steps, converged = solve(jnp.asarray(start))
        return Result(np.asarray(b), int(steps), "", bool(converged))

    return run


GAUSS_NEWTON: dict[str, Any] = {"curvature": "gauss_newton"}

SOLVERS: dict[str, Solver] = {
    "hessopt Gauss-Newton": driven(lambda: hessopt.trust_region_newton(**GAUSS_NEWTON)),
    "hessopt Gauss-Newton, accelerated": driven(
        lambda: hessopt.trust_region_newton(geodesic_acceleration=True, **GAUSS_NEWTON)
    ),
    "hessopt Gauss-Newton, default gtol": driven(
        lambda: hessopt.trust_region_newton(**GAUSS_NEWTON), gtol=1e-6
    ),
    "hessopt trust_region_newton": driven(hessopt.trust_region_newton),
    "hessopt trust_region_newton, default gtol": driven(
        hessopt.trust_region_newton, gtol=1e-6
    ),
    "hessopt newton": driven(hessopt.newton),
    "hessopt newton_cg": driven(hessopt.newton_cg),
    "hessopt ssbroyden": driven(lambda: hessopt.bfgs(formula="ssbroyden")),
    "hessopt bfgs": driven(hessopt.bfgs),
    "hessopt lbfgs": driven(hessopt.lbfgs),
    "optax lbfgs": driven(optax.lbfgs),
    "SciPy lm": scipy_solver("lm"),
    "SciPy trf": scipy_solver("trf"),
    "optimistix LevenbergMarquardt": levenberg_marquardt,
}


def measure(quick: bool) -> tuple[dict[str, Any], Any]:
    """Run the suite; return the record and the figure."""
    jax.config.update("jax_enable_x64", True)
    names, solvers = QUICK if quick else (tuple(nist.names()), tuple(SOLVERS))
    rows = []
    for name in names:
        own = [row for solver in solvers for row in _rows(name, solver)]
        rows += own
        print(
            f"{name:9}",
            *(f"{row['digits']:.1f}{'c' * row['converged']}" for row in own),
            flush=True,
        )
        jax.clear_caches()
    return {"runs": rows}, _figure(rows)


def _rows(name: str, solver: str) -> list[dict[str, Any]]:
    """Run a solver from both starts."""
    fit = nist.load(name)
    value_fn = hessopt.composite(
        lambda b: fit.model_fn(b) - fit.y, lambda r: 0.5 * jnp.sum(r**2)
    )
    run, rows = SOLVERS[solver](fit, value_fn), []
    for index, start in enumerate(fit.starts):
        found = run(start)
        digits = nist.right_digits(found.b, fit.certified)
        row = {
            "set": name,
            "start": index + 1,
            "solver": solver,
            "digits": digits,
            "evaluations": found.evaluations,
            "ended": found.ended,
            "converged": bool(found.converged),
        }
        if found.converged and digits < WRONG and solver.startswith("hessopt"):
            row["gain"] = _gain(value_fn, found.b)
        rows.append(row)
    return rows


def _gain(value_fn: Any, b: np.ndarray) -> float:
    """Return the relative decrease of the value in a further run without a bound on the
    gradient; it is small at another stationary point."""
    start = jnp.asarray(b)
    more = hessopt.minimize(
        value_fn, start, hessopt.newton(), max_steps=MAX_STEPS, gtol=0.0
    )
    before, after = float(value_fn(start)), float(more.value)
    return (before - after) / abs(before)


def markdown(record: dict[str, Any]) -> list[str]:
    """The tables of a record."""
    rows = record["runs"]
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    lines = [
        f"At most {MAX_STEPS} steps, `gtol={GTOL:g}`. Digits: the smallest number of right"
    ]
    lines += [
        "digits of a parameter. False: claims of convergence with fewer than "
        f"{WRONG} digits; in brackets those at another stationary point, from which a",
        f"further run with `gtol=0` lowers the value by at most {MAX_GAIN:g} of it.",
        "",
        f"| | at least {RIGHT} digits | at least {WRONG} | false | median evaluations |",
        "|---" + "|---:" * 4 + "|",
    ]
    for solver in solvers:
        own = [row for row in rows if row["solver"] == solver]
        claims = [row for row in own if row["converged"] and row["digits"] < WRONG]
        elsewhere = [row for row in claims if row.get("gain", 1.0) <= MAX_GAIN]
        cells = [
            f"{sum(row['digits'] >= RIGHT for row in own)} of {len(own)}",
            str(sum(row["digits"] >= WRONG for row in own)),
            f"{len(claims) - len(elsewhere)} ({len(elsewhere)})",
            f"{np.median([row['evaluations'] for row in own]):.0f}",
        ]
        lines += [f"| {solver} | {' | '.join(cells)} |"]
    lines += ["", "## Digits, and evaluations in brackets", ""]
    lines += [
        f"| | {' | '.join(solvers)} |",
        "|---" + "|---:" * len(solvers) + "|",
    ]
    found = {(row["set"], row["start"], row["solver"]): row for row in rows}
    for name, start in dict.fromkeys((row["set"], row["start"]) for row in rows):
        cells = [_cell(found[name, start, solver]) for solver in solvers]
        lines += [f"| {name}, start {start} | {' | '.join(cells)} |"]
    return lines


def _cell(row: dict[str, Any]) -> str:
    claim = "" if row["converged"] or row["digits"] >= RIGHT else ", not converged"
    return f"{row['digits']:.1f} ({row['evaluations']}){claim}"


def _figure(rows: list[dict[str, Any]]) -> Any:
    """The number of fits with at least six digits against evaluations; peers are
    black."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    solvers = dict.fromkeys(row["solver"] for row in rows)
    shown = [solver for solver in solvers if not solver.endswith("default gtol")]
    ours = [solver for solver in shown if solver.startswith("hessopt")]
    peers = [solver for solver in shown if solver not in ours]
    styles = [(f"C{i}", "-") for i in range(len(ours))]
    styles += [("black", style) for style in ("-", "--", "-.", ":")][: len(peers)]
    for solver, (colour, style) in zip([*ours, *peers], styles, strict=True):
        own = [row for row in rows if row["solver"] == solver]
        spent = sorted(row["evaluations"] for row in own if row["digits"] >= RIGHT)
        counts = np.arange(1, len(spent) + 1)
        axis.step(
            spent, counts, where="post", label=solver, color=colour, linestyle=style
        )
    axis.set(
        xscale="log",
        xlabel="evaluations",
        ylabel=f"fits with at least {RIGHT} right digits",
        title="NIST, nonlinear regression from both starts",
    )
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    return figure
