"""The Wolfe line search: finds a rate t at which `phi(t) = f(params + t u)` satisfies
the strong Wolfe conditions.

    phi(t) <= phi(0) + c1 t phi'(0),    |phi'(t)| <= c2 |phi'(0)|

Near the minimum rounding hides the first condition; there Hager and Zhang's approximate
Wolfe conditions compare slopes. `numerics/wolfe.py` chooses the trials.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., sections 3.1 and 3.5;
Hager and Zhang, "A new conjugate gradient method with guaranteed descent and an
efficient line search", 2005.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_count, check_range, choose, injectable
from hessopt.kinds.line_searches import LinesearchInfo, LinesearchState
from hessopt.kinds.protocol import Call, transformation
from hessopt.numerics import wolfe
from hessopt.numerics.guards import select
from hessopt.trees.boxes import (
    Bounds,
    Box,
    box_of,
    check_bounds,
    ended,
    free_part,
    holds_any,
    is_outside,
    outward,
    projected,
    step_within,
)
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import (
    applied,
    inner,
    inner_products,
    solve_dtype,
    strongly_typed,
)
from hessopt.typing import Params, StepStatus, Vector, step_status

MAX_HIDDEN_TRIALS = 5
"""Number of trials, once there is a bracket, if the decrease that the slope promises for
t = 1 is within rounding of the value. Steps of the right length then need one or two
trials; more only compare rounding errors."""

InitialGuess = Callable[[jax.Array, jax.Array], jax.Array]
"""`(fall, slope) -> rate`: the first trial, from the decrease of the objective in the
last step and its current slope, which is negative."""


def quadratic_guess(fall: jax.Array, slope: jax.Array) -> jax.Array:
    """Return the rate at which a parabola with this slope decreases as much as the last
    step did, at most 1 (Nocedal and Wright, equation 3.60)."""
    rate = -2.02 * fall / jnp.where(slope < 0, slope, -jnp.inf)
    return jnp.where((rate > 0) & (rate < 1), rate, 1.0)


def unit_guess(fall: jax.Array, slope: jax.Array) -> jax.Array:
    """Return 1."""
    return jnp.ones_like(slope)


GUESSES: dict[str, InitialGuess] = {"quadratic": quadratic_guess, "one": unit_guess}


@injectable
def scale_by_wolfe_linesearch(
    max_steps: int = 20,
    *,
    slope_rtol: float = 1e-4,
    curv_rtol: float = 0.9,
    max_rate: float | None = None,
    initial_guess: str | InitialGuess = "one",
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale the update to a step that satisfies the Wolfe conditions.

    The input is the additive update u, after the sign change; the output is `t u`.

    Args:
      max_steps: maximum number of trials.
      slope_rtol: c1 in [0, 1/2], the fraction of the initial slope by which the
        objective must decrease per unit of t.
      curv_rtol: c2 in [c1, 1], the fraction of the initial slope that may remain.
      max_rate: largest t, unbounded by default.
      initial_guess: the first t. `"one"` is for updates of the right length;
        `"quadratic"` estimates it, at most 1, from the decrease of the last step; or a
        callable `(fall, slope) -> t` of that decrease (0 at the start) and the slope, a
        negative scalar.
      bounds: `(lower, upper)`, each a number, a tree like params or None; see
        `hessopt.typing.Bounds`. The search then follows the path `params + t u` with
        every entry ended at its bound. Where bounds cut a step, the objective must
        decrease by the fraction c1 of what the gradient promises for that step, and its
        slope along the path must be at least `c2 phi'(0)`.

    Returns:
      A transformation whose `update(updates, state, params, *, value, grad, value_fn,
      **data)` requires the objective, and its value and gradient at params. Put it last
      in a chain: its state stores the value and gradient at the accepted point for
      `value_and_grad_from_state` and `minimize`. Its status is `state.info.status`.

      If no trial is accepted (SEARCH_FAILED), the step is that of the largest decrease
      found, or zero. A trial that is not finite reduces the rate. An update that points
      uphill (NOT_DESCENT), or a value or gradient that is not finite (NONFINITE), gives
      a step of zero. The state is then unchanged except count and info. From params
      outside of the bounds the step leads to the nearest point within (OUTSIDE_BOUNDS).

    Raises:
      ValueError: for max_steps < 1, c1 or c2 out of their ranges, max_rate <= 0 or an
        unknown word.
      TypeError: in `update`, for a missing argument; the message names it.
      ValueError, TypeError: in `init`, for bounds that do not fit params, for complex
        params with bounds, and for params outside of the bounds, where they are known.

    Cost per update: one value and gradient per trial, also under vmap; usually one
    trial if the update is well scaled. The objective is traced once. Memory: one
    gradient and one step.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.scale(-1.0), scale_by_wolfe_linesearch())
      >>> x, value_fn = jnp.array([3.0, 4.0]), lambda x: 10.0 * jnp.sum(x**2)
      >>> value, grad = jax.value_and_grad(value_fn)(x)
      >>> updates, state = tx.update(grad, tx.init(x), x, value=value, grad=grad, value_fn=value_fn)
      >>> float(value_fn(x + updates)) < 25.0
      True

    Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., sections 3.1 and 3.5;
    Hager and Zhang, "A new conjugate gradient method with guaranteed descent and an
    efficient line search", 2005; Ferry, Gill, Wong and Zhang, "Projected-search methods
    for bound-constrained optimization", 2024, for bounds.
    """
    check_count("max_steps", max_steps)
    check_range("slope_rtol", slope_rtol, 0, 0.5)
    check_range("curv_rtol", curv_rtol, slope_rtol, 1)
    check_range(
        "max_rate",
        math.inf if max_rate is None else max_rate,
        float(jnp.finfo(jnp.float32).tiny),
    )
    guess = choose("initial_guess", initial_guess, GUESSES)

    limit = math.inf if max_rate is None else max_rate
    conditions = wolfe.Conditions(slope_rtol, curv_rtol, limit, max_steps, max_steps)
    options = _Options(conditions, guess, check_bounds(bounds))
    return transformation(
        "scale_by_wolfe_linesearch",
        functools.partial(_init, options),
        functools.partial(_step, options),
        needs=("value_fn", "value", "grad"),
    )


