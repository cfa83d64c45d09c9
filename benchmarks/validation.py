"""The validation suite: problems of CUTEst that no default was tuned on.

Nonlinear equations and least squares, and problems with bounds, which are ignored; their
list is chosen by `python -m benchmarks.references`. The solvers are hessopt's and, of each
class, the peers that do best on the public list.
"""

from typing import Any

from benchmarks import cutest
from benchmarks.problems import cutest as problems

SOLVERS = (
    "hessopt lbfgs",
    "optax lbfgs",
    "SciPy L-BFGS-B",
    "hessopt bfgs",
    "hessopt ssbroyden",
    "optimistix BFGS",
    "SciPy BFGS",
    "hessopt newton",
    "hessopt trust_region_newton",
    "hessopt newton_cg",
    "SciPy trust-exact",
)
QUICK = (("BOOTH", "BOX2"), ("hessopt lbfgs", "SciPy L-BFGS-B"))


def measure(quick: bool) -> tuple[dict[str, Any], Any]:
    """Run the suite; return the record and the figure."""
    names, solvers = QUICK if quick else (problems.names("validation"), SOLVERS)
    rows = cutest.race_through(names, solvers)
    title = f"Validation, {len(names)} problems of CUTEst"
    return {"runs": rows}, cutest.profiles(rows, solvers, title)


def markdown(record: dict[str, Any]) -> list[str]:
    """The tables of a record."""
    return cutest.compared(record["runs"])
