import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt
from hessopt import StepStatus, Termination, minimize, scale_by_wolfe_linesearch
from hessopt.kinds.line_searches import LinesearchState


def searched(value_fn, params, updates, tx=None, state=None):
    """One update, and the point it leads to."""
    tx = scale_by_wolfe_linesearch() if tx is None else tx
    value, grad = jax.value_and_grad(value_fn)(params)
    grad = jax.tree.map(jnp.conj, grad)
    state = tx.init(params) if state is None else state
    step, state = jax.jit(
        lambda u, s, p: tx.update(u, s, p, value=value, grad=grad, value_fn=value_fn)
    )(updates, state, params)
    return step, optax.apply_updates(params, step), state


def flags(state):
    return StepStatus(int(state.info.status))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("seed", range(3))
def test_the_step_satisfies_the_strong_wolfe_conditions(scale, seed):
    rng = np.random.default_rng(seed)
    params = {
        "value": jnp.asarray(rng.normal(size=4)),
        "grad": [jnp.asarray(rng.normal(size=(2, 3)))],
    }
    loss = lambda p: sum(
        jnp.sum(jnp.cosh(x - 1.0) + 0.3 * jnp.sin(5 * x)) for x in jax.tree.leaves(p)
    )
    direction = jax.tree.map(lambda g: -scale * g, jax.grad(loss)(params))
    step, there, state = searched(loss, params, direction)
    slope = lambda at: sum(
        jnp.vdot(g, u)
        for g, u in zip(
            *map(jax.tree.leaves, (jax.grad(loss)(at), direction)), strict=True
        )
    )
    t = state.info.rate
    chex.assert_trees_all_close(step, jax.tree.map(lambda u: t * u, direction))
    assert loss(there) <= loss(params) + 1e-4 * t * slope(params)
    assert abs(slope(there)) <= 0.9 * abs(slope(params))
    assert flags(state) == StepStatus.OK
    chex.assert_trees_all_close(
        (state.value, state.grad), jax.value_and_grad(loss)(there), rtol=1e-12
    )


def test_what_it_accepts_is_reused_also_beside_a_parameter_named_value():
    params = {"value": jnp.array([3.0, -2.0]), "grad": jnp.array(0.5)}
    loss = lambda p: jnp.sum(p["value"] ** 4) + jnp.sum(p["grad"] ** 2)
    _, there, state = searched(
        loss, params, jax.tree.map(jnp.negative, jax.grad(loss)(params))
    )
    poisoned = lambda p: loss(p) + jnp.nan
    pair = jax.jit(
        lambda p, s: hessopt.value_and_grad_from_state(poisoned)(p, state=s)
    )(there, (state,))
    chex.assert_trees_all_close(pair, jax.value_and_grad(loss)(there), rtol=1e-12)


def test_it_traces_the_objective_once_and_evaluates_it_once_per_trial():
    traced, made = [], []

    def loss(x):
        traced.append(1)
        jax.debug.callback(lambda: made.append(1))
        return jnp.sum(jnp.cosh(x))

    x, tx = jnp.array([3.0, -2.0]), scale_by_wolfe_linesearch()
    value, grad = 13.8, jnp.sinh(x)
    step = jax.jit(
        lambda s: tx.update(-grad, s, x, value=value, grad=grad, value_fn=loss)[1]
    )
    first = step(tx.init(x))
    second = step(first)
    jax.effects_barrier()
    assert len(traced) == 1
    assert len(made) == int(first.info.trials) + int(second.info.trials)


def test_lanes_cost_one_value_and_gradient_per_trial():
    A = jnp.ones((64, 64))
    loss = lambda x: jnp.sum(jnp.cosh(A @ x))
    tx, starts = scale_by_wolfe_linesearch(), jnp.ones((8, 64))

    def step(x):
        return tx.update(-x, tx.init(x), x, value=loss(x), grad=x, value_fn=loss)[0]

    flops = lambda f: (
        jax.jit(jax.vmap(f)).lower(starts).compile().cost_analysis()["flops"]
    )
    one = flops(jax.value_and_grad(loss))
    body = flops(step) - flops(loss)  # a loop's body is counted once
    assert body <= 1.15 * one


def test_complex_parameters_and_integer_free_trees_are_searched_in_optax_convention():
    loss = lambda z: jnp.sum(jnp.abs(z - (1 + 2j)) ** 2)
    z = jnp.zeros(3, jnp.complex128)
    _, there, state = searched(loss, z, -jnp.conj(jax.grad(loss)(z)))
    assert loss(there) < loss(z)
    assert flags(state) == StepStatus.OK