class _Options(NamedTuple):
    """The arguments of `scale_by_wolfe_linesearch`, checked."""

    conditions: wolfe.Conditions
    guess: InitialGuess
    bounds: Bounds | None


class _Start(NamedTuple):
    """phi at 0, and the normalization of the search."""

    value: jax.Array  # phi(0)
    slope: jax.Array  # phi'(0); -1 if the update is not a descent direction
    per_unit: jax.Array  # 1 / |phi'(0)|
    finite: jax.Array  # bool scalar, whether value and slope are finite
    descends: jax.Array  # bool scalar, whether the slope is negative, beyond underflow
    noise: jax.Array  # normalized change of phi that rounding can cause
    hidden: jax.Array  # bool scalar, whether rounding of phi hides |phi'(0)|


class _Accepted(NamedTuple):
    """The accepted trial, or the one of largest decrease so far."""

    step: Params  # t u
    value: jax.Array
    grad: Params  # result of `jax.grad` at this trial


def _init(options: _Options, params: Params) -> LinesearchState:
    dtype, count = solve_dtype(params), jnp.zeros((), jnp.int32)
    state = LinesearchState(
        count=count,
        value=jnp.full((), jnp.inf, dtype),
        grad=jax.tree.map(
            lambda leaf: jnp.full_like(leaf, jnp.inf), strongly_typed(params)
        ),
        fall=jnp.zeros((), dtype),
        box=None,
        info=LinesearchInfo(
            status=jnp.zeros((), jnp.int32),
            rate=jnp.zeros((), dtype),
            trials=jnp.zeros((), jnp.int32),
            evaluations=jnp.zeros((), jnp.int32),
        ),
    )
    box = box_of(options.bounds, params, caller="scale_by_wolfe_linesearch")
    return beside(state, params)._replace(box=box)


def _step(
    options: _Options, call: Call, state: LinesearchState
) -> tuple[optax.Updates, LinesearchState]:
    box, outside = state.box, jnp.zeros((), bool)
    if box is not None:
        call, outside = _along_bounds(box, call)
    u, (start, length) = call.updates, _measure(call)

    # the first trial; until a trial decreases phi, the best step is zero and the value
    # and gradient are those of the state
    dtype = start.value.dtype
    fall = state.fall.astype(dtype)
    first = jnp.asarray(options.guess(fall, start.slope), dtype)
    # numbers given as arrays must not widen the scalars of the search
    c1, c2, limit = (jnp.asarray(x, dtype) for x in options.conditions[:3])
    most = options.conditions.max_steps
    bracketed = jnp.where(start.hidden, min(most, MAX_HIDDEN_TRIALS), most)
    conditions = wolfe.Conditions(c1, c2, limit, most, bracketed)
    bracket = wolfe.begin(first, start.noise, limit)
    none = _Accepted(jax.tree.map(jnp.zeros_like, u), state.value, state.grad)

    # trials until the Wolfe conditions hold: one value and gradient each
    def searching(carry: tuple[Vector, _Accepted]) -> jax.Array:
        goes = start.descends if box is None else start.descends | outside
        return goes & (wolfe.unpack(carry[0]).outcome == wolfe.SEARCHING)

    attempt = functools.partial(_attempt, conditions, box, outside, call, start)
    begin = wolfe.pack(bracket), none
    packed, found = jax.lax.while_loop(searching, attempt, begin)
    bracket = wolfe.unpack(packed)

    rate = bracket.best.rate
    status = {
        StepStatus.NONFINITE: ~start.finite,
        StepStatus.NOT_DESCENT: start.finite
        & ~start.descends
        & ~outside
        & (length > 0),
        StepStatus.SEARCH_FAILED: start.descends & (bracket.outcome != wolfe.ACCEPTED),
    }
    if box is not None:
        status[StepStatus.OUTSIDE_BOUNDS] = outside
    fallen = (start.value - found.value.astype(dtype)).astype(state.fall.dtype)
    return found.step, LinesearchState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        value=found.value,
        grad=found.grad,
        fall=jnp.where(rate > 0, fallen, state.fall),
        box=box,
        info=LinesearchInfo(
            status=step_status(status),
            rate=rate.astype(state.fall.dtype),
            trials=bracket.trials,
            evaluations=bracket.trials,
        ),
    )


