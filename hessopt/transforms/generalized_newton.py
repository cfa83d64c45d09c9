"""Generalized Newton: the rate at which a parabola through the objective along the
update is lowest.

    phi(eta) = f(params + eta u),    eta = b / A,    b = -phi'(0),  A = phi''(0)

The last rate is kept where the parabola opens downwards (A <= 0) or where u points
uphill (b <= 0).

Source: Bu and Xu, "Gradient descent with generalized Newton's method", arXiv
2407.02772.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_range, choose
from hessopt.calculus.taylor import taylor
from hessopt.kinds.rates import (
    Measurement,
    Memory,
    RateInfo,
    RateProblem,
    RateSolution,
    Rule,
    inner_by_group,
    scale_by_rates,
    scaled,
)
from hessopt.numerics.guards import zero_unless
from hessopt.trees.groups import Groups
from hessopt.trees.vectors import applied, eps
from hessopt.typing import StepStatus, Vector

SMALLEST_RATE, LARGEST_RATE = 1e-18, 1e18
"""The bounds of all rates: the squares of these are still numbers in float32."""


class Parabola(NamedTuple):
    """The model of phi along each group, averaged over steps."""

    descent: Vector  # (S,), b, minus the slope
    curvature: Vector  # (S,), A


class GeneralizedNewtonState(NamedTuple):
    """State of `scale_by_generalized_newton`; S groups."""

    count: jax.Array  # int32 scalar, updates so far
    memory: Memory  # with a `Parabola` for a model
    info: RateInfo


Mode = Callable[[RateProblem, Vector], Measurement]
"""`(problem, rate) -> Measurement` with a `Parabola` for a model; rate `(S,)` is the
last one."""


def scale_by_generalized_newton(
    *,
    mode: str | Mode = "exact",
    groups: Groups | None = None,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    update_every: int = 1,
    curvature_decay: float = 0.8,
    rate_decay: float = 0.0,
    initial_rate: float = 1e-2,
    min_rate: float = 0.0,
    max_rate: float = math.inf,
    max_change: float = 2.0,
    safeguard: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Scale additive updates by the rate of generalized Newton, measured at every step.

    Args:
      mode: how the parabola is measured: `"exact"`, by derivatives; `"forward"`, by one
        value at the last rate and the slope `grad . u`; `"central"`, by two values, at
        the last rate and as far on the other side; or a callable, see `Mode`.
      groups: None for one rate of all parameters; else groups as in `group_labels`,
        each with a rate by a parabola of its own.
      learning_rate: factor on the rates, or a schedule of it. A schedule belongs here:
        in the base optimizer, the rates would cancel it.
      update_every: steps from one measurement to the next. In those between, which cost
        nothing except under vmap, the rates stay, and no group moves farther than when
        it was measured. All steps of the first two periods are measured, and so is a
        step that would lead uphill, if `update` is given grad.
      curvature_decay: in [0, 1], weight of the past in the averages of b and A, for
        noisy batches; 0 for none.
      rate_decay: in [0, 1], weight of the past in an average of the rates; 0 for none.
      initial_rate: rate of every group until a parabola gives one, and place of the
        first probe, where the objective must change by more than its rounding.
      min_rate, max_rate: bounds on the rates that the parabolas give. Halving, by the
        safeguard or after a probe that is not finite, goes below min_rate.
      max_change: factor, at least 1, by which a rate changes at most, after the first.
      safeguard: whether the objective is evaluated at a step with measured rates. If it
        rises there by more than 0.1%, or is not finite, the rates are halved, at most
        five times; if that is not enough, no step is taken.

    Returns:
      A transformation, additive update in and `rate u` out, whose `update(updates,
      state, params, *, value, grad, value_fn, **data)` needs the objective, on the
      batch of the gradient; `"forward"` evaluates a gradient of its own where value and
      grad are not given. Its status is `state.info.status`:

      RATE_KEPT: a group kept its last rate, since its parabola opens downwards
      (NEGATIVE_CURVATURE), its update points uphill (NOT_DESCENT), or rounding hides
      the parabola. Where rounding hides the curvature alone, the rate may grow.
      SAFEGUARDED: the rates were halved because the objective rose. STEP_REJECTED: no
      step was taken. NONFINITE: a probe was not finite and the rate was halved; or the
      value or an update is not finite, and then the update is zero and the state as
      before, but for count and info.

    Raises:
      ValueError: for numbers out of their ranges, or unknown words.
      TypeError: in `update`, for a missing objective or params.

    Cost per measurement: exact, about one gradient, of which half is shared with the
    caller's in the same program, for several groups that of `taylor(order=2)`; forward
    one value per group, central two; the safeguard one value. Memory: scalars.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), scale_by_generalized_newton())
      >>> x, value_fn = jnp.array([3.0, 4.0]), lambda x: 10.0 * jnp.sum(x**2)
      >>> updates, state = tx.update(jax.grad(value_fn)(x), tx.init(x), x, value_fn=value_fn)
      >>> (x + updates).tolist()
      [0.0, 0.0]

    Source: Bu and Xu, "Gradient descent with generalized Newton's method", arXiv
    2407.02772.
    """
    bounds = _Bounds(min_rate, max_rate, max_change)
    measure = choose("mode", mode, MODES)
    check_range("min_rate", min_rate, 0)
    check_range("max_rate", max_rate, min_rate)
    check_range("initial_rate", initial_rate, *_interval(bounds))
    check_range("max_change", max_change, 1)
    rule = Rule(
        "scale_by_generalized_newton",
        State=GeneralizedNewtonState,
        blank=_blank,
        measure=measure,
        solve=functools.partial(_solve, bounds),
    )
    return scale_by_rates(
        rule,
        groups=groups,
        learning_rate=learning_rate,
        update_every=update_every,
        curvature_decay=curvature_decay,
        rate_decay=rate_decay,
        initial_rate=initial_rate,
        safeguard=safeguard,
    )


