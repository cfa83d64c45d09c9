"""Damped Newton: solve `(H + lambda I) p = g`.

H is the Hessian (or Gauss-Newton matrix) of the objective, or its diagonal blocks, and
lambda is a constant or a schedule. The system is solved in scaled parameters D p, with
a diagonal matrix D that equilibrates H + lambda I; each entry is the largest one so
far, as in `trust_region.py`. Away from a minimum H need not be positive definite, and
`-p` need not be a descent direction. There are three treatments of
`D^-1 (H + lambda I) D^-1`:

- `"shift"` adds a sufficient multiple of the identity (`numerics/cholesky.py`), which
  is remembered between steps and divided by four at each: H gets a multiple of D^2, so
  that the units of parameters do not matter;
- `"absolute"` replaces the eigenvalues by their absolute values, so that saddles do not
  attract the iterates (Dauphin et al., 2014);
- `"none"` takes Newton's step, which may lead to any stationary point.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., section 3.4; Dauphin et
al., arXiv 1406.2572.
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
    block_hessians,
    resolve,
)
from hessopt.kinds.faces import on_face
from hessopt.kinds.protocol import Call, scheduled, transformation
from hessopt.numerics.equilibration import equilibration, largest_scales
from hessopt.numerics.guards import divide, or_one, select, zero_unless
from hessopt.numerics.indefiniteness import INDEFINITE_TREATMENTS, IndefiniteTreatment
from hessopt.numerics.norms import norm, unit_scale
from hessopt.trees.boxes import (
    Bounds,
    Face,
    box_of,
    check_bounds,
    completed,
    count,
    face,
)
from hessopt.trees.groups import Groups, check_groups, combine, group_labels, take
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import (
    all_finite,
    ravel,
    ravel_mask,
    solve_dtype,
    unravel,
)
from hessopt.typing import Labels, Matrix, Params, StepStatus, Vector, step_status

_NOT_REUSED = (
    StepStatus.FACTORIZATION_FAILED | StepStatus.NO_CURVATURE | StepStatus.NONFINITE
)
"""Facts after which the next update computes a new factorization."""


class NewtonInfo(NamedTuple):
    """Report of the last update; for several blocks, the worst values."""

    status: jax.Array  # int32 scalar, StepStatus
    damping: jax.Array  # scalar, lambda, in units of f / params^2
    shift: jax.Array  # scalar, multiple of D^2 that was added
    smallest_pivot: jax.Array  # scalar, of the factorized matrix, in scaled parameters
    # scalar, largest over smallest pivot: an estimate of the condition number
    condition: jax.Array
    attempts: jax.Array  # int32 scalar, attempted factorizations, all blocks
    # scalar, decrease of the objective that the quadratic model predicts, g.p / 2, in
    # units of f
    predicted: jax.Array
    evaluations: jax.Array  # int32 scalar, of the objective besides the Hessian: 0
    # int32 scalar, entries held at bounds; None without bounds
    held: Any = None


class NewtonState(NamedTuple):
    """State of `scale_by_newton`. All arrays describe the curvature; none has the shape
    of params."""

    count: jax.Array  # int32 scalar, updates so far
    # (number of blocks,), shifts of the last factorizations that succeeded
    shift: Vector
    # per block (n_b,), the diagonal of D, 0 where the curvature was always 0
    scales: Params
    factors: Params  # with update_every > 1, the blocks' factors; else None
    box: Any  # Box, the bounds; None without bounds
    info: NewtonInfo


@renamed_arguments({"positivity": "on_indefinite"})
@injectable
def scale_by_newton(
    damping: optax.ScalarOrSchedule = 0.0,
    *,
    on_indefinite: str | IndefiniteTreatment = "shift",
    blocks: Groups = "all",
    update_every: int = 1,
    curvature: str | CurvatureFn | Curvature = "hessian",
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiply the gradient by the inverse of the damped Hessian.

    For each block b of the parameters, with n_b entries, `p_b = (H_b + lambda I)^-1
    g_b`.

    Args:
      damping: lambda >= 0, in units of f / params^2, or a schedule of it.
      on_indefinite: treatment of an `H + lambda I` that is not positive definite.
        `"shift"` adds a sufficient multiple of D^2, which is remembered between updates
        and divided by four at each; `"absolute"` replaces the eigenvalues of
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
      bounds: `(lower, upper)`, each a number, a tree like params or None; see
        `hessopt.typing.Bounds`. Entries that a short gradient step leads to a bound are
        held: their direction ends there, and the other entries have the direction of
        the problem in which these are constants. The chain needs a
        `scale_by_wolfe_linesearch` with the same bounds.

    Returns:
      A transformation of the gradient into `+p`, whose `update(grads, state, params, *,
      value_fn, **data)` requires the objective. Its status is `state.info.status`.

      A block whose curvature is not finite uses its previous factor, or gets an update
      of zero if there is none (FACTORIZATION_FAILED). A block whose gradient is not
      finite gets an update of zero (NONFINITE), and so do all blocks if the value is
      given and not finite. A block with zero curvature moves along its gradient by a
      unit length (NO_CURVATURE). In these cases the state is unchanged except count and
      info.

    Raises:
      ValueError: for damping < 0, update_every < 1 or an unknown word.
      TypeError: in `update`, if params, value_fn, or data that value_fn requires is
        missing.
      ValueError, TypeError: in `init`, for bounds that do not fit params, for complex
        params with bounds, and for params outside of the bounds, where they are known.

    Cost per update: sum n_b products of about two gradients each and n_b^3/3
    multiplications per attempted factorization (`"shift"`: usually one or two attempts),
    every `update_every` updates; n_b^2 in between. Memory during an update: two to four
    times the sum of n_b^2; with update_every > 1 once between updates.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def loss(x, target):
      ...     return jnp.sum((x - target) ** 4)
      >>> tx = optax.chain(scale_by_newton(), optax.scale(-1.0))
      >>> x, target = jnp.array([3.0, 2.0]), jnp.zeros(2)
      >>> updates, state = tx.update(jax.grad(loss)(x, target), tx.init(x), x, value_fn=loss, target=target)
      >>> jnp.allclose(updates, -x / 3).item()
      True

    Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., section 3.4; Dauphin
    et al., arXiv 1406.2572.
    """
    check_range("damping", damping, 0)
    check_count("update_every", update_every)
    check_groups("blocks", blocks)
    treatment = choose("on_indefinite", on_indefinite, INDEFINITE_TREATMENTS)
    options = _Options(
        damping,
        treatment,
        blocks,
        update_every,
        resolve(curvature),
        check_bounds(bounds),
    )
    init, step = functools.partial(_init, options), functools.partial(_step, options)
    return transformation("scale_by_newton", init, step, needs=("value_fn",))


