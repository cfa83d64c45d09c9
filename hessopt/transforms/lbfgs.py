"""L-BFGS: the inverse BFGS matrix of the last m pairs `s = params - params_old`, `y = grad - grad_old`, times g.

In compact form (`numerics/compact.py`) this takes the products `S'y, Y'y` and `S'g, Y'g` and one linear combination of
g, S and Y: no recursion over the pairs, and few operations per leaf.

Source: Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", 1989; Byrd, Nocedal and
Schnabel, 1994.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_count
from hessopt.calculus.flat import inner, solve_dtype
from hessopt.calculus.objective import bind, require_params
from hessopt.numerics import compact
from hessopt.typing import Matrix, Params, StepStatus, ValueFn, Vector, step_status

_NAME = "scale_by_lbfgs"

CAUTION = 0.1
"""Cosine of s and y below which a pair of one batch is skipped. Curvature that is nearly zero on one batch is not so on
the next, and its inverse is a leap. (60 epochs of digits, 5 seeds: without it 3 of 5 leapt, with 0.01 two, so none.)"""

LARGE = 2**16
"""Entries from which on passes over the memory count for more than operations. Products with y are then taken from
those with the gradients, where that is exact enough, and the combination of the pairs is written out, term by term,
for XLA to fuse it with what follows."""


class LbfgsInfo(NamedTuple):
    """What the last update found."""

    status: jax.Array  # int32 scalar, StepStatus
    pairs: jax.Array  # int32 scalar, pairs in use
    pairs_skipped: jax.Array  # int32 scalar, pairs that failed the curvature test, since the start
    scale: jax.Array  # scalar, gamma of the initial matrix used, in units of params^2 / f


class LbfgsState(NamedTuple):
    """State of `scale_by_lbfgs`."""

    count: jax.Array  # int32 scalar, iterates taken in
    params: Params  # the last one
    grad: Params  # gradient there; None with same_batch_pairs
    pairs: Params  # per leaf (2m + 2, ...): s and y of slot 0, of slot 1, ...
    gg: jax.Array  # scalar, |grad|^2
    products: Any  # matrix (2, m + 1), S'grad and Y'grad; None with same_batch_pairs
    compact: compact.Compact  # products among the pairs
    info: LbfgsInfo


def scale_by_lbfgs(
    memory_size: int = 10, *, same_batch_pairs: bool = False, memory_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Multiply the gradient by the limited-memory BFGS approximation of the inverse Hessian.

    Args:
      memory_size: m, pairs that are kept.
      same_batch_pairs: whether y is the change of the gradient on the batch of the current call, for stochastic
        training; needs `value_fn` and one more gradient per update.
      memory_dtype: dtype in which pairs are kept, `jnp.bfloat16` for half the memory; by default that of params, at
        least float32.

    Returns:
      A transformation, gradient in and `+H g` out. `update(grads, state, params, *, grad, value_fn, **data)` takes the
      pairs from `grad` if given, else from `grads`; only same_batch_pairs needs `value_fn`. Its status is
      `state.info.status`.

      A pair enters the memory iff `s.y > 1e-8 |s.g_old|` and `s.y > 10 eps |s| (|g| + |g_old|)`, and with
      same_batch_pairs `s.y > 0.1 |s| |y|`; else it is skipped and counted (PAIR_SKIPPED). Without pairs the direction
      is of unit length. Parameters that have not moved since the last update tell of a failed search, and empty the
      memory (MEMORY_RESET), as does a direction that would not descend. A value, or a squared gradient, that is not
      finite gives an update of zero (NONFINITE). The state is then as before, but for info.

    Raises:
      ValueError: for memory_size < 1.
      TypeError: in `update`, for missing params, and for a missing value_fn with same_batch_pairs.

    Cost per update: two readings of the memory, three where y is small against the gradients or `grads` is not `grad`,
    and some 20 n besides. Memory: `2 (m + 1) n` for the pairs, 2 n for
    the last iterate.

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

    def kept_dtype(leaf: jax.Array) -> Any:
        if memory_dtype is None or jnp.iscomplexobj(leaf):
            return jnp.promote_types(leaf.dtype, jnp.float32)
        return jnp.dtype(memory_dtype)

    def init(params: Params) -> LbfgsState:
        params = jax.tree.map(jnp.asarray, params)
        dtype = solve_dtype(params)
        return LbfgsState(
            count=_count(),
            params=_zeros(params),
            grad=None if same_batch_pairs else _zeros(params),
            pairs=jax.tree.map(lambda leaf: jnp.zeros((2 * memory_size + 2, *leaf.shape), kept_dtype(leaf)), params),
            gg=jnp.zeros((), dtype),
            products=None if same_batch_pairs else jnp.zeros((2, memory_size + 1), dtype),
            compact=compact.empty(memory_size + 1, dtype),
            info=LbfgsInfo(_count(), _count(), _count(), jnp.zeros((), dtype)),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        *,
        value: Any = 0.0,
        grad: optax.Updates | None = None,
        value_fn: ValueFn | None = None,
        **data: Any,
    ) -> tuple[optax.Updates, LbfgsState]:
        require_params(params, caller=_NAME)
        grad = updates if grad is None else grad
        first = state.count == 0
        old_params, old_grad = state.params, state.grad
        if same_batch_pairs:
            old_params = _select(first, params, old_params)
            objective = bind(value_fn, data, caller=f"{_NAME}(same_batch_pairs=True)")
            old_grad = jax.tree.map(jnp.conj, jax.grad(objective)(old_params))
        s, y = _difference(params, old_params), _difference(grad, old_grad)
        gg, ss, yy = inner(grad, grad), inner(s, s), inner(y, y)
        gg_old = inner(old_grad, old_grad) if same_batch_pairs else state.gg
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(jnp.stack([gg, gg_old, ss, yy])))

        # the pair, written into the free slot before it is judged
        k, slots = state.compact.slot, memory_size + 1
        pairs = jax.tree.map(lambda rows, s, y: _write(rows, k, s, y, finite), state.pairs, s, y)
        g_products = _products(pairs, grad, slots)

        def from_differences() -> Matrix:
            own = jnp.stack([inner(s, y), yy])
            return jnp.where(jnp.arange(slots) == k, own[:, None], g_products - state.products)

        def direct() -> Matrix:
            stored = jax.tree.map(lambda rows, y: _read(rows, 2 * k + 1).astype(y.dtype), pairs, y)
            return _products(pairs, stored, slots)

        large = sum(leaf.size for leaf in jax.tree.leaves(y)) >= LARGE
        if not large or same_batch_pairs or memory_dtype is not None:
            y_products = direct()
        else:  # y'x = g'x - g_old'x, unless y is so small that rounding would show
            y_products = jax.lax.cond(yy > 0.5 * (gg + gg_old), from_differences, direct)

        sy, eps = y_products[0, k], max((_eps(leaf) for leaf in jax.tree.leaves(grad)), default=0.0)
        sg_old = g_products[0, k] - sy
        noise = 10 * eps * jnp.sqrt(ss) * (jnp.sqrt(gg) + jnp.sqrt(gg_old))
        good = (sy > 1e-8 * jnp.abs(sg_old)) & (sy > noise) & jnp.all(jnp.isfinite(y_products))
        if same_batch_pairs:
            good &= sy > CAUTION * jnp.sqrt(ss) * jnp.sqrt(yy)
        known = finite & ~first
        stuck, good = known & (ss == 0), known & (ss > 0) & good
        small = _select(good, compact.append(state.compact, *y_products), state.compact)
        small = _select(stuck, compact.emptied(small), small)

        # the direction
        same = all(u is g for u, g in zip(*map(jax.tree.leaves, (updates, grad)), strict=True))
        S_u, Y_u = g_products if same else _products(pairs, updates, slots)
        uu = inner(updates, updates)
        unit = jax.lax.rsqrt(jnp.where(uu > 0, uu, 1.0))
        gamma = jnp.where(small.gamma > 0, small.gamma, unit)
        v, w = compact.coefficients(small, S_u, Y_u, gamma)
        slope = gamma * uu + jnp.sum(v * S_u + w * Y_u, where=compact.used(small))
        lost = finite & (uu > 0) & ~(slope > 0)
        small = _select(lost, compact.emptied(small), small)
        v, w, gamma = (jnp.where(lost, without, x) for without, x in ((0.0, v), (0.0, w), (unit, gamma)))
        direction = jax.tree.map(
            lambda u, rows: jnp.where(finite, gamma * u + _combination(rows, v, w), 0.0).astype(u.dtype),
            updates,
            pairs,
        )

        skipped = known & ~stuck & ~good
        status = {
            StepStatus.NONFINITE: ~finite,
            StepStatus.PAIR_SKIPPED: skipped,
            StepStatus.MEMORY_RESET: (stuck | lost) & jnp.any(compact.used(state.compact)),
        }
        return direction, LbfgsState(
            count=state.count + finite.astype(jnp.int32),
            params=_select(finite, params, state.params),
            grad=None if same_batch_pairs else _select(finite, grad, old_grad),
            pairs=pairs,
            gg=_select(finite, gg, state.gg),
            products=None if same_batch_pairs else _select(finite, g_products, state.products),
            compact=small,
            info=LbfgsInfo(
                status=step_status(status),
                pairs=jnp.sum(compact.used(small), dtype=jnp.int32),
                pairs_skipped=state.info.pairs_skipped + skipped.astype(jnp.int32),
                scale=gamma,
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _count() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def _zeros(tree: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def _select(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _difference(a: Params, b: Params) -> Params:
    def subtract(x: jax.Array, y: jax.Array) -> jax.Array:
        wide = jnp.promote_types(jnp.result_type(x), jnp.float32)
        return jnp.asarray(x, wide) - jnp.asarray(y, wide)

    return jax.tree.map(subtract, a, b)


def _eps(leaf: jax.Array) -> float:
    return float(jnp.finfo(leaf.dtype).eps)


def _write(rows: jax.Array, k: jax.Array, s: jax.Array, y: jax.Array, finite: jax.Array) -> jax.Array:
    """Put s and y of a leaf into slot k, in place, unless they are not finite."""
    for i, x in ((2 * k, s), (2 * k + 1, y)):
        x = jnp.where(finite, x.astype(rows.dtype), _read(rows, i))
        rows = jax.lax.dynamic_update_index_in_dim(rows, x, i, axis=0)
    return jax.lax.optimization_barrier(rows)  # or XLA writes into copies, one for each use


def _read(rows: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(rows, i, keepdims=False)


def _products(pairs: Params, vector: Params, slots: int) -> Matrix:
    """`S'x` and `Y'x`, `(2, slots)`, summed over the leaves."""

    def product(rows: jax.Array, x: jax.Array) -> jax.Array:
        wide = jnp.promote_types(jnp.float32, x.dtype)
        if jnp.finfo(rows.dtype).bits < jnp.finfo(wide).bits:  # widened as it is read, not before
            return jnp.sum(rows.astype(wide) * x, axis=tuple(range(1, rows.ndim)))
        return jnp.real(jnp.tensordot(rows, jnp.conj(x).astype(rows.dtype), x.ndim, precision="highest"))

    none = jnp.zeros(2 * slots, solve_dtype(vector))
    return sum(jax.tree.leaves(jax.tree.map(product, pairs, vector)), none).reshape(slots, 2).T


def _combination(rows: jax.Array, v: Vector, w: Vector) -> jax.Array:
    """`S v + Y w` of a leaf."""
    weights = jnp.stack([v, w], axis=1).ravel()
    wide = jnp.promote_types(rows.dtype, weights.dtype)
    if rows[0].size < LARGE and rows.dtype == wide:
        return jnp.tensordot(weights, rows, 1, precision="highest")
    terms = [weights[i] * rows[i].astype(wide) for i in range(len(weights))]
    return functools.reduce(jnp.add, terms)