class _Bounds(NamedTuple):
    """Which rates may be found."""

    min_rate: jax.typing.ArrayLike
    max_rate: jax.typing.ArrayLike
    max_change: jax.typing.ArrayLike  # factor


def _interval(bounds: _Bounds) -> tuple[jax.Array, jax.Array]:
    """Return the lowest and the highest rate, of those whose squares are numbers."""
    lowest = jnp.maximum(bounds.min_rate, SMALLEST_RATE)
    return lowest, jnp.minimum(bounds.max_rate, LARGEST_RATE)


def _blank(size: int, dtype: Any) -> Parabola:
    return Parabola(jnp.zeros(size, dtype), jnp.zeros(size, dtype))


def _solve(
    bounds: _Bounds,
    model: Parabola,
    rate: Vector,
    solved: jax.Array,
    count: jax.Array,
) -> RateSolution:
    # eta = b / A is a minimum only where the parabola opens upwards and u points
    # downhill
    b, A = model
    usable = (b > 0) & (A > 0)
    eta = b / jnp.where(usable, A, 1)

    # one noisy batch must not change a rate by orders of magnitude; the initial rate
    # was a guess
    changed = jnp.clip(eta, rate / bounds.max_change, rate * bounds.max_change)
    eta = jnp.clip(jnp.where(solved, changed, eta), *_interval(bounds))
    facts = {
        StepStatus.NOT_DESCENT: jnp.any(b < 0),
        StepStatus.NEGATIVE_CURVATURE: jnp.any(A < 0),
    }
    return RateSolution(eta, usable, facts)


def exact(problem: RateProblem, rate: Vector) -> Measurement:
    """Measure the parabola by derivatives, in one sweep of tangents."""
    terms = taylor(
        problem.objective,
        problem.params,
        problem.updates,
        groups=problem.groups,
        order=2,
    )
    assert terms.hessian is not None
    curvature = jnp.diagonal(terms.hessian)
    return Measurement(terms.value, Parabola(-terms.gradient, curvature))


def forward(problem: RateProblem, rate: Vector) -> Measurement:
    """Measure the parabola by a value at the last rate and the slope at 0."""
    start, slope = _slope(problem, rate)
    # phi(r) - phi(0) = -b r + A r^2 / 2
    change = (_values(problem, jnp.diag(rate)) - start).astype(rate.dtype)
    return _parabola(problem, start, rate, -slope * rate, change - slope * rate)


def central(problem: RateProblem, rate: Vector) -> Measurement:
    """Measure the parabola by two values, at the last rate and as far on the other
    side."""
    start = problem.value
    if start is None:
        start = problem.objective(problem.params)
    # phi(+-r) - phi(0) = -+b r + A r^2 / 2
    probes = jnp.concatenate([jnp.diag(rate), jnp.diag(-rate)])
    changes = (_values(problem, probes) - start).astype(rate.dtype)
    ahead, back = jnp.split(changes, 2)
    return _parabola(problem, start, rate, (back - ahead) / 2, (ahead + back) / 2)


MODES: dict[str, Mode] = {"exact": exact, "forward": forward, "central": central}


def _slope(problem: RateProblem, rate: Vector) -> tuple[jax.Array, Vector]:
    """phi(0) and phi'(0), from what `update` was given if that is both."""
    if problem.value is not None and problem.grad is not None:
        slope = inner_by_group(problem.grad, problem.updates, problem.labels, rate)
        return problem.value, slope
    terms = taylor(
        problem.objective,
        problem.params,
        problem.updates,
        groups=problem.groups,
        order=1,
    )
    return terms.value, terms.gradient


def _values(problem: RateProblem, rates: jax.Array) -> Vector:
    """phi at each row of `(k, S)`, in the dtype of the objective."""

    def phi(rate: Vector) -> jax.Array:
        step = scaled(problem.updates, problem.labels, rate)
        return problem.objective(applied(problem.params, step))

    return jax.lax.map(phi, rates)


def _parabola(
    problem: RateProblem, start: jax.Array, rate: Vector, fall: Vector, bend: Vector
) -> Measurement:
    """Return the parabola through phi(0) with `fall = b r` and `bend = A r^2 / 2` at
    the rate r."""
    # what of a difference of two values may be rounding
    coarsest = max(float(jnp.finfo(start.dtype).eps), eps(problem.params))
    noise = 8 * coarsest * jnp.abs(start).astype(rate.dtype)

    # a bend that rounding hides may be as large as the noise; where the fall is hidden
    # too, nothing is known
    beyond = ~jnp.isfinite(bend)
    seen = jnp.abs(bend) > noise
    known = (seen | (fall > 2 * noise)) & ~beyond
    bend = jnp.where(seen, bend, noise)
    model = zero_unless(known, Parabola(fall / rate, 2 * bend / rate**2))
    return Measurement(start, model, known, beyond)
