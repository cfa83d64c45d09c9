"""The loop that `minimize` compiles: it updates, applies, evaluates and tests for
termination.

This module defines the variables that the loop carries and the termination tests.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hessopt.kinds.faces import box_in
from hessopt.kinds.line_searches import accepted
from hessopt.kinds.reports import Report, evaluations, failed, reports
from hessopt.numerics.guards import divide, or_one, select
from hessopt.objective.binding import (
    Objective,
    UpdateFn,
    bind,
    informed_update,
    precompose,
)
from hessopt.trees.boxes import Box, free_part, is_outside, outward, projected
from hessopt.trees.vectors import applied, inner, largest, strongly_typed
from hessopt.typing import Aux, Data, Params, Termination, ValueFn

_CALL = "hessopt.minimize({name}, params, tx, data=dict({given}))"

PATIENCE = 60
"""Number of steps without any change beyond rounding after which the run counts as
stalled. It is large since methods make slow progress on plateaus."""

FAILED_STEP = 20
"""Number of steps without change that a failed step of zero counts for. Other steps of
zero do not count: they occur when gradients are accumulated or a schedule starts at
zero."""

FLOOR_STEP = 6
"""Number of steps without change that a step counts for if the predicted decrease, or
the step itself, is within rounding; a failed step then ends the run."""

LEAST_TOLERANCE_POWER = 3 / 8
"""Exponent of the machine epsilon that is the smallest tolerance on the share of the
predicted decrease; its square is well above the rounding of the value."""

LARGE_SHARE = 0.01
"""Smallest predicted decrease, relative to the value, at which the value counts as
tending to zero."""

UNBOUNDED_FALL = 1e20
"""Decrease of the objective, in units of its scale at the start, above which it counts
as unbounded."""

UNBOUNDED_DISTANCE = 1e15
"""Magnitude of the largest parameter, in units of the largest at the start, above which
such a decrease counts. The decrease alone is not sufficient, since the scale of the
objective is tiny next to a saddle point."""


class Point(NamedTuple):
    """Parameters, and the value and gradient of the objective there."""

    params: Params
    value: jax.Array
    grad: Params
    # scalar, largest magnitude in grad, of the entries that no bound holds
    size: jax.Array


class Limits(NamedTuple):
    """The arguments of `minimize` that bound a run, as scalars."""

    max_steps: jax.Array
    gtol: jax.Array
    ftol: jax.Array
    xtol: jax.Array


class Run(NamedTuple):
    """The variables that the loop carries."""

    here: Point
    best: Point
    state: optax.OptState
    start_value: jax.Array
    start_size: jax.Array
    extent: jax.Array  # largest magnitude in params at the start
    # bool, whether the start was outside of bounds; None without bounds
    projected: Any
    scale: jax.Array  # scale of the objective at the start: max(|f|, |g| |x|)
    # lowest value and smallest size so far, up to changes within rounding; no trees
    record: Point
    waited: jax.Array  # int32, steps since the record, weighted
    # scalar, largest magnitude in the last change of params; None where nobody asks
    move: Any
    steps: jax.Array
    evaluations: jax.Array
    termination: jax.Array


class Step(NamedTuple):
    """The sizes of a step, scalars."""

    change: jax.Array  # absolute change of the value
    move: jax.Array  # largest magnitude in the change of params
    # decrease that the model predicted for the whole direction p; inf if not known
    predicted: jax.Array
    length: jax.Array  # largest magnitude in p; inf if not known
    has_model: bool  # whether the method has a model; otherwise p is the step
    # bool, whether no step was taken because a derivative was not finite
    nonfinite: jax.Array


class Problem(NamedTuple):
    """The static arguments of the program; functions are compared by identity."""

    value_fn: Objective
    tx: optax.GradientTransformation
    has_aux: bool


def bound_objective(problem: Problem, data: Data) -> Objective:
    """Return value_fn as a function of params alone."""
    return bind(
        problem.value_fn, data, caller="minimize", call=_CALL, has_aux=problem.has_aux
    )


def objective_and_aux(
    problem: Problem, data: Data
) -> tuple[ValueFn, Callable[[Params], Aux]]:
    """Return the objective and its auxiliary output as functions of params alone."""
    both = bound_objective(problem, data)
    if problem.has_aux:
        return lambda params: both(params)[0], lambda params: both(params)[1]
    return both, lambda params: None


def evaluate(objective: ValueFn, params: Params, box: Box | None = None) -> Point:
    """Evaluate the value and the gradient; complex leaves of the gradient follow
    optax's convention."""
    value, grad = strongly_typed(jax.value_and_grad(objective)(params))
    grad = jax.tree.map(jnp.conj, grad)
    return Point(params, value, grad, _size(params, grad, box))


