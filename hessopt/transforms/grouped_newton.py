"""Grouped Newton: the rates of all groups together, by a model of third order of the
objective along their updates.

    phi(eta) = f(params + sum_s eta_s u_s),    g = -phi'(0),   H = phi''(0),   d_s = |phi_sss(0)|^(1/3)

    eta = argmin  -g.eta + eta.H eta / 2 + (lambda / 6) |D eta|^3,    D = diag(d)

The cubic term keeps the rates where the parabola is one, at whatever scale of a group.

Source: Wolinski, "Adapting Newton's Method to Neural Networks through a Summary of
Higher-Order Derivatives", arXiv 2312.03885.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_range
from hessopt.calculus.taylor import taylor
from hessopt.kinds.protocol import scheduled
from hessopt.kinds.rates import (
    Measurement,
    Memory,
    RateInfo,
    RateProblem,
    RateSolution,
    Rule,
    scale_by_rates,
)
from hessopt.numerics.cubic import solve_cubic
from hessopt.numerics.guards import matmul, or_one
from hessopt.trees.groups import Groups
from hessopt.typing import Matrix, StepStatus, Vector

_NAME = "scale_by_grouped_newton"

FACTS = (
    StepStatus.NEGATIVE_CURVATURE,
    StepStatus.UNBOUNDED_MODEL,
    StepStatus.NONFINITE,
)
"""Of a model, that `solve_cubic` tells."""


class Cubic(NamedTuple):
    """What phi looks like, averaged over steps."""

    descent: Vector  # (S,), g, minus the slopes
    hessian: Matrix  # (S, S), H
    scale: Vector  # (S,), d


class GroupedNewtonState(NamedTuple):
    """State of `scale_by_grouped_newton`; S groups."""

    count: jax.Array  # int32 scalar, updates so far
    memory: Memory  # with a `Cubic` for a model
    info: RateInfo


def _measure(at: RateProblem, rate: Vector) -> Measurement:
    """By derivatives: one sweep of tangents."""
    value, gradient, hessian, third = taylor(
        at.objective, at.params, at.updates, groups=at.groups
    )
    assert hessian is not None
    assert third is not None
    return Measurement(value, Cubic(-gradient, hessian, jnp.cbrt(jnp.abs(third))))


def _bounded(g: Vector, H: Matrix) -> Vector:
    """The minimiser of `-g.eta + eta.|H| eta / 2`, a parabola above that of H; zero for
    a group without curvature.

    |H| has the eigenvalues of H by magnitude, in units of the groups in which all rows are alike.
    """
    largest = jnp.max(jnp.abs(H), axis=1, initial=0.0)
    t = jnp.where(largest > 0, 1 / jnp.sqrt(or_one(largest)), 0)
    theta, Q = jnp.linalg.eigh(H * t * t[:, None])
    theta = jnp.maximum(
        jnp.abs(theta),
        jnp.finfo(H.dtype).eps ** 0.5 * jnp.max(jnp.abs(theta), initial=0.0),
    )
    step = matmul(Q.T, t * g) / or_one(theta)
    return t * matmul(Q, step)


def scale_by_grouped_newton(
    *,
    groups: Groups = "leaf",
    cubic_damping: optax.ScalarOrSchedule = 1.0,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    update_every: int = 2,
    curvature_decay: float = 0.9,
    rate_decay: float = 0.0,
    nonnegative: bool = False,
    cross_groups: bool = True,
    ridge: float = 0.0,
    initial_rate: float = 0.0,
    safeguard: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Scale additive updates, group by group, by the rates that minimise a cubic model
    of the objective.

    Args:
      groups: groups of leaves, as in `group_labels`.
      cubic_damping: lambda, not negative, or a schedule of it. Without units: 1 trusts
        third derivatives as they are. With 0 it is Newton's method in the rates.
      learning_rate: factor on the rates, or a schedule of it. The place for schedules:
        one in the base optimizer would be cancelled.
      update_every: steps from one model to the next. In those between, which cost
        nothing but under vmap, the rates stay, and no group goes farther than when it
        was measured. The first two periods are measured throughout, and so is a step
        that would lead uphill, if `update` is given grad.
      curvature_decay: in [0, 1], weight of the past in the averages of g, H and d; 0
        for none.
      rate_decay: in [0, 1], weight of the past in an average of the rates, which begins
        with the first solution.
      nonnegative: whether negative rates are replaced by 0, after the solve and before
        they are averaged. (What a group gains by going backwards others count on:
        training is better without.)
      cross_groups: whether H has entries between groups.
      ridge: not negative, is added to H as this part of the magnitudes of its diagonal.
      initial_rate: rate of every group until there is a solution.
      safeguard: whether the objective is evaluated where new rates lead: if it rises
        there by more than 0.1%, or is not finite, the rates are halved, at most five
        times; then no step is taken.

    Returns:
      A transformation, additive update in and `rate u` out, whose `update(updates,
      state, params, *, value, grad, value_fn, **data)` needs the objective: on the
      batch of the gradient, or for the model on the whole data

          objective = lambda params: loss(params, all_of_x, all_of_y) updates, state =
          tx.update(grads, state, params, grad=grads, value_fn=objective)

      Its status is `state.info.status`. UNBOUNDED_MODEL: the model has no minimiser, as
      where each group alone makes a parabola (ReLU and squares) and H is indefinite;
      the rates are those of a parabola above it, which lower the model too. RATE_KEPT
      for groups of which the model says nothing, and with NONFINITE where it is not
      finite. NEGATIVE_CURVATURE, of H, is no trouble. SAFEGUARDED and STEP_REJECTED: a
      halved step, and none. NONFINITE also for a value or an update that is not: then
      the update is zero and the state as before, but for count and info.

      The damping on plateau of the paper follows the rate, as

          optax.chain(grouped_newton(base), optax.contrib.reduce_on_plateau(factor=0.5,
          patience=10))

      whose `update` also wants `value`.

    Raises:
      ValueError: for numbers out of their ranges, or unknown words.
      TypeError: in `update`, for a missing objective or params.

    Cost per model: that of `taylor(order=3)`, `solve_cubic`, and one value for the
    safeguard; between them nothing. Memory: `S^2`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), scale_by_grouped_newton(cubic_damping=0.0))
      >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(1.0)}
      >>> value_fn = lambda p: 10.0 * jnp.sum(p["a"] ** 2) + p["a"][0] * p["b"] + p["b"] ** 2
      >>> updates, state = tx.update(jax.grad(value_fn)(params), tx.init(params), params, value_fn=value_fn)
      >>> float(value_fn(optax.apply_updates(params, updates))) < 0.1
      True

    Source: see the head of this file.
    """
    check_range("cubic_damping", cubic_damping, 0)
    check_range("ridge", ridge, 0)
    check_range("initial_rate", initial_rate, 0)

    def blank(size: int, dtype: Any) -> Cubic:
        return Cubic(
            jnp.zeros(size, dtype),
            jnp.zeros((size, size), dtype),
            jnp.zeros(size, dtype),
        )

    def solve(
        model: Cubic, rate: Vector, solved: jax.Array, count: jax.Array
    ) -> RateSolution:
        g, H, d = model
        diagonal = jnp.diagonal(H)
        H = (H if cross_groups else jnp.diag(diagonal)) + ridge * jnp.diag(
            jnp.abs(diagonal)
        )
        eta, _, status = solve_cubic(-g, H, d, scheduled(cubic_damping, count))
        facts = {flag: status & flag != 0 for flag in FACTS}
        unbounded = facts[StepStatus.UNBOUNDED_MODEL]
        eta = jnp.where(unbounded, _bounded(g, H), eta)
        usable = ~facts[StepStatus.NONFINITE] & (~unbounded | jnp.any(H != 0, axis=1))
        return RateSolution(jnp.maximum(eta, 0) if nonnegative else eta, usable, facts)

    return scale_by_rates(
        Rule(_NAME, GroupedNewtonState, blank, _measure, solve),
        groups=groups,
        learning_rate=learning_rate,
        update_every=update_every,
        curvature_decay=curvature_decay,
        rate_decay=rate_decay,
        initial_rate=initial_rate,
        safeguard=safeguard,
    )
