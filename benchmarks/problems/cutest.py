"""CUTEst problems, as `sif2jax` defines them, in float64, each from its own start: the
public list of unconstrained problems, and a list for validation.

`cutest.json` and `validation.json` hold, per problem, the lowest value `f_ref` and the
smallest gradient `g_floor` (largest entry) that tight reference runs reached. A run has
solved a problem by criterion (a) if `max|g| <= max(1e-6 max(1, |f_ref|), 10 g_floor)`,
and by (b) if `f - f_best <= 1e-6 max(1, |f_best|)`, with f_best the lowest of f_ref and
all runs. Nonlinear equations and least squares are minimized as half the sum of squares,
and bounds are ignored.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from benchmarks.problems import Problem, sif

LISTS = ("cutest", "validation")


def names(which: str = "cutest") -> list[str]:
    """Return the problems of a list."""
    return list(_references(which))


def load(name: str) -> Problem:
    """Build a problem of one of the lists."""
    reference = next(found[name] for found in map(_references, LISTS) if name in found)
    value_fn, start = objective(
        name, reference.get("kind", "unconstrained_minimisation")
    )
    bound = max(1e-6 * max(1.0, abs(reference["f_ref"])), 10 * reference["g_floor"])
    return Problem(name, value_fn, start, bound, reference["f_ref"])


def objective(name: str, kind: str) -> tuple[Callable[[Any], Any], Any]:
    """Return the objective of one vector, and its start."""
    problem = sif.problem(name, kind)
    start, restore = ravel_pytree(problem.y0)
    if kind == "nonlinear_equations":

        def value_fn(x: Any) -> Any:
            residuals, _ = ravel_pytree(problem.constraint(restore(x))[0])
            return 0.5 * jnp.sum(residuals**2)

    else:

        def value_fn(x: Any) -> Any:
            return problem.objective(restore(x), problem.args)

    return value_fn, jnp.asarray(start, float)


@functools.cache
def _references(which: str) -> dict[str, Any]:
    place = pathlib.Path(__file__).with_name(f"{which}.json")
    return json.loads(place.read_text())["problems"]
