"""Newton-CG: solve `H p = g` inexactly by conjugate gradients, which stop at a
direction of negative curvature.

The products with H share one linearization of the gradient by default; H is never
formed, and vectors are not flattened into one array. The iteration stops when the
residual is at most `min(1/2, sqrt(|g|/|g_0|)) |g|`, with g_0 the gradient of the first
update, so that early steps are cheap and the last ones converge superlinearly. A
direction of negative curvature ends the iteration and is included in p, since a step
along it leads away from a saddle.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., algorithm 7.1; Martens,
"Deep learning via Hessian-free optimization", 2010, for the warm start.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from hessopt._checks import check_count, injectable
from hessopt.calculus.curvature import Curvature, CurvatureFn, resolve
from hessopt.kinds.faces import short_reach
from hessopt.kinds.protocol import Call, transformation
from hessopt.numerics.cg import conjugate_gradients, forcing
from hessopt.numerics.guards import divide, or_one, select, zero_unless
from hessopt.objective.binding import precompose
from hessopt.trees.boxes import (
    Bounds,
    Box,
    Face,
    box_of,
    check_bounds,
    completed,
    count,
    face,
    free_part,
    outward,
)
from hessopt.trees.sharding import zeros
from hessopt.trees.vectors import (
    inner,
    inner_products,
    real_leaves,
    solve_dtype,
    unit_factor,
)
from hessopt.typing import Params, StepStatus, step_status

Preconditioner = Callable[[Params, Params], Params]
"""`(residual, params) -> tree like residual`: an approximation of `H^-1 residual`,
linear, symmetric and positive definite."""


Leaves = list[jax.Array]
"""The real leaves of a tree like params."""


class NewtonCgInfo(NamedTuple):
    """Report of the last update."""

    status: jax.Array  # int32 scalar, StepStatus
    products: jax.Array  # int32 scalar, products with H
    residual: jax.Array  # scalar, |g - H p| over |g|
    # scalar, decrease of the objective that the quadratic model predicts, g.p / 2, in
    # units of f
    predicted: jax.Array
    # int32 scalar, evaluations of the objective outside of products; always 0
    evaluations: jax.Array
    # int32 scalar, entries held at bounds; None without bounds
    held: Any


class NewtonCgState(NamedTuple):
    """State of `scale_by_newton_cg`."""

    count: jax.Array  # int32 scalar, updates so far
    first_length: jax.Array  # scalar, |g| at the first update; 0 before
    # with warm_start, p of the last update, a tree like params; else None
    direction: Params
    box: Any  # Box, the bounds; None without bounds
    info: NewtonCgInfo


@injectable
def scale_by_newton_cg(
    *,
    curvature: str | CurvatureFn | Curvature = "hessian",
    max_iterations: int = 100,
    preconditioner: Preconditioner | None = None,
    warm_start: bool = False,
    rematerialize: bool = False,
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiply the gradient by the inverse of the Hessian, approximately, with
    conjugate gradients.

    Args:
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
      bounds: `(lower, upper)`, each a number, a tree like params or None; see
        `hessopt.typing.Bounds`. Entries that a short gradient step leads to a bound are
        held: their direction ends there, and the other entries have the direction of
        the problem in which these are constants. The chain needs a
        `scale_by_wolfe_linesearch` with the same bounds.

    Returns:
      A transformation of the gradient into `+p`, whose `update(grads, state, params, *,
      value_fn, **data)` requires the objective. Its status is `state.info.status`.

      NEGATIVE_CURVATURE: p ends with a step along a direction without positive
      curvature. A gradient or product that is not finite (NONFINITE) ends the
      iteration; the direction is then the last finite iterate, or zero, and the state
      is unchanged except count and info. A value that is not finite gives zero. If `-p`
      is not a descent direction, the gradient is returned instead (NOT_DESCENT); only
      rounding, or a warm start with an indefinite H, can cause this.

    Raises:
      ValueError: for max_iterations < 1 or an unknown curvature.
      TypeError: in `update`, if params, value_fn, or data that value_fn requires is
        missing.
      ValueError, TypeError: in `init`, for bounds that do not fit params, for complex
        params with bounds, and for params outside of the bounds, where they are known.

    Cost per update: one gradient, and about two gradients per product, with
    rematerialize three; with bounds one product more. Memory: the intermediates of the
    gradient and of its tangent, and five vectors like params; with rematerialize the
    intermediates are held only during a product.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def loss(x):
      ...     return jnp.sum(jnp.array([1.0, 10.0, 100.0]) * (x - 1.0) ** 2)
      >>> tx = optax.chain(scale_by_newton_cg(), optax.scale(-1.0))
      >>> x = jnp.zeros(3)
      >>> state = tx.init(x)
      >>> for _ in range(6):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x, value_fn=loss)
      ...     x = optax.apply_updates(x, updates)
      >>> jnp.round(x, 3).tolist()
      [1.0, 1.0, 1.0]

    Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., algorithm 7.1;
    Martens, "Deep learning via Hessian-free optimization", 2010, for the warm start.
    """
    check_count("max_iterations", max_iterations)
    linearize = resolve(curvature).linearize
    options = _Options(
        linearize,
        max_iterations,
        preconditioner,
        warm_start,
        rematerialize,
        check_bounds(bounds),
    )
    init, step = functools.partial(_init, options), functools.partial(_step, options)
    return transformation("scale_by_newton_cg", init, step, needs=("value_fn",))


