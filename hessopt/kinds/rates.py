"""Rates by a local model of `phi(eta) = f(params + sum_s eta_s u_s)`: what all such
rules have in common.

Every so many steps the model is measured, averaged with its predecessors, and solved
for the rates; a safeguard looks whether the step raises the objective, and shortens it
if so. In the steps between, no group goes farther than it went when its rate was
measured: an update that has grown, as momentum does, would run past the minimum along
it. For the same reason the first steps are all measured, and so is one that would lead
uphill, where the gradient is given. A rule says how to measure and how to solve.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_count, check_range
from hessopt.numerics.guards import select
from hessopt.objective.binding import bind, require_params
from hessopt.trees.groups import Groups, check_groups, group_labels, take
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import all_finite, applied, inner, solve_dtype
from hessopt.typing import Params, StepStatus, ValueFn, Vector, step_status

RISE = 1e-3
"""By how much of itself the objective may rise in a step: batches are noisy."""
HALVINGS = 5
"""Of a step that raises it by more, before it is dropped."""
FIRST = 2
"""Periods at the start of which every step is measured."""


_NOT_COUNTED = -1
"""Evaluations, of an update that does not count them."""


class Restricted(NamedTuple):
    """The objective, the point, and the updates whose rates are sought."""

    objective: ValueFn  # of params
    params: Params
    updates: Params
    groups: Groups
    labels: Any  # tree like params of ints, the group of every leaf
    value: jax.Array | None  # objective(params), if it was given
    # its gradient there in optax's convention (conjugated), if it was given
    grad: Params | None


class Measured(NamedTuple):
    """A model of phi at 0."""

    value: jax.Array  # phi(0), scalar
    model: Any  # tree of arrays, each `(S,)` or `(S, S)`
    known: jax.Array | bool = True  # bool (S,), whether it says anything about a group
    # bool (S,), whether phi was not finite where it was probed
    beyond: jax.Array | bool = False


class Solved(NamedTuple):
    """What a model says."""

    rate: Vector  # (S,)
    usable: jax.Array  # bool (S,), for which groups it says anything
    facts: dict[StepStatus, jax.Array]


class Rule(NamedTuple):
    """What tells one method from another."""

    name: str
    State: Callable[[jax.Array, Any, Any], Any]  # count, memory, info
    blank: Callable[[int, Any], Any]  # number of groups, dtype -> a model of zeros
    measure: Callable[[Restricted, Vector], Measured]  # with the rates so far
    # model, rates so far, which were solved for, count
    solve: Callable[[Any, Vector, jax.Array, jax.Array], Solved]


class Memory(NamedTuple):
    """What is carried from one measurement to the next."""

    age: jax.Array  # int32 scalar, steps since the last measurement
    measured: jax.Array  # int32 (S,), measurements in the average
    solved: jax.Array  # bool (S,), whether a rate is no longer the initial one
    rate: Vector  # (S,), before learning_rate
    # (S,), norm of the updates of a group when they were measured; 0 if the step was
    # not taken
    length: Vector
    model: Any  # average


class RateInfo(NamedTuple):
    """What the last update did."""

    status: jax.Array  # int32 scalar, StepStatus
    rate: Vector  # (S,), by which the updates were multiplied
    halvings: jax.Array  # int32 scalar, by the safeguard
    evaluations: jax.Array  # int32 scalar, of the objective: -1, not counted


def scale_by_rates(
    rule: Rule,
    *,
    groups: Groups | None,
    learning_rate: optax.ScalarOrSchedule,
    update_every: int,
    curvature_decay: jax.typing.ArrayLike,
    rate_decay: jax.typing.ArrayLike,
    initial_rate: jax.typing.ArrayLike,
    safeguard: bool,
) -> optax.GradientTransformationExtraArgs:
    """Scale updates by the rates that a rule finds; arguments are those of
    `scale_by_generalized_newton`."""
    check_count("update_every", update_every)
    check_range("learning_rate", learning_rate, 0)
    check_range("curvature_decay", curvature_decay, 0, 1)
    check_range("rate_decay", rate_decay, 0, 1)
    groups = "all" if groups is None else groups
    check_groups("groups", groups)

    def init(params: Params) -> Any:
        dtype, size = solve_dtype(params), len(group_labels(params, groups)[1])
        state = rule.State(
            jnp.zeros((), jnp.int32),
            Memory(
                age=jnp.int32(update_every),
                measured=jnp.zeros(size, jnp.int32),
                solved=jnp.zeros(size, bool),
                rate=jnp.full(size, initial_rate, dtype),
                length=jnp.full(size, jnp.inf, dtype),
                model=rule.blank(size, dtype),
            ),
            RateInfo(
                status=jnp.zeros((), jnp.int32),
                rate=jnp.full(size, initial_rate, dtype),
                halvings=jnp.zeros((), jnp.int32),
                evaluations=jnp.full((), _NOT_COUNTED, jnp.int32),
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
    ) -> tuple[optax.Updates, Any]:
        require_params(params, caller=rule.name)
        objective, labels = (
            bind(value_fn, data, caller=rule.name),
            group_labels(params, groups)[0],
        )
        old, dtype = state.memory, state.memory.rate.dtype
        if value is not None:
            value = _as_value(value, dtype, rule.name)
        at = Restricted(objective, params, updates, groups, labels, value, grad)
        factor = jnp.asarray(
            learning_rate(state.count) if callable(learning_rate) else learning_rate,
            dtype,
        )
        length = jnp.sqrt(inner_by_group(updates, updates, labels, old.rate))
        moves = length > 0

        def renew() -> tuple[Memory, RateInfo]:
            start, new, known, beyond = rule.measure(at, old.rate)
            new = jax.tree.map(
                lambda x, like: jnp.asarray(x, like.dtype), new, old.model
            )
            finite = all_finite(new) & ~jnp.any(beyond)
            seen = finite & known & moves
            keep = jnp.where(old.measured > 0, jnp.asarray(curvature_decay, dtype), 0)

            def averaged(x: jax.Array, past: jax.Array) -> jax.Array:
                here = seen if x.ndim == 1 else seen & seen[:, None]
                kept = keep if x.ndim == 1 else jnp.minimum(keep, keep[:, None])
                return jnp.where(here, kept * past + (1 - kept) * x, past)

            model = jax.tree.map(averaged, new, old.model)
            found, usable, facts = rule.solve(model, old.rate, old.solved, state.count)
            usable, keep = (
                usable & seen,
                jnp.where(old.solved, jnp.asarray(rate_decay, dtype), 0),
            )
            rate = jnp.where(
                usable, keep * old.rate + (1 - keep) * found.astype(dtype), old.rate
            )
            rate = jnp.where(beyond, rate / 2, rate)
            halvings, dropped = (
                _guard(at, factor * rate, start)
                if safeguard
                else (jnp.int32(0), jnp.bool_(False))
            )
            rate = jnp.where(
                jnp.isfinite(start),
                rate * jnp.asarray(0.5, dtype) ** halvings,
                old.rate,
            )
            happened = {
                StepStatus.NONFINITE: ~finite,
                StepStatus.RATE_KEPT: jnp.any(~usable & moves),
                StepStatus.SAFEGUARDED: halvings > 0,
                StepStatus.STEP_REJECTED: dropped,
            }
            status = step_status(happened) | step_status(
                {flag: finite & fact for flag, fact in facts.items()}
            )
            memory = Memory(
                age=jnp.ones((), jnp.int32),
                measured=old.measured + seen.astype(jnp.int32),
                solved=old.solved | usable,
                rate=rate,
                length=jnp.where(dropped, 0, jnp.where(moves, length, old.length)),
                model=model,
            )
            return memory, RateInfo(
                status,
                jnp.where(dropped, 0, factor * rate),
                halvings,
                jnp.int32(_NOT_COUNTED),
            )

        def reuse() -> tuple[Memory, RateInfo]:
            shorter = jnp.where(
                length > old.length, old.length / jnp.where(moves, length, 1), 1
            )
            none = jnp.zeros((), jnp.int32)
            return old._replace(age=old.age + 1), RateInfo(
                none, factor * old.rate * shorter, none, jnp.int32(_NOT_COUNTED)
            )

        # nothing is learnt from updates that are zero, as those of a base that
        # accumulates gradients
        due = (old.age >= update_every) | (state.count < FIRST * update_every)
        if grad is not None:
            due |= (
                jnp.vdot(old.rate, inner_by_group(grad, updates, labels, old.rate)) > 0
            )
        due &= jnp.any(moves)
        memory, info = renew() if update_every == 1 else jax.lax.cond(due, renew, reuse)
        # an entry that is not finite shows in the length
        sound = all_finite((length, value))
        trouble = RateInfo(
            jnp.int32(StepStatus.NONFINITE),
            jnp.zeros_like(old.rate),
            jnp.zeros((), jnp.int32),
            jnp.int32(_NOT_COUNTED),
        )
        memory, info = select(sound, (memory, info), (old, trouble))
        info = info._replace(rate=jnp.where(jnp.isfinite(info.rate), info.rate, 0))
        step = jax.tree.map(
            lambda u: jnp.where(sound, u, 0), scaled(updates, labels, info.rate)
        )
        return step, rule.State(
            jnp.asarray(optax.safe_increment(state.count)), memory, info
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _as_value(value: Any, dtype: Any, caller: str) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape:
        raise TypeError(f"{caller} needs value to be a scalar, got shape {value.shape}")
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(dtype)


def inner_by_group(a: Params, b: Params, labels: Any, like: Vector) -> Vector:
    """The real inner products of the leaves of each group, like a vector `(S,)`."""
    parts = (
        (take(a, labels, group), take(b, labels, group)) for group in range(like.size)
    )
    return jnp.array([inner(*part) for part in parts], like.dtype)


def scaled(updates: Params, labels: Any, rate: Vector) -> Params:
    """Every leaf times the rate of its group."""
    return jax.tree.map(
        lambda u, label: (rate[label] * u).astype(u.dtype), updates, labels
    )


def _guard(
    at: Restricted, rate: Vector, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How often a step must be halved before it raises the objective by no more than
    RISE, and whether none does."""
    limit = value + max(RISE, 4 * float(jnp.finfo(value.dtype).eps)) * jnp.abs(value)

    def goes_on(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        trial, rises = carry
        return rises & (trial <= HALVINGS)

    def attempt(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        trial, _ = carry
        shorter = scaled(
            at.updates, at.labels, rate * jnp.asarray(0.5, rate.dtype) ** trial
        )
        reached = at.objective(applied(at.params, shorter))
        return trial + 1, ~(reached <= limit) | ~jnp.isfinite(reached)

    trials, rises = jax.lax.while_loop(
        goes_on, attempt, (jnp.zeros((), jnp.int32), jnp.ones((), bool))
    )
    return trials - 1, rises
