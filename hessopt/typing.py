"""Names for the arrays and functions that every signature of hessopt speaks of."""

import enum
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Params: TypeAlias = Any
"""A pytree of floating or complex arrays."""

ValueFn: TypeAlias = Callable[..., jax.Array]
"""The objective, `value_fn(params, **data)`: a real scalar, never `(value, aux)`."""

Vector: TypeAlias = jax.Array
"""A real array of shape `(n,)`."""

Matrix: TypeAlias = jax.Array
"""A real array of shape `(n, n)`."""


class StepStatus(enum.IntFlag):
    """What happened during one update. The facts can co-occur; states hold them as one
    int32.

    Example:
      >>> status = StepStatus.NEGATIVE_CURVATURE | StepStatus.NOT_DESCENT
      >>> StepStatus.NOT_DESCENT in status
      True
    """

    OK = 0
    """None of what follows."""
    NONFINITE = enum.auto()
    """A value, gradient or curvature was inf or NaN; what depended on it was left out."""
    NOT_DESCENT = enum.auto()
    """The direction points uphill, or along a contour."""
    SEARCH_FAILED = enum.auto()
    """No trial step was accepted."""
    PAIR_SKIPPED = enum.auto()
    """A secant pair failed the curvature test and was not used."""
    MEMORY_RESET = enum.auto()
    """The quasi-Newton memory was emptied."""
    FACTORIZATION_FAILED = enum.auto()
    """A matrix could not be factorised; its block of the update is an older one's, or
    zero."""
    NEGATIVE_CURVATURE = enum.auto()
    """The curvature matrix, damping included, is known not to be positive definite."""
    UNBOUNDED_MODEL = enum.auto()
    """The local model has no minimiser."""
    STEP_REJECTED = enum.auto()
    """The trial step was worse than none and was not taken."""
    RATE_KEPT = enum.auto()
    """The model gave no usable rate; the last one was kept."""
    SAFEGUARDED = enum.auto()
    """The safeguard shortened the step."""
    NO_CURVATURE = enum.auto()
    """The curvature matrix is zero: the step has no length of its own."""
    FAILURES = (
        NONFINITE
        | NOT_DESCENT
        | SEARCH_FAILED
        | FACTORIZATION_FAILED
        | UNBOUNDED_MODEL
        | NO_CURVATURE
        | STEP_REJECTED
    )
    """The facts that may have left a step short, or at zero. The others are remarks."""


class Termination(enum.IntEnum):
    """Why `minimize` ended. GRADIENT, VALUE and STEP are convergence by a tolerance,
    the others are not."""

    RUNNING = 0
    """It has not ended."""
    GRADIENT = enum.auto()
    """The gradient fell below its tolerance."""
    VALUE = enum.auto()
    """The objective hardly changed in a step."""
    STEP = enum.auto()
    """The parameters hardly changed in a step."""
    MAX_STEPS = enum.auto()
    """All steps were taken."""
    STALLED_AT_NOISE = enum.auto()
    """For many steps neither value nor gradient changed by more than rounding, or no
    step was found."""
    UNBOUNDED = enum.auto()
    """The objective fell without bound."""
    NONFINITE = enum.auto()
    """The objective or its gradient was inf or NaN, at the start or after a step."""
    INTERRUPTED = enum.auto()
    """Ctrl-C, or a callback, ended the run."""


def step_status(facts: Mapping[StepStatus, jax.Array]) -> jax.Array:
    """Return the int32 scalar with the flag of every fact that is true."""
    status = jnp.zeros((), jnp.int32)
    for flag, fact in facts.items():
        status = status | jnp.where(fact, jnp.int32(flag), jnp.int32(0))
    return status
