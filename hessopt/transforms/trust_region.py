"""Trust-region Newton: the global minimizer of a quadratic model, restricted to the
region where the model is accurate.

With g and H the gradient and the Hessian (or Gauss-Newton matrix) at params, the step
minimizes one of

    g.p + p.H p / 2  over  |D p| <= radius,        g.p + p.H p / 2 + (sigma/3) |D p|^3,

and is taken if the objective decreases. The ratio of the actual decrease to the
decrease predicted by the quadratic model determines the next radius or sigma. H may be
indefinite: both minimizers then have a component along negative curvature. The diagonal
matrix D equilibrates H; each entry is the largest one so far. The units of parameters
therefore do not matter, and the step of a parameter that has lost its influence, such
as that of a saturated neuron, does not become too long. One eigendecomposition of `D^-1
H D^-1` is used for all trials.

Geodesic acceleration follows the curve `p t + a t^2 / 2` with `a = -(J'LJ + kappa
D^2)^-1 J'L r''`, where r'' is the second derivative of the model's outputs along p. The
outputs change along a straight line to second order on this curve.

Source: Conn, Gould and Toint, "Trust-Region Methods", 2000; Cartis, Gould and Toint,
"Adaptive cubic regularisation methods for unconstrained optimization", 2011; Gould,
Lucidi, Roma and Toint, "Solving the trust-region subproblem using the Lanczos method",
1999; Transtrum and Sethna, arXiv 1201.5885.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import (
    check_count,
    check_range,
    choose,
    injectable,
    renamed_arguments,
)
from hessopt.calculus.curvature import (
    Curvature,
    CurvatureFn,
    curvature_product,
    resolve,
)
from hessopt.calculus.linearization import has_forward_derivative, linearize_gradient
from hessopt.kinds.bounded_steps import (
    BoundedStep,
    SingleEntries,
    projected_step,
    with_single_entries,
)
from hessopt.kinds.faces import on_face, short_reach
from hessopt.kinds.protocol import Call, transformation
from hessopt.kinds.step_bounds import STEP_BOUNDS, TAKEN_RATIO, StepBound, gain_ratio
from hessopt.kinds.subproblems import (
    SUBPROBLEMS,
    EigenModel,
    Leaves,
    LocalModel,
    SubproblemSolver,
)
from hessopt.numerics import secular
from hessopt.numerics.cg import forcing
from hessopt.numerics.guards import divide, select, zero_unless
from hessopt.numerics.norms import norm, unit_scale
from hessopt.objective.binding import Objective, precompose
from hessopt.trees.boxes import (
    Bounds,
    Box,
    box_of,
    check_bounds,
    count,
    face,
    free_part,
    is_outside,
    outward,
)
from hessopt.trees.sharding import zeros
from hessopt.trees.vectors import (
    all_finite,
    applied,
    inner,
    ravel,
    ravel_mask,
    real_leaves,
    solve_dtype,
    tree_norm,
    unit_factor,
    unravel,
)
from hessopt.typing import Params, StepStatus, Vector, step_status

FULL_REACH = 100.0
"""First radius for a Gauss-Newton matrix, in units of `|D x|`. The model has no negative
curvature, and the full step of many fits is long: it is the first trial unless it is
out of proportion. A short first step can end in another basin, from which a fit does
not return."""

MAX_ACCELERATION = 0.75
"""Largest ratio of the length of an acceleration to that of its step. Above it the
series in t is not accurate, and the acceleration is not used."""


class TrustRegionInfo(NamedTuple):
    """Report of the last update."""

    status: jax.Array  # int32 scalar, StepStatus
    # scalar, actual decrease of the objective over predicted decrease, at the last
    # trial
    ratio: jax.Array
    shift: jax.Array  # scalar, kappa of the last trial, in the scaled parameters
    lowest: jax.Array  # scalar, smallest eigenvalue of the scaled curvature
    trials: jax.Array  # int32 scalar, values evaluated at trial points
    products: jax.Array  # int32 scalar, products with the curvature; 0 with "exact"
    # scalar, decrease of the objective that the quadratic model predicts without a bound
    # on the step, in units of f; inf if it is unbounded
    predicted: jax.Array
    # int32 scalar, values: one per trial, and one at params if it was not given
    evaluations: jax.Array
    # int32 scalar, entries held at bounds; None without bounds
    held: Any


class TrustRegionState(NamedTuple):
    """State of `trust_region_newton`."""

    count: jax.Array  # int32 scalar, updates so far
    # scalar, the radius or sigma for the next update; 0 before the first
    size: jax.Array
    first_length: jax.Array  # scalar, |g| at the first update; 0 before
    # (n,), the diagonal of D, 0 where the curvature was always 0; None if D = 1
    scales: Params
    box: Any  # Box, the bounds; None without bounds
    info: TrustRegionInfo


@renamed_arguments({"model": "step_bound"})
@injectable
def trust_region_newton(
    *,
    step_bound: str | StepBound | None = None,
    subproblem: str | SubproblemSolver = "exact",
    curvature: str | CurvatureFn | Curvature = "hessian",
    initial_radius: float | None = None,
    max_trials: int = 20,
    geodesic_acceleration: bool = False,
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trust-region Newton method; the curvature may be indefinite.

    Args:
      step_bound: restriction of the step to the region where the model is accurate:
        `"cubic"` adds a term `sigma/3 |D p|^3`, `"radius"` requires `|D p| <= radius`.
        A `StepBound` is also accepted. By default `"radius"` for `"gauss_newton"`,
        otherwise `"cubic"`.
      subproblem: `"exact"` solves by an eigendecomposition, with a D that makes the
        method independent of the units of parameters. `"cg"` solves in the Krylov space
        of conjugate gradients (at most 50 products with the curvature, D = 1), until
        the residual is at most `min(1/2, sqrt(|g|/|g_0|)) |g|`, where g_0 is the first
        gradient. A `SubproblemSolver` is also accepted.
      curvature: `"hessian"`, or `"gauss_newton"` with
        `value_fn=hessopt.composite(model_fn, loss_fn)`; with `"exact"` that is the
        method of Levenberg and Marquardt. If the Hessian of the loss in the outputs is
        diagonal, as for a sum of squares, the singular values of the Jacobian are used,
        which avoids squaring the condition number; the gradient is then computed from
        value_fn, and `grads` is not used. An objective without forward derivatives,
        such as one with a `jax.custom_vjp`, is differentiated in reverse mode only.
      initial_radius: length of the first trial step, in units of D p; by default that
        of the Cauchy step, and for `"gauss_newton"` with `"exact"` `100 |D x|`, where x
        is params, if that is not zero: the first trial is then usually the full step.
      max_trials: maximum number of trials per update; after each rejected trial the
        next one is shorter.
      geodesic_acceleration: whether to correct steps by the second derivative of the
        outputs; for `"gauss_newton"` and `"exact"`, and for a model with forward
        derivatives.
      bounds: `(lower, upper)`, each a number, a tree like params or None: all iterates
        stay within, and the objective is not evaluated outside. See
        `hessopt.typing.Bounds`. Entries that a short gradient step leads to a bound are
        held, and have no coupling to the others in the model; every entry of a trial
        step ends at its bound.

    Returns:
      An optimizer that is used without a chain: it maps the gradient to an additive
      update. Its `update(grads, state, params, *, value, value_fn, **data)` requires
      the objective, and evaluates it at params if value is missing. Its status is
      `state.info.status`.

      If no trial is accepted (STEP_REJECTED), the step is zero, and the next update
      starts with a shorter trial, or with a longer one if the predicted decrease of the
      last trial was below the rounding of the value and its value was finite. A value,
      gradient or curvature that is not finite (NONFINITE) gives a step of zero; the
      state is then unchanged except count and info. NEGATIVE_CURVATURE: H has a
      negative eigenvalue.

    Raises:
      ValueError: for max_trials < 1, initial_radius <= 0, an unknown word, or
        geodesic_acceleration with another curvature or subproblem than it is for.
      TypeError: in `update`, if params, value_fn, or data that value_fn requires is
        missing; for geodesic_acceleration also if the model has no forward derivatives.
      ValueError, TypeError: in `init`, for bounds that do not fit params, for complex
        params with bounds, and for params outside of the bounds, where they are known.

    Cost per update: n products of about two gradients each (with a diagonal loss:
    tangents of the model and `2 m n^2` multiplications, m outputs) and about `9 n^3`
    multiplications; per trial one value and `n^2`, and with bounds one product. With
    `"cg"` one such product and `4 k n` multiplications for the k-th dimension. Memory:
    `n^2` three times; m n; 50 n.

    Example:
      >>> import jax.numpy as jnp, hessopt
      >>> def saddle(x):
      ...     return (x[0] ** 2 - 1.0) ** 2 + x[1] ** 2
      >>> solution = hessopt.minimize(saddle, jnp.array([0.0, 1.0]), trust_region_newton())
      >>> jnp.round(jnp.abs(solution.params), 3).tolist()
      [1.0, 0.0]

    Source: Conn, Gould and Toint, "Trust-Region Methods", 2000; Cartis, Gould and
    Toint, "Adaptive cubic regularisation methods for unconstrained optimization", 2011;
    Gould, Lucidi, Roma and Toint, "Solving the trust-region subproblem using the
    Lanczos method", 1999; Transtrum and Sethna, arXiv 1201.5885; Lin and More,
    "Newton's method for large bound-constrained optimization problems", 1999, for
    bounds.
    """
    check_count("max_trials", max_trials)
    if initial_radius is not None:
        check_range(
            "initial_radius", initial_radius, float(jnp.finfo(jnp.float32).tiny)
        )
    resolved = resolve(curvature)
    default = "cubic" if resolved.root is None else "radius"
    options = _Options(
        step_bound=choose("step_bound", step_bound or default, STEP_BOUNDS),
        solver=choose("subproblem", subproblem, SUBPROBLEMS),
        curvature=resolved,
        initial_radius=initial_radius,
        max_trials=max_trials,
        geodesic_acceleration=geodesic_acceleration,
        bounds=check_bounds(bounds),
    )
    has_outputs = options.curvature.root is not None
    if geodesic_acceleration and not (has_outputs and options.solver.complete):
        raise ValueError(
            'geodesic_acceleration needs curvature="gauss_newton" and another '
            f'subproblem than "cg", got {curvature!r} and {subproblem!r}'
        )
    init, step = functools.partial(_init, options), functools.partial(_step, options)
    return transformation("trust_region_newton", init, step, needs=("value_fn",))