def _size(params: Params, grad: Params, box: Box | None) -> jax.Array:
    """Return the largest magnitude in the gradient of the entries that no bound
    holds."""
    if box is None:
        return largest(grad)
    return largest(free_part(outward(box, params, grad), grad))


def begin(
    problem: Problem,
    params: Params,
    state: optax.OptState | None,
    data: Data,
    limits: Limits,
) -> Run:
    """Evaluate the starting point and test for termination: a run may end before its
    first step. A start outside of bounds is replaced by the nearest point within."""
    state = strongly_typed(problem.tx.init(params)) if state is None else state
    box, outside = box_in(state, params), None
    if box is not None:
        outside, params = is_outside(box, params), projected(box, params)
    here = evaluate(objective_and_aux(problem, data)[0], params, box)
    extent = largest(params)
    scale = jnp.maximum(jnp.abs(here.value), here.size * or_one(extent))
    run = Run(
        here=here,
        best=here,
        state=state,
        start_value=here.value,
        start_size=here.size,
        extent=extent,
        projected=outside,
        scale=scale.astype(here.value.dtype),
        record=here._replace(params=None, grad=None),
        waited=jnp.zeros((), jnp.int32),
        move=None,
        steps=jnp.zeros((), jnp.int32),
        evaluations=jnp.ones((), jnp.int32),
        termination=jnp.zeros((), jnp.int32),
    )
    zero, unknown = (jnp.full((), x, here.value.dtype) for x in (0.0, jnp.inf))
    step = Step(
        change=zero,
        move=zero,
        predicted=unknown,
        length=unknown,
        has_model=True,
        nonfinite=jnp.zeros((), bool),
    )
    return run._replace(termination=_judge(run, step, limits))


def advance(
    problem: Problem,
    run: Run,
    data: Data,
    limits: Limits,
    until: jax.Array,
) -> Run:
    """Take steps until the run ends or `until` steps have been taken in total."""
    objective, _ = objective_and_aux(problem, data)

    def goes_on(run: Run) -> jax.Array:
        return (run.termination == Termination.RUNNING) & (
            run.steps < jnp.minimum(until, limits.max_steps)
        )

    update = informed_update(problem.tx)
    return jax.lax.while_loop(
        goes_on, functools.partial(_step, update, objective, limits), run
    )


def _step(update: UpdateFn, objective: ValueFn, limits: Limits, run: Run) -> Run:
    old = run.here
    # x+ = x + u
    updates, state = _updated(update, objective, run)
    params = applied(old.params, updates)
    move = largest(jax.tree.map(jnp.subtract, params, old.params))

    # f and g at x+, which a line search has computed already
    kept = accepted(state, (old.value, old.grad))
    box = box_in(state, params)
    here = (
        _reused(params, kept, old, move, box)
        if kept
        else evaluate(objective, params, box)
    )

    # the evaluations of this step, and whether a step of zero is a failure
    found = reports(state, run.state)
    silent = not found and _evaluates(update, objective, run)
    spent = jnp.int32(-1) if silent else evaluations(found)
    counted = (spent >= 0) & (run.evaluations >= 0)
    has_failed = jnp.bool_(silent) if not found else failed(found)

    # the sizes of the step, and the best point so far
    direction = _direction(found, old.grad, updates)
    rests = largest(updates) == 0
    nonfinite = rests & jnp.any(jnp.array([report.nonfinite for report in found]))
    step = Step(jnp.abs(here.value - old.value), move, *direction, nonfinite)
    better = _is_better(here, run.best) & jnp.isfinite(move)

    # the steps since f or |g| was smaller than before by more than rounding
    record, progress = _recorded(here, run.record)
    level = jnp.abs(here.value - record.value) <= _noise(here.value, record.value)
    at_floor = _is_at_floor(run._replace(here=here), step)
    of_step = jnp.where(at_floor, FLOOR_STEP, level)
    of_zero = jnp.where(has_failed, FAILED_STEP, 0)
    counts = jnp.where(rests, of_zero, of_step)
    counts = jnp.where(at_floor & has_failed, PATIENCE, counts)
    new = run._replace(
        here=here,
        best=select(better, here, run.best),
        state=state,
        record=record,
        waited=jnp.where(progress, 0, run.waited + counts).astype(jnp.int32),
        move=None if run.move is None else move,
        steps=run.steps + 1,
        evaluations=jnp.where(counted, run.evaluations + spent + (kept is None), -1),
    )
    return new._replace(termination=_judge(new, step, limits))


