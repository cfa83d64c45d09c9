"""L-BFGS: the product of g with the inverse BFGS matrix of the last m pairs `s = params
- params_old`, `y = grad - grad_old`.

In compact form (`numerics/compact.py`) the product requires `S'y, Y'y` and `S'g, Y'g`
and one linear combination of g, S and Y, without a recursion over the pairs and with
few operations per leaf. S and Y are stored in one stack of pairs (`trees/stacks.py`),
which is written in place.

Source: Liu and Nocedal, "On the limited memory BFGS method for large scale
optimization", Mathematical Programming 45, 1989; Byrd, Nocedal and Schnabel,
"Representations of quasi-Newton matrices and their use in limited memory methods",
Mathematical Programming 63, 1994.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_count, injectable, warn_renamed
from hessopt.kinds.protocol import Call, in_own_unit, transformation
from hessopt.numerics import compact
from hessopt.numerics.guards import select, zero_unless
from hessopt.numerics.secant import accepts, first_scale, to_unit_length
from hessopt.trees import stacks
from hessopt.trees.boxes import (
    Bounds,
    Face,
    box_of,
    check_bounds,
    completed,
    count,
    face,
    free_part,
    holds_any,
)
from hessopt.trees.sharding import stack_of, zeros
from hessopt.trees.vectors import eps, inner, inner_products, solve_dtype
from hessopt.typing import Matrix, Params, StepStatus, Vector, step_status

MIN_COSINE = 0.1
"""Smallest cosine of s and y at which a pair of one batch is used. Curvature that is
nearly zero on one batch is larger on the next, and its inverse makes too long a step.
(60 epochs of digits, 5 seeds: the loss jumped with 3 seeds without the test, with 2 at
0.01, with none at 0.1.)"""


class LbfgsInfo(NamedTuple):
    """Report of the last update."""

    status: jax.Array  # int32 scalar, StepStatus
    pairs: jax.Array  # int32 scalar, pairs in use
    # int32 scalar, pairs that failed the curvature test, since the start
    pairs_skipped: jax.Array
    # scalar, gamma of the initial matrix used, in units of params^2 / f
    scale: jax.Array
    # scalar, decrease of the objective that the quadratic model predicts, u'H u / 2 with
    # u the updates, in units of f
    predicted: jax.Array
    # int32 scalar, of the objective's gradient: 1 with same_batch_pairs, else 0
    evaluations: jax.Array
    # int32 scalar, entries held at bounds; None without bounds
    held: Any

    @property
    def gradients(self) -> jax.Array:
        """The old name of `evaluations`, until 0.3."""
        warn_renamed("LbfgsInfo.gradients", "evaluations")
        return self.evaluations


class LbfgsState(NamedTuple):
    """State of `scale_by_lbfgs`."""

    count: jax.Array  # int32 scalar, updates so far whose values were all finite
    # scalar, power of two by which gradients are multiplied; 0 before the first update
    factor: jax.Array
    old_params: Params  # params at the last of these
    old_grad: Params  # gradient there, scaled; None with same_batch_pairs
    pairs: Params  # per leaf (m, 2, ...): s and y of each pair
    gg: jax.Array  # scalar, |old_grad|^2
    # (m, 2), S'old_grad and Y'old_grad; None with same_batch_pairs
    products: Any
    compact: compact.Compact  # products among the pairs
    box: Any  # Box, the bounds; None without bounds
    info: LbfgsInfo


@injectable
def scale_by_lbfgs(
    memory_size: int = 10,
    *,
    same_batch_pairs: bool = False,
    memory_dtype: jax.typing.DTypeLike | None = None,
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiply the gradient by the limited-memory BFGS approximation of the inverse
    Hessian.

    Args:
      memory_size: m, the number of stored pairs.
      same_batch_pairs: whether y is the change of the gradient on the batch of the
        current call, for stochastic training; requires `value_fn` and one more gradient
        per update.
      memory_dtype: dtype of the stored pairs, such as `jnp.bfloat16` for half the
        memory; by default that of params, at least float32.
      bounds: `(lower, upper)`, each a number, a tree like params or None; see
        `hessopt.typing.Bounds`. Entries that a short gradient step leads to a bound are
        held: their direction ends there, and the other entries have the direction of
        the problem in which these are constants. The chain needs a
        `scale_by_wolfe_linesearch` with the same bounds.

    Returns:
      A transformation of the gradient into `+H g`. `update(grads, state, params, *,
      grad, value_fn, **data)` forms the pairs from `grad` if it is given, else from
      `grads`; only same_batch_pairs requires `value_fn`. Its status is
      `state.info.status`.

      A pair is stored if `s.y > 1e-8 |s.g_old|` and `s.y > 10 eps |s| (|g| + |g_old|)`,
      and with same_batch_pairs `s.y > 0.1 |s| |y|`; otherwise it is skipped and counted
      (PAIR_SKIPPED). Without pairs the direction is the gradient, scaled to unit length
      or by the scale of the last pair, whichever is shorter. The memory is emptied
      (MEMORY_RESET) if the parameters have not changed since the last update, which
      indicates a failed search, or if the direction is not a descent direction. A value
      or a squared gradient that is not finite gives an update of zero (NONFINITE); the
      state is then unchanged except info.

    Raises:
      ValueError: for memory_size < 1, or a memory_dtype without the range of float32,
        such as float16.
      TypeError: in `update`, for missing params; with same_batch_pairs also for a
        missing value_fn, or data that it requires.
      ValueError, TypeError: in `init`, for bounds that do not fit params, for complex
        params with bounds, and for params outside of the bounds, where they are known.

    Cost per update: two passes over the memory, or three if y is small compared to the
    gradients or `grads` is not `grad`, and about 20 n more; while bounds hold entries,
    one more pass and `4 m^2 n` multiplications. Memory: `2 m n` for the
    pairs, 2 n for the last iterate.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> curvature = jnp.array([1.0, 100.0])
      >>> value_fn = lambda x: 0.5 * jnp.sum(curvature * x**2)
      >>> tx = optax.chain(scale_by_lbfgs(), optax.scale(-1.0))
      >>> x = jnp.array([1.0, 1.0])
      >>> state = tx.init(x)
      >>> for _ in range(12):
      ...     updates, state = tx.update(jax.grad(value_fn)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(value_fn(x) < 1e-6)
      True

    Source: Liu and Nocedal, "On the limited memory BFGS method for large scale
    optimization", 1989; Byrd, Nocedal and Schnabel, "Representations of quasi-Newton
    matrices and their use in limited memory methods", 1994, theorem 2.2; Byrd, Lu,
    Nocedal and Zhu, "A limited memory algorithm for bound constrained optimization",
    1995, for the minimization over free entries.
    """
    check_count("memory_size", memory_size)
    if (
        memory_dtype is not None
        and jnp.finfo(memory_dtype).maxexp < jnp.finfo(jnp.float32).maxexp
    ):
        raise ValueError(
            "memory_dtype must have the range of float32, as bfloat16 has, "
            f"got {memory_dtype}"
        )

    options = _Options(
        memory_size, same_batch_pairs, memory_dtype, check_bounds(bounds)
    )
    init, step = functools.partial(_init, options), functools.partial(_step, options)
    name, needs = "scale_by_lbfgs", ()
    if same_batch_pairs:
        name, needs = f"{name}(same_batch_pairs=True)", ("value_fn",)
    return transformation(name, init, step, needs=needs)


