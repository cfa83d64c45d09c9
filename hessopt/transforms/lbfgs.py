"""L-BFGS: the inverse BFGS matrix of the last m pairs `s = params - params_old`, `y =
grad - grad_old`, times g.

In compact form (`numerics/compact.py`) this takes the products `S'y, Y'y` and `S'g,
Y'g` and one linear combination of g, S and Y: no recursion over the pairs, and few
operations per leaf.

Source: Liu and Nocedal, "On the limited memory BFGS method for large scale
optimization", 1989; Byrd, Nocedal and Schnabel, 1994.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_count
from hessopt.numerics import compact
from hessopt.numerics.guards import select
from hessopt.numerics.secant import accepts, first_scale, to_unit_length
from hessopt.objective.binding import bind, require_params
from hessopt.trees import vectors
from hessopt.trees.sharding import contract, stack_of, zeros
from hessopt.trees.vectors import eps, inner, inner_products, solve_dtype
from hessopt.typing import Matrix, Params, StepStatus, ValueFn, Vector, step_status

_NAME = "scale_by_lbfgs"

CAUTION = 0.1
"""Cosine of s and y below which a pair of one batch is skipped. Curvature that is
nearly zero on one batch is not so on the next, and its inverse is a leap. (60 epochs of
digits, 5 seeds: without it 3 of 5 leapt, with 0.01 two, so none.)"""


class LbfgsInfo(NamedTuple):
    """What the last update found."""

    status: jax.Array  # int32 scalar, StepStatus
    pairs: jax.Array  # int32 scalar, pairs in use
    # int32 scalar, pairs that failed the curvature test, since the start
    pairs_skipped: jax.Array
    # scalar, gamma of the initial matrix used, in units of params^2 / f
    scale: jax.Array
    # int32 scalar, of the objective's gradient: 1 with same_batch_pairs, else 0
    evaluations: jax.Array


class LbfgsState(NamedTuple):
    """State of `scale_by_lbfgs`."""

    count: jax.Array  # int32 scalar, iterates taken in
    old_params: Params  # the last ones
    old_grad: Params  # gradient there; None with same_batch_pairs
    pairs: Params  # per leaf (m, 2, ...): s and y of each pair
    gg: jax.Array  # scalar, |old_grad|^2
    # matrix (m, 2), S'old_grad and Y'old_grad; None with same_batch_pairs
    products: Any
    compact: compact.Compact  # products among the pairs
    info: LbfgsInfo


def scale_by_lbfgs(
    memory_size: int = 10, *, same_batch_pairs: bool = False, memory_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Multiply the gradient by the limited-memory BFGS approximation of the inverse
    Hessian.

    Args:
      memory_size: m, pairs that are kept.
      same_batch_pairs: whether y is the change of the gradient on the batch of the
        current call, for stochastic training; needs `value_fn` and one more gradient
        per update.
      memory_dtype: dtype in which pairs are kept, `jnp.bfloat16` for half the memory;
        by default that of params, at least float32.

    Returns:
      A transformation, gradient in and `+H g` out. `update(grads, state, params, *,
      grad, value_fn, **data)` takes the pairs from `grad` if given, else from `grads`;
      only same_batch_pairs needs `value_fn`. Its status is `state.info.status`.

      A pair enters the memory iff `s.y > 1e-8 |s.g_old|` and `s.y > 10 eps |s| (|g| +
      |g_old|)`, and with same_batch_pairs `s.y > 0.1 |s| |y|`; else it is skipped and
      counted (PAIR_SKIPPED). Without pairs the direction is along the gradient, of unit
      length or by the scale of the last pair, whichever is shorter. Parameters that
      have not moved since the last update tell of a failed search, and empty the memory
      (MEMORY_RESET), as does a direction that would not descend. A value, or a squared
      gradient, that is not finite gives an update of zero (NONFINITE). The state is
      then as before, but for info.

    Raises:
      ValueError: for memory_size < 1, or a memory_dtype without the range of float32,
        as float16.
      TypeError: in `update`, for missing params, and for a missing value_fn with
        same_batch_pairs.

    Cost per update: two readings of the memory, three where y is small against the
    gradients or `grads` is not `grad`, and some 20 n besides. Memory: `2 m n` for the
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

    Source: see the head of this file.
    """
    check_count("memory_size", memory_size)
    if (
        memory_dtype is not None
        and jnp.finfo(memory_dtype).maxexp < jnp.finfo(jnp.float32).maxexp
    ):
        raise ValueError(
            f"memory_dtype must have the range of float32, as bfloat16 has, got {memory_dtype}"
        )

    def kept_dtype(leaf: jax.Array) -> Any:
        if memory_dtype is None or jnp.iscomplexobj(leaf):
            return jnp.promote_types(leaf.dtype, jnp.float32)
        return jnp.dtype(memory_dtype)

    def init(params: Params) -> LbfgsState:
        params = jax.tree.map(jnp.asarray, params)
        dtype = solve_dtype(params)
        shape: Any = jax.ShapeDtypeStruct
        like = jax.tree.map(stack_of, params)
        count, scalar = shape((), jnp.int32), shape((), dtype)
        return zeros(
            LbfgsState(
                count=count,
                old_params=like,
                old_grad=None if same_batch_pairs else like,
                pairs=jax.tree.map(
                    lambda leaf: stack_of(leaf, memory_size, 2, dtype=kept_dtype(leaf)),
                    params,
                ),
                gg=scalar,
                products=None if same_batch_pairs else shape((memory_size, 2), dtype),
                compact=compact.shapes(memory_size, dtype),
                info=LbfgsInfo(count, count, count, scalar, count),
            ),
            params,
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        *,
        value: Any = None,
        grad: optax.Updates | None = None,
        value_fn: ValueFn | None = None,
        **data: Any,
    ) -> tuple[optax.Updates, LbfgsState]:
        require_params(params, caller=_NAME)
        grad = updates if grad is None else grad
        first = state.count == 0
        old_params, old_grad = state.old_params, state.old_grad
        if same_batch_pairs:
            old_params = select(first, params, old_params)
            objective = bind(value_fn, data, caller=f"{_NAME}(same_batch_pairs=True)")
            old_grad = jax.tree.map(jnp.conj, jax.grad(objective)(old_params))

        # the next pair
        s = jax.tree.map(_difference, params, old_params, state.pairs)
        y = jax.tree.map(_difference, grad, old_grad, state.pairs)
        inners = inner_products(grad, s, y)
        (gg, sg, _), (_, ss, sy), (_, _, yy) = inners
        gg_old = inner(old_grad, old_grad) if same_batch_pairs else state.gg
        same = all(
            u is g for u, g in zip(*map(jax.tree.leaves, (updates, grad)), strict=True)
        )
        uu = gg if same else inner(updates, updates)
        finite = (
            (value is None or jnp.isfinite(value))
            & jnp.isfinite(gg_old + uu)
            & jnp.all(jnp.isfinite(inners))
        )

        # products with the pairs
        products = functools.partial(_products, jnp.zeros((memory_size, 2), gg.dtype))
        is_large = [leaf.size >= vectors.LARGE for leaf in jax.tree.leaves(y)]
        small_g, small_y = products(
            *(_part(tree, is_large, False) for tree in (state.pairs, grad, y))
        )
        large_pairs, large_g, large_y = (
            _part(tree, is_large, True) for tree in (state.pairs, grad, y)
        )

        def measured() -> list[Matrix]:
            return [
                a + b
                for a, b in zip(
                    [small_g, small_y],
                    products(large_pairs, large_g, large_y),
                    strict=True,
                )
            ]

        def derived() -> list[Matrix]:
            g_products = small_g + products(large_pairs, large_g)[0]
            return [g_products, g_products - state.products]

        if state.products is None or not any(is_large):
            g_products, y_products = measured()
        else:  # y'x = g'x - g_old'x, unless y is so small that rounding would show
            g_products, y_products = jax.lax.cond(
                yy > 0.5 * (gg + gg_old), derived, measured
            )
        (u_products,) = (
            [g_products]
            if same
            else products(*map(jax.tree.leaves, (state.pairs, updates)))
        )

        known = finite & ~first
        stuck = known & (ss == 0)
        good = known & accepts(ss, sy, sg - sy, gg, gg_old, eps(grad))
        if same_batch_pairs:
            good &= sy > CAUTION * jnp.sqrt(ss) * jnp.sqrt(yy)
        # waits for all products with the pairs, which are overwritten next; or XLA
        # keeps a copy
        good = jnp.all(
            good
            & jnp.isfinite(g_products)
            & jnp.isfinite(y_products)
            & jnp.isfinite(u_products)
        )

        new = jnp.arange(memory_size)[:, None] == state.compact.slot
        y_products = jnp.where(new, inners[1:, 2], y_products)
        g_products = jnp.where(new & good, inners[1:, 0], g_products)
        if same:
            u_products = g_products
        else:
            u_products = jnp.where(
                new & good,
                jnp.stack([inner(s, updates), inner(y, updates)]),
                u_products,
            )
        small = select(
            good, compact.append(state.compact, *y_products.T), state.compact
        )
        small = select(stuck, compact.emptied(small), small)
        write = functools.partial(_write, state.compact.slot, good)
        pairs = jax.tree.map(write, state.pairs, s, y)

        # the direction
        unit = to_unit_length(uu)
        gamma = jnp.where(
            jnp.any(small.used) & (small.gamma > 0),
            small.gamma,
            first_scale(small.gamma, uu),
        )
        S_u, Y_u = u_products.T
        v, w = compact.coefficients(small, S_u, Y_u, gamma)
        slope = gamma * uu + jnp.sum(v * S_u + w * Y_u, where=small.used)
        lost = finite & (uu > 0) & ~(slope > 0)
        small = select(lost, compact.emptied(small), small)
        v, w, gamma = (
            jnp.where(lost, without, x)
            for without, x in ((0.0, v), (0.0, w), (unit, gamma))
        )
        direction = jax.tree.map(
            lambda u, rows: jnp.where(
                finite, gamma * u + _combination(rows, v, w), 0.0
            ).astype(u.dtype),
            updates,
            pairs,
        )

        skipped = known & ~stuck & ~good
        status = {
            StepStatus.NONFINITE: ~finite,
            StepStatus.PAIR_SKIPPED: skipped,
            StepStatus.MEMORY_RESET: (stuck | lost) & jnp.any(state.compact.used),
        }
        return direction, LbfgsState(
            count=state.count + finite.astype(jnp.int32),
            old_params=select(finite, params, state.old_params),
            old_grad=None if same_batch_pairs else select(finite, grad, old_grad),
            pairs=pairs,
            gg=select(finite, gg, state.gg),
            products=None
            if same_batch_pairs
            else select(finite, g_products, state.products),
            compact=small,
            info=LbfgsInfo(
                status=step_status(status),
                pairs=jnp.sum(small.used, dtype=jnp.int32),
                pairs_skipped=state.info.pairs_skipped + skipped.astype(jnp.int32),
                scale=gamma,
                evaluations=jnp.int32(same_batch_pairs),
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _difference(new: jax.Array, old: jax.Array, rows: jax.Array) -> jax.Array:
    """`new - old` of a leaf, as rounded as it will be kept."""
    wide = jnp.promote_types(jnp.result_type(new), jnp.float32)
    return (
        (jnp.asarray(new, wide) - jnp.asarray(old, wide))
        .astype(rows.dtype)
        .astype(wide)
    )


def _write(
    k: jax.Array, good: jax.Array, rows: jax.Array, s: jax.Array, y: jax.Array
) -> jax.Array:
    """Put s and y of a leaf into slot k, in place, if they are good."""
    for i, x in enumerate((s, y)):
        start = (k, jnp.asarray(i, k.dtype), *[jnp.zeros((), k.dtype)] * s.ndim)
        old = jax.lax.dynamic_slice(rows, start, (1, 1, *s.shape))
        rows = jax.lax.dynamic_update_slice(
            rows, jnp.where(good, x.astype(rows.dtype), old), start
        )
    return rows


def _part(tree: Params, is_large: Sequence[bool], large: bool) -> list[jax.Array]:
    """The leaves that are large, or those that are not."""
    return [
        leaf
        for leaf, this in zip(jax.tree.leaves(tree), is_large, strict=True)
        if this == large
    ]


def _products(
    none: Matrix, pairs: Sequence[jax.Array], *trees: Sequence[jax.Array]
) -> list[Matrix]:
    """`S'x` and `Y'x`, `(m, 2)`, of each vector x, summed over the leaves."""

    def product(rows: jax.Array, x: jax.Array, axes: int) -> jax.Array:
        return jnp.real(contract(rows, jnp.conj(x).astype(rows.dtype), axes))

    def products(rows: jax.Array, *xs: jax.Array) -> Sequence[jax.Array]:
        axes, wide = xs[0].ndim, jnp.promote_types(jnp.float32, xs[0].dtype)
        # widened as it is read, not before
        if jnp.finfo(rows.dtype).bits < jnp.finfo(wide).bits:
            return [
                jnp.sum(rows.astype(wide) * x, axis=tuple(range(2, rows.ndim)))
                for x in xs
            ]
        if xs[0].size >= vectors.LARGE:
            return [product(rows, x, axes) for x in xs]
        return jnp.unstack(product(rows, jnp.stack(xs), axes), axis=2)

    return [
        sum(column, none) for column in zip(*map(products, pairs, *trees), strict=True)
    ] or [none] * len(trees)


def _combination(rows: jax.Array, v: Vector, w: Vector) -> jax.Array:
    """`S v + Y w` of a leaf."""
    weights = jnp.stack([v, w], axis=1)
    wide = jnp.promote_types(rows.dtype, weights.dtype)
    if rows[0, 0].size < vectors.LARGE:
        return jnp.sum(
            jnp.expand_dims(weights, range(2, rows.ndim)) * rows.astype(wide),
            axis=(0, 1),
        )
    terms = [
        weights[i, j] * rows[i, j].astype(wide) for i in range(len(v)) for j in range(2)
    ]
    return functools.reduce(jnp.add, terms)
