"""`python -m benchmarks.references`: choose the validation list of the CUTEst suite, and
run its problems to the end for their references.

The list has nonlinear equations and least squares, as half the sum of squares, and
problems with bounds, which are ignored, of at most 200 variables. It has no problem of
the public list, none of NIST and at most three of a family. A problem is left out if
no reference run ends at a finite stationary point.
"""

import json
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

import hessopt
from benchmarks import race
from benchmarks.problems import cutest, nist, sif

KINDS = ("nonlinear_equations", "bounded_minimisation")
MAX_VARIABLES = 200
MAX_OF_FAMILY = 3
MAX_GROWTH = 1e6
"""Largest parameter at the end, relative to the largest at the start plus 1."""
RUNS = (
    hessopt.trust_region_newton(),
    hessopt.trust_region_newton(step_bound="radius"),
    hessopt.newton(),
    hessopt.bfgs(formula="ssbroyden"),
)
EMPTY = {
    "about": "Problems that no default was tuned on, and why others were left out; "
    "written by `python -m benchmarks.references`.",
    "problems": {},
    "unsuitable": {},
}


def candidates() -> list[tuple[str, str]]:
    """Return the names and kinds of the problems that may enter the list."""
    known = {_stem(name) for name in (*cutest.names(), *map(str.upper, nist.names()))}
    known |= {"DANIWOOD"}  # NIST's DanWood
    families: dict[str, int] = {}
    found = []
    for kind in KINDS:
        for name in sif.names(kind):
            family = re.match(r"[A-Z]+?(?=\d|NE$|LS$|$)", name)
            key = family[0] if family else name
            if _stem(name) not in known and families.get(key, 0) < MAX_OF_FAMILY:
                families[key] = families.get(key, 0) + 1
                known.add(_stem(name))
                found.append((name, kind))
    return found


def _stem(name: str) -> str:
    """Return a name without the ending that tells the form of a problem."""
    return re.sub(r"(NE|LS|S)$", "", name)


def end(name: str, kind: str, run: int) -> dict[str, Any]:
    """Return the value and the gradient at the end of a reference run, or why the
    problem does not suit the list."""
    value_fn, start = cutest.objective(name, kind)
    if start.size > MAX_VARIABLES:
        return {"unsuitable": f"{start.size} variables"}
    found = hessopt.minimize(value_fn, start, RUNS[run], max_steps=3000, gtol=1e-14)
    farthest = float(jnp.max(jnp.abs(found.params)))
    return {
        "n": int(start.size),
        "f": float(found.value),
        "g": float(jnp.max(jnp.abs(found.grad))),
        "is_near": farthest <= MAX_GROWTH * (1 + float(jnp.max(jnp.abs(start)))),
    }


def reference(worker: race.Worker, name: str, kind: str) -> dict[str, Any]:
    """Return the lowest value and the smallest gradient of the reference runs, or why
    the problem does not suit the list."""
    ends = []
    for run in range(len(RUNS)):
        row = worker.ask(end, name, kind, run)
        if "unsuitable" in row or (not ends and "error" in row):
            return row
        if "f" in row and np.isfinite([row["f"], row["g"]]).all() and row["is_near"]:
            ends.append(row)
    if not ends:
        return {"unsuitable": "no finite end"}
    f_ref = min(row["f"] for row in ends)
    unit = max(1.0, abs(f_ref))
    g_floor = min(row["g"] for row in ends if row["f"] - f_ref <= 1e-9 * unit)
    if g_floor > 1e-6 * unit:
        return {"unsuitable": f"gradient {g_floor:.1e}"}
    return {"n": ends[0]["n"], "f_ref": f_ref, "g_floor": g_floor, "kind": kind}


def main() -> None:
    """Write the list, or go on with it."""
    place = pathlib.Path(cutest.__file__).with_name("validation.json")
    record = json.loads(place.read_text()) if place.exists() else dict(EMPTY)
    problems, unsuitable = record["problems"], record["unsuitable"]
    worker = race.Worker()
    for name, kind in candidates():
        if name in problems or name in unsuitable:
            continue
        found = reference(worker, name, kind)
        print(name, found, flush=True)
        if "f_ref" in found:
            problems[name] = found
        else:
            unsuitable[name] = found.get("unsuitable") or found["error"].split(":")[0]
        place.write_text(json.dumps(record, indent=1) + "\n")
    worker.close()


if __name__ == "__main__":
    main()
