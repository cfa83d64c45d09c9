"""NIST's reference data sets for nonlinear regression (StRD), each from its two starts,
in float64.

`nist.json` has the starts, the certified parameters and the certified sums of squared
residuals. The observations are those of `sif2jax`, taken from the constants of its
programs.

Source: NIST Statistical Reference Datasets, "Nonlinear Least Squares Regression".
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problems import sif

MAX_DIGITS = 11
"""Number of digits of the certified parameters."""


class Fit(NamedTuple):
    """One data set."""

    model_fn: Callable[[Any], Any]  # b (n,) -> values of the model (m,)
    y: Any  # (m,), observations
    starts: np.ndarray  # (2, n)
    certified: np.ndarray  # (n,)
    squares: float  # sum of squared residuals at the certified parameters


def names() -> list[str]:
    """All data sets."""
    return list(_facts())


def size(name: str) -> int:
    """The number of parameters of a data set."""
    return len(_facts()[name]["certified"])


def load(name: str) -> Fit:
    """Build one data set."""
    facts, model = _facts()[name], _MODELS[name]
    y, x = _observations(name)
    if name == "Nelson":
        y = np.log(y)
    x, y = jnp.asarray(x), jnp.asarray(y)
    return Fit(
        lambda b: model(b, x),
        y,
        np.array(facts["starts"]),
        np.array(facts["certified"]),
        facts["squares"],
    )


def right_digits(b: Any, certified: np.ndarray) -> float:
    """Return the smallest number of right digits of the parameters, at most 11."""
    b = np.asarray(b)
    if not np.isfinite(b).all():
        return 0.0
    errors = np.max(np.abs(b - certified) / np.abs(certified))
    return float(np.clip(-np.log10(max(errors, 1e-99)), 0.0, MAX_DIGITS))


@functools.cache
def _facts() -> dict[str, Any]:
    return json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())["sets"]


def _observations(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return y and x."""
    facts = _facts()[name]
    if "y" in facts:
        return np.array(facts["y"]), np.array(facts["x"])
    if name == "Lanczos1":
        x = 0.05 * np.arange(24)
        exact = 0.0951 * np.exp(-x) + 0.8607 * np.exp(-3 * x) + 1.5576 * np.exp(-5 * x)
        return np.array([float(f"{value:.12e}") for value in exact]), x
    *x, y = _constants(name)
    if not x:
        return y, np.arange(1.0, len(y) + 1)
    return y, x[0] if len(x) == 1 else np.stack(x)


def _constants(name: str) -> list[np.ndarray]:
    """Return the longest constants of the program of the residuals, which are x and y;
    of the sum of squares if sif2jax does not have the residuals."""
    name = {"DanWood": "DANIWOOD"}.get(name, name.upper())
    if name in sif.names("nonlinear_equations"):
        problem = sif.problem(name, "nonlinear_equations")
        program = jax.make_jaxpr(lambda b: problem.constraint(b)[0])(problem.y0)
    else:
        problem = sif.problem(f"{name}LS", "unconstrained_minimisation")
        program = jax.make_jaxpr(lambda b: problem.objective(b, problem.args))(
            problem.y0
        )
    found = [np.asarray(constant) for constant in program.consts]
    length = max(map(np.size, found))
    return [constant for constant in found if constant.size == length]


def _lanczos(b: Any, x: Any) -> Any:
    return sum(b[i] * jnp.exp(-b[i + 1] * x) for i in (0, 2, 4))


def _gauss(b: Any, x: Any) -> Any:
    first = b[2] * jnp.exp(-((x - b[3]) ** 2) / b[4] ** 2)
    second = b[5] * jnp.exp(-((x - b[6]) ** 2) / b[7] ** 2)
    return b[0] * jnp.exp(-b[1] * x) + first + second


def _cubics(b: Any, x: Any) -> Any:
    above = b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3
    return above / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def _enso(b: Any, x: Any) -> Any:
    def wave(period: Any, cosine: Any, sine: Any) -> Any:
        angle = 2 * jnp.pi * x / period
        return cosine * jnp.cos(angle) + sine * jnp.sin(angle)

    return b[0] + wave(12, b[1], b[2]) + wave(b[3], *b[4:6]) + wave(b[6], *b[7:9])


Model = Callable[[Any, Any], Any]
"""`(b, x) -> values`, with b of shape (n,) and x of shape (m,), or (2, m) for
Nelson."""

_MODELS: dict[str, Model] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": lambda b, x: b[0] * (1 - jnp.exp(-b[1] * x)),
    "Chwirut1": lambda b, x: jnp.exp(-b[0] * x) / (b[1] + b[2] * x),
    "Chwirut2": lambda b, x: jnp.exp(-b[0] * x) / (b[1] + b[2] * x),
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "ENSO": _enso,
    "Eckerle4": lambda b, x: b[0] / b[1] * jnp.exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "Gauss3": _gauss,
    "Hahn1": _cubics,
    "Kirby2": lambda b, x: (
        (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2)
    ),
    "Lanczos1": _lanczos,
    "Lanczos2": _lanczos,
    "Lanczos3": _lanczos,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * jnp.exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x: b[0] + b[1] * jnp.exp(-x * b[3]) + b[2] * jnp.exp(-x * b[4]),
    "Misra1a": lambda b, x: b[0] * (1 - jnp.exp(-b[1] * x)),
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x: b[0] - b[1] * x[0] * jnp.exp(-b[2] * x[1]),
    "Rat42": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)),
    "Rat43": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - jnp.arctan(b[2] / (x - b[3])) / jnp.pi,
    "Thurber": _cubics,
}
