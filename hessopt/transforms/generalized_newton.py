"""Generalized Newton: the rate that minimizes a parabola through the objective along
the update.

    phi(eta) = f(params + eta u),    eta = b / A,    b = -phi'(0),  A = phi''(0)

The last rate is kept if the parabola opens downwards (A <= 0) or u points uphill (b <=
0).

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

from hessopt._checks import check_range, choose, injectable
from hessopt.kinds.rates import (
    Measurement,
    Memory,
    RateInfo,
    RateProblem,
    RateSolution,
    Rule,
    inner_by_group,
    largest_growth,
    scale_by_rates,
    scaled,
    taylor_terms,
)
from hessopt.numerics.guards import zero_unless
from hessopt.trees.groups import Groups
from hessopt.trees.vectors import applied, eps
from hessopt.typing import StepStatus, Vector

SMALLEST_RATE, LARGEST_RATE = 1e-18, 1e18
"""Bounds of all rates; their squares can be represented in float32."""
LEAST_FALL = 2.0
"""Largest factor by which a rate falls, if `max_change` is smaller."""


class Parabola(NamedTuple):
    """The model of phi along each group, averaged over steps."""

    descent: Vector  # (S,), b, minus the slope
    curvature: Vector  # (S,), A


class GeneralizedNewtonState(NamedTuple):
    """State of `scale_by_generalized_newton`; S groups."""

    count: jax.Array  # int32 scalar, updates so far
    memory: Memory  # its model is a `Parabola`
    info: RateInfo


Mode = Callable[[RateProblem, Vector], Measurement]
"""`(problem, rate) -> Measurement` whose model is a `Parabola`; rate `(S,)` is the last
one."""


@injectable
def scale_by_generalized_newton(
    *,
    mode: str | Mode = "exact",
    groups: Groups | None = None,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    horizon: optax.ScalarOrSchedule | None = None,
    momentum: float | None = None,
    update_every: int = 1,
    curvature_decay: float = 0.9,
    rate_decay: float = 0.0,
    initial_rate: float = 1e-2,
    min_rate: float = 0.0,
    max_rate: float = math.inf,
    max_change: float | None = None,
    safeguard: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Scale additive updates by the rate of generalized Newton, measured at every step.

    Args:
      mode: the measurement of the parabola. `"exact"` uses derivatives, and for an
        objective without forward derivatives, such as one with a `jax.custom_vjp`,
        those in reverse mode; `"forward"` one value of the objective at the last rate
        r, and the slope `grad . u`; `"central"` two values, at r and -r. A callable is
        also accepted, see `Mode`.
      groups: None for one rate; else groups as in `hessopt.group_labels`, each with a
        rate from its own parabola.
      learning_rate: factor on the rates, or a schedule of it. Put a schedule here: one
        in the base optimizer would be cancelled by the rates.
      horizon: number h >= 1, or a schedule of it. The rates that minimize the model are
        multiplied by a factor between `1 / (1 + 1.5 m)`, with m the momentum, and `1 +
        (1 - m) (h - 1)`. It is the larger, the larger the share of the promised descent
        that the next batch confirms: this is 1 for a batch of all data. Rates larger
        than those that minimize the model gain more in the long run; from h = 2 on the
        losses may rise. Without grad in `update` the factor is the lower one. None: 1.
      momentum: number m in [0, 1], the share of an update that is left of the update
        before: 0.9 for `optax.sgd(1.0, momentum=0.9)`, b1 for Adam. The optimizer
        `hessopt.generalized_newton` measures it.
      update_every: number of steps from one measurement to the next. The steps in
        between reuse the rates and cost nothing, except under vmap.
      curvature_decay: in [0, 1], weight of the past in the averages of b and A, for
        noisy batches; 0 disables averaging.
      rate_decay: in [0, 1], weight of the past in an average of the rates, which starts
        with the first solution; 0 disables averaging.
      initial_rate: the rate until the first parabola is usable; also the first probe,
        which must change the objective by more than rounding.
      min_rate, max_rate: bounds on the rates; the safeguard and a probe that is not
        finite can reduce rates below min_rate.
      max_change: largest factor, at least 1, by which a rate grows from one measurement
        to the next, after the first one; it falls by at most 2, or this factor if it is
        larger. By default `1.03**min(update_every, 300)` with the safeguard, unlimited
        without.
      safeguard: whether to add the following to the published method.
        (1) The objective is evaluated at the step of newly measured rates. If it rises
        by more than 0.1%, or is not finite, the step is halved, at most five times;
        if that does not suffice, no step is taken.
        (2) Between two measurements the step of a group is at most as long as at its
        measurement.
        (3) Every step of the first two periods of `update_every` steps is measured, and
        so is a step after a halved one, or one that would lead uphill, if `update`
        receives grad.
        (4) max_change is `1.03**min(update_every, 300)` by default.
        (5) With `"forward"` and `"central"`, a curvature below the rounding of the
        values is replaced by that rounding.
        False, with `curvature_decay=0`, is the published method. Numbers that are not
        finite are treated alike in both.

    Returns:
      A transformation of the additive update u into `rate u`, whose `update(updates,
      state, params, *, value, grad, value_fn, **data)` requires the objective on the
      batch of the gradient; `"forward"` computes the value and the slope itself if
      value and grad are not both given. Its status is `state.info.status`:

      RATE_KEPT: a group kept its last rate, because its parabola opens downwards
        (NEGATIVE_CURVATURE), its update points uphill (NOT_DESCENT), or the parabola
        cannot be distinguished from rounding. If only the curvature cannot be
        distinguished from rounding, the rate may grow.
      SAFEGUARDED: the step was halved because the objective rose. STEP_REJECTED: no
      step was taken. NONFINITE: a probe was not finite and the rate was halved; or the
      value or an update is not finite, and then the update is zero and the state is
      unchanged except count and info.

    Raises:
      ValueError: for numbers out of range, or an unknown mode.
      TypeError: in `update`, for a missing objective or params.

    Cost per measurement: with `"exact"` about one gradient, half of which is shared
    with the caller's gradient in the same program, or for several groups that of
    `taylor(order=2)`; with `"forward"` one value per group, with `"central"` two; one
    value for the safeguard. Memory: scalars.

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
    if max_change is None and safeguard:
        max_change = largest_growth(update_every)
    bounds = _Bounds(min_rate, max_rate, max_change)
    measure = choose("mode", mode, MODES)
    check_range("min_rate", min_rate, 0)
    check_range("max_rate", max_rate, min_rate)
    check_range("initial_rate", initial_rate, *_interval(bounds))
    check_range("max_change", 1 if max_change is None else max_change, 1)
    rule = Rule(
        "scale_by_generalized_newton",
        State=GeneralizedNewtonState,
        blank=_blank,
        measure=measure,
        solve=functools.partial(_solve, bounds),
        along=_along,
    )
    return scale_by_rates(
        rule,
        groups=groups,
        learning_rate=learning_rate,
        horizon=horizon,
        momentum=momentum,
        update_every=update_every,
        curvature_decay=curvature_decay,
        rate_decay=rate_decay,
        initial_rate=initial_rate,
        safeguard=safeguard,
    )


class _Bounds(NamedTuple):
    """Bounds on the rates."""

    min_rate: jax.typing.ArrayLike
    max_rate: jax.typing.ArrayLike
    max_change: jax.typing.ArrayLike | None  # factor; None: unlimited


def _interval(bounds: _Bounds) -> tuple[jax.Array, jax.Array]:
    """Return the lowest and the highest rate whose squares can be represented."""
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
    # eta = b / A is a minimum only if the parabola opens upwards and u points downhill
    b, A = model
    usable = (b > 0) & (A > 0)
    eta = b / jnp.where(usable, A, 1)

    # one noisy batch must not change a rate by orders of magnitude; the first solution
    # is not limited, since the initial rate is a guess
    if bounds.max_change is not None:
        fall = jnp.maximum(bounds.max_change, LEAST_FALL)
        changed = jnp.clip(eta, rate / fall, rate * bounds.max_change)
        eta = jnp.where(solved, changed, eta)
    eta = jnp.clip(eta, *_interval(bounds))
    facts = {
        StepStatus.NOT_DESCENT: jnp.any(b < 0),
        StepStatus.NEGATIVE_CURVATURE: jnp.any(A < 0),
    }
    return RateSolution(eta, usable, facts)


def _along(model: Parabola, rate: Vector) -> tuple[jax.Array, jax.Array]:
    b, A = model
    return jnp.sum(b * rate), jnp.sum(A * rate**2)


def exact(problem: RateProblem, rate: Vector) -> Measurement:
    """Measure the parabola with derivatives, in one sweep of tangents."""
    terms = taylor_terms(problem, order=2)
    assert terms.hessian is not None
    curvature = jnp.diagonal(terms.hessian)
    return Measurement(terms.value, Parabola(-terms.gradient, curvature))


def forward(problem: RateProblem, rate: Vector) -> Measurement:
    """Measure the parabola with a value at the last rate and the slope at 0."""
    start, slope = _slope(problem, rate)
    # phi(r) - phi(0) = -b r + A r^2 / 2
    change = (_values(problem, jnp.diag(rate)) - start).astype(rate.dtype)
    return _parabola(problem, start, rate, -slope * rate, change - slope * rate)


def central(problem: RateProblem, rate: Vector) -> Measurement:
    """Measure the parabola with two values, at the last rate r and at -r."""
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
    """Return phi(0) and phi'(0), from value and grad if `update` received both."""
    if problem.value is not None and problem.grad is not None:
        slope = inner_by_group(problem.grad, problem.updates, problem.labels, rate)
        return problem.value, slope
    terms = taylor_terms(problem, order=1)
    return terms.value, terms.gradient