@pytest.mark.parametrize(
    "guess", ["one", "quadratic", lambda fall, slope: 0.25 * jnp.ones_like(slope)]
)
def test_the_first_trial_is_the_guess(guess):
    loss = lambda x: 0.5 * jnp.sum(x**2)
    tx = scale_by_wolfe_linesearch(initial_guess=guess)
    x = jnp.array([1.0, 1.0])
    _, _, state = searched(
        loss, x, -1e-3 * x, tx, tx.init(x)._replace(fall=jnp.asarray(1e-4))
    )
    expected = {"one": 1.0, "quadratic": 2.02 * 1e-4 / 2e-3}.get(
        guess if isinstance(guess, str) else "", 0.25
    )
    assert state.info.trials > 1  # it expands from there, twofold at least
    assert float(state.info.rate) >= 2 * expected


def test_uphill_and_flat_directions_give_no_step_and_say_so():
    loss, x = (lambda x: jnp.sum(x**2)), jnp.array([1.0, 2.0])
    for direction, fact in ((x, StepStatus.NOT_DESCENT), (0 * x, StepStatus.OK)):
        step, _, state = searched(loss, x, direction)
        assert not step.any()
        assert flags(state) == fact
        assert state.info.trials == 0


def test_a_failed_search_gives_the_best_decrease_or_nothing():
    tx = scale_by_wolfe_linesearch(max_steps=4)
    x = jnp.array([0.3])
    _, there, state = searched(lambda x: jnp.sum(jnp.abs(x)), x, jnp.array([-1.0]), tx)
    assert flags(state) == StepStatus.SEARCH_FAILED
    assert jnp.abs(there[0]) < 0.3
    lying = jax.custom_jvp(lambda x: jnp.sum(x**2))
    lying.defjvp(
        lambda primals, tangents: (jnp.sum(primals[0] ** 2), -jnp.sum(tangents[0]))
    )
    step, _, state = searched(lying, x, jnp.array([1.0]), tx)
    assert flags(state) == StepStatus.SEARCH_FAILED
    assert not step.any()
    assert jnp.isinf(state.value)


ENDINGS = {  # objective, start, how minimize ends
    "overflow at the unit step": (
        lambda x: jnp.sum(jnp.exp(1e3 * x) - 50 * x),
        -0.2,
        Termination.GRADIENT,
    ),
    "constant": (lambda x: 3.0 + 0 * jnp.sum(x), 1.0, Termination.GRADIENT),
    "NaN at the start": (lambda x: jnp.sum(jnp.log(x)), -1.0, Termination.NONFINITE),
    "linear": (lambda x: jnp.sum(x), 1.0, Termination.UNBOUNDED),
    "kink": (lambda x: jnp.sum(jnp.abs(x - 1 / 3)), 1.0, Termination.STALLED_AT_NOISE),
    "next to a saddle": (
        lambda x: jnp.sum(x**4 / 4 - x**2 / 2),
        1e-12,
        Termination.GRADIENT,
    ),
    "downward parabola": (lambda x: -jnp.sum(x**2), 1.0, Termination.UNBOUNDED),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_awkward_objectives_end_for_the_right_reason(name):
    loss, start, reason = ENDINGS[name]
    x = jnp.full(2, start)
    solution = minimize(loss, x, hessopt.lbfgs())
    assert solution.reason == reason.name
    chex.assert_tree_all_finite(solution.params)
    assert not solution.value > loss(x)
    if name == "kink":
        np.testing.assert_allclose(solution.params, 1 / 3, atol=1e-5)


@pytest.mark.parametrize("exponent", [-20, -45])
def test_a_first_step_in_other_units_than_the_parameters_is_shortened_until_it_serves(
    exponent,
):
    unit = 2.0**exponent
    loss = lambda x: jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)
    solution = minimize(
        lambda x: loss(x / unit), jnp.full(6, -unit / 2), hessopt.lbfgs()
    )
    assert solution.reason == "GRADIENT"
    np.testing.assert_allclose(solution.params / unit, 1.0, atol=1e-2)


def test_a_double_precision_objective_of_single_precision_parameters_is_compared_in_double():
    x = jnp.array([1.0, 1.0], jnp.float32)
    loss = lambda x: 1e4 + 1e-9 * jnp.sum(jnp.cosh(x.astype(jnp.float64) * 4))
    step, there, state = searched(loss, x, -x)
    assert flags(state) == StepStatus.OK
    assert loss(there) < loss(x)
    assert step.dtype == jnp.float32


def test_arguments_out_of_range_are_named():
    for name, bad, says in (
        ("max_steps", 0, "max_steps must be an int, at least 1, got 0"),
        ("slope_rtol", 0.7, r"slope_rtol must be in \[0, 0.5\], got 0.7"),
        ("curv_rtol", 1e-9, r"curv_rtol must be in \[0.0001, 1\], got 1e-09"),
        ("max_rate", 0.0, "max_rate must be at least 1.17.*e-38, got 0.0"),
        (
            "initial_guess",
            "two",
            r"initial_guess must be one of \['one', 'quadratic'\], .* got 'two'",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            scale_by_wolfe_linesearch(**{name: bad})


def test_the_state_is_found_by_its_type():
    state = hessopt.lbfgs().init(jnp.ones(3))
    assert isinstance(state[-1], LinesearchState)
