"""The optimizers: chains of a direction, a sign change and an optional line search, or
of any optimizer and a rate."""

import functools
import math
from typing import Any

import jax
import optax

from hessopt._checks import (
    check_transformation,
    injectable,
    renamed_arguments,
)
from hessopt.calculus.curvature import Curvature, CurvatureFn
from hessopt.kinds.bases import over_base
from hessopt.kinds.faces import has_box
from hessopt.numerics.broyden import Formula
from hessopt.numerics.indefiniteness import IndefiniteTreatment
from hessopt.transforms.bfgs import scale_by_bfgs
from hessopt.transforms.gauss_newton import DampingRule, scale_by_gauss_newton
from hessopt.transforms.generalized_newton import Mode, scale_by_generalized_newton
from hessopt.transforms.grouped_newton import scale_by_grouped_newton
from hessopt.transforms.lbfgs import scale_by_lbfgs
from hessopt.transforms.linesearch import scale_by_wolfe_linesearch
from hessopt.transforms.newton import scale_by_newton
from hessopt.transforms.newton_cg import Preconditioner, scale_by_newton_cg
from hessopt.transforms.optax_linesearch import fitted
from hessopt.transforms.within import keep_within
from hessopt.trees.boxes import Bounds, check_bounds
from hessopt.trees.groups import Groups
from hessopt.typing import Params

DEFAULT_LINESEARCH = scale_by_wolfe_linesearch()
"""Default of `newton_cg` and `lbfgs`: their steps usually have the right length, so the
first trial is 1."""

_CAPPED: dict[str, Any] = {"max_rate": 1.0}
CAPPED_LINESEARCH = scale_by_wolfe_linesearch(**_CAPPED)
"""Default of `newton`: rates are at most 1, since the quadratic model is minimal at the
full step. (Digits, 5 seeds: a test accuracy of 0.97 with all seeds; with four seeds if
the search may go farther.)"""

_QUADRATIC: dict[str, Any] = {"initial_guess": "quadratic"}
QUADRATIC_LINESEARCH = scale_by_wolfe_linesearch(**_QUADRATIC)
"""Default of `bfgs`: steps are too long at first and after self-scaling, so the first
trial is estimated from the last decrease. (A PINN, 2000 steps of SSBroyden: 1.02
gradients per step, compared to 1.57 with a first trial of 1.)"""


@renamed_arguments({"positivity": "on_indefinite"})
@injectable
def newton(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    damping: optax.ScalarOrSchedule = 0.0,
    on_indefinite: str | IndefiniteTreatment = "shift",
    blocks: Groups = "all",
    update_every: int = 1,
    curvature: str | CurvatureFn | Curvature = "hessian",
    bounds: Bounds | None = None,
    linesearch: optax.GradientTransformation | None = CAPPED_LINESEARCH,
) -> optax.GradientTransformationExtraArgs:
    """Damped Newton method with a line search.

    Args:
      learning_rate: factor on the step before the line search, or a schedule of it;
        None means 1.
      damping: lambda >= 0, in units of f / params^2, or a schedule of it.
      on_indefinite: treatment of an `H + lambda I` that is not positive definite.
        `"shift"` adds a sufficient multiple of D^2, which is remembered between updates
        and divided by four at each; D is a diagonal matrix that equilibrates
        H + lambda I. `"absolute"` replaces the eigenvalues of
        `D^-1 (H + lambda I) D^-1` by their absolute values; `"none"` uses the matrix as
        it is: the step may then lead towards a saddle or a maximum, and the status
        reports this. An `IndefiniteTreatment` is also accepted.
      blocks: `"all"`, or groups as in `hessopt.group_labels`. With groups, H is
        restricted to its diagonal blocks, and each block is computed separately.
      update_every: number of updates that use one factorization.
      curvature: `"hessian"`, or `"gauss_newton"` with
        `value_fn=hessopt.composite(model_fn, loss_fn)`. An objective without forward
        derivatives, such as one with a `jax.custom_vjp`, is differentiated in reverse
        mode only.
      bounds: `(lower, upper)`, each a number, a tree like params or None: all iterates
        stay within, and the objective is not evaluated outside. See
        `hessopt.typing.Bounds`. A default line search gets the same bounds, another one
        has to have them.
      linesearch: a line search that takes the additive update, or None.

    Returns:
      An optimizer whose `update(grads, state, params, *, value, grad, value_fn,
      **data)` requires the objective, and with a line search also the value and the
      gradient at `params`.

    Raises:
      ValueError, TypeError: as in `scale_by_newton`; TypeError also if value or grad is
        missing for a line search.

    Cost per step: that of `scale_by_newton`, and one value and gradient per trial of
    the line search, usually one trial.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def loss(x):
      ...     return jnp.sum((x**2 - 1.0) ** 2)
      >>> x, tx = jnp.array([0.5, 3.0]), newton()
      >>> state = tx.init(x)
      >>> for _ in range(8):
      ...     value, grad = jax.value_and_grad(loss)(x)
      ...     updates, state = tx.update(grad, state, x, value=value, grad=grad, value_fn=loss)
      ...     x = optax.apply_updates(x, updates)
      >>> jnp.round(x, 4).tolist()
      [1.0, 1.0]

    Source: see `scale_by_newton`.
    """
    direction = scale_by_newton(
        damping,
        on_indefinite=on_indefinite,
        blocks=blocks,
        update_every=update_every,
        curvature=curvature,
        bounds=bounds,
    )
    return _descend(direction, learning_rate, linesearch, bounds)