class _Options(NamedTuple):
    """The arguments of `scale_by_newton`, checked and resolved."""

    damping: optax.ScalarOrSchedule
    treatment: IndefiniteTreatment
    blocks: Groups
    update_every: int
    curvature: Curvature
    bounds: Bounds | None


class _Blocks(NamedTuple):
    """The factorized blocks of the curvature, as an update uses them."""

    factors: Params  # one per block
    shift: Vector  # (number of blocks,)
    scales: Params  # one per block
    info: NewtonInfo


class _Block(NamedTuple):
    """One factorized block."""

    factor: Params  # of the scaled matrix, and 1/D
    shift: jax.Array  # scalar
    scales: Vector  # (n_b,), the diagonal of D


def _init(options: _Options, params: Params) -> NewtonState:
    labels, names = group_labels(params, options.blocks)
    dtype = solve_dtype(params)
    factors = None
    if options.update_every > 1:
        factors = _per_block(_empty_factors(options, params, labels, len(names)))
    state = NewtonState(
        count=jnp.zeros((), jnp.int32),
        shift=jnp.zeros(len(names), dtype),
        scales=_per_block(
            [jnp.zeros(_size(params, labels, b), dtype) for b in range(len(names))]
        ),
        factors=factors,
        box=None,
        info=_worst([], dtype),
    )
    box = box_of(options.bounds, params, caller="scale_by_newton")
    if box is not None:
        held = jnp.zeros((), jnp.int32)
        state = state._replace(info=state.info._replace(held=held))
    return beside(state, params)._replace(box=box)


