"""Ready-made optimizers: a direction, a sign and, if any, a line search; or any
optimizer and a rate."""

import math
from typing import Any

import optax

from hessopt._checks import check_transformation, renamed_arguments
from hessopt.calculus.curvature import Curvature, CurvatureFn
from hessopt.numerics.broyden import Formula
from hessopt.numerics.guards import select
from hessopt.numerics.indefiniteness import IndefiniteTreatment
from hessopt.transforms.bfgs import scale_by_bfgs
from hessopt.transforms.generalized_newton import Mode, scale_by_generalized_newton
from hessopt.transforms.grouped_newton import scale_by_grouped_newton
from hessopt.transforms.lbfgs import scale_by_lbfgs
from hessopt.transforms.linesearch import scale_by_wolfe_linesearch
from hessopt.transforms.newton import scale_by_newton
from hessopt.transforms.newton_cg import Preconditioner, scale_by_newton_cg
from hessopt.transforms.optax_linesearch import fitted
from hessopt.trees.groups import Groups
from hessopt.trees.vectors import all_finite
from hessopt.typing import Params

DEFAULT_LINESEARCH = scale_by_wolfe_linesearch()
"""For `newton_cg` and `lbfgs`, whose steps mostly have the right length."""

CAPPED_LINESEARCH = scale_by_wolfe_linesearch(max_rate=1.0)
"""For `newton`, whose full step is the longest that its model speaks for. (Digits, 5
seeds: a test accuracy of 0.97 in all; by a search that goes farther, in four.)"""

QUADRATIC_LINESEARCH = scale_by_wolfe_linesearch(initial_guess="quadratic")
"""For the dense quasi-Newton methods, whose steps are too long at first and after a
self-scaling. (A PINN, 2000 steps of SSBroyden: 1.02 gradients per step, and 1.57 from a
first rate of 1.)"""


@renamed_arguments({"positivity": "on_indefinite"})
def newton(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    damping: optax.ScalarOrSchedule = 0.0,
    on_indefinite: str | IndefiniteTreatment = "shift",
    blocks: Groups = "all",
    update_every: int = 1,
    curvature: str | CurvatureFn | Curvature = "hessian",
    linesearch: optax.GradientTransformation | None = CAPPED_LINESEARCH,
) -> optax.GradientTransformationExtraArgs:
    """Damped Newton with a line search.

    Args:
      learning_rate: factor on the step before the line search, or a schedule of it;
        None means 1.
      damping: lambda >= 0, in units of f / params^2, or a schedule of it.
      on_indefinite: what to do where `H + lambda I` is not positive definite.
        `"shift"`: add a sufficient multiple of the identity, remembered between updates
        and halved at each; `"absolute"`: take eigenvalues by magnitude; `"none"`:
        nothing, which may step towards a saddle or a maximum and says so in the status;
        or an `IndefiniteTreatment`.
      blocks: `"all"`, or groups as in `hessopt.group_labels`: H then keeps its diagonal
        blocks only, each computed on its own.
      update_every: number of updates for which a factorisation serves. Shapes the
        state, so under `optax.inject_hyperparams` it stands in `static_args`.
      curvature: `"hessian"`, or `"gauss_newton"` with
        `value_fn=hessopt.composite(model_fn, loss_fn)`.
      linesearch: a line search that takes the additive update, or None for none.

    Returns:
      An optimizer whose `update(grads, state, params, *, value, grad, value_fn,
      **data)` needs the objective, and with a line search also the value and the
      gradient at `params`.

    Raises:
      ValueError, TypeError: see `scale_by_newton`; TypeError also when a line search
        misses value or grad.

    Cost per step: that of `scale_by_newton`, and one value and gradient per trial step
    of the search, mostly one.

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
    )
    return _descend(direction, learning_rate, linesearch)


def newton_cg(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    curvature: str | CurvatureFn | Curvature = "hessian",
    max_iterations: int = 100,
    preconditioner: Preconditioner | None = None,
    warm_start: bool = False,
    rematerialize: bool = False,
    linesearch: optax.GradientTransformation | None = DEFAULT_LINESEARCH,
) -> optax.GradientTransformationExtraArgs:
    """Newton-CG with a line search: second order without a matrix.

    Args:
      learning_rate: factor on the step before the line search, or a schedule of it;
        None means 1.
      curvature: `"hessian"`, or `"gauss_newton"` with
        `value_fn=hessopt.composite(model_fn, loss_fn)`.
      max_iterations: products with H at most, per update.
      preconditioner: `(residual, params) -> tree`, near `H^-1 residual`, linear,
        symmetric and positive definite.
      warm_start: whether to begin with the last direction, at the length that suits
        this gradient; one more product.
      rematerialize: whether to linearise the gradient anew in every product: less
        memory, more time.
      linesearch: a line search that takes the additive update, or None for none.

    Returns:
      An optimizer whose `update(grads, state, params, *, value, grad, value_fn,
      **data)` needs the objective, and with a line search also the value and the
      gradient at `params`.

    Raises:
      ValueError, TypeError: see `scale_by_newton_cg`; TypeError also when a line search
        misses value or grad.

    Cost per step: that of `scale_by_newton_cg`, and one value and gradient per trial
    step of the search, mostly one.

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
    )
    return _descend(direction, learning_rate, linesearch)


