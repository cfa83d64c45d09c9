"""`python -m benchmarks.bounded_references`: choose the problems with bounds, and run
them to the end for their references.

The list has CUTEst's bounded minimization and bounded quadratic problems of at most 200
variables, at the default size of sif2jax or at a smaller one. A problem is left out if
it has no bound, if its start meets criterion (a), or if no reference run ends at a
stationary point.
"""

import json
from typing import Any

import jax
import numpy as np

from benchmarks import race
from benchmarks.problems import bounded, sif

MAX_VARIABLES = 200
QUADRATIC = ("BQP1VAR", "BQPGABIM", "BQPGASIM", "BQPGAUSS", "CHENHARK", "CVXBQP1")
QUADRATIC += tuple(f"NCVXBQP{i}" for i in (1, 2, 3))
QUADRATIC += tuple(f"TORSION{i}" for i in "123456ABCDEF")
SIZES: dict[str, dict[str, int]] = {
    "BDEXP": {"N": 100},
    "CHARDIS0": {"n_charges": 50},
    "CHARDIS02": {"n_charges": 20},
    "CHENHARK": {"n": 100, "nfree": 50, "ndegen": 10},
    "CLPLATEA": {"n": 100, "P": 10},
    "CLPLATEB": {"n": 100, "P": 10},
    "CLPLATEC": {"n": 49, "P": 7},
    "CYCLOOCTLS": {"p": 20},
    "DEGDIAG": {"n_minus_1": 100},
    "DEGTRID": {"_n": 101},
    "DEGTRID2": {"_n": 51},
    "DIAGIQE": {"n": 100},
    "DIAGIQT": {"n": 50},
    "DIAGNQB": {"n": 100},
    "DIAGNQE": {"n": 50},
    "DIAGNQT": {"n": 100},
    "DIAGPQB": {"n": 50},
    "DIAGPQE": {"n": 100},
    "DIAGPQT": {"n": 100},
    "EXPLIN": {"N": 120, "M": 10},
    "EXPLIN2": {"N": 120, "M": 10},
    "HADAMALS": {"n": 10},
    "JANNSON3": {"N": 100},
    "JNLBRNG2": {"PT": 10, "PY": 10},
    "LINVERSE": {"N": 100},
    "NOBNDTOR": {"n": 100, "Q": 5},
    "NONSCOMP": {"n": 100},
    "OBSTCLAE": {"px": 10, "py": 10},
    "OBSTCLBL": {"px": 10, "py": 10},
    "QUDLIN": {"n": 120, "m": 60},
    "RAYBENDL": {"_nknots": 64},
    "RAYBENDS": {"_nknots": 32},
    "TORSION1": {"q": 5},
    "TORSION3": {"q": 5},
    "TORSION6": {"q": 5},
    "TORSIONB": {"q": 5},
    "TORSIOND": {"q": 5},
}
"""Arguments of the problems that have more variables by default."""
FITS = (
    "Chwirut2",
    "DanWood",
    "Eckerle4",
    "Gauss1",
    "Kirby2",
    "MGH17",
    "Misra1a",
    "Rat42",
    "Rat43",
    "Thurber",
)
RUNS = ("L-BFGS-B", "TNC", "trust-constr")
RESTARTS = 10
DAMPED_STEPS = 3000
TIGHT: dict[str, dict[str, Any]] = {
    "L-BFGS-B": {"ftol": 0.0, "gtol": 1e-12, "maxiter": 15_000, "maxfun": 100_000},
    "TNC": {"ftol": 0.0, "xtol": 0.0, "gtol": 0.0, "maxfun": 20_000},
    "trust-constr": {
        "gtol": 1e-12,
        "xtol": 1e-14,
        "barrier_tol": 1e-12,
        "maxiter": 1000,
    },
}


def candidates() -> list[tuple[str, str]]:
    """Return the names and kinds of the problems that may enter the list."""
    own = [
        (name, "bounded_minimisation")
        for name in sif.names("bounded_minimisation")
        if name != "OBSTCLBase"
    ]
    return sorted([*own, *((name, "quadratic_problems") for name in QUADRATIC)])


def end(name: str, kind: str, run: str) -> dict[str, Any]:
    """Return the value and the projected gradient at the end of a reference run, or why
    the problem does not suit the list."""
    problem = (
        bounded.fit(name)
        if kind == "fit"
        else bounded.minimization(name, kind, SIZES.get(name, {}))
    )
    start, lower, upper = map(np.asarray, problem[2:5])
    if start.size > MAX_VARIABLES:
        return {"unsuitable": f"{start.size} variables"}
    if not np.isfinite([lower, upper]).any():
        return {"unsuitable": "no bound"}
    value_and_grad = jax.jit(jax.value_and_grad(problem.value_fn))
    value, grad = value_and_grad(start)
    size = float(bounded.projected(start, grad, lower, upper))
    if not np.isfinite([value, size]).all():
        return {"unsuitable": "not finite at the start"}
    x = _polished(problem, _descended(problem, run))
    value, grad = value_and_grad(x)
    row = {"n": start.size, "f": float(value), "size_at_start": size}
    row["active"] = int(np.sum((x == lower) | (x == upper)))
    return row | {"pg": float(bounded.projected(x, grad, lower, upper))}