class _Options(NamedTuple):
    """The arguments of `trust_region_newton`, checked and resolved."""

    step_bound: StepBound
    solver: SubproblemSolver
    curvature: Curvature
    initial_radius: float | None
    max_trials: int
    geodesic_acceleration: bool
    bounds: Bounds | None


def _init(options: _Options, params: Params) -> TrustRegionState:
    shape: Any = jax.ShapeDtypeStruct
    scalar, count = shape((), solve_dtype(params)), shape((), jnp.int32)
    scales: Any = jax.eval_shape(ravel, params) if options.solver.scaled else None
    info = TrustRegionInfo(
        *(count, scalar, scalar, scalar, count, count, scalar, count),
        None if options.bounds is None else count,
    )
    state = TrustRegionState(count, scalar, scalar, scales, None, info)
    box = box_of(options.bounds, params, caller="trust_region_newton")
    return zeros(state, params)._replace(box=box)


class _Problem(NamedTuple):
    """The model of one update, and the objective with which its steps are tested."""

    # of real leaves; with bounds, held entries are constants of the first one
    objective: Objective
    evaluate: Objective
    parts: Leaves  # params
    value: jax.Array  # scalar, objective at parts
    noise: jax.Array  # scalar, bound on the rounding of the value
    model: EigenModel
    first_length: jax.Array  # scalar, |g| at the first update
    finite: jax.Array  # bool scalar, of value, gradient and curvature