def bfgs(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    formula: str | Formula = "bfgs",
    on_bad_curvature: str = "skip",
    linesearch: optax.GradientTransformation | None = QUADRATIC_LINESEARCH,
) -> optax.GradientTransformationExtraArgs:
    """BFGS, or a relative of the Broyden class, with a line search.

    Args:
      learning_rate: factor on the step before the line search, or a schedule of it;
        None means 1.
      formula: the member of the Broyden class: `"bfgs"`, `"dfp"`, or with a scaling of
        H at every update `"ssbfgs"`, `"ssbroyden"`; or a callable `(b, h, n) -> (tau,
        phi)`, see `numerics/broyden.py`.
      on_bad_curvature: what becomes of a pair that fails the curvature test: `"skip"`,
        or `"powell"`, which mixes y with B s until `s.y = 0.2 s.Bs`.
      linesearch: a line search that takes the additive update, or None for none.

    Returns:
      An optimizer whose `update(grads, state, params, *, value, grad, value_fn,
      **data)` needs value, gradient and objective for its line search.

    Raises:
      ValueError, TypeError: see `scale_by_bfgs`; TypeError also when a line search
        misses value, grad or value_fn.

    Cost per step: that of `scale_by_bfgs`, and one value and gradient per trial step of
    the search, mostly one.

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
        scale_by_bfgs(formula, on_bad_curvature=on_bad_curvature),
        learning_rate,
        linesearch,
    )


def lbfgs(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    memory_size: int = 10,
    same_batch_pairs: bool = False,
    memory_dtype: Any = None,
    linesearch: optax.GradientTransformation | None = DEFAULT_LINESEARCH,
) -> optax.GradientTransformationExtraArgs:
    """L-BFGS with a line search.

    Args:
      learning_rate: factor on the step before the line search, or a schedule of it;
        None means 1.
      memory_size: m, pairs that are kept.
      same_batch_pairs: whether y is the change of the gradient on the batch of the
        current call, for stochastic training; needs `value_fn` and one more gradient
        per update.
      memory_dtype: dtype in which pairs are kept, `jnp.bfloat16` for half the memory;
        by default that of params, at least float32.
      linesearch: a line search that takes the additive update, or None for none.

    Returns:
      An optimizer whose `update(grads, state, params, *, value, grad, value_fn,
      **data)` needs value, gradient and objective for its line search.

    Raises:
      ValueError, TypeError: see `scale_by_lbfgs`; TypeError also when a line search
        misses value, grad or value_fn.

    Cost per step: that of `scale_by_lbfgs`, and one value and gradient per trial step
    of the search, mostly one.

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
        memory_size, same_batch_pairs=same_batch_pairs, memory_dtype=memory_dtype
    )
    return _descend(direction, learning_rate, linesearch)


