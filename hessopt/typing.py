"""Names for the arrays, functions and enumerations in the signatures of hessopt."""

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
    """Events during one update. Several flags can be set at once; states store them as
    one int32.

    Example:
      >>> status = StepStatus.NEGATIVE_CURVATURE | StepStatus.NOT_DESCENT
      >>> StepStatus.NOT_DESCENT in status
      True
    """

    OK = 0
    """None of the following events."""
    NONFINITE = enum.auto()
    """A value, gradient or curvature was inf or NaN; quantities that depend on it were
    not used."""
    NOT_DESCENT = enum.auto()
    """The direction points uphill or along a contour."""
    SEARCH_FAILED = enum.auto()
    """No trial step was accepted."""
    PAIR_SKIPPED = enum.auto()
    """A secant pair failed the curvature test and was not used."""
    MEMORY_RESET = enum.auto()
    """The quasi-Newton memory was emptied."""
    FACTORIZATION_FAILED = enum.auto()
    """A matrix could not be factorized; its block of the update is zero or uses an
    older factorization."""
    NEGATIVE_CURVATURE = enum.auto()
    """The curvature matrix, damping included, is known not to be positive definite."""
    UNBOUNDED_MODEL = enum.auto()
    """The local model has no minimizer."""
    STEP_REJECTED = enum.auto()
    """The trial step was worse than a step of zero and was not taken."""
    RATE_KEPT = enum.auto()
    """The model gave no usable rate; the last one was kept."""
    SAFEGUARDED = enum.auto()
    """The safeguard shortened the step."""
    NO_CURVATURE = enum.auto()
    """The curvature matrix is zero and does not determine the length of the step."""
    FAILURES = (
        NONFINITE
        | NOT_DESCENT
        | SEARCH_FAILED
        | FACTORIZATION_FAILED
        | UNBOUNDED_MODEL
        | NO_CURVATURE
        | STEP_REJECTED
    )
    """The flags of events that can make a step too short or zero. The others are for
    information."""


class Termination(enum.IntEnum):
    """The reason why `minimize` ended. GRADIENT, VALUE and STEP mean convergence by a
    tolerance, the others do not."""

    RUNNING = 0
    """The run has not ended."""
    GRADIENT = enum.auto()
    """The gradient fell below its tolerance."""
    VALUE = enum.auto()
    """The change of the objective in a step fell below its tolerance."""
    STEP = enum.auto()
    """The change of the parameters in a step fell below its tolerance."""
    MAX_STEPS = enum.auto()
    """The maximum number of steps was taken."""
    STALLED_AT_NOISE = enum.auto()
    """For many steps neither value nor gradient changed by more than rounding, or no
    step was accepted."""
    UNBOUNDED = enum.auto()
    """The objective decreased without bound."""
    NONFINITE = enum.auto()
    """The objective or its gradient was inf or NaN, at the start or after a step."""
    INTERRUPTED = enum.auto()
    """Ctrl-C or a callback ended the run."""


def step_status(facts: Mapping[StepStatus, jax.Array]) -> jax.Array:
    """Return the int32 scalar with the flags of all facts that are true."""
    status = jnp.zeros((), jnp.int32)
    for flag, fact in facts.items():
        status = status | jnp.where(fact, jnp.int32(flag), jnp.int32(0))
    return status