class _Options(NamedTuple):
    """The arguments of `scale_by_lbfgs`, checked."""

    memory_size: int
    same_batch_pairs: bool
    memory_dtype: jax.typing.DTypeLike | None
    bounds: Bounds | None


class _Pair(NamedTuple):
    """The newest pair, and the inner products of the tests."""

    s: Params
    y: Params
    gram: Matrix  # (3, 3), inner products among g, s and y
    gg: jax.Array  # scalar, |g|^2
    gg_old: jax.Array  # scalar, |g_old|^2
    uu: jax.Array  # scalar, |u|^2 of the updates u


class _Products(NamedTuple):
    """Products of the gradient g, of y and of the updates u with the pairs in memory,
    each `(m, 2)`."""

    g: jax.Array  # S'g and Y'g
    y: jax.Array  # S'y and Y'y
    u: jax.Array  # S'u and Y'u


class _Verdict(NamedTuple):
    """The result of the tests, bool scalars."""

    finite: jax.Array  # value, gradient, updates and pair are finite
    good: jax.Array  # the pair enters the memory
    skipped: jax.Array  # the pair fails the curvature test
    stuck: jax.Array  # s = 0: the last search failed, and the memory is emptied


class _Memory(NamedTuple):
    """The pairs after this update, and their products."""

    pairs: Params
    compact: compact.Compact  # products among the pairs
    g: jax.Array  # (m, 2), S'g and Y'g
    u: jax.Array  # (m, 2), S'u and Y'u


