"""Rates by a local model of `phi(eta) = f(params + sum_s eta_s u_s)`: what all such
rules have in common.

Every so many steps the model is measured, averaged with earlier ones, and solved for
the rates. If the objective rises at the step that they give, the rates are halved. In
the steps between two measurements no group goes farther than it went when its rate was
measured: an update that has grown, as momentum does, would run past the minimum along
it. For the same reason every step of the first periods is measured, and so is a step
that would lead uphill, where the gradient is given. A rule says how to measure and how
to solve.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_count, check_range, renamed_attributes
from hessopt.kinds.protocol import Call, scheduled, transformation
from hessopt.numerics.guards import divide, select
from hessopt.trees.groups import Groups, check_groups, group_labels, take
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import all_finite, applied, inner, solve_dtype
from hessopt.typing import Params, StepStatus, ValueFn, Vector, step_status

TOLERATED_RISE = 1e-3
"""The part of its value by which the objective may rise in a step: batches are noisy."""
MAX_HALVINGS = 5
"""How often a step that raises the objective by more is halved before it is dropped."""
MEASURED_PERIODS = 2
"""Periods of `update_every` steps, from the first step on, in which all are measured."""
NOT_COUNTED = -1
"""In place of a number of evaluations that is not known."""


class RateProblem(NamedTuple):
    """The objective, the point, and the updates whose rates are sought."""

    objective: ValueFn  # of params
    params: Params
    updates: Params
    groups: Groups
    labels: Any  # tree like params of ints, the group of every leaf
    value: jax.Array | None  # objective(params), if it was given
    # its gradient there in optax's convention (conjugated), if it was given
    grad: Params | None


class Measurement(NamedTuple):
    """A model of phi at 0."""

    value: jax.Array  # phi(0), scalar
    model: Any  # tree of arrays, each `(S,)` or `(S, S)`
    known: jax.Array | bool = True  # bool (S,), whether it says anything about a group
    # bool (S,), whether phi was not finite where it was probed
    beyond: jax.Array | bool = False


class RateSolution(NamedTuple):
    """The rates that a model gives."""

    rate: Vector  # (S,)
    usable: jax.Array  # bool (S,), whether the model gives a rate for a group
    facts: dict[StepStatus, jax.Array]


class Memory(NamedTuple):
    """What is carried from one measurement to the next."""

    age: jax.Array  # int32 scalar, steps since the last measurement
    measured: jax.Array  # int32 (S,), measurements in the average
    solved: jax.Array  # bool (S,), whether a rate is no longer the initial one
    rate: Vector  # (S,), before learning_rate
    # (S,), norm of the updates of a group when they were measured; 0 if the step was
    # not taken
    length: Vector
    model: Any  # average


class RateInfo(NamedTuple):
    """What the last update did."""

    status: jax.Array  # int32 scalar, StepStatus
    rate: Vector  # (S,), by which the updates were multiplied
    # int32 scalar, how often the rates were halved because the objective rose
    halvings: jax.Array
    evaluations: jax.Array  # int32 scalar, of the objective; -1: not counted


class _State(Protocol):
    """The state of a rate: of a type of its own for each method, which logs show."""

    @property
    def count(self) -> jax.Array: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def info(self) -> RateInfo: ...


class Rule(NamedTuple):
    """What tells one method from another."""

    name: str  # of the public function, for errors
    State: Callable[
        [jax.Array, Memory, RateInfo], optax.OptState
    ]  # count, memory, info
    blank: Callable[[int, Any], Any]  # number of groups, dtype -> a model of zeros
    measure: Callable[[RateProblem, Vector], Measurement]  # with the rates so far
    # model, rates so far, which were solved for, count
    solve: Callable[[Any, Vector, jax.Array, jax.Array], RateSolution]


def scale_by_rates(
    rule: Rule,
    *,
    groups: Groups | None,
    learning_rate: optax.ScalarOrSchedule,
    update_every: int,
    curvature_decay: jax.typing.ArrayLike,
    rate_decay: jax.typing.ArrayLike,
    initial_rate: jax.typing.ArrayLike,
    safeguard: bool,
) -> optax.GradientTransformationExtraArgs:
    """Scale updates by the rates that a rule finds; arguments are those of
    `scale_by_generalized_newton`."""
    check_count("update_every", update_every)
    check_range("learning_rate", learning_rate, 0)
    check_range("curvature_decay", curvature_decay, 0, 1)
    check_range("rate_decay", rate_decay, 0, 1)
    groups = "all" if groups is None else groups
    check_groups("groups", groups)
    options = _Options(
        rule=rule,
        groups=groups,
        learning_rate=learning_rate,
        update_every=update_every,
        curvature_decay=curvature_decay,
        rate_decay=rate_decay,
        initial_rate=initial_rate,
        safeguard=safeguard,
    )
    init, step = functools.partial(_init, options), functools.partial(_step, options)
    return transformation(rule.name, init, step, needs=("value_fn",))


class _Options(NamedTuple):
    """The arguments of `scale_by_rates`, checked."""

    rule: Rule
    groups: Groups
    learning_rate: optax.ScalarOrSchedule
    update_every: int
    curvature_decay: jax.typing.ArrayLike
    rate_decay: jax.typing.ArrayLike
    initial_rate: jax.typing.ArrayLike
    safeguard: bool


def _init(options: _Options, params: Params) -> optax.OptState:
    dtype, size = solve_dtype(params), len(group_labels(params, options.groups)[1])
    memory = Memory(
        age=jnp.int32(options.update_every),
        measured=jnp.zeros(size, jnp.int32),
        solved=jnp.zeros(size, bool),
        rate=jnp.full(size, options.initial_rate, dtype),
        length=jnp.full(size, jnp.inf, dtype),
        model=options.rule.blank(size, dtype),
    )
    info = RateInfo(
        status=jnp.zeros((), jnp.int32),
        rate=jnp.full(size, options.initial_rate, dtype),
        halvings=jnp.zeros((), jnp.int32),
        evaluations=jnp.int32(NOT_COUNTED),
    )
    return beside(options.rule.State(jnp.zeros((), jnp.int32), memory, info), params)


class _Situation(NamedTuple):
    """Where an update begins: what all of its phases look at."""

    problem: RateProblem
    memory: Memory  # of the step before
    count: jax.Array  # int32 scalar, updates so far
    factor: jax.Array  # scalar, the learning rate
    length: Vector  # (S,), norm of the updates of a group
    moves: jax.Array  # bool (S,), whether that is not zero


class _Outcome(NamedTuple):
    """What an update remembers and reports."""

    memory: Memory
    status: jax.Array  # int32 scalar, StepStatus
    rate: Vector  # (S,), by which the updates are multiplied
    halvings: jax.Array  # int32 scalar


def _step(
    options: _Options, call: Call, state: _State
) -> tuple[optax.Updates, optax.OptState]:
    # phi(eta) = f(params + sum_s eta_s u_s), and |u_s|
    now = _begin(options, call, state)

    # a measurement costs evaluations of f: between two of them the rates stay
    def renew() -> _Outcome:
        return _renew(options, now)

    def reuse() -> _Outcome:
        return _reuse(now)

    if options.update_every > 1:
        due = _is_due(options, now)
        outcome = jax.lax.cond(due, renew, reuse)
    else:
        outcome = renew()

    # a value or an update that is not finite, which shows in |u_s|, gives no step and
    # leaves the memory as it was
    sound = call.finite & all_finite(now.length)
    zero = jnp.zeros((), jnp.int32)
    nonfinite = jnp.int32(StepStatus.NONFINITE)
    untouched = _Outcome(now.memory, nonfinite, jnp.zeros_like(now.length), zero)
    memory, status, rate, halvings = select(sound, outcome, untouched)

    # eta_s u_s
    rate = jnp.where(jnp.isfinite(rate), rate, 0)
    step = scaled(call.updates, now.problem.labels, rate)
    return jax.tree.map(lambda u: jnp.where(sound, u, 0), step), options.rule.State(
        jnp.asarray(optax.safe_increment(state.count)),
        memory,
        RateInfo(status, rate, halvings, evaluations=jnp.int32(NOT_COUNTED)),
    )


def _begin(options: _Options, call: Call, state: _State) -> _Situation:
    """The restriction of the objective to the updates, and their lengths."""
    memory = state.memory
    dtype = memory.rate.dtype
    labels, _ = group_labels(call.params, options.groups)
    value = call.value
    if value is not None:
        value = _scalar(value, dtype, options.rule.name)
    length = jnp.sqrt(inner_by_group(call.updates, call.updates, labels, memory.rate))
    return _Situation(
        RateProblem(
            call.objective,
            call.params,
            call.updates,
            options.groups,
            labels,
            value,
            call.grad,
        ),
        memory,
        state.count,
        jnp.asarray(scheduled(options.learning_rate, state.count), dtype),
        length,
        moves=length > 0,
    )


def _is_due(options: _Options, now: _Situation) -> jax.Array:
    """Whether the model has to be measured in this step."""
    problem, memory, every = now.problem, now.memory, options.update_every
    due = (memory.age >= every) | (now.count < MEASURED_PERIODS * every)
    # phi'(0) > 0 along the last rates: the step would lead uphill
    if problem.grad is not None:
        slopes = inner_by_group(
            problem.grad, problem.updates, problem.labels, memory.rate
        )
        due |= jnp.vdot(memory.rate, slopes) > 0
    # nothing is learnt from updates that are zero, as those of a base that accumulates
    # gradients
    return due & jnp.any(now.moves)


def _reuse(now: _Situation) -> _Outcome:
    """Take the last rates, for steps that are no longer than the measured ones."""
    old = now.memory
    # |eta_s u_s| at most as when u_s was measured
    shorter = divide(old.length, now.length, now.length > old.length, 1)
    zero = jnp.zeros((), jnp.int32)
    memory = old._replace(age=old.age + 1)
    return _Outcome(memory, zero, now.factor * old.rate * shorter, zero)


def _renew(options: _Options, now: _Situation) -> _Outcome:
    """Measure the model of phi and take the rates that it gives."""
    old = now.memory

    # m = w m + (1 - w) (new m) for the model m, where the new one says something
    measured = _measure(options, now)
    model = _average(options, old, measured)

    # the rates at its minimum, averaged with the last ones
    found = _solve(options, now, measured, model)

    # halved until f(params + sum_s eta_s u_s) is hardly above f(params)
    halvings, dropped = _guard(options, now, found.rate, measured.value)
    rate = select(jnp.isfinite(measured.value), _halved(found.rate, halvings), old.rate)

    facts = {flag: measured.finite & fact for flag, fact in found.facts.items()}
    happened = {
        StepStatus.NONFINITE: ~measured.finite,
        StepStatus.RATE_KEPT: jnp.any(~found.usable & now.moves),
        StepStatus.SAFEGUARDED: halvings > 0,
        StepStatus.STEP_REJECTED: dropped,
    }
    length = jnp.where(now.moves, now.length, old.length)
    memory = Memory(
        age=jnp.ones((), jnp.int32),
        measured=old.measured + measured.seen.astype(jnp.int32),
        solved=old.solved | found.usable,
        rate=rate,
        length=jnp.where(dropped, 0, length),
        model=model,
    )
    return _Outcome(
        memory,
        step_status(happened) | step_status(facts),
        jnp.where(dropped, 0, now.factor * rate),
        halvings,
    )


class _Reading(NamedTuple):
    """A measurement as this update uses it."""

    value: jax.Array  # phi(0), scalar
    model: Any
    beyond: jax.Array | bool  # bool (S,), whether phi was not finite at a probe
    finite: jax.Array  # bool scalar, whether model and probes all were
    seen: jax.Array  # bool (S,), whether the model says anything about a group


def _measure(options: _Options, now: _Situation) -> _Reading:
    """The model of phi at 0 by the rule, in the dtypes of the average."""
    value, model, known, beyond = options.rule.measure(now.problem, now.memory.rate)
    model = jax.tree.map(
        lambda x, like: jnp.asarray(x, like.dtype), model, now.memory.model
    )
    finite = all_finite(model) & ~jnp.any(beyond)
    return _Reading(value, model, beyond, finite, finite & known & now.moves)


def _average(options: _Options, old: Memory, measured: _Reading) -> Any:
    """The exponential average of the models; the first measurement of a group stands
    alone."""
    seen = measured.seen
    decay = jnp.asarray(options.curvature_decay, old.rate.dtype)
    keep = jnp.where(old.measured > 0, decay, 0)

    def averaged(new: jax.Array, past: jax.Array) -> jax.Array:
        # an entry between two groups counts where both do, and is as new as the newer
        here = seen if new.ndim == 1 else seen & seen[:, None]
        w = keep if new.ndim == 1 else jnp.minimum(keep, keep[:, None])
        return jnp.where(here, w * past + (1 - w) * new, past)

    return jax.tree.map(averaged, measured.model, old.model)


def _solve(
    options: _Options, now: _Situation, measured: _Reading, model: Any
) -> RateSolution:
    """The rates by the rule, averaged; a group that the model gives no rate keeps its
    last one."""
    old, dtype = now.memory, now.memory.rate.dtype
    found, usable, facts = options.rule.solve(model, old.rate, old.solved, now.count)
    usable = usable & measured.seen
    w = jnp.where(old.solved, jnp.asarray(options.rate_decay, dtype), 0)
    rate = jnp.where(usable, w * old.rate + (1 - w) * found.astype(dtype), old.rate)
    # a probe at the last rate that was not finite: it was too long
    return RateSolution(jnp.where(measured.beyond, rate / 2, rate), usable, facts)


def _guard(
    options: _Options, now: _Situation, rate: Vector, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How often the rates must be halved for the objective to rise by no more than
    TOLERATED_RISE, and whether even MAX_HALVINGS are too few."""
    if not options.safeguard:
        return jnp.int32(0), jnp.bool_(False)
    problem, rate = now.problem, now.factor * rate
    # a rise within rounding is none
    tolerated = max(TOLERATED_RISE, 4 * float(jnp.finfo(value.dtype).eps))
    limit = value + tolerated * jnp.abs(value)

    def goes_on(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        trial, rises = carry
        return rises & (trial <= MAX_HALVINGS)

    def attempt(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        trial, _ = carry
        shorter = scaled(problem.updates, problem.labels, _halved(rate, trial))
        reached = problem.objective(applied(problem.params, shorter))
        return trial + 1, ~(reached <= limit) | ~jnp.isfinite(reached)

    start = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    trials, rises = jax.lax.while_loop(goes_on, attempt, start)
    return trials - 1, rises


def _halved(rate: Vector, times: jax.Array) -> Vector:
    return rate * jnp.asarray(0.5, rate.dtype) ** times


def _scalar(value: Any, dtype: Any, caller: str) -> jax.Array:
    """The value as a floating scalar, in the dtype that it has if that is floating."""
    value = jnp.asarray(value)
    if value.shape:
        raise TypeError(f"{caller} needs value to be a scalar, got shape {value.shape}")
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(dtype)


def inner_by_group(a: Params, b: Params, labels: Any, like: Vector) -> Vector:
    """The real inner products of the leaves of each group, like a vector `(S,)`."""
    parts = (
        (take(a, labels, group), take(b, labels, group)) for group in range(like.size)
    )
    return jnp.array([inner(*part) for part in parts], like.dtype)


def scaled(updates: Params, labels: Any, rate: Vector) -> Params:
    """Every leaf times the rate of its group."""
    return jax.tree.map(
        lambda u, label: (rate[label] * u).astype(u.dtype), updates, labels
    )


__getattr__: Callable[[str], Any] = renamed_attributes(
    __name__,
    {
        "Restricted": "RateProblem",
        "Measured": "Measurement",
        "Solved": "RateSolution",
    },
)