@injectable
def gauss_newton(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    damping: optax.ScalarOrSchedule = 1e-5,
    damping_rule: str | DampingRule = "value",
    momentum: float = 0.0,
    space: str = "auto",
    solver: str = "auto",
    centered: bool = False,
    linesearch: optax.GradientTransformation | None = CAPPED_LINESEARCH,
) -> optax.GradientTransformationExtraArgs:
    """Damped Gauss-Newton method for stochastic training, with a line search.

    For fixed data and few parameters,
    `trust_region_newton(curvature="gauss_newton")` is more accurate.

    Args:
      learning_rate: factor on the step before the line search, or a schedule of it;
        None means 1.
      damping: a factor >= 0, or a schedule of it.
      damping_rule: `"value"` for lambda = damping times |value|, which does not depend
        on the unit of the objective; `"constant"` for lambda = damping; or a callable
        `(damping, value) -> lambda`.
      momentum: mu in [0, 1), the factor of the last direction (SPRING).
      space: `"parameters"` solves a system of n equations for n parameters, `"samples"`
        one of M equations for M outputs of all samples; `"auto"` chooses the smaller.
      solver: `"cholesky"`, or `"cg"` for conjugate gradients in the space of samples;
        `"auto"` factorizes up to 4096 equations.
      centered: whether the mean over the samples of each `rowwise` model is subtracted
        from its rows, for stochastic reconfiguration.
      linesearch: a line search that takes the additive update, or None.
        `scale_by_grid_linesearch` evaluates values only.

    Returns:
      An optimizer whose `update(grads, state, params, *, value, grad, value_fn,
      **data)` requires `value_fn=hessopt.composite(model_fn, loss_fn)`, and with a line
      search also the value and the gradient at `params`.

    Raises:
      ValueError, TypeError: as in `scale_by_gauss_newton`; TypeError also if value or
        grad is missing for a line search.

    Cost per step: that of `scale_by_gauss_newton`, and that of the line search.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hessopt
      >>> def model_fn(params, x):
      ...     return jnp.tanh(x @ params)
      >>> value_fn = hessopt.composite(
      ...     hessopt.rowwise(model_fn, over=["x"]), lambda u, y: jnp.mean((u - y) ** 2)
      ... )
      >>> x = jax.random.normal(jax.random.key(0), (50, 3))
      >>> data = {"x": x, "y": jnp.tanh(x @ jnp.array([1.0, -1.0, 0.5]))}
      >>> solution = hessopt.minimize(value_fn, jnp.zeros(3), gauss_newton(), data=data)
      >>> jnp.round(solution.params, 3).tolist()
      [1.0, -1.0, 0.5]

    Source: see `scale_by_gauss_newton`.
    """
    direction = scale_by_gauss_newton(
        damping,
        damping_rule=damping_rule,
        momentum=momentum,
        space=space,
        solver=solver,
        centered=centered,
    )
    return _descend(direction, learning_rate, linesearch)


