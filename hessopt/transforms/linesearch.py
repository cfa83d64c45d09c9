"""The Wolfe line search: the rate t at which `phi(t) = f(params + t u)` has fallen
enough and is flat enough.

    phi(t) <= phi(0) + c1 t phi'(0),    |phi'(t)| <= c2 |phi'(0)|

Near the minimum rounding drowns the first condition; there Hager and Zhang's
approximate Wolfe conditions decide by slopes. Which rate is tried next is the business
of `numerics/wolfe.py`.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., sections 3.1 and 3.5;
Hager and Zhang, "A new conjugate gradient method with guaranteed descent and an
efficient line search", 2005.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_count, check_range, choose
from hessopt.kinds.line_searches import LinesearchInfo, LinesearchState
from hessopt.numerics import wolfe
from hessopt.objective.binding import bind, require_given, require_params
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import applied, gram, inner, solve_dtype, strongly_typed
from hessopt.typing import Params, StepStatus, ValueFn, step_status

_NAME = "scale_by_wolfe_linesearch"

InitialGuess = Callable[[jax.Array, jax.Array], jax.Array]
"""`(fall, slope) -> rate`: what the objective fell by in the last step, and its slope
now, negative."""


def quadratic_guess(fall: jax.Array, slope: jax.Array) -> jax.Array:
    """Where a parabola with this slope has fallen as much as the last step did, at most
    1 (Nocedal, Wright: 3.60)."""
    rate = -2.02 * fall / jnp.where(slope < 0, slope, -jnp.inf)
    return jnp.where((rate > 0) & (rate < 1), rate, 1.0)


def unit_guess(fall: jax.Array, slope: jax.Array) -> jax.Array:
    """Always 1."""
    return jnp.ones_like(slope)


GUESSES: dict[str, InitialGuess] = {"quadratic": quadratic_guess, "one": unit_guess}


def scale_by_wolfe_linesearch(
    max_steps: int = 20,
    *,
    slope_rtol: float = 1e-4,
    curv_rtol: float = 0.9,
    max_rate: float | None = None,
    initial_guess: str | InitialGuess = "one",
) -> optax.GradientTransformationExtraArgs:
    """Scale the update to a step that satisfies the Wolfe conditions.

    The update u is the additive one, behind the sign; `t u` comes out.

    Args:
      max_steps: trials at most.
      slope_rtol: c1 in [0, 1/2], the part of the initial slope by which the objective
        falls per unit of t.
      curv_rtol: c2 in [c1, 1], the part of the initial slope that may remain.
      max_rate: largest t, unbounded by default.
      initial_guess: the first t. `"one"`, for updates that know their length;
        `"quadratic"`, for those that do not: from the fall of the last step, at most 1;
        or a callable `(fall, slope) -> t` of that fall (0 at the start) and the slope,
        a negative scalar.

    Returns:
      A transformation whose `update(updates, state, params, *, value, grad, value_fn,
      **data)` needs the objective, and its value and gradient at params. Stands last in
      a chain: its state keeps value and gradient at the point accepted for
      `value_and_grad_from_state` and `minimize`. Its status is `state.info.status`.

      Where no trial is accepted (SEARCH_FAILED) the step is the one of the largest
      decrease seen, else zero; a trial that is not finite makes the rate smaller. An
      update that points uphill (NOT_DESCENT), or a value or gradient that is not finite
      (NONFINITE), gives a step of zero. The state is then as before, but for count and
      info.

    Raises:
      ValueError: for max_steps < 1, c1 or c2 out of their ranges, max_rate <= 0 or an
        unknown word.
      TypeError: in `update`, for what is missing, naming it.

    Cost per update: one value and gradient per trial, also under vmap: one trial
    mostly, where the update is well scaled. One trace of the objective. Memory: one
    gradient and one step.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.scale(-1.0), scale_by_wolfe_linesearch())
      >>> x, value_fn = jnp.array([3.0, 4.0]), lambda x: 10.0 * jnp.sum(x**2)
      >>> value, grad = jax.value_and_grad(value_fn)(x)
      >>> updates, state = tx.update(grad, tx.init(x), x, value=value, grad=grad, value_fn=value_fn)
      >>> float(value_fn(x + updates)) < 25.0
      True

    Source: see the head of this file.
    """
    check_count("max_steps", max_steps)
    check_range("slope_rtol", slope_rtol, 0, 0.5)
    check_range("curv_rtol", curv_rtol, slope_rtol, 1)
    check_range(
        "max_rate",
        math.inf if max_rate is None else max_rate,
        float(jnp.finfo(jnp.float32).tiny),
    )
    guess = choose("initial_guess", initial_guess, GUESSES)

    def init(params: Params) -> LinesearchState:
        dtype = solve_dtype(params)
        state = LinesearchState(
            count=jnp.zeros((), jnp.int32),
            value=jnp.full((), jnp.inf, dtype),
            grad=jax.tree.map(
                lambda leaf: jnp.full_like(leaf, jnp.inf), strongly_typed(params)
            ),
            fall=jnp.zeros((), dtype),
            info=LinesearchInfo(
                status=jnp.zeros((), jnp.int32),
                rate=jnp.zeros((), dtype),
                trials=jnp.zeros((), jnp.int32),
                evaluations=jnp.zeros((), jnp.int32),
            ),
        )
        return beside(state, params)

    def update(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        *,
        value: Any = None,
        grad: optax.Updates | None = None,
        value_fn: ValueFn | None = None,
        **data: Any,
    ) -> tuple[optax.Updates, LinesearchState]:
        require_params(params, caller=_NAME)
        objective = bind(value_fn, data, caller=_NAME)
        require_given(value=value, grad=grad, caller=_NAME)
        u, inners = updates, gram(grad, updates)
        slope, length = inners[0, 1], inners[1, 1]
        value_dtype = jnp.result_type(value)
        dtype = solve_dtype((params, value))
        value, slope = jnp.asarray(value, dtype), jnp.asarray(slope, dtype)
        finite = jnp.isfinite(value) & jnp.isfinite(slope)
        descends = finite & (slope < -jnp.finfo(dtype).tiny)
        per_unit = 1.0 / jnp.where(descends, -slope, 1.0)
        limit = jnp.asarray(jnp.inf if max_rate is None else max_rate, dtype)
        conditions = wolfe.Conditions(slope_rtol, curv_rtol, limit, max_steps)

        def searching(carry: Any) -> jax.Array:
            return descends & (wolfe.unpack(carry[0]).outcome == wolfe.SEARCHING)

        def try_next(carry: Any) -> Any:
            bracket, kept = wolfe.unpack(carry[0]), carry[1]
            t = bracket.trial
            step = jax.tree.map(lambda leaf: (t * leaf).astype(leaf.dtype), u)
            pair = jax.value_and_grad(objective)(applied(params, step))
            change = jnp.asarray(pair[0], dtype) - value
            along = jnp.asarray(inner(jax.tree.map(jnp.conj, pair[1]), u), dtype)
            bracket = wolfe.advance(
                bracket, change * per_unit, along * per_unit, conditions
            )
            best = bracket.best.rate == t
            new = (step, *pair)
            kept = jax.tree.map(
                lambda new, old: jnp.where(best, jnp.asarray(new, old.dtype), old),
                new,
                kept,
            )
            return wolfe.pack(bracket), kept

        eps = jnp.finfo(value_dtype).eps
        noise = eps**wolfe.NOISE * jnp.abs(value) * per_unit
        first = jnp.asarray(
            guess(state.fall.astype(dtype), jnp.where(descends, slope, -1.0)), dtype
        )
        bracket = wolfe.pack(wolfe.begin(first, noise, limit))
        kept = (jax.tree.map(jnp.zeros_like, u), state.value, state.grad)
        bracket, (step, new_value, new_grad) = jax.lax.while_loop(
            searching, try_next, (bracket, kept)
        )
        bracket = wolfe.unpack(bracket)

        rate = bracket.best.rate
        status = {
            StepStatus.NONFINITE: ~finite,
            StepStatus.NOT_DESCENT: finite & ~descends & (length > 0),
            StepStatus.SEARCH_FAILED: descends & (bracket.outcome != wolfe.ACCEPTED),
        }
        return step, LinesearchState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            value=new_value,
            grad=new_grad,
            fall=jnp.where(
                rate > 0,
                (value - new_value.astype(dtype)).astype(state.fall.dtype),
                state.fall,
            ),
            info=LinesearchInfo(
                status=step_status(status),
                rate=rate.astype(state.fall.dtype),
                trials=bracket.trials,
                evaluations=bracket.trials,
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)
