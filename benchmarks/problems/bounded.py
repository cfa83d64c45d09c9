"""Problems with bounds, in float64, each from its own start projected into the bounds:
CUTEst's bounded minimization as `sif2jax` defines it, and fits of NIST's data sets with
an active bound.

`bounded.json` holds, per problem, the lowest value `f_ref` and the smallest projected
gradient `pg_floor` that the runs of `python -m benchmarks.bounded_references` reached,
and the number of parameters at a bound there, `active`.
The projected gradient is `x - clip(x - g, lower, upper)`, and its size is its largest
entry. A run has solved a problem by criterion (a) if the size is at most
`max(1e-6 max(1, |f_ref|), 10 pg_floor)`, and by (b) as in `cutest.py`. Every second
problem is for development, the others are for judgement.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import hessopt
from benchmarks.problems import nist, sif

HALVES = ("development", "judgement")
PLACE = pathlib.Path(__file__).with_suffix(".json")
ACTIVE, WIDTH = 0.9, 10.0
"""Bound on the first parameter of a fit, and the largest ratio of the others to the
certified ones."""


class Bounded(NamedTuple):
    """An objective with bounds, its start, and what counts as solved."""

    name: str
    value_fn: Any  # (n,) -> ()
    start: Any  # (n,), within the bounds
    lower: Any  # (n,)
    upper: Any  # (n,)
    gradient: float  # bound on the largest entry of the projected gradient
    f_ref: float  # lowest value that is known
    residual_fn: Callable[[Any], Any] | None  # (n,) -> (m,), of a fit


def names(half: str | None = None, which: str = "problems") -> list[str]:
    """Return the problems, or the fits, of a half or of both."""
    if half is not None and half not in HALVES:
        raise ValueError(f"half must be one of {HALVES}, got {half!r}")
    found = sorted(_record()[which])
    return found if half is None else found[HALVES.index(half) :: 2]


def half_of(name: str) -> str:
    """Return the half that a problem or a fit belongs to."""
    return next(
        half
        for half in HALVES
        for which in ("problems", "fits")
        if name in names(half, which)
    )


def load(name: str) -> Bounded:
    """Build a problem or a fit."""
    record = _record()
    if name in record["fits"]:
        facts, parts = record["fits"][name], fit(name)
    else:
        facts = record["problems"][name]
        parts = minimization(name, facts["kind"], facts.get("arguments", {}))
    bound = max(1e-6 * max(1.0, abs(facts["f_ref"])), 10 * facts["pg_floor"])
    return parts._replace(gradient=bound, f_ref=facts["f_ref"])


def minimization(name: str, kind: str, arguments: Mapping[str, int]) -> Bounded:
    """Build a problem of CUTEst without its references."""
    problem = sif.problem(name, kind, **arguments)
    start, restore = ravel_pytree(problem.y0)
    lower, upper = (
        jnp.broadcast_to(ravel_pytree(bound)[0], start.shape).astype(float)
        for bound in problem.bounds
    )

    def value_fn(x: Any) -> Any:
        return problem.objective(restore(x), problem.args)

    start = jnp.clip(jnp.asarray(start, float), lower, upper)
    return Bounded(name, value_fn, start, lower, upper, 0.0, 0.0, None)


def fit(name: str) -> Bounded:
    """Build a fit without its references.

    The parameters z are relative to the certified ones, and the residuals to their norm
    there. The first entry of z is at most 0.9, all are between 0.1 and 10.
    """
    data = nist.load(name)
    certified = jnp.asarray(data.certified)
    scale = np.sqrt(data.squares)

    def residual_fn(z: Any) -> Any:
        return (data.model_fn(certified * z) - data.y) / scale

    value_fn = hessopt.composite(residual_fn, lambda r: 0.5 * jnp.sum(r**2))
    lower = jnp.full(certified.shape, 1 / WIDTH)
    upper = jnp.full(certified.shape, WIDTH).at[0].set(ACTIVE)
    start = jnp.clip(data.starts[0] / certified, lower, upper)
    return Bounded(name, value_fn, start, lower, upper, 0.0, 0.0, residual_fn)


def projected(x: Any, grad: Any, lower: Any, upper: Any) -> Any:
    """Return the largest entry of the projected gradient."""
    return jnp.max(jnp.abs(x - jnp.clip(x - grad, lower, upper)))


@functools.cache
def _record() -> dict[str, Any]:
    """Return what the file of references holds."""
    return json.loads(PLACE.read_text())