@injectable
def newton_cg(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    curvature: str | CurvatureFn | Curvature = "hessian",
    max_iterations: int = 100,
    preconditioner: Preconditioner | None = None,
    warm_start: bool = False,
    rematerialize: bool = False,
    bounds: Bounds | None = None,
    linesearch: optax.GradientTransformation | None = DEFAULT_LINESEARCH,
) -> optax.GradientTransformationExtraArgs:
    """Newton-CG with a line search: a second-order method without a matrix.

    Args:
      learning_rate: factor on the step before the line search, or a schedule of it;
        None means 1.
      curvature: `"hessian"`, or `"gauss_newton"` with
        `value_fn=hessopt.composite(model_fn, loss_fn)`. An objective without forward
        derivatives, such as one with a `jax.custom_vjp`, is differentiated in reverse
        mode only.
      max_iterations: maximum number of iterations per update, one product with H each.
      preconditioner: `(residual, params) -> tree`, an approximation of `H^-1 residual`,
        linear in the residual, symmetric and positive definite.
      warm_start: whether to start with the last direction, scaled to fit the current
        gradient; costs one more product.
      rematerialize: whether to linearize the gradient again for every product, which
        uses less memory and more time.
      bounds: `(lower, upper)`, each a number, a tree like params or None: all iterates
        stay within, and the objective is not evaluated outside. See
        `hessopt.typing.Bounds`. A default line search gets the same bounds, another one
        has to have them.
      linesearch: a line search that takes the additive update, or None.

    Returns:
      An optimizer whose `update(grads, state, params, *, value, grad, value_fn,
      **data)` requires the objective, and with a line search also the value and the
      gradient at `params`.

    Raises:
      ValueError, TypeError: as in `scale_by_newton_cg`; TypeError also if value or grad
        is missing for a line search.

    Cost per step: that of `scale_by_newton_cg`, and one value and gradient per trial of
    the line search, usually one trial.

    Example:
      >>> import jax.numpy as jnp, hessopt
      >>> def rosenbrock(x):
      ...     return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)
      >>> solution = hessopt.minimize(rosenbrock, jnp.zeros(10), newton_cg())
      >>> jnp.round(solution.params, 2).tolist()
      [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    Source: see `scale_by_newton_cg`.
    """
    direction = scale_by_newton_cg(
        curvature=curvature,
        max_iterations=max_iterations,
        preconditioner=preconditioner,
        warm_start=warm_start,
        rematerialize=rematerialize,
        bounds=bounds,
    )
    return _descend(direction, learning_rate, linesearch, bounds)


@injectable
def bfgs(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    formula: str | Formula = "bfgs",
    on_bad_curvature: str = "skip",
    bounds: Bounds | None = None,
    linesearch: optax.GradientTransformation | None = QUADRATIC_LINESEARCH,
) -> optax.GradientTransformationExtraArgs:
    """BFGS, or another method of the Broyden class, with a line search.

    Args:
      learning_rate: factor on the step before the line search, or a schedule of it;
        None means 1.
      formula: the member of the Broyden class: `"bfgs"`, `"dfp"`, or `"ssbfgs"` and
        `"ssbroyden"`, which scale H at every update; or a callable `(b, h, n) -> (tau,
        phi)`, see `numerics/broyden.py`.
      on_bad_curvature: treatment of a pair (s, y) that fails the curvature test:
        `"skip"` does not use the pair, `"powell"` replaces y by a combination of y and
        B s for which `s.y = 0.2 s.Bs`.
      bounds: `(lower, upper)`, each a number, a tree like params or None: all iterates
        stay within, and the objective is not evaluated outside. See
        `hessopt.typing.Bounds`. A default line search gets the same bounds, another one
        has to have them.
      linesearch: a line search that takes the additive update, or None.

    Returns:
      An optimizer whose `update(grads, state, params, *, value, grad, value_fn,
      **data)` requires value, gradient and objective for its line search.

    Raises:
      ValueError, TypeError: as in `scale_by_bfgs`; TypeError also if value, grad or
        value_fn is missing for a line search.

    Cost per step: that of `scale_by_bfgs`, and one value and gradient per trial of the
    line search, usually one trial.

    Example:
      >>> import jax.numpy as jnp, hessopt
      >>> def rosenbrock(x):
      ...     return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)
      >>> solution = hessopt.minimize(rosenbrock, jnp.zeros(10), bfgs(formula="ssbroyden"))
      >>> jnp.round(solution.params, 2).tolist()
      [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    Source: see `scale_by_bfgs`.
    """
    return _descend(
        scale_by_bfgs(formula, on_bad_curvature=on_bad_curvature, bounds=bounds),
        learning_rate,
        linesearch,
        bounds,
    )


