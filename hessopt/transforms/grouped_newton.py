"""Grouped Newton: the rates of all groups are determined jointly by a third-order model
of the objective along their updates.

    phi(eta) = f(params + sum_s eta_s u_s)
    g = -phi'(0),    H = phi''(0),    d_s = |phi_sss(0)|^(1/3),    D = diag(d)
    eta = argmin  -g.eta + eta.H eta / 2 + (lambda / 6) |D eta|^3

The cubic term restricts the rates to the region where phi is close to its quadratic
model. The method is invariant to a change of the units of a group, but for the
shrinkage towards one rate for all groups.

Source: Wolinski, "Adapting Newton's Method to Neural Networks through a Summary of
Higher-Order Derivatives", arXiv 2312.03885.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_range, injectable
from hessopt.kinds.protocol import scheduled
from hessopt.kinds.rates import (
    Measurement,
    Memory,
    RateInfo,
    RateProblem,
    RateSolution,
    Rule,
    largest_growth,
    scale_by_rates,
    taylor_terms,
)
from hessopt.numerics.cubic import solve_cubic
from hessopt.numerics.guards import divide, matmul, or_one
from hessopt.trees.groups import Groups
from hessopt.typing import Matrix, StepStatus, Vector

SOLVER_FACTS = (
    StepStatus.NEGATIVE_CURVATURE,
    StepStatus.UNBOUNDED_MODEL,
    StepStatus.NONFINITE,
)
"""The facts that `solve_cubic` reports about a model."""


class Cubic(NamedTuple):
    """The model of phi, averaged over steps."""

    descent: Vector  # (S,), g, minus the slopes
    hessian: Matrix  # (S, S), H
    scale: Vector  # (S,), d


class GroupedNewtonState(NamedTuple):
    """State of `scale_by_grouped_newton`; S groups."""

    count: jax.Array  # int32 scalar, updates so far
    memory: Memory  # its model is a `Cubic`
    info: RateInfo


@injectable
def scale_by_grouped_newton(
    *,
    groups: Groups = "leaf",
    cubic_damping: optax.ScalarOrSchedule = 1.0,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    horizon: optax.ScalarOrSchedule | None = None,
    momentum: float | None = None,
    update_every: int = 2,
    curvature_decay: float = 0.9,
    rate_decay: float = 0.0,
    nonnegative: bool = False,
    cross_groups: bool = True,
    ridge: float = 0.0,
    shrinkage: float = 0.0,
    initial_rate: float = 0.0,
    safeguard: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Scale the additive updates of each group by the rates that minimize a cubic model
    of the objective.

    Args:
      groups: groups of leaves, as in `hessopt.group_labels`.
      cubic_damping: lambda >= 0, dimensionless, or a schedule of it. With 1 the third
        derivatives enter as they are; with 0 the method is Newton's method in the
        rates. With the number 0, third derivatives are not computed, and the objective
        may depend on params through a `jax.custom_vjp`, such as
        `jax.experimental.ode.odeint`.
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
        `hessopt.grouped_newton` measures it.
      update_every: number of steps from one model to the next. The steps in between
        reuse the rates and cost nothing, except under vmap.
      curvature_decay: in [0, 1], weight of the past in the averages of g, H and d; 0
        disables averaging.
      rate_decay: in [0, 1], weight of the past in an average of the rates, which starts
        with the first solution.
      nonnegative: whether negative rates are replaced by 0, after the solve and before
        the average. (Training is better without: the solution relies on the decrease by
        groups with negative rates.)
      cross_groups: whether H has entries between groups; otherwise it is diagonal.
      ridge: number >= 0; the absolute values of the diagonal of H, times ridge, are
        added to the diagonal.
      shrinkage: number >= 0, weight of a term that draws the rates towards the one rate
        that minimizes the model for all groups, in units of the diagonal of H. The
        model of many rates follows the noise of a batch.
      initial_rate: rate of every group until the first solution.
      safeguard: whether to add the following to the published method.
        (1) The objective is evaluated at the step of newly measured rates. If it rises
        by more than 0.1%, or is not finite, the step is halved, at most five times;
        if that does not suffice, no step is taken.
        (2) Between two measurements the step of a group is at most as long as at its
        measurement.
        (3) Every step of the first two periods of `update_every` steps is measured, and
        so is a step after a halved one, or one that would lead uphill, if `update`
        receives grad.
        (4) From one model to the next, the length of the step at the same updates grows
        by at most `1.03**min(update_every, 300)`.
        False, with `curvature_decay=0`, is the published method. Models that are not
        finite, or have no minimizer, are treated alike in both.

    Returns:
      A transformation of the additive update u into `rate u`, whose `update(updates,
      state, params, *, value, grad, value_fn, **data)` requires the objective: on the
      batch of the gradient, or, for a model on the whole data, as a closure:

          objective = lambda params: loss(params, all_of_x, all_of_y)
          updates, state = tx.update(
              grads, state, params, grad=grads, value_fn=objective
          )

      Its status is `state.info.status`:

      UNBOUNDED_MODEL: the model has no minimizer, since H is indefinite and third
      derivatives are zero (with ReLU and squares the objective is a parabola along each
      group); the rates then minimize a parabola above the model, which decreases the
      model as well. RATE_KEPT: a group kept its last rate, since the model does not
      determine it or, with NONFINITE, is not finite. NEGATIVE_CURVATURE: H is not
      positive definite, and the cubic term bounds the model. SAFEGUARDED: the step
      was halved because the objective rose. STEP_REJECTED: no step was taken.
      NONFINITE is also reported if the value or an update is not finite; then the
      update is zero and the state is unchanged except count and info.

      The paper also shortens the steps on a plateau of the objective. For this, append
      the following transformation to the chain; `update` then requires `value`:

          optax.chain(
              grouped_newton(base),
              optax.contrib.reduce_on_plateau(factor=0.5, patience=10),
          )

    Raises:
      ValueError: for numbers out of range, or unknown groups.
      TypeError: in `update`, for a missing objective or params, and for an objective
        with a `jax.custom_vjp` unless cubic_damping is the number 0.

    Cost per model: that of `taylor(order=3)`, with the number 0 for cubic_damping that
    of `taylor(order=2)`, of `solve_cubic`, and one value for the safeguard. The steps
    in between cost nothing. Memory: `S^2`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1.0), scale_by_grouped_newton(cubic_damping=0.0))
      >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(1.0)}
      >>> def value_fn(p):
      ...     return 10.0 * jnp.sum(p["a"] ** 2) + p["a"][0] * p["b"] + p["b"] ** 2
      >>> grads, state = jax.grad(value_fn)(params), tx.init(params)
      >>> updates, state = tx.update(grads, state, params, value_fn=value_fn)
      >>> float(value_fn(optax.apply_updates(params, updates))) < 0.1
      True

    Source: Wolinski, "Adapting Newton's Method to Neural Networks through a Summary of
    Higher-Order Derivatives", arXiv 2312.03885.
    """
    check_range("cubic_damping", cubic_damping, 0)
    check_range("ridge", ridge, 0)
    check_range("initial_rate", initial_rate, 0)
    check_range("shrinkage", shrinkage, 0)

    solver = _Solver(cubic_damping, nonnegative, cross_groups, ridge, shrinkage)
    rule = Rule(
        "scale_by_grouped_newton",
        State=GroupedNewtonState,
        blank=_blank,
        measure=functools.partial(_measure, 3 if solver.is_cubic else 2),
        solve=functools.partial(_solve, solver),
        along=_along,
        max_growth=largest_growth(update_every) if safeguard else None,
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


class _Solver(NamedTuple):
    """The arguments of the solution of a model, checked."""

    cubic_damping: optax.ScalarOrSchedule
    nonnegative: bool
    cross_groups: bool
    ridge: jax.typing.ArrayLike
    shrinkage: jax.typing.ArrayLike

    @property
    def is_cubic(self) -> bool:
        """Whether the third derivatives are used, as far as is known while tracing."""
        lam = self.cubic_damping
        return not isinstance(lam, int | float) or lam != 0


def _blank(size: int, dtype: Any) -> Cubic:
    g, H, d = (jnp.zeros(shape, dtype) for shape in (size, (size, size), size))
    return Cubic(g, H, d)


def _measure(order: int, problem: RateProblem, rate: Vector) -> Measurement:
    """Measure the model with derivatives up to the order, in one sweep of tangents."""
    value, gradient, hessian, third = taylor_terms(problem, order)
    assert hessian is not None
    third = jnp.zeros_like(gradient) if third is None else third
    # d_s has the unit of phi^(1/3) / eta_s, so that |D eta|^3 has that of phi
    return Measurement(value, Cubic(-gradient, hessian, jnp.cbrt(jnp.abs(third))))


def _solve(
    solver: _Solver, model: Cubic, rate: Vector, solved: jax.Array, count: jax.Array
) -> RateSolution:
    g, H, d = model
    diagonal = jnp.diagonal(H)
    H = H if solver.cross_groups else jnp.diag(diagonal)
    H = H + solver.ridge * jnp.diag(jnp.abs(diagonal))

    # sum_s w_s (eta_s - r)^2 / 2 draws the rates towards r, the minimum for one rate
    w = solver.shrinkage * jnp.abs(diagonal)
    b, A = jnp.sum(g), jnp.maximum(jnp.sum(H), jnp.mean(jnp.abs(diagonal)))
    r = divide(b, A, (A > 0) & (b > 0), 0.0)
    g, H = g + w * r, H + jnp.diag(w)

    # eta = argmin -g.eta + eta.H eta / 2 + (lambda / 6) |D eta|^3
    damping = scheduled(solver.cubic_damping, count)
    eta, _, status = solve_cubic(-g, H, d, damping)
    facts = {flag: status & flag != 0 for flag in SOLVER_FACTS}

    # if there is no minimum, use that of a parabola above the model; a group without
    # curvature has no minimum there either
    unbounded = facts[StepStatus.UNBOUNDED_MODEL]
    eta = jnp.where(unbounded, _bounded(g, H), eta)
    usable = ~facts[StepStatus.NONFINITE] & (~unbounded | jnp.any(H != 0, axis=1))
    eta = jnp.maximum(eta, 0) if solver.nonnegative else eta
    return RateSolution(eta, usable, facts)


def _along(model: Cubic, rate: Vector) -> tuple[jax.Array, jax.Array]:
    g, H, _ = model
    return jnp.vdot(rate, g), jnp.vdot(rate, matmul(H, rate))


def _bounded(g: Vector, H: Matrix) -> Vector:
    """Return the minimizer of `-g.eta + eta.|H| eta / 2`, a parabola above that of H,
    with zero for a group without curvature."""
    # |H| has the absolute values of the eigenvalues of H, in units of the groups in
    # which all rows have similar size
    largest = jnp.max(jnp.abs(H), axis=1, initial=0.0)
    t = jnp.where(largest > 0, 1 / jnp.sqrt(or_one(largest)), 0)
    theta, Q = jnp.linalg.eigh(H * t * t[:, None])

    # an eigenvalue below rounding does not make the step long
    theta = jnp.abs(theta)
    rounding = jnp.finfo(H.dtype).eps ** 0.5 * jnp.max(theta, initial=0.0)
    theta = jnp.maximum(theta, rounding)
    return t * matmul(Q, matmul(Q.T, t * g) / or_one(theta))
