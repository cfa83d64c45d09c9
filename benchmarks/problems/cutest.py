"""Unconstrained CUTEst problems, as `sif2jax` defines them, in float64, each from its
own start.

`cutest.json` holds, per problem, the lowest value `f_ref` and the smallest gradient
`g_floor` (largest entry) that tight reference runs reached. A run has solved a problem
by criterion (a) if `max|g| <= max(1e-6 max(1, |f_ref|), 10 g_floor)`, and by (b) if `f
- f_best <= 1e-6 max(1, |f_best|)`, with f_best the lowest of f_ref and all runs.
"""

import functools
import importlib
import importlib.util
import json
import pathlib
import re
import sys
import types
from typing import Any

from benchmarks.problems import Problem

PACKAGE = "sif2jax.cutest._unconstrained_minimisation"


def names() -> list[str]:
    """All problems of the list."""
    return list(_references())


def load(name: str) -> Problem:
    """Build one problem."""
    import jax.numpy as jnp
    from jax.flatten_util import ravel_pytree

    reference = _references()[name]
    problem = _class(name)()
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


def _class(name: str) -> Any:
    """The class of a problem, from its own module: to import all of sif2jax takes a
    minute."""
    folder = _packages()
    for file in sorted(folder.glob("*.py")):
        if not file.name.startswith("_") and re.search(
            rf"^class {name}\b", file.read_text(), re.MULTILINE
        ):
            return getattr(importlib.import_module(f"{PACKAGE}.{file.stem}"), name)
    raise LookupError(f"sif2jax has no unconstrained problem {name}")


@functools.cache
def _packages() -> pathlib.Path:
    """Stand in for the packages above the problems' modules, without what they import;
    return the modules' folder."""
    spec = importlib.util.find_spec("sif2jax")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the CUTEst problems come from sif2jax: pip install hessopt[bench]"
        )
    folder, path = pathlib.Path(spec.origin).parent, ""
    for part in PACKAGE.split("."):
        path = f"{path}.{part}".lstrip(".")
        folder = folder / part if path != "sif2jax" else folder
        package = types.ModuleType(path)
        package.__path__ = [str(folder)]
        sys.modules.setdefault(path, package)
    return folder