class _Trial(NamedTuple):
    """A trial step and its test by the objective."""

    p: Leaves
    size: jax.Array  # scalar, radius or sigma for the next trial
    ratio: jax.Array  # scalar, actual over predicted decrease
    shift: jax.Array  # scalar, kappa
    told: jax.Array  # bool scalar, whether the predicted decrease exceeds rounding
    count: jax.Array  # int32 scalar


def _step(
    options: _Options, call: Call, state: TrustRegionState
) -> tuple[optax.Updates, TrustRegionState]:
    if not jax.tree.leaves(call.params):
        return call.updates, state
    gradient, restore = real_leaves(call.updates)

    # the model in its eigenvectors, and the first radius or sigma
    bounded = None
    if state.box is None:
        problem = _measure(options, call, call, state, None)
    else:
        problem, bounded = _measure_on_face(options, call, state)
    w, z = problem.model.w, problem.model.z
    size = _size(options, state, w, z, _reach(options, problem))

    # trials, each shorter than the one before, until one is accepted
    def goes_on(last: _Trial) -> jax.Array:
        unsettled = last.told & (last.count < options.max_trials)
        known = problem.finite if bounded is None else problem.finite | bounded.outside
        return known & unsettled & ~(last.ratio >= TAKEN_RATIO)

    zero = jnp.zeros((), w.dtype)
    none = jax.tree.map(jnp.zeros_like, problem.parts)
    begin = _Trial(none, size, zero, zero, jnp.ones((), bool), jnp.zeros((), jnp.int32))
    attempt = functools.partial(_attempt, options, problem, bounded)
    last = jax.lax.while_loop(goes_on, attempt, begin)

    taken = last.ratio >= TAKEN_RATIO
    held = None
    if bounded is not None:
        w, z, held = bounded.w, bounded.z, bounded.held
    rounding = jnp.finfo(w.dtype).eps * len(w) * jnp.max(jnp.abs(w))
    status = {
        StepStatus.NONFINITE: ~problem.finite,
        StepStatus.STEP_REJECTED: problem.finite & ~taken,
        StepStatus.NEGATIVE_CURVATURE: w[0] < -rounding,
    }
    predicted = _unbounded_decrease(w, z, rounding)
    if bounded is not None:
        predicted += bounded.promise
        status[StepStatus.OUTSIDE_BOUNDS] = bounded.outside
        # a step from outside tells nothing about the model
        last = last._replace(size=select(bounded.outside, state.size, last.size))
    step = optax.tree.cast_like(zero_unless(taken, last.p), gradient)
    found = last.size, problem.first_length, problem.model.scales
    before = state.size, state.first_length, state.scales
    return restore(step), TrustRegionState(
        jnp.asarray(optax.safe_increment(state.count)),
        *select(problem.finite, found, before),
        box=state.box,
        info=TrustRegionInfo(
            step_status(status),
            last.ratio,
            last.shift,
            w[0],
            last.count,
            jnp.asarray(problem.model.products, jnp.int32),
            jnp.where(w[0] < -rounding, jnp.inf, predicted),
            last.count + (call.value is None),
            held,
        ),
    )