class _Options(NamedTuple):
    """The arguments of `scale_by_newton_cg`, checked."""

    linearize: CurvatureFn
    max_iterations: int
    preconditioner: Preconditioner | None
    warm_start: bool
    rematerialize: bool
    bounds: Bounds | None


def _init(options: _Options, params: Params) -> NewtonCgState:
    shape: Any = jax.ShapeDtypeStruct
    scalar, count = shape((), solve_dtype(params)), shape((), jnp.int32)
    held = None if options.bounds is None else count
    info = NewtonCgInfo(count, count, scalar, scalar, count, held)
    state = zeros(NewtonCgState(count, scalar, None, None, info), params)
    direction = jax.tree.map(jnp.zeros_like, params) if options.warm_start else None
    box = box_of(options.bounds, params, caller="scale_by_newton_cg")
    return state._replace(direction=direction, box=box)


def _step(
    options: _Options, call: Call, state: NewtonCgState
) -> tuple[optax.Updates, NewtonCgState]:
    # the system H p = g in real leaves, in at least float32; both sides are multiplied by
    # a power of two, so that squares of g neither overflow nor underflow
    factor = unit_factor(call.updates)
    multiply, precondition = _products(options, call, factor)
    g, side = _wide(call.updates, call.params, factor), None
    if state.box is not None:
        side = _face(state.box, call, multiply, g, factor)
        held = jax.tree.leaves(side.held)
        multiply, precondition = _within(held, multiply), _within(held, precondition)
        g = free_part(held, g)
    size = jnp.sqrt(inner(g, g))
    length = size / factor
    first_length = jnp.where(state.first_length > 0, state.first_length, length)

    # if the value or the gradient is not finite, g = 0 makes the update zero
    known = jnp.isfinite(length) & call.finite
    start = None
    if options.warm_start:
        before = _wide(state.direction, call.params)
        if side is not None:
            before = free_part(jax.tree.leaves(side.held), before)
        start = _warm(before, multiply, g)
    g = zero_unless(known, g)

    # conjugate gradients until |g - H p| <= min(1/2, sqrt(|g|/|g_0|)) |g|, as in
    # algorithm 7.1, or until a direction has negative curvature; p includes that one
    found = conjugate_gradients(
        multiply,
        g,
        start,
        gram=inner_products,
        precondition=precondition,
        tolerance=forcing(length, first_length) * size,
        max_iterations=options.max_iterations,
    )

    # p is the last finite iterate, or the gradient if -p is not a descent direction
    sound = known & found.finite
    slope = inner(g, found.x)
    downhill = slope > 0
    gradient = zero_unless(found.finite, jax.tree.map(lambda leaf: leaf / factor, g))
    p = select(downhill, found.x, gradient)
    direction = _restored(p, call.updates)
    predicted = jnp.where(downhill, slope / factor, length**2) / 2
    kept, held, products = direction, None, found.products
    if side is not None:
        direction = zero_unless(known, completed(side, direction))
        predicted = inner(direction, zero_unless(known, call.updates)) / 2
        held, products = count(side.held), products + 1
    status = {
        StepStatus.NONFINITE: ~sound,
        StepStatus.NEGATIVE_CURVATURE: found.negative,
        StepStatus.NOT_DESCENT: sound & (length > 0) & ~downhill,
    }
    return direction, NewtonCgState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        first_length=jnp.where(sound, first_length, state.first_length),
        direction=_kept(options, sound, kept, state.direction),
        box=state.box,
        info=NewtonCgInfo(
            status=step_status(status),
            products=products + jnp.int32(options.warm_start),
            residual=found.residual / or_one(size),
            predicted=predicted,
            evaluations=jnp.zeros((), jnp.int32),
            held=held,
        ),
    )