@injectable
def lbfgs(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    memory_size: int = 10,
    same_batch_pairs: bool = False,
    memory_dtype: jax.typing.DTypeLike | None = None,
    bounds: Bounds | None = None,
    linesearch: optax.GradientTransformation | None = DEFAULT_LINESEARCH,
) -> optax.GradientTransformationExtraArgs:
    """L-BFGS with a line search.

    Args:
      learning_rate: factor on the step before the line search, or a schedule of it;
        None means 1.
      memory_size: m, the number of stored pairs.
      same_batch_pairs: whether y is the change of the gradient on the batch of the
        current call, for stochastic training; requires `value_fn` and one more gradient
        per update.
      memory_dtype: dtype of the stored pairs, such as `jnp.bfloat16` for half the
        memory; by default that of params, at least float32.
      bounds: `(lower, upper)`, each a number, a tree like params or None: all iterates
        stay within, and the objective is not evaluated outside. See
        `hessopt.typing.Bounds`. A default line search gets the same bounds, another one
        has to have them.
      linesearch: a line search that takes the additive update, or None.

    Returns:
      An optimizer whose `update(grads, state, params, *, value, grad, value_fn,
      **data)` requires value, gradient and objective for its line search.

    Raises:
      ValueError, TypeError: as in `scale_by_lbfgs`; TypeError also if value, grad or
        value_fn is missing for a line search.

    Cost per step: that of `scale_by_lbfgs`, and one value and gradient per trial of the
    line search, usually one trial.

    Example:
      >>> import jax.numpy as jnp, hessopt
      >>> def rosenbrock(x):
      ...     return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)
      >>> solution = hessopt.minimize(rosenbrock, jnp.zeros(10), lbfgs())
      >>> jnp.round(solution.params, 2).tolist()
      [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    Source: see `scale_by_lbfgs`.
    """
    direction = scale_by_lbfgs(
        memory_size,
        same_batch_pairs=same_batch_pairs,
        memory_dtype=memory_dtype,
        bounds=bounds,
    )
    return _descend(direction, learning_rate, linesearch, bounds)