def _descended(problem: bounded.Bounded, run: str) -> np.ndarray:
    """Return the end of a method of SciPy, and of L-BFGS-B from there as long as it
    descends."""
    import scipy.optimize

    compiled = jax.jit(jax.value_and_grad(problem.value_fn))
    hessian = jax.jit(jax.hessian(problem.value_fn))
    lower, upper = np.asarray(problem.lower), np.asarray(problem.upper)

    def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = compiled(x)
        return float(value), np.asarray(grad)

    def ran(x: np.ndarray, method: str) -> np.ndarray:
        found = scipy.optimize.minimize(
            value_and_grad,
            x,
            jac=True,
            hess=(lambda x: np.asarray(hessian(x))) if method == RUNS[2] else None,
            method=method,
            bounds=np.column_stack((lower, upper)),
            options=TIGHT[method],
        )
        return np.clip(found.x, lower, upper)

    x = np.asarray(problem.start) if run == RUNS[0] else ran(problem.start, run)
    for _ in range(RESTARTS):
        new = ran(x, RUNS[0])
        if not value_and_grad(new)[0] < value_and_grad(x)[0]:
            break
        x = new
    return x


def _polished(problem: bounded.Bounded, x: np.ndarray) -> np.ndarray:
    """Return the point of the smallest projected gradient among some steps of Newton's
    method in the free variables, after damped steps as long as they descend."""
    lower, upper = np.asarray(problem.lower), np.asarray(problem.upper)
    value_and_grad = jax.value_and_grad(problem.value_fn)
    compiled = jax.jit(lambda x: (*value_and_grad(x), jax.hessian(problem.value_fn)(x)))

    def derivatives(x: np.ndarray) -> Any:
        return tuple(map(np.asarray, compiled(x)))

    def stepped(x: np.ndarray, grad: Any, hessian: Any, damping: float) -> np.ndarray:
        free = ~(((x <= lower) & (grad > 0)) | ((x >= upper) & (grad < 0)))
        values, vectors = np.linalg.eigh(hessian[np.ix_(free, free)])
        sizes = np.abs(values) if damping else values
        sizes = sizes + max(damping, 1e-16) * np.max(np.abs(values), initial=1e-300)
        step = vectors @ ((vectors.T @ grad[free]) / sizes)
        new = x.copy()
        new[free] = np.clip(x[free] - step, lower[free], upper[free])
        return new

    here, damping = derivatives(x), 1e-6
    for _ in range(DAMPED_STEPS):
        if not np.isfinite(here[2]).all() or damping > 1e3:
            break
        new = stepped(x, *here[1:], damping)
        there = derivatives(new)
        if there[0] < here[0]:
            x, here, damping = new, there, max(damping / 10, 1e-16)
        else:
            damping *= 10
    best, least, lowest = x, np.inf, float(here[0])
    for _ in range(20):
        size = float(bounded.projected(x, here[1], lower, upper))
        lowest = min(lowest, float(here[0]))
        is_higher = here[0] - lowest > 1e-12 * abs(lowest)
        if is_higher or not np.isfinite(here[2]).all():
            break
        if size < least:
            best, least = x, size
        x = stepped(x, *here[1:], 0.0)
        here = derivatives(x)
    return best


def reference(worker: race.Worker, name: str, kind: str) -> dict[str, Any]:
    """Return the lowest value and the smallest projected gradient of the reference runs,
    or why the problem does not suit the list."""
    ends = []
    for run in RUNS:
        row = worker.ask(end, name, kind, run)
        if "unsuitable" in row:
            return row
        if row.get("error", "").startswith("FileNotFoundError"):
            return {"unsuitable": "missing data"}
        if "f" in row and np.isfinite([row["f"], row["pg"]]).all():
            ends.append(row)
        elif run == RUNS[0]:
            return {"unsuitable": row.get("error", "no finite end").split(":")[0]}
    f_ref = min(row["f"] for row in ends)
    unit = max(1.0, abs(f_ref))
    lowest = [row for row in ends if row["f"] - f_ref <= 1e-9 * unit]
    best = min(lowest, key=lambda row: row["pg"])
    if best["pg"] > 1e-6 * unit:
        return {"unsuitable": f"projected gradient {best['pg']:.1e}"}
    if best["size_at_start"] <= max(1e-6 * unit, 10 * best["pg"]):
        return {"unsuitable": "the start meets criterion (a)"}
    facts = {"kind": kind, "n": best["n"], "f_ref": f_ref, "pg_floor": best["pg"]}
    if name in SIZES:
        facts["arguments"] = SIZES[name]
    return facts | {"active": best["active"]}


def main() -> None:
    """Write the list, or go on with it."""
    empty: dict[str, Any] = {
        "about": "Problems with bounds, and why others were left out; "
        "written by `python -m benchmarks.bounded_references`.",
        "problems": {},
        "fits": {},
        "unsuitable": {},
    }
    place = bounded.PLACE
    record = json.loads(place.read_text()) if place.exists() else empty
    worker = race.Worker()
    for name, kind in [*candidates(), *((name, "fit") for name in FITS)]:
        which = "fits" if kind == "fit" else "problems"
        if name in record[which] or name in record["unsuitable"]:
            continue
        found = reference(worker, name, kind)
        print(name, "chosen" if "f_ref" in found else found["unsuitable"], flush=True)
        if "f_ref" in found:
            record[which][name] = found
        else:
            record["unsuitable"][name] = found["unsuitable"]
        for part in ("problems", "fits", "unsuitable"):
            record[part] = dict(sorted(record[part].items()))
        place.write_text(json.dumps(record, indent=1) + "\n")
    worker.close()


if __name__ == "__main__":
    main()