def _step(
    options: _Options, call: Call, state: NewtonState
) -> tuple[optax.Updates, NewtonState]:
    # bounds hold some entries, and the others are those of a smaller problem
    labels, names = group_labels(call.params, options.blocks)
    whole, side = call, None
    if state.box is not None:
        side = face(
            state.box,
            call.params,
            call.updates,
            _reach(call, state, labels, len(names)),
        )
        call = on_face(call, side)

    # the gradient of each block; if the value is not finite, no gradient is usable
    parts = [take(call.updates, labels, group) for group in range(len(names))]
    gradients = [jnp.where(call.finite, ravel(part), jnp.nan) for part in parts]

    # factorize H + lambda I if it is due or if the last factors cannot be used
    def factorize() -> _Blocks:
        return _factorize(options, call, state, labels, gradients, side)

    def reuse() -> _Blocks:
        # negative curvature is reported for as long as the factor is in use
        status = state.info.status & StepStatus.NEGATIVE_CURVATURE
        info = state.info._replace(
            status=status, attempts=jnp.zeros((), jnp.int32), held=None
        )
        return _Blocks(state.factors, state.shift, state.scales, info)

    if options.update_every > 1:
        again = (state.info.status & _NOT_REUSED) != 0
        due = (state.count % options.update_every == 0) | again
        blocks = jax.lax.cond(due, factorize, reuse)
    else:
        blocks = factorize()

    # p_b = (H_b + lambda I)^-1 g_b; zero for a block without a finite solution
    direction, status = call.updates, blocks.info.status
    for group, (part, g) in enumerate(zip(parts, gradients, strict=True)):
        factor, t = blocks.factors[group]
        p = unravel(t * options.treatment.solve(factor, t * g), part)
        solved, finite = all_finite(p), jnp.all(jnp.isfinite(g))
        facts = {
            StepStatus.NONFINITE: ~finite,
            StepStatus.FACTORIZATION_FAILED: finite & ~solved,
        }
        status |= step_status(facts)
        p = zero_unless(solved, p)
        direction = combine(p, direction)
    info = blocks.info
    if side is not None:
        known = jnp.asarray(call.finite)
        direction = zero_unless(known, completed(side, direction))
        info = info._replace(held=count(side.held))
    slope, uphill = _slope(direction, whole)
    status |= step_status({StepStatus.NOT_DESCENT: uphill})

    return direction, NewtonState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        shift=blocks.shift,
        scales=blocks.scales,
        factors=blocks.factors if options.update_every > 1 else None,
        box=state.box,
        info=info._replace(status=status, predicted=jnp.maximum(slope / 2, 0.0)),
    )


def _reach(call: Call, state: NewtonState, labels: Labels, blocks: int) -> Params:
    """Return the inverse of the diagonal of D^2, a tree like params; 0 where D is not
    known."""
    reach = call.params
    for group in range(blocks):
        part, D = take(call.params, labels, group), state.scales[group]
        reach = combine(unravel(divide(1.0, D, D > 0) ** 2, part), reach)
    return reach


def _factorize(
    options: _Options,
    call: Call,
    state: NewtonState,
    labels: Labels,
    gradients: list[Vector],
    side: Face | None,
) -> _Blocks:
    """Form and factorize all blocks of the curvature at params."""
    count, dtype = len(gradients), solve_dtype(call.params)
    lam = jnp.asarray(scheduled(options.damping, state.count), dtype)
    matrices = block_hessians(
        call.objective, call.params, labels, count, curvature=options.curvature
    )
    old = state.factors
    if old is None:
        old = _empty_factors(options, call.params, labels, count)
    factors, shifts, scales, infos = [], [], [], []
    for group, (H, g) in enumerate(zip(matrices, gradients, strict=True)):
        before = _Block(old[group], state.shift[group], state.scales[group])
        held = None
        if side is not None:
            held = ravel_mask(take(side.held, labels, group))
        block, info = _factorize_block(options.treatment, H, g, lam, before, held)
        factors.append(block.factor)
        shifts.append(block.shift)
        scales.append(block.scales)
        infos.append(info)
    return _Blocks(
        _per_block(factors),
        jnp.array(shifts, dtype),
        _per_block(scales),
        _worst(infos, dtype),
    )


def _empty_factors(
    options: _Options, params: Params, labels: Labels, count: int
) -> list[Params]:
    """Return zeros in the shapes of the blocks' factors and of 1/D."""

    def empty(group: int) -> Params:
        size = _size(params, labels, group)
        matrix = jax.ShapeDtypeStruct((size, size), solve_dtype(params))
        shift = jax.ShapeDtypeStruct((), matrix.dtype)
        shapes = jax.eval_shape(options.treatment.factorize, matrix, shift).factor
        inverse = jax.ShapeDtypeStruct((size,), matrix.dtype)
        return jax.tree.map(
            lambda shape: jnp.zeros(shape.shape, shape.dtype), (shapes, inverse)
        )

    return [empty(group) for group in range(count)]


