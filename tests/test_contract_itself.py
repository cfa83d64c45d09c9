"""A test of the tests: what the contract forbids, done on purpose, is caught by the law
that forbids it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from hessopt import StepStatus
from hessopt.objective.binding import bind
from hessopt.typing import step_status
from tests import contract
from tests.table import Case


class Info(NamedTuple):
    status: jax.Array


class HalvingState(NamedTuple):
    count: jax.Array
    rate: jax.Array
    spare: Any
    info: Info


def halving(**faults: bool) -> optax.GradientTransformationExtraArgs:
    """Gradient descent whose rate is halved when the step would not decrease the
    objective; sound without faults."""
    faulty = faults.get

    def init(params: Any) -> HalvingState:
        spare = params if faulty("aliased") else jax.tree.map(jnp.zeros_like, params)
        return HalvingState(
            jnp.zeros((), jnp.int32),
            jnp.full((), 0.1, float),
            spare,
            Info(jnp.zeros((), jnp.int32)),
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value: Any,
        value_fn: Any = None,
        **data: Any,
    ) -> Any:
        if value_fn is None and faulty("goes_without"):
            return jax.tree.map(lambda u: -0.1 * u, updates), state
        if faulty("swallows"):
            data.pop("weight", None)
        if faulty("refuses") and "nobody_knows" in data:
            raise TypeError("nobody_knows")
        objective = bind(value_fn, data, caller="halving")
        finite = jnp.isfinite(value) & jnp.all(
            jnp.array([jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates)])
        )
        step = jax.tree.map(lambda u: -(state.rate * u).astype(u.dtype), updates)
        probe = objective(optax.apply_updates(params, step))
        ok = finite & jnp.isfinite(probe)
        if not faulty("lets_nan_through"):
            step = jax.tree.map(lambda u: jnp.where(ok, u, 0), step)
        if faulty("uphill"):
            step = jax.tree.map(jnp.negative, step)
        rate = jnp.where(ok & (probe > value), state.rate / 2, state.rate)
        if faulty("weakens"):
            rate = jnp.where(ok, 0.1, 0.05)  # of Python floats: a weak type
        if faulty("remembers_nan"):
            rate = rate + 0 * probe
        status = Info(step_status({StepStatus.NONFINITE: ~ok}))
        return step, HalvingState(state.count + 1, rate, state.spare, status)

    return optax.GradientTransformationExtraArgs(init, update)


def case(**faults: bool) -> Case:
    return Case(
        f"halving {sorted(faults)}", lambda: halving(**faults), needs=("value_fn",)
    )


FAULTS = {
    "weakens": contract.has_a_stable_strongly_typed_state,
    "aliased": contract.shares_no_buffer,
    "lets_nan_through": contract.survives_what_is_not_finite,
    "remembers_nan": contract.survives_what_is_not_finite,
    "swallows": contract.passes_data_on_to_the_objective,
    "refuses": contract.ignores_unknown_keywords,
    "goes_without": contract.names_what_is_missing,
    "uphill": contract.steps_downhill,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_by_its_law_and_by_nothing_but_the_fault(fault):
    law = FAULTS[fault]
    law(case())
    with pytest.raises((AssertionError, TypeError, pytest.fail.Exception)):
        law(case(**{fault: True}))


def test_the_weak_type_also_shows_as_a_second_compilation():
    contract.is_traced_and_compiled_once(case())
    with pytest.raises(AssertionError):
        contract.is_traced_and_compiled_once(case(weakens=True))