def _values(problem: RateProblem, rates: jax.Array) -> Vector:
    """Return phi at each row of rates `(k, S)`, in the dtype of the objective."""

    def phi(rate: Vector) -> jax.Array:
        step = scaled(problem.updates, problem.labels, rate)
        return problem.objective(applied(problem.params, step))

    return jax.lax.map(phi, rates)


def _parabola(
    problem: RateProblem, start: jax.Array, rate: Vector, fall: Vector, bend: Vector
) -> Measurement:
    """Return the parabola through phi(0) with `fall = b r` and `bend = A r^2 / 2` at
    the rate r."""
    beyond = ~jnp.isfinite(bend)
    if not problem.safeguard:
        model = zero_unless(~beyond, Parabola(fall / rate, 2 * bend / rate**2))
        return Measurement(start, model, ~beyond, beyond)

    # bound on the rounding of a difference of two values
    coarsest = max(float(jnp.finfo(start.dtype).eps), eps(problem.params))
    noise = 8 * coarsest * jnp.abs(start).astype(rate.dtype)

    # a bend below the noise is replaced by the noise, which bounds it; if the fall is
    # below it too, nothing is known
    seen = jnp.abs(bend) > noise
    known = (seen | (fall > 2 * noise)) & ~beyond
    bend = jnp.where(seen, bend, noise)
    model = zero_unless(known, Parabola(fall / rate, 2 * bend / rate**2))
    return Measurement(start, model, known, beyond, curved=seen)