def _updated(
    update: UpdateFn, objective: ValueFn, run: Run
) -> tuple[optax.Updates, optax.OptState]:
    """Return the updates and the new state, with the dtypes of the old one."""
    old = run.here
    updates, state = update(
        old.grad,
        run.state,
        old.params,
        value=old.value,
        grad=old.grad,
        value_fn=objective,
    )
    return updates, jax.tree.map(
        lambda new, kept: jnp.asarray(new, kept.dtype), state, run.state
    )


def _reused(
    params: Params,
    kept: tuple[jax.Array, Params],
    old: Point,
    move: jax.Array,
    box: Box | None,
) -> Point:
    """Return the point with the value and gradient that a line search has kept. After a
    step of zero they are those of the old point: a search may have kept others."""
    found = kept[0], jax.tree.map(jnp.conj, kept[1])
    value, grad = select(move == 0, (old.value, old.grad), found)
    return Point(params, value, grad, _size(params, grad, box))


def _is_better(here: Point, best: Point) -> jax.Array:
    """Return whether a point is finite, and lower than the best one by more than
    rounding, or as low with a smaller gradient."""
    noise = _noise(here.value, best.value)
    is_lower = here.value < best.value - noise
    is_as_low = here.value <= best.value + noise
    is_finite = jnp.isfinite(here.value) & jnp.isfinite(here.size)
    return (is_lower | (is_as_low & (here.size < best.size))) & is_finite


def _recorded(here: Point, record: Point) -> tuple[Point, jax.Array]:
    """Return the new record, and whether the value is lower than it by more than
    rounding, or the gradient smaller by a tenth."""
    is_lower = here.value < record.value - _noise(here.value, record.value)
    progress = is_lower | (here.size < 0.9 * record.size)
    value = jnp.minimum(here.value, record.value)
    size = jnp.minimum(here.size, record.size)
    return select(progress, Point(None, value, None, size), record), progress


def _direction(
    found: list[Report], grad: Params, updates: optax.Updates
) -> tuple[jax.Array, jax.Array, bool]:
    """Return the decrease that the model predicts for the whole direction p, the size
    of p, and whether there is a model.

    A line search took `u = t p` with a known t. A bounded model took a step u with a
    decrease of `|g.u| / 2`, at most that of p. For a method without a model p is u, and
    the decrease `|g.u| / 2`.
    """
    size = largest(updates)
    rates = [report.rate for report in found if report.rate is not None]
    models = [report.predicted for report in found if report.predicted is not None]
    if not models:
        along = jnp.abs(inner(grad, updates)) / 2
        along, size = (jnp.where(size == 0, jnp.inf, x) for x in (along, size))
        return along, size, False
    predicted = functools.reduce(jnp.maximum, models)
    if rates:
        taken = functools.reduce(jnp.multiply, rates)
    else:
        along = jnp.abs(inner(grad, updates)) / 2
        taken = divide(along, predicted, predicted > 0)
    known = (size > 0) & (taken > 0)
    return predicted, divide(size, taken, known, jnp.inf), True


class _Evaluated(Exception):
    """Raised by an objective that only detects whether it is called."""


