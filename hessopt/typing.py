"""Names for the arrays, functions, records and enumerations in the signatures of
hessopt.

The types of records and functions that an argument accepts in place of a word are
loaded on first use, since their modules import this one.
"""

import enum
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from hessopt.calculus.curvature import Curvature as Curvature
    from hessopt.calculus.curvature import CurvatureFn as CurvatureFn
    from hessopt.calculus.curvature import RootFn as RootFn
    from hessopt.calculus.least_squares import Root as Root
    from hessopt.kinds.protocol import Call as Call
    from hessopt.kinds.rates import Measurement as Measurement
    from hessopt.kinds.rates import RateProblem as RateProblem
    from hessopt.kinds.step_bounds import StepBound as StepBound
    from hessopt.kinds.subproblems import EigenModel as EigenModel
    from hessopt.kinds.subproblems import LocalModel as LocalModel
    from hessopt.kinds.subproblems import SubproblemSolver as SubproblemSolver
    from hessopt.numerics.broyden import Formula as Formula
    from hessopt.numerics.indefiniteness import Factorization as Factorization
    from hessopt.numerics.indefiniteness import (
        IndefiniteTreatment as IndefiniteTreatment,
    )
    from hessopt.objective.binding import Objective as Objective
    from hessopt.transforms.gauss_newton import DampingRule as DampingRule
    from hessopt.transforms.generalized_newton import Mode as Mode
    from hessopt.transforms.generalized_newton import Parabola as Parabola
    from hessopt.transforms.linesearch import InitialGuess as InitialGuess
    from hessopt.transforms.newton_cg import Preconditioner as Preconditioner
    from hessopt.trees.boxes import Bounds as Bounds
    from hessopt.trees.groups import Groups as Groups
else:
    _HOMES = {
        "Bounds": "trees.boxes",
        "Call": "kinds.protocol",
        "Curvature": "calculus.curvature",
        "CurvatureFn": "calculus.curvature",
        "DampingRule": "transforms.gauss_newton",
        "EigenModel": "kinds.subproblems",
        "Factorization": "numerics.indefiniteness",
        "Formula": "numerics.broyden",
        "Groups": "trees.groups",
        "IndefiniteTreatment": "numerics.indefiniteness",
        "InitialGuess": "transforms.linesearch",
        "LocalModel": "kinds.subproblems",
        "Measurement": "kinds.rates",
        "Mode": "transforms.generalized_newton",
        "Objective": "objective.binding",
        "Parabola": "transforms.generalized_newton",
        "Preconditioner": "transforms.newton_cg",
        "RateProblem": "kinds.rates",
        "Root": "calculus.least_squares",
        "RootFn": "calculus.curvature",
        "StepBound": "kinds.step_bounds",
        "SubproblemSolver": "kinds.subproblems",
    }

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"hessopt.{_HOMES[name]}"), name)

    def __dir__():
        return sorted({*globals(), *_HOMES})


Params: TypeAlias = Any
"""A pytree of floating or complex arrays."""

Tree = TypeVar("Tree")
"""The type of a pytree, for a function that returns one like it."""

Labels: TypeAlias = Any
"""A tree like params with a label for every leaf: an int, or what the user chose."""

ValueFn: TypeAlias = Callable[..., jax.Array]
"""The objective, `value_fn(params, **data)`: a real scalar, never `(value, aux)`."""

Data: TypeAlias = Mapping[str, Params]
"""The data of an objective by name: pytrees of arrays, of any dtype."""

Aux: TypeAlias = Any
"""What an objective returns beside its value, with has_aux: a pytree of arrays."""

ObjectiveFn: TypeAlias = Callable[..., jax.Array | tuple[jax.Array, Aux]]
"""An objective that may return `(value, aux)`, where the caller takes that."""

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
    OUTSIDE_BOUNDS = enum.auto()
    """The parameters were outside of their bounds; the step leads to the nearest point
    within."""
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
    """The objective or its gradient was inf or NaN, at the start or after a step; or no
    step could be taken since a derivative that the method needs was."""
    INTERRUPTED = enum.auto()
    """Ctrl-C or a callback ended the run."""


def step_status(facts: Mapping[StepStatus, jax.Array]) -> jax.Array:
    """Return the int32 scalar with the flags of all facts that are true."""
    status = jnp.zeros((), jnp.int32)
    for flag, fact in facts.items():
        status = status | jnp.where(fact, jnp.int32(flag), jnp.int32(0))
    return status