def _measure_on_face(
    options: _Options, call: Call, state: TrustRegionState
) -> tuple[_Problem, BoundedStep]:
    """Return the problem of the entries that no bound holds, and the bounds.

    Held entries are those that a gradient step leads to a bound, with the inverse of
    D^2, or with one length for all entries if D = 1. Those that are not there yet have
    a model without coupling, in which that step is the minimizer.
    """
    box, params, gradient = state.box, call.params, call.updates
    parts, restore = real_leaves(params)
    objective = precompose(call.objective, restore)
    product = curvature_product(objective, parts, options.curvature)
    there = outward(box, params, gradient)
    if state.scales is None:
        factor, free = unit_factor(gradient), free_part(there, gradient)
        unit = [leaf * factor.astype(leaf.dtype) for leaf in jax.tree.leaves(free)]
        g = optax.tree.cast_like(unit, parts)
        short = short_reach(g, product(g))
        reach = jax.tree.map(lambda x: jnp.full_like(x, short), params)
    else:
        reach = unravel(divide(1.0, state.scales, state.scales > 0) ** 2, params)
    side = face(box, params, gradient, reach)
    held = ravel_mask(side.held)
    problem = _measure(options, on_face(call, side), call, state, held)

    near = jax.tree.map(lambda h, t: h & ~t, side.held, there)
    slopes = jax.tree.map(lambda n, g: jnp.where(n, g, 0), near, gradient)
    single = SingleEntries(held, ravel(slopes), ravel(reach))
    model = with_single_entries(problem.model, parts, single, problem.finite)
    flat = [jax.tree.leaves(tree) for tree in (*box, gradient)]
    bounded = BoundedStep(
        box=Box(*flat[:2]),
        gradient=flat[2],
        held=count(side.held),
        promise=inner(side.ahead, slopes),
        w=problem.model.w,
        z=problem.model.z,
        outside=is_outside(box, params),
        product=product,
    )
    return problem._replace(model=model), bounded


def _measure(
    options: _Options,
    call: Call,
    whole: Call,
    state: TrustRegionState,
    held: Vector | None,
) -> _Problem:
    """Return the value, and the model in the eigenvectors of the curvature."""
    gradient, _ = real_leaves(call.updates)
    parts, restore = real_leaves(call.params)
    objective = precompose(call.objective, restore)
    evaluate = precompose(whole.objective, restore)
    value = objective(parts) if call.value is None else jnp.asarray(call.value)
    noise = 10 * jnp.finfo(value.dtype).eps * jnp.abs(value)
    value = value.astype(solve_dtype((call.params, value)))

    length = tree_norm(gradient)
    first_length = jnp.where(state.first_length > 0, state.first_length, length)
    local = LocalModel(
        objective,
        parts,
        gradient,
        options.curvature,
        lambda w, z: options.step_bound.minimize(
            w, z, _size(options, state, w, z, 0.0)
        ),
        forcing(length, first_length),
        state.scales,
        held,
    )
    model = options.solver.solve(local)

    # if anything is not finite, no trial is made, and any finite w and z will do
    w, z = model.w, model.z
    finite = jnp.isfinite(value) & jnp.isfinite(length) & all_finite((w, z))
    sound = model._replace(w=jnp.where(finite, w, 1.0), z=jnp.where(finite, z, 0.0))
    return _Problem(
        objective, evaluate, parts, value, noise, sound, first_length, finite
    )