def _products(
    options: _Options, call: Call, factor: jax.Array
) -> tuple[Callable[[Leaves], Leaves], Callable[[Leaves], Leaves]]:
    """Return `v -> H v`, multiplied by the factor, and `r -> M r` at params, with M the
    preconditioner, over real leaves in at least float32."""
    params = call.params
    parts, restore = real_leaves(params)
    objective = precompose(call.objective, restore)

    def product_at(point: Leaves) -> Callable[[Leaves], Leaves]:
        return options.linearize(objective, lambda parts: parts, point)

    once = None if options.rematerialize else product_at(parts)

    def multiply(v: Leaves) -> Leaves:
        v = [x.astype(p.dtype) for x, p in zip(v, parts, strict=True)]
        if once is not None:
            return _wide(once(v), params, factor)
        # the barrier makes params depend on v; otherwise XLA would move the
        # linearization out of the loop
        point, v = jax.lax.optimization_barrier((parts, v))
        return _wide(product_at(point)(v), params, factor)

    def precondition(r: Leaves) -> Leaves:
        if options.preconditioner is None:
            return r
        return _wide(options.preconditioner(restore(r), params), params)

    return multiply, precondition


def _face(
    box: Box,
    call: Call,
    multiply: Callable[[Leaves], Leaves],
    g: Leaves,
    factor: jax.Array,
) -> Face:
    """Return the face whose entries a gradient step of length `|g.H g| / |H g|^2` leads
    to a bound, with g the gradient in the entries that are not at theirs."""
    g = free_part(jax.tree.leaves(outward(box, call.params, call.updates)), g)
    # g is multiplied by the factor, H g by its square
    reach = factor * short_reach(g, multiply(g))
    return face(box, call.params, call.updates, reach)


def _within(
    held: Leaves, apply: Callable[[Leaves], Leaves]
) -> Callable[[Leaves], Leaves]:
    """Return the function with zeros for the held entries of its results."""
    return lambda v: free_part(held, apply(v))


def _wide(tree: Params, params: Params, factor: ArrayLike = 1.0) -> Leaves:
    """Return the real leaves of a tree, multiplied by a factor, in the dtype of inner
    products over params."""
    dtype = solve_dtype(params)
    factor = jnp.asarray(factor, dtype)
    return [leaf.astype(dtype) * factor for leaf in real_leaves(tree)[0]]


def _restored(p: Leaves, updates: optax.Updates) -> optax.Updates:
    """Return the tree whose real leaves are p, in the dtypes of the updates."""
    like, restore = real_leaves(updates)
    return restore([x.astype(leaf.dtype) for x, leaf in zip(p, like, strict=True)])


def _kept(
    options: _Options, sound: jax.Array, direction: optax.Updates, old: Params
) -> Params:
    """Return the direction for the next warm start: that of the last step that was
    finite."""
    if not options.warm_start:
        return None
    return optax.tree.cast_like(select(sound, direction, old), old)


def _warm(
    p: Leaves, multiply: Callable[[Leaves], Leaves], g: Leaves
) -> tuple[Leaves, Leaves]:
    """Return the multiple x of p that minimizes `x'H x / 2 - g'x`, and H x; zeros
    unless `p'H p > 0` and `p'g > 0`."""
    q = multiply(p)
    (_, pq, _), (_, _, _), (pg, _, _) = inner_products(p, q, g)
    usable = (pq > 0) & (pg > 0) & jnp.isfinite(pq) & jnp.isfinite(pg)
    rate = divide(pg, pq, usable)
    return zero_unless(usable, jax.tree.map(lambda leaf: rate * leaf, (p, q)))