def generalized_newton(
    base: optax.GradientTransformation,
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
    """Any optimizer, with a learning rate that finds itself.

    Args:
      base: any optax transformation whose updates are to be added, of constant scale:
        `optax.sgd(1.0, momentum=0.9)`, `optax.adamw(1.0)`. The scale itself does not
        matter.
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
      An optimizer whose `update(grads, state, params, *, value, grad, value_fn,
      **data)` needs the objective on the batch of the gradient. The direction that is
      applied is the one that was measured: the state of base advances once per step,
      and not at all for a value or an update that is not finite.

    Raises:
      ValueError, TypeError: see `scale_by_generalized_newton`.

    Cost per step: that of base, and see `scale_by_generalized_newton`.

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
    rate = scale_by_generalized_newton(
        mode=mode,
        groups=groups,
        learning_rate=learning_rate,
        update_every=update_every,
        curvature_decay=curvature_decay,
        rate_decay=rate_decay,
        initial_rate=initial_rate,
        min_rate=min_rate,
        max_rate=max_rate,
        max_change=max_change,
        safeguard=safeguard,
    )
    return _rated(base, rate)


def grouped_newton(
    base: optax.GradientTransformation,
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
    """Any optimizer, with a learning rate for each group of parameters that they find
    together.

    Args:
      base: any optax transformation whose updates are to be added, of constant scale:
        `optax.sgd(1.0, momentum=0.9)`, `optax.adamw(1.0)`. The scale itself does not
        matter.
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
      An optimizer whose `update(grads, state, params, *, value, value_fn, **data)`
      needs the objective. The state of base advances once per step, and not at all for
      a value or an update that is not finite.

    Raises:
      ValueError, TypeError: see `scale_by_grouped_newton`.

    Cost per step: that of base, and see `scale_by_grouped_newton`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def loss(p):
      ...     return jnp.sum((p["scale"] * p["w"] - 3.0) ** 2) + 1e-3 * p["scale"] ** 2
      >>> params, tx = {"scale": jnp.array(1.0), "w": jnp.array([0.1, 5.0])}, grouped_newton(optax.sgd(1.0))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params, value_fn=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(20):
      ...     params, state = step(params, state)
      >>> float(loss(params)) < 0.1
      True

    Source: see `scale_by_grouped_newton`.
    """
    rate = scale_by_grouped_newton(
        groups=groups,
        cubic_damping=cubic_damping,
        learning_rate=learning_rate,
        update_every=update_every,
        curvature_decay=curvature_decay,
        rate_decay=rate_decay,
        nonnegative=nonnegative,
        cross_groups=cross_groups,
        ridge=ridge,
        initial_rate=initial_rate,
        safeguard=safeguard,
    )
    return _rated(base, rate)


def _rated(
    base: optax.GradientTransformation, rate: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Chain an optimizer with a rate, and keep its state where its update, or the
    value, is not finite."""
    check_transformation("base", base)
    base = optax.with_extra_args_support(base)

    def init(params: Params) -> Any:
        return base.init(params), rate.init(params)

    def update(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        **keywords: Any,
    ) -> tuple[optax.Updates, Any]:
        updates, new = base.update(updates, state[0], params, **keywords)
        sound = all_finite((updates, keywords.get("value")))
        kept = select(sound, new, state[0])
        updates, rate_state = rate.update(updates, state[1], params, **keywords)
        return updates, (kept, rate_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _descend(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule | None,
    linesearch: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """Chain a direction with the sign flip, its rate and a line search."""
    sign = (
        optax.scale(-1.0)
        if learning_rate is None
        else optax.scale_by_learning_rate(learning_rate)
    )
    search = [] if linesearch is None else [fitted(linesearch)]
    return optax.with_extra_args_support(optax.chain(direction, sign, *search))
