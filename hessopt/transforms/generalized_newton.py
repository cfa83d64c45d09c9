"""Generalized Newton: the rate at which a parabola through the objective along the
update has its lowest point.

    phi(eta) = f(params + eta u),    eta = b / A,    b = -phi'(0),  A = phi''(0)

No parabola opens downwards, and none is trusted where u points uphill: the last rate is
kept where A <= 0 or b <= 0.

Source: Bu and Xu, "Gradient descent with generalized Newton's method", arXiv
2407.02772.
"""

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
from hessopt.trees.groups import Groups
from hessopt.trees.vectors import applied, eps
from hessopt.typing import StepStatus, Vector

_NAME = "scale_by_generalized_newton"

FLOOR, CEILING = 1e-18, 1e18
"""No rate is outside of these: their squares are still numbers."""


class Parabola(NamedTuple):
    """What phi looks like along each group, averaged over steps."""

    descent: Vector  # (S,), b, minus the slope
    curvature: Vector  # (S,), A


class GeneralizedNewtonState(NamedTuple):
    """State of `scale_by_generalized_newton`; S groups."""

    count: jax.Array  # int32 scalar, updates so far
    memory: Memory  # with a `Parabola` for a model
    info: RateInfo


Mode = Callable[[RateProblem, Vector], Measurement]
"""`(at, rate) -> Measurement` with a `Parabola` for a model."""


def exact(at: RateProblem, rate: Vector) -> Measurement:
    """By derivatives: one sweep of tangents."""
    terms = taylor(at.objective, at.params, at.updates, groups=at.groups, order=2)
    assert terms.hessian is not None
    return Measurement(
        terms.value, Parabola(-terms.gradient, jnp.diagonal(terms.hessian))
    )


def forward(at: RateProblem, rate: Vector) -> Measurement:
    """From a value at the last rate, and the slope of the gradient."""
    if at.value is None or at.grad is None:
        start, slope = taylor(
            at.objective, at.params, at.updates, groups=at.groups, order=1
        )[:2]
    else:
        start, slope = at.value, inner_by_group(at.grad, at.updates, at.labels, rate)
    change = (_values(at, jnp.diag(rate)) - start).astype(rate.dtype)
    return _fitted(at, start, -slope * rate, change - slope * rate, rate)


def central(at: RateProblem, rate: Vector) -> Measurement:
    """From two values, at the last rate and as far on the other side."""
    start = at.objective(at.params) if at.value is None else at.value
    changes = _values(at, jnp.concatenate([jnp.diag(rate), jnp.diag(-rate)])) - start
    ahead, behind = jnp.split(changes.astype(rate.dtype), 2)
    return _fitted(at, start, (behind - ahead) / 2, (ahead + behind) / 2, rate)


MODES: dict[str, Mode] = {"exact": exact, "forward": forward, "central": central}


def _values(at: RateProblem, rates: jax.Array) -> Vector:
    """phi at each row of `(k, S)`, in the dtype of the objective."""
    return jax.lax.map(
        lambda rate: at.objective(
            applied(at.params, scaled(at.updates, at.labels, rate))
        ),
        rates,
    )


def _fitted(
    at: RateProblem, start: jax.Array, fall: Vector, bend: Vector, rate: Vector
) -> Measurement:
    """The parabola through phi(0) that falls by `fall - bend` up to `rate`, `bend`
    being due to its curvature.

    A bend that rounding hides may be as large as rounding; if the fall is hidden too,
    nothing is known.
    """
    coarsest = max(float(jnp.finfo(start.dtype).eps), eps(at.params))
    beyond, noise = (
        ~jnp.isfinite(bend),
        8 * coarsest * jnp.abs(start).astype(rate.dtype),
    )
    seen = jnp.abs(bend) > noise
    known = (seen | (fall > 2 * noise)) & ~beyond
    bend = jnp.where(seen, bend, noise)
    model = Parabola(
        jnp.where(known, fall / rate, 0), jnp.where(known, 2 * bend / rate**2, 0)
    )
    return Measurement(start, model, known, beyond)


def _bounds(
    min_rate: jax.typing.ArrayLike, max_rate: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    return jnp.maximum(min_rate, FLOOR), jnp.minimum(max_rate, CEILING)


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
      mode: how the parabola is measured. `"exact"`: by derivatives. `"forward"`: by one
        value at the last rate, and the slope `grad . u`. `"central"`: by two values. A
        callable: see `Mode`.
      groups: None for one rate, else a rate for each group by its own parabola, as in
        `group_labels`.
      learning_rate: factor on the rates, or a schedule of it. The place for schedules:
        one in the base optimizer would be cancelled.
      update_every: steps from one measurement to the next. In those between, which cost
        nothing but under vmap, the rates stay, and no group goes farther than when it
        was measured. The first two periods are measured throughout, and so is a step
        that would lead uphill, if `update` is given grad.
      curvature_decay: in [0, 1], weight of the past in the averages of b and A, for
        noisy batches; 0 for none.
      rate_decay: in [0, 1], weight of the past in an average of the rates.
      initial_rate: until the first parabola is usable; also the first probe, which must
        be long enough to be seen beside the rounding of the objective.
      min_rate, max_rate: bounds of the rates that are found; the safeguard and a probe
        that is not finite go below.
      max_change: factor, at least 1, by which a rate changes at most, after the first.
      safeguard: whether the objective is evaluated where a measured rate leads: if it
        rises there by more than 0.1%, or is not finite, the rates are halved, at most
        five times; then no step is taken.

    Returns:
      A transformation, additive update in and `rate u` out, whose `update(updates,
      state, params, *, value, grad, value_fn, **data)` needs the objective, on the
      batch of the gradient; `"forward"` evaluates a gradient of its own where value and
      grad are not given. Its status is `state.info.status`:

      RATE_KEPT for a group whose parabola opens downwards (NEGATIVE_CURVATURE) or whose
      update leads uphill (NOT_DESCENT), and for one that rounding hides, unless the
      objective falls visibly: then the rate may grow. NONFINITE for a probe that is not
      finite, which halves the rate, and for a value or an update that is not: then the
      update is zero and the state as before, but for count and info. SAFEGUARDED: a
      halved step. STEP_REJECTED: none.

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

    Source: see the head of this file.
    """
    measure = choose("mode", mode, MODES)
    check_range("min_rate", min_rate, 0)
    check_range("max_rate", max_rate, min_rate)
    check_range("initial_rate", initial_rate, *_bounds(min_rate, max_rate))
    check_range("max_change", max_change, 1)

    def blank(size: int, dtype: Any) -> Parabola:
        return Parabola(jnp.zeros(size, dtype), jnp.zeros(size, dtype))

    def solve(
        model: Parabola, rate: Vector, solved: jax.Array, count: jax.Array
    ) -> RateSolution:
        b, A = model
        usable = (b > 0) & (A > 0)
        eta = b / jnp.where(usable, A, 1)
        eta = jnp.where(
            solved, jnp.clip(eta, rate / max_change, rate * max_change), eta
        )
        eta = jnp.clip(eta, *_bounds(min_rate, max_rate))
        return RateSolution(
            eta,
            usable,
            {
                StepStatus.NOT_DESCENT: jnp.any(b < 0),
                StepStatus.NEGATIVE_CURVATURE: jnp.any(A < 0),
            },
        )

    return scale_by_rates(
        Rule(_NAME, GeneralizedNewtonState, blank, measure, solve),
        groups=groups,
        learning_rate=learning_rate,
        update_every=update_every,
        curvature_decay=curvature_decay,
        rate_decay=rate_decay,
        initial_rate=initial_rate,
        safeguard=safeguard,
    )
