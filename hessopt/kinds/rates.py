"""Rates computed from a local model of `phi(eta) = f(params + sum_s eta_s u_s)`: the
parts that all such rules share.

Once per `update_every` steps the model is measured, averaged with earlier ones, and
solved for the rates; the steps in between reuse them. A rule defines the measurement
and the solution.

The rates that minimize the model are multiplied by

    c = low + (high - low) s,    low = 1 / (1 + 3/2 m),    high = 1 + (1 - m) (h - 1),

with m the momentum of the updates, h the horizon and s in [0, 1] the progress. c = 1 for
m = 0, h = 1.

Momentum: m is the share of an update that is left of the one before. A step along such
updates is followed by others in nearly the same direction, which the model of one step
does not know. For gradients of noise g on a parabola of curvature A, updates `u = m u -
g` and a rate r, the averages of b = -phi'(0) and of phi''(0) are

    <b> = ((1 - m^2) + r A m / 2) |u|^2,    <phi''(0)> = A |u|^2,

so `r = c <b> / <phi''(0)>` with `c = 1 / (1 + 3/2 m)` holds for `r = (1 - m) / A`. A
gradient, which moves the parameters by `r / (1 - m)` in all, then leads as far for every
m, to the minimum of its batch.

Progress: s = 1 if all batches agree (see `agreement`), and s = 0 if they agree by low / 2
only: the losses do not decrease then at the lower rates, and their gradients are noise.
Where there is no noise, rates that minimize the model are right with momentum as well.
Larger ones gain more in the long run, since a step to the minimum along an update leaves
behind the parameters of small curvature. With momentum an excess acts on for `1 / (1 -
m)` steps, and is divided by that.

The safeguard adds the following. If the objective rises at the step of newly measured
rates, the step is halved. Rates grow by at most 3% per step. In the steps between two
measurements the step of a group is at most as long as when its rate was measured: an
update that grows, as with momentum, would overshoot the minimum along it. For the same
reason every step of the first periods is measured, and so is a step after a halved one,
or one that would lead uphill, if the gradient is given.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from hessopt._checks import check_count, check_range
from hessopt.calculus.taylor import Taylor, taylor
from hessopt.kinds.agreement import (
    Agreement,
    confirmed,
    lower_bound,
    no_agreement,
)
from hessopt.kinds.protocol import Call, scheduled, transformation
from hessopt.numerics.guards import divide, select, zero_unless
from hessopt.trees.groups import Groups, check_groups, group_labels, take
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import all_finite, applied, inner, solve_dtype
from hessopt.typing import Labels, Params, StepStatus, ValueFn, Vector, step_status

TOLERATED_RISE = 1e-3
"""Relative rise of the objective that is accepted in a step: batches are noisy."""
MAX_HALVINGS = 5
"""Maximum number of halvings of a step that raises the objective by more than that; the
step is dropped afterwards."""
MEASURED_PERIODS = 2
"""Number of periods of `update_every` steps at the start in which every step is
measured, with the safeguard."""
MAX_GROWTH = 1.03
"""Largest factor by which rates grow per step, with the safeguard. Where the losses tend
to zero the model of a batch is nearly flat, and its minimum too far away for the next."""
LIMITED_STEPS = 300
"""Number of steps over which that factor is compounded at most, to about 7000: a power
with a longer period would overflow."""
NOT_COUNTED = -1
"""Number of evaluations that is reported if it is not known."""


class RateProblem(NamedTuple):
    """The objective, the point, and the updates to find rates for."""

    objective: ValueFn  # of params
    params: Params
    updates: Params
    groups: Groups
    labels: Labels  # tree like params of ints, the group of every leaf
    value: jax.Array | None  # objective(params), if given
    # gradient at params in optax's convention (conjugated), if given
    grad: Params | None
    safeguard: bool = True  # whether a measurement may depart from the published method


def taylor_terms(problem: RateProblem, order: int) -> Taylor:
    """Return phi and its derivatives at 0 up to the order, 1 to 3, by `taylor`."""
    return taylor(
        problem.objective,
        problem.params,
        problem.updates,
        groups=problem.groups,
        order=order,
    )


class Measurement(NamedTuple):
    """A model of phi at 0."""

    value: jax.Array  # phi(0), scalar
    model: Params  # tree of arrays, each `(S,)` or `(S, S)`
    known: jax.Array | bool = True  # bool (S,), whether the model holds for a group
    # bool (S,), whether phi was not finite at the probe
    beyond: jax.Array | bool = False
    # bool (S,), whether the curvature is measured; otherwise the model bounds it
    curved: jax.Array | bool = True


class RateSolution(NamedTuple):
    """The solution of a model for the rates."""

    rate: Vector  # (S,)
    usable: jax.Array  # bool (S,), whether the model determines the rate of a group
    facts: dict[StepStatus, jax.Array]


class Memory(NamedTuple):
    """The memory that is carried from one measurement to the next."""

    age: jax.Array  # int32 scalar, steps since the last measurement
    measured: jax.Array  # int32 (S,), measurements in the average
    # bool (S,), whether the rate is the result of a solution with known curvature
    solved: jax.Array
    rate: Vector  # (S,), before learning_rate
    # (S,), norm of the updates of a group at its measurement, halved with the step; 0 for
    # a dropped one
    length: Vector
    model: Params  # average
    # None without horizon and momentum: it has no influence then
    agreement: Agreement | None


class RateInfo(NamedTuple):
    """Diagnostics of the last update."""

    status: jax.Array  # int32 scalar, StepStatus
    rate: Vector  # (S,), factors on the updates
    halvings: jax.Array  # int32 scalar, halvings since the objective rose
    evaluations: jax.Array  # int32 scalar, of the objective; -1: not counted


class _State(Protocol):
    """The state of a rate. Each method has its own type, whose name appears in logs."""

    @property
    def count(self) -> jax.Array: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def info(self) -> RateInfo: ...


class Rule(NamedTuple):
    """The functions that define a method."""

    name: str  # of the public function, for error messages
    State: Callable[[jax.Array, Memory, RateInfo], Any]  # count, memory, info
    # number of groups, dtype -> a model of zeros
    blank: Callable[[int, DTypeLike], Params]
    measure: Callable[[RateProblem, Vector], Measurement]  # with the rates so far
    # model, rates so far, which of them are solutions, count
    solve: Callable[[Params, Vector, jax.Array, jax.Array], RateSolution]
    # model, rates eta -> `-phi'(0).eta` and `eta.phi''(0) eta`, scalars
    along: Callable[[Params, Vector], tuple[jax.Array, jax.Array]]
    # largest factor by which the length of a step grows from one measurement to the
    # next at the same updates; None: unlimited
    max_growth: ArrayLike | None = None


def largest_growth(update_every: int) -> float:
    """Return the largest factor by which rates grow from one measurement to the next."""
    check_count("update_every", update_every)
    return MAX_GROWTH ** min(update_every, LIMITED_STEPS)


def scale_by_rates(
    rule: Rule,
    *,
    groups: Groups | None,
    learning_rate: optax.ScalarOrSchedule,
    horizon: optax.ScalarOrSchedule | None,
    momentum: ArrayLike | None,
    update_every: int,
    curvature_decay: ArrayLike,
    rate_decay: ArrayLike,
    initial_rate: ArrayLike,
    safeguard: bool,
) -> optax.GradientTransformationExtraArgs:
    """Scale updates by the rates of a rule; the arguments are those of
    `scale_by_generalized_newton`."""
    check_count("update_every", update_every)
    check_range("learning_rate", learning_rate, 0)
    is_adaptive = horizon is not None or momentum is not None
    horizon = 1.0 if horizon is None else horizon
    momentum = 0.0 if momentum is None else momentum
    check_range("horizon", horizon, 1)
    check_range("momentum", momentum, 0, 1)
    check_range("curvature_decay", curvature_decay, 0, 1)
    check_range("rate_decay", rate_decay, 0, 1)
    groups = "all" if groups is None else groups
    check_groups("groups", groups)
    options = _Options(
        rule=rule,
        groups=groups,
        learning_rate=learning_rate,
        horizon=horizon,
        momentum=momentum,
        is_adaptive=is_adaptive,
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
    horizon: optax.ScalarOrSchedule
    momentum: ArrayLike
    is_adaptive: bool  # whether one of the two was given: their factor may not be 1
    update_every: int
    curvature_decay: ArrayLike
    rate_decay: ArrayLike
    initial_rate: ArrayLike
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
        agreement=no_agreement(params, dtype) if options.is_adaptive else None,
    )
    info = RateInfo(
        status=jnp.zeros((), jnp.int32),
        rate=jnp.full(size, options.initial_rate, dtype),
        halvings=jnp.zeros((), jnp.int32),
        evaluations=jnp.int32(NOT_COUNTED),
    )
    return beside(options.rule.State(jnp.zeros((), jnp.int32), memory, info), params)


class _Situation(NamedTuple):
    """The inputs of an update, used by all of its phases."""

    problem: RateProblem
    # of the previous step, with the agreement of this batch; without the step itself
    memory: Memory
    count: jax.Array  # int32 scalar, updates so far
    factor: jax.Array  # scalar, learning rate times c
    length: Vector  # (S,), norm of the updates of a group
    moves: jax.Array  # bool (S,), whether length is not zero
    halved: jax.Array  # bool scalar, whether the safeguard halved the last step


class _Outcome(NamedTuple):
    """The new memory and the report of an update."""

    memory: Memory
    status: jax.Array  # int32 scalar, StepStatus
    rate: Vector  # (S,), factors on the updates
    halvings: jax.Array  # int32 scalar


def _step(
    options: _Options, call: Call, state: _State
) -> tuple[optax.Updates, optax.OptState]:
    # phi(eta) = f(params + sum_s eta_s u_s), and |u_s|
    now = _begin(options, call, state)

    # a measurement costs evaluations of f, so the rates are reused between two of them
    def renew() -> _Outcome:
        return _renew(options, now)

    def reuse() -> _Outcome:
        return _reuse(options, now)

    if options.update_every > 1:
        due = _is_due(options, now)
        outcome = jax.lax.cond(due, renew, reuse)
    else:
        outcome = renew()

    # if the value or an update (hence |u_s|) is not finite, the step is zero and the
    # memory stays unchanged
    sound = call.finite & all_finite(now.length)
    zero = jnp.zeros((), jnp.int32)
    nonfinite = jnp.int32(StepStatus.NONFINITE)
    before = _without_step(state.memory)
    untouched = _Outcome(before, nonfinite, jnp.zeros_like(now.length), zero)
    memory, status, rate, halvings = select(sound, outcome, untouched)

    # eta_s u_s; a group whose step cannot be represented takes none
    represented = jnp.isfinite(rate * now.length)
    status |= jnp.where(jnp.all(represented), 0, nonfinite)
    rate = jnp.where(represented, rate, 0)
    step = zero_unless(sound, scaled(call.updates, now.problem.labels, rate))
    if state.memory.agreement is not None:
        assert memory.agreement is not None
        # after a step of zero the last one still ends here
        taken = sound & jnp.any(rate * now.length != 0)
        sums = select(sound, now.memory.agreement, before.agreement)
        agreement: Agreement = select(taken, memory.agreement, sums)
        last = select(taken, step, state.memory.agreement.step)
        memory = memory._replace(agreement=agreement._replace(step=last))
    return step, options.rule.State(
        jnp.asarray(optax.safe_increment(state.count)),
        memory,
        RateInfo(status, rate, halvings, evaluations=jnp.int32(NOT_COUNTED)),
    )


def _without_step(memory: Memory) -> Memory:
    """Return the memory without the last step, a tree like params, which a condition
    would copy."""
    if memory.agreement is None:
        return memory
    return memory._replace(agreement=memory.agreement._replace(step=None))


def _begin(options: _Options, call: Call, state: _State) -> _Situation:
    """Set up the restriction of the objective to the updates, and their lengths."""
    memory = state.memory
    if memory.agreement is not None and call.grad is not None:
        memory = memory._replace(agreement=confirmed(memory.agreement, call.grad))
    memory = _without_step(memory)
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
            options.safeguard,
        ),
        memory,
        state.count,
        _factor(options, memory, state.count).astype(dtype),
        length,
        moves=length > 0,
        halved=state.info.halvings > 0,
    )


def _factor(options: _Options, memory: Memory, count: jax.Array) -> jax.Array:
    """Return the factor on the rates that minimize the model."""
    factor = jnp.asarray(scheduled(options.learning_rate, count))
    if memory.agreement is None:
        return factor
    m, h = options.momentum, scheduled(options.horizon, count)
    low, high = 1 / (1 + 1.5 * m), 1 + (1 - m) * (h - 1)
    a = lower_bound(memory.agreement)
    progress = jnp.maximum((a - low / 2) / (1 - low / 2), 0)
    return factor * (low + (high - low) * progress)


def _is_due(options: _Options, now: _Situation) -> jax.Array:
    """Return whether the model has to be measured in this step."""
    problem, memory, every = now.problem, now.memory, options.update_every
    due = memory.age >= every
    if options.safeguard:
        due |= (now.count < MEASURED_PERIODS * every) | now.halved
    # phi'(0) > 0 along the last rates: the step would lead uphill
    if options.safeguard and problem.grad is not None:
        slopes = inner_by_group(
            problem.grad, problem.updates, problem.labels, memory.rate
        )
        due |= jnp.vdot(memory.rate, slopes) > 0
    # updates of zero, as from a base that accumulates gradients, need no measurement
    return due & jnp.any(now.moves)


def _reuse(options: _Options, now: _Situation) -> _Outcome:
    """Take the last rates; with the safeguard, for steps at most as long as the
    measured ones."""
    old, rate = now.memory, now.factor * now.memory.rate
    if options.safeguard:
        # limit |u_s| to its length at the measurement
        rate = rate * divide(old.length, now.length, now.length > old.length, 1)
    zero = jnp.zeros((), jnp.int32)
    agreement = old.agreement
    if agreement is not None:
        agreement = agreement._replace(measured=jnp.zeros((), bool))
    memory = old._replace(age=old.age + 1, agreement=agreement)
    return _Outcome(memory, zero, rate, zero)


def _renew(options: _Options, now: _Situation) -> _Outcome:
    """Measure the model of phi and solve it for the rates."""
    old = now.memory

    # m = w m + (1 - w) (new m) for the entries of the model m that were measured
    measured = _measure(options, now)
    model = _average(options, old, measured)

    # the rates at the minimum of the model, averaged with the last ones
    found = _solve(options, now, measured, model)

    # halve them until f(params + sum_s eta_s u_s) <= f(params) + TOLERATED_RISE |f|
    halvings, dropped = _guard(options, now, found.rate, measured.value)
    halved = _halved(found.rate, halvings)
    taken = jnp.where(dropped, 0, now.factor * halved)

    # the next rates start from those of the model, since one batch does not tell that
    # they are too long; but where no step keeps its promise of descent, from the shorter
    promised = options.rule.along(measured.model, halved)[0] > 0
    rate = jnp.where(dropped & promised, halved, found.rate)
    rate = select(jnp.isfinite(measured.value), rate, old.rate)

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
        solved=old.solved | (found.usable & measured.curved),
        rate=rate,
        length=jnp.where(dropped, 0, _halved(length, halvings)),
        model=model,
        agreement=_promise(options, old.agreement, measured, taken),
    )
    status = step_status(happened) | step_status(facts)
    return _Outcome(memory, status, taken, halvings)


class _Reading(NamedTuple):
    """A measurement, checked and cast for this update."""

    value: jax.Array  # phi(0), scalar
    model: Params
    beyond: jax.Array | bool  # bool (S,), whether phi was not finite at a probe
    finite: jax.Array  # bool scalar, whether the model and all probes are finite
    seen: jax.Array  # bool (S,), whether the model holds for a group
    curved: jax.Array  # bool (S,), whether its curvature is measured as well


def _measure(options: _Options, now: _Situation) -> _Reading:
    """Measure the model of phi at 0, in the dtypes of the average."""
    found = options.rule.measure(now.problem, now.memory.rate)
    value, model, known, beyond, curved = found
    model = jax.tree.map(
        lambda x, like: jnp.asarray(x, like.dtype), model, now.memory.model
    )
    finite = all_finite(model) & ~jnp.any(beyond)
    seen = finite & known & now.moves
    return _Reading(value, model, beyond, finite, seen, seen & curved)


def _average(options: _Options, old: Memory, measured: _Reading) -> Params:
    """Compute the exponential moving average of the models, which starts with the first
    measurement of a group."""
    seen = measured.seen
    decay = jnp.asarray(options.curvature_decay, old.rate.dtype)
    keep = jnp.where(old.measured > 0, decay, 0)

    def averaged(new: jax.Array, past: jax.Array) -> jax.Array:
        # an entry between two groups is updated if both were measured, with the smaller
        # of their weights of the past
        here = seen if new.ndim == 1 else seen & seen[:, None]
        w = keep if new.ndim == 1 else jnp.minimum(keep, keep[:, None])
        return jnp.where(here, w * past + (1 - w) * new, past)

    return jax.tree.map(averaged, measured.model, old.model)


def _solve(
    options: _Options, now: _Situation, measured: _Reading, model: Params
) -> RateSolution:
    """Solve for the rates and average them; a group without a usable rate keeps its
    last one."""
    old, dtype = now.memory, now.memory.rate.dtype
    found, usable, facts = options.rule.solve(model, old.rate, old.solved, now.count)
    usable = usable & measured.seen
    if options.rule.max_growth is not None:
        found = _limited(found, options.rule.max_growth, old, now.length)
    w = jnp.where(old.solved, jnp.asarray(options.rate_decay, dtype), 0)
    rate = jnp.where(usable, w * old.rate + (1 - w) * found.astype(dtype), old.rate)
    # a probe at the last rate that was not finite was too long
    return RateSolution(jnp.where(measured.beyond, rate / 2, rate), usable, facts)


def _limited(
    rate: Vector, max_growth: ArrayLike, old: Memory, length: Vector
) -> Vector:
    """Return the rates, reduced to at most `max_growth` times the last ones in the
    length of the step; the first solution is not limited."""
    size, bound = (jnp.linalg.norm(x * length) for x in (rate, max_growth * old.rate))
    exceeds = jnp.any(old.solved) & (size > bound) & (bound > 0)
    return rate * divide(bound, size, exceeds, 1.0).astype(rate.dtype)


def _promise(
    options: _Options, old: Agreement | None, measured: _Reading, rate: Vector
) -> Agreement | None:
    """Return the agreement with the promise of the rates that are taken."""
    if old is None:
        return None
    # the model of this batch, not the average: the next batch is compared with it
    promise = (x.astype(rate.dtype) for x in options.rule.along(measured.model, rate))
    descent, curvature = promise
    known = measured.finite & jnp.isfinite(descent) & jnp.isfinite(curvature)
    descent, curvature = zero_unless(known, (descent, curvature))
    return old._replace(descent=descent, curvature=curvature, measured=known)


def _guard(
    options: _Options, now: _Situation, rate: Vector, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return how often the rates must be halved until the objective rises by at most
    TOLERATED_RISE, and whether MAX_HALVINGS are not sufficient."""
    if not options.safeguard:
        return jnp.int32(0), jnp.bool_(False)
    problem, rate = now.problem, now.factor * rate
    # a rise within rounding is accepted
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


def _scalar(value: ArrayLike, dtype: DTypeLike, caller: str) -> jax.Array:
    """Return the value as a floating scalar; a floating dtype is kept."""
    value = jnp.asarray(value)
    if value.shape:
        raise TypeError(f"{caller} needs value to be a scalar, got shape {value.shape}")
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(dtype)


def inner_by_group(a: Params, b: Params, labels: Labels, like: Vector) -> Vector:
    """Return the real inner product of the leaves of each group, `(S,)`, in the dtype
    of `like`."""
    parts = (
        (take(a, labels, group), take(b, labels, group)) for group in range(like.size)
    )
    return jnp.array([inner(*part) for part in parts], like.dtype)


def scaled(updates: Params, labels: Labels, rate: Vector) -> Params:
    """Multiply every leaf by the rate of its group."""
    return jax.tree.map(
        lambda u, label: (rate[label] * u).astype(u.dtype), updates, labels
    )