def _evaluates(update: UpdateFn, objective: ValueFn, run: Run) -> bool:
    """Return whether a transformation that reports nothing evaluates the objective.
    Traces the update once more, up to the first evaluation."""

    def refuse(params: Params) -> Params:
        raise _Evaluated

    def attempt(run: Run) -> tuple[optax.Updates, optax.OptState]:
        point, refusing = run.here, precompose(objective, refuse)
        given = {"value": point.value, "grad": point.grad, "value_fn": refusing}
        return update(point.grad, run.state, point.params, **given)

    try:
        jax.eval_shape(attempt, run)
    except _Evaluated:
        return True
    return False


def _noise(value: jax.Array, other: jax.Array) -> jax.Array:
    """Return the difference of two values of the objective that rounding can cause."""
    return 4 * jnp.finfo(value.dtype).eps * jnp.maximum(jnp.abs(value), jnp.abs(other))


def _share(run: Run, step: Step) -> jax.Array:
    """Return the predicted decrease relative to the value."""
    value = jnp.abs(run.here.value)
    nothing = jnp.where(step.predicted == 0, 0.0, jnp.inf)
    return divide(step.predicted, value, value > 0, nothing)


def _is_short(run: Run, step: Step, tolerance: ArrayLike) -> jax.Array:
    """Return whether the direction is at most `tolerance` times the parameters, here or
    at the start."""
    extent = jnp.maximum(largest(run.here.params), run.extent)
    return step.length <= tolerance * extent


def _is_near(run: Run, step: Step, gtol: jax.Array) -> jax.Array:
    """Return whether the minimum is near: the predicted decrease is small compared to
    the value; or, for a minimum of value zero, the direction is short.

    With a value that tends to zero the predicted decrease remains a large share of it.
    With another one, a short direction may be one along which the objective is steep.
    """
    least = float(jnp.finfo(run.here.value.dtype).eps) ** LEAST_TOLERANCE_POWER
    tolerance, share = jnp.maximum(gtol, least), _share(run, step)
    is_short = _is_short(run, step, tolerance)
    if step.has_model:
        is_short &= share >= LARGE_SHARE
    return (share <= tolerance**2) | is_short


def _is_at_floor(run: Run, step: Step) -> jax.Array:
    """Return whether rounding hides the predicted decrease, or the direction."""
    noise = 10 * jnp.finfo(run.here.value.dtype).eps
    return (_share(run, step) <= noise) | _is_short(run, step, noise)


def _judge(run: Run, step: Step, limits: Limits) -> jax.Array:
    """Return the first reason to stop that holds, else RUNNING. Tolerances are
    relative, so the result does not depend on units."""
    value, size, move = run.here.value, run.here.size, step.move
    # a gradient that is small compared to the first one is not sufficient: far from a
    # minimum the first one may be larger by any factor
    is_small = size <= limits.gtol * run.start_size
    is_stationary = is_small & (_is_near(run, step, limits.gtol) | (size == 0))
    fall = run.start_value - value
    # the value does not exceed the best one
    settled = (move > 0) & (value <= run.best.value + _noise(value, run.best.value))
    far = largest(run.here.params) > UNBOUNDED_DISTANCE * or_one(run.extent)
    reasons = (
        (
            Termination.UNBOUNDED,
            (value == -jnp.inf) | (far & (fall > UNBOUNDED_FALL * run.scale)),
        ),
        (
            Termination.NONFINITE,
            ~(jnp.isfinite(value) & jnp.isfinite(size) & jnp.isfinite(move)),
        ),
        (Termination.GRADIENT, is_stationary),
        (
            Termination.VALUE,
            settled
            & (limits.ftol > 0)
            & (fall > 0)
            & (step.change <= limits.ftol * fall),
        ),
        (
            Termination.STEP,
            settled
            & (limits.xtol > 0)
            & (move <= limits.xtol * largest(run.here.params)),
        ),
        (Termination.NONFINITE, (run.waited >= PATIENCE) & step.nonfinite),
        (Termination.STALLED_AT_NOISE, run.waited >= PATIENCE),
    )
    termination = jnp.asarray(Termination.RUNNING, jnp.int32)
    for reason, holds in reversed(reasons):
        termination = jnp.where(holds, jnp.int32(reason), termination)
    return termination


def end(run: Run, reason: Termination) -> Run:
    """End a run that has not terminated yet."""
    going = run.termination == Termination.RUNNING
    return run._replace(
        termination=jnp.where(going, jnp.int32(reason), run.termination)
    )
