"""The best of several rates: phi(t) = f(theta + t u) is evaluated on a geometric grid.

Needs values only, all at once or one after the other, and finds a decrease wherever
phi has one at a rate of the grid, however far phi is from convex.

Source: Mueller and Zeinhofer, "Achieving high accuracy with PINNs via energy natural
gradient descent", 2023.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_count, check_range, injectable
from hessopt.kinds.line_searches import LinesearchInfo
from hessopt.kinds.protocol import Call, transformation
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import applied, largest, solve_dtype
from hessopt.typing import Params, StepStatus, step_status


class GridLinesearchState(NamedTuple):
    """State of `scale_by_grid_linesearch`."""

    count: jax.Array  # int32 scalar, updates so far
    info: LinesearchInfo


@injectable
def scale_by_grid_linesearch(
    count: int = 12, *, max_rate: float = 1.0, factor: float = 0.5
) -> optax.GradientTransformationExtraArgs:
    """Scale the update by the best rate of a geometric grid.

    The input is the additive update u, after the sign change; the output is `t u` with
    the t of `max_rate * factor**j`, j = 0, ..., count - 1, for which the objective is
    lowest.

    Args:
      count: number of rates.
      max_rate: largest rate.
      factor: ratio of a rate to the one before, in (0, 1).

    Returns:
      A transformation whose `update(updates, state, params, *, value, value_fn,
      **data)` requires the objective and its value at params. Its status is
      `state.info.status`.

      If no rate gives a value below that at params, the step is zero (SEARCH_FAILED); so
      it is for a value or an update that is not finite (NONFINITE). Rates whose values
      are not finite are not used.

    Raises:
      ValueError: for count < 1, max_rate <= 0, or a factor outside of (0, 1).
      TypeError: in `update`, for a missing argument; the message names it.

    Cost per update: `count` values, one after the other; the objective is traced once.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.scale(-1.0), scale_by_grid_linesearch())
      >>> x, value_fn = jnp.array([3.0, 4.0]), lambda x: 10.0 * jnp.sum(x**2)
      >>> value, grad = jax.value_and_grad(value_fn)(x)
      >>> updates, state = tx.update(grad, tx.init(x), x, value=value, value_fn=value_fn)
      >>> (x + updates).tolist()  # rate 1/16
      [-0.75, -1.0]

    Source: Mueller and Zeinhofer, "Achieving high accuracy with PINNs via energy natural
    gradient descent", 2023.
    """
    check_count("count", count)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    check_range("max_rate", max_rate, tiny)
    check_range("factor", factor, tiny, 1 - float(jnp.finfo(jnp.float32).epsneg))
    step = functools.partial(_step, _Options(count, max_rate, factor))
    needs = ("value_fn", "value")
    return transformation("scale_by_grid_linesearch", _init, step, needs=needs)


class _Options(NamedTuple):
    """The arguments of `scale_by_grid_linesearch`, checked."""

    count: int
    max_rate: jax.typing.ArrayLike
    factor: jax.typing.ArrayLike


def _init(params: Params) -> GridLinesearchState:
    info = LinesearchInfo(
        status=jnp.zeros((), jnp.int32),
        rate=jnp.zeros((), solve_dtype(params)),
        trials=jnp.zeros((), jnp.int32),
        evaluations=jnp.zeros((), jnp.int32),
    )
    return beside(GridLinesearchState(jnp.zeros((), jnp.int32), info), params)


def _step(
    options: _Options, call: Call, state: GridLinesearchState
) -> tuple[optax.Updates, GridLinesearchState]:
    dtype = state.info.rate.dtype
    ratios = jnp.asarray(options.factor, dtype) ** jnp.arange(options.count)
    rates = jnp.asarray(options.max_rate, dtype) * ratios.astype(dtype)

    def scaled(t: jax.Array) -> optax.Updates:
        return jax.tree.map(lambda u: (t * u).astype(u.dtype), call.updates)

    def value_at(t: jax.Array) -> jax.Array:
        return call.objective(applied(call.params, scaled(t)))

    length = largest(call.updates)
    finite = call.finite & jnp.isfinite(length)
    values = jax.lax.map(value_at, rates)
    usable = jnp.where(jnp.isfinite(values), values, jnp.inf)
    best = jnp.argmin(usable)
    taken = finite & (usable[best] < jnp.asarray(call.value))
    rate = jnp.where(taken, rates[best], 0.0)
    updates = jax.tree.map(lambda u: jnp.where(taken, u, 0), scaled(rate))
    status = {
        StepStatus.NONFINITE: ~finite,
        StepStatus.SEARCH_FAILED: finite & ~taken & (length > 0),
    }
    trials = jnp.full((), options.count, jnp.int32)
    return updates, GridLinesearchState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        info=LinesearchInfo(step_status(status), rate, trials, trials),
    )