def _size(params: Params, labels: Labels, group: int) -> int:
    """Return the number of real entries of a block."""
    return jax.eval_shape(ravel, take(params, labels, group)).size


def _slope(direction: optax.Updates, call: Call) -> tuple[jax.Array, jax.Array]:
    """Return g.p, and whether it is not positive although p is not zero."""
    p, g = ravel(direction), ravel(call.gradient)
    g = jnp.where(jnp.isfinite(g), g, 0.0)  # the direction is zero there
    slope = jnp.vdot(g / unit_scale(g), p / unit_scale(p), precision="highest")
    uphill = jnp.any(p != 0) & ~(slope > 0)
    return slope * unit_scale(g) * unit_scale(p), uphill


def _factorize_block(
    treatment: IndefiniteTreatment,
    H: Matrix,
    g: Vector,
    lam: jax.Array,
    old: _Block,
    held: Vector | None,
) -> tuple[_Block, NewtonInfo]:
    """Factorize `D^-1 (H + lam I) D^-1`, with `|g| I` for H + lam I if that is zero; on
    failure return the old block. Held entries, of which H has rows of zeros, get a
    diagonal of 1."""
    length = norm(g)
    flat = (H.size > 0) & ~jnp.any(H) & (lam == 0)
    if held is not None:
        flat &= ~jnp.all(held)
    diagonal = jnp.where(flat, or_one(length), lam)
    A = H + diagonal * jnp.eye(len(H), dtype=H.dtype)
    known = jnp.any(A != 0, axis=1)
    if held is not None:
        known &= ~held
    scales, t = largest_scales(old.scales, equilibration(A), known)
    scaled = A * t * t[:, None]
    if held is not None:
        scaled = jnp.where(jnp.diag(held), 1.0, scaled)
    new = treatment.factorize(scaled, old.shift)

    smallest = jnp.min(new.pivots, initial=jnp.inf)
    status = step_status(
        {
            StepStatus.NONFINITE: ~jnp.all(jnp.isfinite(H)),
            StepStatus.FACTORIZATION_FAILED: ~new.ok,
            StepStatus.NEGATIVE_CURVATURE: new.ok & new.indefinite,
            StepStatus.NO_CURVATURE: flat,
        }
    )
    info = NewtonInfo(
        status=status,
        damping=diagonal,
        shift=jnp.where(new.ok, new.shift, 0.0),
        smallest_pivot=jnp.where(new.ok, smallest, 0.0),
        condition=jnp.where(
            new.ok, jnp.max(new.pivots, initial=0.0) / smallest, jnp.inf
        ),
        attempts=new.attempts,
        predicted=jnp.zeros_like(length),
        evaluations=jnp.zeros((), jnp.int32),
    )
    sound = new.ok & jnp.isfinite(length)
    block = _Block((new.factor, t), new.shift, scales)
    return select(sound, block, old), info


def _worst(infos: list[NewtonInfo], dtype: jax.typing.DTypeLike) -> NewtonInfo:
    """Return the flags of all blocks, the extremes of their numbers and the sum of
    their attempts; zeros if there are no blocks."""
    if not infos:
        # one array per field: a state that shares buffers cannot be donated
        kinds = jnp.int32, *[dtype] * 4, jnp.int32, dtype, jnp.int32
        return NewtonInfo(*(jnp.zeros((), kind) for kind in kinds))
    every = jax.tree.map(lambda *field: jnp.stack(field), *infos)
    return NewtonInfo(
        status=functools.reduce(jnp.bitwise_or, every.status),
        damping=jnp.max(every.damping),
        shift=jnp.max(every.shift),
        smallest_pivot=jnp.min(every.smallest_pivot),
        condition=jnp.max(every.condition),
        attempts=jnp.sum(every.attempts, dtype=jnp.int32),
        predicted=jnp.zeros((), dtype),
        evaluations=jnp.zeros((), jnp.int32),
    )


def _per_block(items: list[Params]) -> Params:
    """Return one item per block, or a scalar if there are no blocks, so that
    `optax.tree.map_params` finds a non-parameter there."""
    return tuple(items) or jnp.zeros(())