class _Free(NamedTuple):
    """The updates u in the free entries, and the face that holds the others."""

    u: Params
    uu: jax.Array  # scalar, |u|^2
    face: Face | None  # None without bounds


class _Weights(NamedTuple):
    """The coefficients of `H u = gamma u + S v + Y w`."""

    gamma: jax.Array  # scalar
    v: Vector  # (m,)
    w: Vector  # (m,)


def _init(options: _Options, params: Params) -> LbfgsState:
    params = jax.tree.map(jnp.asarray, params)
    m, dtype = options.memory_size, solve_dtype(params)
    shape: Any = jax.ShapeDtypeStruct
    count, scalar = shape((), jnp.int32), shape((), dtype)
    like = jax.tree.map(stack_of, params)

    def stack(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return stack_of(leaf, m, 2, dtype=_memory_dtype(options, leaf))

    state = LbfgsState(
        count=count,
        factor=scalar,
        old_params=like,
        old_grad=None if options.same_batch_pairs else like,
        pairs=jax.tree.map(stack, params),
        gg=scalar,
        products=None if options.same_batch_pairs else shape((m, 2), dtype),
        compact=compact.shapes(m, dtype),
        box=None,
        info=LbfgsInfo(
            *(count, count, count, scalar, scalar, count),
            None if options.bounds is None else count,
        ),
    )
    box = box_of(options.bounds, params, caller="scale_by_lbfgs")
    return zeros(state, params)._replace(box=box)


def _memory_dtype(options: _Options, leaf: jax.Array) -> jnp.dtype:
    """Return the dtype of the stored pairs of a leaf."""
    if options.memory_dtype is None or jnp.iscomplexobj(leaf):
        return jnp.promote_types(leaf.dtype, jnp.float32)
    return jnp.dtype(options.memory_dtype)


def _step(
    options: _Options, call: Call, state: LbfgsState
) -> tuple[optax.Updates, LbfgsState]:
    call, factor = in_own_unit(call, state.factor)

    # the newest pair, s = x - x_old and y = g - g_old, and its products S'g, Y'g, S'y,
    # Y'y with the memory, all taken before the oldest pair is overwritten
    pair = _form(options, call, state, factor)
    products = _multiply(call, state, pair)

    # the pair is stored if s'y > 1e-8 |s'g_old| and s'y > 10 eps |s| (|g| + |g_old|): H
    # stays positive definite, and y is more than rounding
    verdict = _judge(options, call, state, pair, products)
    memory = _remember(call, state, pair, products, verdict)

    # H u = gamma u + S v + Y w for the updates u; if u'H u <= 0 by rounding, the
    # direction is u scaled to unit length, and the memory is emptied
    free = _release(call, state, memory, pair.uu)
    weights, slope, lost = _weigh(memory, verdict, free)
    direction = _direct(call, memory, weights, verdict, free)
    held = None
    if free.face is not None:
        slope, held = inner(direction, call.updates), count(free.face.held)
    small = select(lost, compact.emptied(memory.compact), memory.compact)

    def kept(new: Any, old: Any) -> Any:
        return None if old is None else select(verdict.finite, new, old)

    status = {
        StepStatus.NONFINITE: ~verdict.finite,
        StepStatus.PAIR_SKIPPED: verdict.skipped,
        StepStatus.MEMORY_RESET: (verdict.stuck | lost) & jnp.any(state.compact.used),
    }
    return direction, LbfgsState(
        count=state.count + verdict.finite.astype(jnp.int32),
        factor=jnp.where(verdict.finite & (pair.gg > 0), factor, state.factor),
        old_params=kept(call.params, state.old_params),
        old_grad=kept(call.gradient, state.old_grad),
        pairs=memory.pairs,
        gg=kept(pair.gg, state.gg),
        products=kept(memory.g, state.products),
        compact=small,
        box=state.box,
        info=LbfgsInfo(
            status=step_status(status),
            pairs=jnp.sum(small.used, dtype=jnp.int32),
            pairs_skipped=state.info.pairs_skipped + verdict.skipped.astype(jnp.int32),
            scale=weights.gamma * factor,
            predicted=jnp.where(verdict.finite, slope / 2, 0.0) / factor,
            evaluations=jnp.int32(options.same_batch_pairs),
            held=held,
        ),
    )


def _form(options: _Options, call: Call, state: LbfgsState, factor: jax.Array) -> _Pair:
    """Form the newest pair and its inner products."""
    old_params, old_grad, gg_old = state.old_params, state.old_grad, state.gg
    if options.same_batch_pairs:
        # g_old on the batch of this call; at the first call there is no old point
        old_params = select(state.count == 0, call.params, old_params)
        old_grad = jax.tree.map(
            lambda g: (jnp.conj(g) * factor).astype(g.dtype),
            jax.grad(call.objective)(old_params),
        )
        gg_old = inner(old_grad, old_grad)
    s = jax.tree.map(_difference, call.params, old_params, state.pairs)
    y = jax.tree.map(_difference, call.gradient, old_grad, state.pairs)
    products = inner_products(call.gradient, s, y)
    gg = products[0, 0]
    return _Pair(
        s=s,
        y=y,
        gram=products,
        gg=gg,
        gg_old=gg_old,
        uu=gg if call.is_gradient else inner(call.updates, call.updates),
    )


def _difference(new: jax.Array, old: jax.Array, rows: jax.Array) -> jax.Array:
    """Return `new - old` of a leaf, rounded to the dtype of the memory."""
    wide = jnp.promote_types(jnp.result_type(new), jnp.float32)
    difference = jnp.asarray(new, wide) - jnp.asarray(old, wide)
    return difference.astype(rows.dtype).astype(wide)


def _multiply(call: Call, state: LbfgsState, pair: _Pair) -> _Products:
    """Compute the products with the pairs in memory, in one pass over it if
    possible."""
    m = len(state.compact.used)
    products = functools.partial(stacks.products, jnp.zeros((m, 2), pair.gg.dtype))
    small, large = stacks.by_size(state.pairs, call.gradient, pair.y)
    small_g, small_y = products(*small)

    def measured() -> tuple[jax.Array, jax.Array]:
        large_g, large_y = products(*large)
        return small_g + large_g, small_y + large_y

    def derived() -> tuple[jax.Array, jax.Array]:
        g = small_g + products(*large[:2])[0]
        return g, g - state.products

    # S'y = S'g - S'g_old saves a pass over large leaves, unless y is so small compared
    # to the gradients that rounding errors would matter
    if state.products is None or not large[0]:
        g, y = measured()
    else:
        is_long = pair.gram[2, 2] > 0.5 * (pair.gg + pair.gg_old)
        g, y = jax.lax.cond(is_long, derived, measured)
    (u,) = [g] if call.is_gradient else products(state.pairs, call.updates)
    return _Products(g=g, y=y, u=u)


def _judge(
    options: _Options,
    call: Call,
    state: LbfgsState,
    pair: _Pair,
    products: _Products,
) -> _Verdict:
    """Test the newest pair: `s'y` against `s'g_old = s'g - s'y` and the lengths."""
    (gg, sg, _), (_, ss, sy), (_, _, yy) = pair.gram
    finite = (
        call.finite
        & jnp.isfinite(pair.gg_old + pair.uu)
        & jnp.all(jnp.isfinite(pair.gram))
    )
    known = finite & (state.count != 0)
    stuck = known & (ss == 0)
    good = accepts(ss, sy, sg - sy, gg, pair.gg_old, eps(call.gradient))
    if options.same_batch_pairs:
        good &= sy > MIN_COSINE * jnp.sqrt(ss) * jnp.sqrt(yy)
    # the memory is written next, and XLA would copy it if a product with it could be
    # computed later: the test therefore depends on all products
    good = jnp.all(
        known
        & good
        & jnp.isfinite(products.g)
        & jnp.isfinite(products.y)
        & jnp.isfinite(products.u)
    )
    skipped = known & ~stuck & ~good
    return _Verdict(finite=finite, good=good, skipped=skipped, stuck=stuck)


def _remember(
    call: Call, state: LbfgsState, pair: _Pair, products: _Products, verdict: _Verdict
) -> _Memory:
    """Write a good pair and its products into its slot; empty the memory after a failed
    search."""
    slot, good = state.compact.slot, verdict.good
    is_new = jnp.arange(len(products.g))[:, None] == slot
    # the rows of the slot are s'y and y'y, s'g and y'g, s'u and y'u
    S_y, Y_y = jnp.where(is_new, pair.gram[1:, 2], products.y).T
    g = jnp.where(is_new & good, pair.gram[1:, 0], products.g)
    u = g
    if not call.is_gradient:
        su, yu = inner(pair.s, call.updates), inner(pair.y, call.updates)
        u = jnp.where(is_new & good, jnp.stack([su, yu]), products.u)
    appended = compact.append(state.compact, S_y, Y_y)
    small = select(good, appended, state.compact)
    small = select(verdict.stuck, compact.emptied(small), small)
    return _Memory(
        pairs=stacks.write(state.pairs, slot, (pair.s, pair.y), good),
        compact=small,
        g=g,
        u=u,
    )


def _release(call: Call, state: LbfgsState, memory: _Memory, uu: jax.Array) -> _Free:
    """Return the updates in the free entries: all but those that a gradient step with
    the scale of the initial matrix leads to a bound."""
    if state.box is None:
        return _Free(call.updates, uu, None)
    reach = first_scale(memory.compact.gamma, uu)
    side = face(state.box, call.params, call.updates, reach)
    u = free_part(side.held, call.updates)
    return _Free(u, inner(u, u), side)


def _weigh(
    memory: _Memory, verdict: _Verdict, free: _Free
) -> tuple[_Weights, jax.Array, jax.Array]:
    """Return the weights of H u, or those of u at unit length if u'H u <= 0 by
    rounding; the slope u'H u; and whether it was not positive."""
    small, uu = memory.compact, free.uu

    # the initial matrix is gamma I, with gamma = s'y / y'y of the newest pair
    has_scale = jnp.any(small.used) & (small.gamma > 0)
    gamma = jnp.where(has_scale, small.gamma, first_scale(small.gamma, uu))
    (S_u, Y_u), v, w = _combine(memory, gamma, free)
    weights = _Weights(gamma=gamma, v=v, w=w)

    # u'H u = gamma u'u + v'S'u + w'Y'u
    slope = gamma * uu + jnp.sum(v * S_u + w * Y_u, where=small.used)
    lost = verdict.finite & (uu > 0) & ~(slope > 0)
    unit = _Weights(to_unit_length(uu), jnp.zeros_like(v), jnp.zeros_like(w))
    slope = jnp.where(lost, unit.gamma * uu, slope)
    return select(lost, unit, weights), slope, lost


def _combine(
    memory: _Memory, gamma: jax.Array, free: _Free
) -> tuple[jax.Array, Vector, Vector]:
    """Return S'u and Y'u, and the coefficients v and w of the pairs."""

    def whole() -> tuple[jax.Array, Vector, Vector]:
        S_u, Y_u = memory.u.T
        found = compact.coefficients(memory.compact, S_u, Y_u, gamma)
        return memory.u.T, *found

    if free.face is None:
        return whole()
    held = free.face.held

    # the pairs in held entries do not count
    def reduced() -> tuple[jax.Array, Vector, Vector]:
        zero = jnp.zeros_like(memory.u)
        (products,) = stacks.products(zero, memory.pairs, free.u)
        gram = stacks.gram(zero, memory.pairs, held)
        S_u, Y_u = products.T
        found = compact.reduced_coefficients(memory.compact, S_u, Y_u, gamma, gram)
        return products.T, *found

    return jax.lax.cond(holds_any(held), reduced, whole)


def _direct(
    call: Call, memory: _Memory, weights: _Weights, verdict: _Verdict, free: _Free
) -> optax.Updates:
    """Return `gamma u + S v + Y w`, in one pass over the memory, or zero if the call is
    not finite."""
    columns = jnp.stack([weights.v, weights.w], axis=1)
    combined = stacks.combination(memory.pairs, columns)

    def sum_of(u: jax.Array, part: jax.Array) -> jax.Array:
        return jnp.where(verdict.finite, weights.gamma * u + part, 0.0).astype(u.dtype)

    direction = jax.tree.map(sum_of, free.u, combined)
    if free.face is None:
        return direction
    return zero_unless(verdict.finite, completed(free.face, direction))
