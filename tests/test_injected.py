"""Every transformation takes its numbers from `optax.inject_hyperparams`, as a user
first writes it: without `static_args`.

The contract injects into the rows of its table; here is every number of every public
function, as a number and as a schedule.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt
from hessopt._checks import StaticDefault

BASE = optax.sgd(1.0, momentum=0.5)
RATES = {
    "learning_rate": 0.5,
    "horizon": 1.25,
    "momentum": 0.75,
    "curvature_decay": 0.5,
    "rate_decay": 0.25,
    "initial_rate": 0.125,
}
PARABOLA = RATES | {"min_rate": 1e-3, "max_rate": 0.5, "max_change": 1.5}
CUBIC = RATES | {"cubic_damping": 0.5, "ridge": 0.25, "shrinkage": 2.0}
DAMPED = {"damping": 0.25, "momentum": 0.5}
GRID = {"max_rate": 0.5, "factor": 0.25}
SEARCH = {"slope_rtol": 0.125, "curv_rtol": 0.25, "max_rate": 0.5}
NUMBERS: dict[str, dict[str, float]] = {
    "newton": {"learning_rate": 0.5, "damping": 0.25},
    "newton_cg": {"learning_rate": 0.5},
    "gauss_newton": {"learning_rate": 0.5} | DAMPED,
    "bfgs": {"learning_rate": 0.5},
    "lbfgs": {"learning_rate": 0.5},
    "trust_region_newton": {"initial_radius": 0.25},
    "generalized_newton": PARABOLA,
    "grouped_newton": CUBIC,
    "scale_by_newton": {"damping": 0.25},
    "scale_by_newton_cg": {},
    "scale_by_gauss_newton": DAMPED,
    "scale_by_bfgs": {},
    "scale_by_lbfgs": {},
    "scale_by_wolfe_linesearch": SEARCH,
    "scale_by_grid_linesearch": GRID,
    "scale_by_generalized_newton": PARABOLA,
    "scale_by_grouped_newton": CUBIC,
    "subsampled": {"probability": 0.5},
    "masked": {},
}
"""The hyperparameters of every public function, and values that are not defaults."""

GIVEN: dict[str, dict[str, Any]] = {
    "generalized_newton": {"base": BASE},
    "grouped_newton": {"base": BASE},
    "subsampled": {"inner": hessopt.scale_by_newton()},
    "masked": {"inner": hessopt.scale_by_newton(), "mask": {"a": True, "b": False}},
}
"""Arguments without which a function cannot be called."""

SHAPING = {
    "subsampled": "seed",
    "newton": "update_every",
    "newton_cg": "max_iterations",
    "lbfgs": "memory_size",
    "trust_region_newton": "max_trials",
    "generalized_newton": "update_every",
    "grouped_newton": "update_every",
    "scale_by_newton": "update_every",
    "scale_by_newton_cg": "max_iterations",
    "scale_by_lbfgs": "memory_size",
    "scale_by_wolfe_linesearch": "max_steps",
    "scale_by_grid_linesearch": "count",
    "scale_by_generalized_newton": "update_every",
    "scale_by_grouped_newton": "update_every",
}
"""The argument of each function that is no hyperparameter, although an int."""

PARAMS = {"a": jnp.array([0.5, -1.0]), "b": jnp.array(2.0)}


@functools.partial(hessopt.composite, lambda params: params)
def value_fn(params):
    return jnp.sum(jnp.cosh(params["a"])) + (params["a"][0] - params["b"]) ** 2


def plain(name: str, **arguments: Any) -> Any:
    return getattr(hessopt, name)(**GIVEN.get(name, {}), **arguments)


def injected(name: str, **arguments: Any) -> Any:
    factory: Callable[..., Any] = getattr(hessopt, name)
    return optax.inject_hyperparams(factory)(**GIVEN.get(name, {}), **arguments)


SCALED = (
    "scale_by_wolfe_linesearch",
    "scale_by_grid_linesearch",
    "scale_by_generalized_newton",
    "scale_by_grouped_newton",
)
"""Those that scale an additive update."""


def step(name: str, tx: Any, state: Any) -> Any:
    """One update at the start."""
    value, grad = jax.value_and_grad(value_fn)(PARAMS)
    given = jax.tree.map(jnp.negative, grad) if name in SCALED else grad
    return tx.update(given, state, PARAMS, value=value, grad=grad, value_fn=value_fn)


def types(tree: Any) -> Any:
    return jax.tree.map(lambda x: (np.shape(x), jnp.result_type(x)), tree)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)


def test_the_table_has_every_public_number():
    public = {
        name: inspect.signature(function)
        for name, function in vars(hessopt).items()
        if inspect.isfunction(function)
        and "GradientTransformation"
        in str(inspect.signature(function).return_annotation)
    }
    assert set(public) == set(NUMBERS)
    for name, signature in public.items():
        numbers = {
            parameter.name
            for parameter in signature.parameters.values()
            if isinstance(parameter.default, float)
            or any(
                kind in str(parameter.annotation)
                for kind in ("float", "ScalarOrSchedule")
            )
        }
        assert numbers == set(NUMBERS[name]), name


@pytest.mark.parametrize("name", NUMBERS)
def test_injected_numbers_and_schedules_give_the_update_of_the_plain_optimizer(name):
    numbers = NUMBERS[name]
    # a schedule that has these values at first
    schedules = {
        number: functools.partial(lambda x, count: x * 0.5**count, value)
        for number, value in numbers.items()
    }
    txs = plain(name, **numbers), injected(name, **numbers), injected(name, **schedules)

    @jax.jit
    def first():
        return [step(name, tx, tx.init(PARAMS)) for tx in txs]

    expected, *found = first()
    assert any(np.any(leaf) for leaf in jax.tree.leaves(expected[0]))
    for updates, state in found:
        same(updates, expected[0])
        same(state.inner_state, expected[1])
        assert set(numbers) <= set(state.hyperparams)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_an_injected_state_keeps_its_types(name, dtype):
    numbers = NUMBERS[name]
    params = optax.tree.cast(PARAMS, jnp.dtype(dtype))
    real = hessopt.composite(lambda p: jax.tree.map(jnp.real, p), value_fn.loss_fn)
    schedules = {number: lambda count, x=x: x for number, x in numbers.items()}
    required = numbers if name == "subsampled" else {}
    for arguments in (required, numbers, schedules):
        tx = injected(name, **arguments)
        state = jax.eval_shape(tx.init, params)

        def update(p, s, tx=tx):
            grads = jax.tree.map(jnp.conj, jax.grad(real)(p))
            given = {"value": real(p), "grad": grads, "value_fn": real}
            return tx.update(grads, s, p, **given)

        updates, new = jax.eval_shape(update, params, state)
        assert types(updates) == types(params)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        shapes = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
        assert shapes(new) == shapes(state)


def test_schedules_advance_and_the_state_can_be_written():
    name = "scale_by_newton"
    scheduled = injected(name, damping=lambda count: 1.0 + count)
    written = injected(name, damping=0.25)

    @jax.jit
    def found():
        _, second = step(name, scheduled, scheduled.init(PARAMS))
        state = written.init(PARAMS)
        state.hyperparams["damping"] = jnp.array(2.0)
        return step(name, scheduled, second)[0], step(name, written, state)[0]

    tx = plain(name, damping=2.0)
    expected, _ = jax.jit(lambda: step(name, tx, tx.init(PARAMS)))()
    for updates in found():
        same(updates, expected)


@pytest.mark.parametrize("name", NUMBERS)
def test_what_shapes_the_program_is_no_hyperparameter(name):
    arguments = NUMBERS[name] if name == "subsampled" else {}
    hyperparams = jax.eval_shape(injected(name, **arguments).init, PARAMS).hyperparams
    assert set(hyperparams) <= set(NUMBERS[name])
    parameters = inspect.signature(getattr(hessopt, name)).parameters.values()
    ints = {p.name: str(p) for p in parameters if isinstance(p.default, StaticDefault)}
    assert set(ints) == ({SHAPING[name]} if name in SHAPING else set())
    # a signature shows the numbers all the same
    assert all(text.split(" = ")[1].isdigit() for text in ints.values())


@pytest.mark.parametrize("name", [name for name in SHAPING if name != "subsampled"])
def test_a_number_that_shapes_the_program_must_be_static(name):
    shaping = SHAPING[name]
    message = (
        rf'^{shaping} must be an int, .* pass static_args=\("{shaping}",\) '
        r"to optax\.inject_hyperparams"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(injected(name, **{shaping: 3}).init, PARAMS)
    inject = optax.inject_hyperparams(getattr(hessopt, name), static_args=(shaping,))
    tx = inject(**GIVEN.get(name, {}), **{shaping: 3})
    txs = tx, plain(name, **{shaping: 3})
    state, expected = (jax.eval_shape(tx.init, PARAMS) for tx in txs)
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(expected)


def test_numbers_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"damping must be at least 0, got -1\.0"):
        injected("newton", damping=-1.0).init(PARAMS)


def test_minimize_runs_an_injected_optimizer():
    solution = hessopt.minimize(value_fn, PARAMS, injected("newton", damping=1e-3))
    assert solution.converged
    state: Any = solution.state
    assert "damping" in state.hyperparams