@injectable
def generalized_newton(
    base: optax.GradientTransformation,
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
    """Any optimizer, with a learning rate determined by the curvature along its update.

    With u the update of base, the rate minimizes a parabola that approximates
    `f(params + t u)`, `f(params) - b t + A t^2 / 2`: it is b / A if both are positive.

    Args:
      base: any optax transformation of constant scale that produces additive updates,
        such as `optax.sgd(1.0, momentum=0.9)` or `optax.adamw(1.0)`. The scale itself
        does not matter.
      mode: the measurement of the parabola. `"exact"` uses derivatives, and for an
        objective without forward derivatives, such as one with a `jax.custom_vjp`,
        those in reverse mode; `"forward"` one value of the objective at the last rate,
        and the slope `grad . u`; `"central"` two values. A callable is also accepted,
        with the signature `hessopt.transforms.generalized_newton.Mode`.
      groups: None for one rate; else groups as in `hessopt.group_labels`, each with a
        rate from its own parabola.
      learning_rate: factor on the rates, or a schedule of it. Put a schedule here: one
        in the base optimizer would be cancelled by the rates.
      horizon: number h >= 1, or a schedule of it. The rates that minimize the model are
        multiplied by a factor between `1 / (1 + 1.5 m)`, with m the momentum, and `1 +
        (1 - m) (h - 1)`. It is the larger, the larger the share of the promised descent
        that the next batch confirms: this is 1 for a batch of all data. Rates larger
        than those that minimize the model gain more in the long run; from h = 2 on the
        losses may rise. Without grad in `update` the factor is the lower one. h is
        1.8 by default with the safeguard, 1 without.
      momentum: number m in [0, 1], the share of an update that is left of the update
        before: 0.9 for `optax.sgd(1.0, momentum=0.9)`, b1 for Adam. None: with the
        safeguard it is measured in the first 50 steps, as the length of the update of
        base for a gradient of zero relative to that of the update before; without, it
        is 0.
      update_every: number of steps from one measurement to the next. The steps in
        between reuse the rates and cost nothing, except under vmap.
      curvature_decay: in [0, 1], weight of the past in the averages of b and A, for
        noisy batches; 0 disables averaging.
      rate_decay: in [0, 1], weight of the past in an average of the rates, which starts
        with the first solution.
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
        (6) horizon is 1.8 by default, and momentum is measured.
        False, with `curvature_decay=0`, is the published method. Numbers that are not
        finite are treated alike in both.

    Returns:
      An optimizer whose `update(grads, state, params, *, value, grad, value_fn,
      **data)` requires the objective on the batch of the gradient. The applied
      direction is the measured one: the state of base advances once per step, and stays
      unchanged if a value or an update is not finite.

    Raises:
      ValueError, TypeError: as in `scale_by_generalized_newton`.

    Cost per step: that of base and that of `scale_by_generalized_newton`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([3.0, 6.0])
      >>> def loss(w, x, y):
      ...     return jnp.mean((x @ w - y) ** 2)
      >>> w, tx = jnp.zeros(1), generalized_newton(optax.sgd(1.0))
      >>> value, grad = jax.value_and_grad(loss)(w, x, y)
      >>> updates, state = tx.update(grad, tx.init(w), w, value=value, grad=grad, value_fn=loss, x=x, y=y)
      >>> jnp.round(optax.apply_updates(w, updates), 4).tolist()
      [3.0]

    Source: see `scale_by_generalized_newton`.
    """
    rate = functools.partial(
        scale_by_generalized_newton,
        mode=mode,
        groups=groups,
        learning_rate=learning_rate,
        horizon=_or_default(horizon, HORIZON if safeguard else None),
        update_every=update_every,
        curvature_decay=curvature_decay,
        rate_decay=rate_decay,
        initial_rate=initial_rate,
        min_rate=min_rate,
        max_rate=max_rate,
        max_change=max_change,
        safeguard=safeguard,
    )
    return over_base("generalized_newton", base, rate, momentum, safeguard)


@injectable
def grouped_newton(
    base: optax.GradientTransformation,
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
    shrinkage: float | None = None,
    initial_rate: float = 0.0,
    safeguard: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer, with one learning rate per group of parameters, determined jointly
    by the curvature along its update.

    The rates minimize a model of `f(params + sum_s eta_s u_s)` with slopes -g, Hessian
    H and a cubic term with scales d, where u_s is the update of base for group s.

    Args:
      base: any optax transformation of constant scale that produces additive updates,
        such as `optax.sgd(1.0, momentum=0.9)` or `optax.adamw(1.0)`. The scale itself
        does not matter.
      groups: groups of leaves, as in `hessopt.group_labels`.
      cubic_damping: lambda >= 0, dimensionless, or a schedule of it. With 1 the third
        derivatives enter as they are; with 0 the method is Newton's method in the
        rates. With the number 0, third derivatives are not computed, and the objective
        may depend on params through a `jax.custom_vjp`.
      learning_rate: factor on the rates, or a schedule of it. Put a schedule here: one
        in the base optimizer would be cancelled by the rates.
      horizon: number h >= 1, or a schedule of it. The rates that minimize the model are
        multiplied by a factor between `1 / (1 + 1.5 m)`, with m the momentum, and `1 +
        (1 - m) (h - 1)`. It is the larger, the larger the share of the promised descent
        that the next batch confirms: this is 1 for a batch of all data. Rates larger
        than those that minimize the model gain more in the long run; from h = 2 on the
        losses may rise. Without grad in `update` the factor is the lower one. h is
        1.8 by default with the safeguard, 1 without.
      momentum: number m in [0, 1], the share of an update that is left of the update
        before: 0.9 for `optax.sgd(1.0, momentum=0.9)`, b1 for Adam. None: with the
        safeguard it is measured in the first 50 steps, as the length of the update of
        base for a gradient of zero relative to that of the update before; without, it
        is 0.
      update_every: number of steps from one model to the next. The steps in between
        reuse the rates and cost nothing, except under vmap.
      curvature_decay: in [0, 1], weight of the past in the averages of g, H and d; 0
        disables averaging.
      rate_decay: in [0, 1], weight of the past in an average of the rates, which starts
        with the first solution.
      nonnegative: whether negative rates are replaced by 0, after the solve and before
        the average. (Training is better without: the solution relies on the decrease by
        groups with negative rates.)
      cross_groups: whether H has entries between groups.
      ridge: number >= 0; the absolute values of the diagonal of H, times ridge, are
        added to the diagonal.
      shrinkage: number >= 0, weight of a term that draws the rates towards the one rate
        that minimizes the model for all groups, in units of the diagonal of H. The
        model of many rates follows the noise of a batch; by default 3 with the
        safeguard, and 0 without.
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
        (5) shrinkage is 3 and horizon 1.8 by default, and momentum is measured.
        False, with `curvature_decay=0`, is the published method. Models that are not
        finite, or have no minimizer, are treated alike in both.

    Returns:
      An optimizer whose `update(grads, state, params, *, value, value_fn, **data)`
      requires the objective. The state of base advances once per step, and stays
      unchanged if a value or an update is not finite.

    Raises:
      ValueError, TypeError: as in `scale_by_grouped_newton`.

    Cost per step: that of base and that of `scale_by_grouped_newton`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def loss(p):
      ...     return jnp.sum((p["scale"] * p["w"] - 3.0) ** 2) + 1e-3 * p["scale"] ** 2
      >>> params, tx = {"scale": jnp.array(1.0), "w": jnp.array([0.1, 5.0])}, grouped_newton(optax.sgd(1.0))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grad = jax.grad(loss)(params)
      ...     updates, state = tx.update(grad, state, params, grad=grad, value_fn=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(20):
      ...     params, state = step(params, state)
      >>> float(loss(params)) < 0.1
      True

    Source: see `scale_by_grouped_newton`.
    """
    rate = functools.partial(
        scale_by_grouped_newton,
        groups=groups,
        cubic_damping=cubic_damping,
        learning_rate=learning_rate,
        horizon=_or_default(horizon, HORIZON if safeguard else None),
        update_every=update_every,
        curvature_decay=curvature_decay,
        rate_decay=rate_decay,
        nonnegative=nonnegative,
        cross_groups=cross_groups,
        ridge=ridge,
        shrinkage=_or_default(shrinkage, SHRINKAGE if safeguard else 0.0),
        initial_rate=initial_rate,
        safeguard=safeguard,
    )
    return over_base("grouped_newton", base, rate, momentum, safeguard)


HORIZON = 1.8
"""Default of `horizon`, with the safeguard."""

SHRINKAGE = 3.0
"""Default of `shrinkage` of `grouped_newton`, with the safeguard."""


def _or_default(given: Any, default: float | None) -> Any:
    return default if given is None else given


def _descend(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule | None,
    linesearch: optax.GradientTransformation | None,
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Chain a direction with the sign change, the learning rate and a line search."""
    sign = (
        optax.scale(-1.0)
        if learning_rate is None
        else optax.scale_by_learning_rate(learning_rate)
    )
    if check_bounds(bounds) is not None:
        search = [_bounded(linesearch, bounds)]
    else:
        search = [] if linesearch is None else [fitted(linesearch)]
    return optax.with_extra_args_support(optax.chain(direction, sign, *search))


def _bounded(
    linesearch: optax.GradientTransformation | None, bounds: Bounds | None
) -> optax.GradientTransformation:
    """Return a default line search with bounds, a projection in place of None, or
    another search as it is."""
    if linesearch is None:
        return keep_within(bounds)
    for default, options in (
        (DEFAULT_LINESEARCH, {}),
        (CAPPED_LINESEARCH, _CAPPED),
        (QUADRATIC_LINESEARCH, _QUADRATIC),
    ):
        if linesearch is default:
            return scale_by_wolfe_linesearch(**options, bounds=bounds)
    check_transformation("linesearch", linesearch)

    def init(params: Params) -> optax.OptState:
        state = linesearch.init(params)
        if jax.tree.leaves(params) and not has_box(state):
            raise ValueError(
                "linesearch needs the bounds: give it "
                "`scale_by_wolfe_linesearch(..., bounds=bounds)`"
            )
        return state

    update = optax.with_extra_args_support(linesearch).update
    return optax.GradientTransformationExtraArgs(init, update)
