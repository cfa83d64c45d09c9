"""Unconstrained CUTEst problems, as `sif2jax` defines them, in float64, each from its
own start.

`cutest.json` holds, per problem, the lowest value `f_ref` and the smallest gradient
`g_floor` (largest entry) that tight reference runs reached. A run has solved a problem
by criterion (a) if `max|g| <= max(1e-6 max(1, |f_ref|), 10 g_floor)`, and by (b) if `f
- f_best <= 1e-6 max(1, |f_best|)`, with f_best the lowest of f_ref and all runs.
"""

import functools
import json
import pathlib

from benchmarks.problems import Problem, sif


def names() -> list[str]:
    """All problems of the list."""
    return list(_references())


def load(name: str) -> Problem:
    """Build one problem."""
    import jax.numpy as jnp
    from jax.flatten_util import ravel_pytree

    reference = _references()[name]
    problem = sif.problem(name, "unconstrained_minimisation")
    start, restore = ravel_pytree(problem.y0)
    args = problem.args
    bound = max(1e-6 * max(1.0, abs(reference["f_ref"])), 10 * reference["g_floor"])
    return Problem(
        name,
        lambda x: problem.objective(restore(x), args),
        jnp.asarray(start, float),
        bound,
        reference["f_ref"],
    )


@functools.cache
def _references() -> dict[str, dict[str, float]]:
    return json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())[
        "problems"
    ]