def _reach(options: _Options, problem: _Problem) -> jax.Array | float:
    """Return `100 |D x|` for a Gauss-Newton matrix with known D, otherwise 0."""
    scales = problem.model.scales
    if options.curvature.root is None or scales is None:
        return 0.0
    return FULL_REACH * norm(scales * ravel(problem.parts))


def _size(
    options: _Options,
    state: TrustRegionState,
    w: Vector,
    z: Vector,
    reach: jax.Array | float,
) -> jax.Array:
    """Return the radius or sigma of the last update; for the first, the reach, or that
    of the Cauchy step if the reach is zero."""
    given = options.initial_radius
    radius = jnp.asarray(
        jnp.where(reach > 0, reach, _cauchy(w, z)) if given is None else given, w.dtype
    )
    first = options.step_bound.first(w, secular.within_radius(w, z, radius))
    return jnp.where(state.size > 0, state.size, first)


def _attempt(
    options: _Options, problem: _Problem, bounded: BoundedStep | None, last: _Trial
) -> _Trial:
    """Minimize the bounded model, and test the step with the objective."""
    objective, evaluate, parts, value, noise, model, *_ = problem
    step = options.step_bound.minimize(model.w, model.z, last.size)
    sound = jnp.isfinite(step.length)

    # p + a / 2, unless the acceleration is too long for the series in t
    p = model.lift(step.y)
    if options.geodesic_acceleration:
        bending = model.project(_bending(objective, parts, p))
        a = secular.divided(model.w, bending, step.shift)
        p = model.lift(
            step.y + jnp.where(norm(a) <= MAX_ACCELERATION * step.length, a / 2, 0.0)
        )
    p = optax.tree.cast_like(zero_unless(sound, p), parts)
    told = step.decrease > noise
    if bounded is not None:
        p, step = projected_step(bounded, parts, model.scales, p, step)

    # the gain ratio; if the predicted decrease is below rounding, the ratio does not
    # measure the accuracy of the model, and 1 is used, which relaxes the bound
    reached = jnp.asarray(evaluate(applied(parts, p)), value.dtype)
    fall = jnp.where(sound, value - reached, jnp.nan)
    ratio = gain_ratio(fall, step.decrease, noise).astype(model.w.dtype)
    if bounded is not None:
        # from outside a point within is taken, whatever its value
        ratio = jnp.where(bounded.outside, 1.0, ratio)
    judged = jnp.where(told | ~jnp.isfinite(fall), ratio, 1.0)
    size = options.step_bound.adapt(model.w, model.z, last.size, judged, step)
    return _Trial(p, size, ratio, step.shift, told, last.count + 1)


def _bending(objective: Objective, parts: Leaves, p: Leaves) -> Leaves:
    """Return `J'L r''`, where r'' is the second derivative of the outputs along p."""
    outputs, transposed = jax.vjp(objective.model_fn, parts)

    if not has_forward_derivative(objective.model_fn, parts):
        raise TypeError(
            "geodesic_acceleration=True needs forward derivatives of the model, which "
            "depends on params through a jax.custom_vjp; use geodesic_acceleration=False"
        )

    def slope(x: Leaves) -> Params:
        return jax.jvp(objective.model_fn, (x,), (p,))[1]

    second = jax.jvp(slope, (parts,), (p,))[1]
    return transposed(linearize_gradient(objective.loss_fn, outputs)[1](second))[0]


def _unbounded_decrease(w: Vector, z: Vector, least: jax.Array) -> jax.Array:
    """Return `sum z^2 / (2 w)`, with eigenvalues of at least the rounding error."""
    scale = unit_scale(z)
    w = jnp.maximum(w, least)
    return 0.5 * scale * (scale * jnp.sum(divide((z / scale) ** 2, w, w > 0)))


def _cauchy(w: Vector, z: Vector) -> jax.Array:
    """Return the length of the step to the minimum along the gradient, with the
    absolute values of the eigenvalues; 1 if the curvature along it is zero."""
    scale = unit_scale(z)
    z = z / scale
    along, curved = jnp.sum(z**2), jnp.sum(jnp.abs(w) * z**2)
    return divide(scale * along**1.5, curved, curved > 0, 1.0)