def _along_bounds(box: Box, call: Call) -> tuple[Call, jax.Array]:
    """Return the call with updates that do not point outward at a bound, and whether
    params are outside of the box; the updates then lead to the nearest point within."""
    outside = is_outside(box, call.params)
    nearest = jax.tree.map(jnp.subtract, projected(box, call.params), call.params)
    u = optax.tree.cast_like(select(outside, nearest, call.updates), call.updates)
    at_bound = outward(box, call.params, jax.tree.map(jnp.negative, u))
    moving = free_part(at_bound, u)
    return call._replace(updates=select(outside, u, moving)), outside


def _measure(call: Call) -> tuple[_Start, jax.Array]:
    """Compute phi(0), phi'(0) = Re <g, u>, and the squared length of u."""
    value_dtype = jnp.result_type(call.value)
    dtype = solve_dtype((call.params, call.value))
    inners = inner_products(call.grad, call.updates)
    value, slope = jnp.asarray(call.value, dtype), jnp.asarray(inners[0, 1], dtype)
    finite = jnp.isfinite(value) & jnp.isfinite(slope)
    descends = finite & (slope < -jnp.finfo(dtype).tiny)
    per_unit = 1.0 / jnp.where(descends, -slope, 1.0)
    noise = jnp.finfo(value_dtype).eps ** wolfe.NOISE_POWER * jnp.abs(value) * per_unit
    hidden = 10 * jnp.finfo(value_dtype).eps * jnp.abs(value) * per_unit > 1
    slope = jnp.where(descends, slope, -1.0)
    start = _Start(value, slope, per_unit, finite, descends, noise, hidden)
    return start, inners[1, 1]


def _attempt(
    conditions: wolfe.Conditions,
    box: Box | None,
    outside: jax.Array,
    call: Call,
    start: _Start,
    carry: tuple[Vector, _Accepted],
) -> tuple[Vector, _Accepted]:
    """Evaluate phi and phi' at the trial rate, and update the bracket."""
    bracket, best = wolfe.unpack(carry[0]), carry[1]
    t, u, dtype = bracket.trial, call.updates, start.value.dtype
    step = jax.tree.map(lambda leaf: (t * leaf).astype(leaf.dtype), u)
    cut = None
    if box is not None:
        cut = ended(box, call.params, step)
        u, step = free_part(cut, u), step_within(box, call.params, step)
    value, grad = jax.value_and_grad(call.objective)(applied(call.params, step))

    # psi and psi', the normalized phi; the result of jax.grad is conjugated for complex
    # leaves
    change, promise = jnp.asarray(value, dtype) - start.value, None
    if box is not None:
        promise = -inner(call.grad, step).astype(dtype) * start.per_unit
        promise = jnp.where(holds_any(cut), jnp.minimum(promise, t), t)
    along = jnp.asarray(inner(jax.tree.map(jnp.conj, grad), u), dtype)
    change, along = change * start.per_unit, along * start.per_unit
    if box is not None:
        # from outside a point within is taken, whatever its value
        taken = jnp.array([-1.0, 0.0, 1.0], dtype)
        change, along, promise = select(outside, tuple(taken), (change, along, promise))
    bracket = wolfe.advance(bracket, change, along, conditions, promise)
    new = jax.tree.map(
        lambda x, like: jnp.asarray(x, like.dtype), _Accepted(step, value, grad), best
    )
    return wolfe.pack(bracket), select(bracket.best.rate == t, new, best)
