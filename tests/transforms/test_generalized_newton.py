import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hessopt import (
    StepStatus,
    generalized_newton,
    masked,
    restriction,
    scale_by_generalized_newton,
)
from hessopt.kinds.rates import MAX_HALVINGS

MODES = ("exact", "forward", "central")


def rates(tx, params, updates, value_fn, state=None, **keywords):
    """What one jitted update makes of these updates, and its state."""
    state = tx.init(params) if state is None else state
    value, grad = jax.value_and_grad(value_fn)(params)
    keywords = {"value": value, "grad": grad, "value_fn": value_fn, **keywords}
    return jax.jit(lambda u, s, p: tx.update(u, s, p, **keywords))(
        updates, state, params
    )


def along(slope, bend):
    """`phi(eta) = 1 + slope eta + bend eta^2`, as an objective of eta itself."""
    return lambda x: 1.0 + slope * x + bend * x**2


@pytest.mark.parametrize("mode", MODES)
def test_the_rate_is_that_of_the_parabola(mode):
    tx = scale_by_generalized_newton(mode=mode)
    step, state = rates(tx, jnp.array(0.0), jnp.array(1.0), along(-1.209734, 1.272058))
    np.testing.assert_allclose(step, 0.4755026, rtol=1e-6)
    assert state.info.status == StepStatus.OK


@pytest.mark.parametrize("mode", MODES)
def test_no_rate_is_taken_from_a_parabola_that_opens_downwards(mode):
    tx = scale_by_generalized_newton(mode=mode, initial_rate=0.03)
    step, state = rates(
        tx, jnp.array(0.0), jnp.array(1.0), along(-0.2078444, -0.0949995)
    )
    np.testing.assert_allclose(step, 0.03)
    assert state.info.status == StepStatus.RATE_KEPT | StepStatus.NEGATIVE_CURVATURE


@functools.partial(jax.jit, static_argnums=0)
def rate_of_linear_model(mode, x, unit, weight):
    """The rate for updates of some unit, of a loss of some weight."""
    params = {"w": jnp.ones(3), "b": jnp.array(0.5)}
    loss = lambda p: weight * 0.5 * (p["w"] @ x + p["b"] - 0.7) ** 2
    value, grad = jax.value_and_grad(loss)(params)
    tx = scale_by_generalized_newton(mode=mode, initial_rate=0.1 / unit)
    updates = jax.tree.map(lambda g: -unit / weight * g, grad)
    return tx.update(
        updates, tx.init(params), params, value=value, grad=grad, value_fn=loss
    )[1].info.rate[0]


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(-6, 6), st.floats(-8, 8))
def test_units_of_updates_and_objective_do_not_matter(mode, seed, log_unit, log_weight):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=3))
    unit, weight = 10.0**log_unit, 10.0**log_weight
    np.testing.assert_allclose(
        unit * rate_of_linear_model(mode, x, unit, weight), 1 / (1 + x @ x), rtol=1e-5
    )


def test_groups_have_rates_of_their_own():
    params = {"w": jnp.array([0.3, -0.2, 1.0]), "b": jnp.array(0.5)}
    loss = lambda p: jnp.sum(jnp.cosh(p["w"])) + p["w"][0] * p["b"] + p["b"] ** 2
    updates = jax.tree.map(jnp.negative, jax.grad(loss)(params))
    phi = restriction(loss, params, updates, groups="leaf")
    slope, H = jax.jit(
        lambda: (jax.grad(phi)(jnp.zeros(2)), jax.hessian(phi)(jnp.zeros(2)))
    )()
    for mode, rtol in (("exact", 1e-12), ("forward", 0.02), ("central", 1e-4)):
        _, state = rates(
            scale_by_generalized_newton(mode=mode, groups="leaf"), params, updates, loss
        )
        np.testing.assert_allclose(state.info.rate, -slope / jnp.diagonal(H), rtol=rtol)


def test_forward_evaluates_the_objective_once_without_the_safeguard_and_needs_no_gradient():
    seen = []

    def loss(x):
        seen.append(None)
        return jnp.sum((x - 2.0) ** 2)

    tx = scale_by_generalized_newton(mode="forward", safeguard=False)
    x = jnp.zeros(2)
    value, grad = jax.value_and_grad(loss)(x)
    seen.clear()
    step, _ = jax.jit(
        lambda s: tx.update(-grad, s, x, value=value, grad=grad, value_fn=loss)
    )(tx.init(x))
    assert len(seen) == 1
    np.testing.assert_allclose(step, 2.0)
    alone, _ = jax.jit(lambda s: tx.update(-grad, s, x, value_fn=loss))(tx.init(x))
    np.testing.assert_allclose(alone, 2.0)


def test_what_rounding_hides_is_not_taken_for_curvature():
    tx = scale_by_generalized_newton(
        mode="forward", initial_rate=1e-5, curvature_decay=0.0
    )
    x, loss = jnp.ones(2, jnp.float32), lambda x: 3.0 + jnp.sum(x**2)
    state, sizes = tx.init(x), []
    update = jax.jit(
        lambda s: tx.update(-2 * x, s, x, value=loss(x), grad=2 * x, value_fn=loss)[1]
    )
    for _ in range(40):  # always at the same place: the right rate is 1/2
        state = update(state)
        sizes.append(float(state.info.rate[0]))
    assert all(a <= 1.01 * b for a, b in itertools.pairwise(sizes))
    np.testing.assert_allclose(sizes[-1], 0.5, rtol=0.05)
    flat = scale_by_generalized_newton(mode="forward")
    _, state = rates(flat, x, 1e-9 * x, loss)  # neither slope nor curvature can be seen
    assert state.info.status == StepStatus.RATE_KEPT
    np.testing.assert_allclose(state.info.rate, 1e-2)


def test_a_rate_changes_by_a_factor_at_most_and_keeps_its_bounds():
    tx = scale_by_generalized_newton(
        max_change=3.0,
        curvature_decay=0.0,
        min_rate=1e-2,
        max_rate=50.0,
        safeguard=False,
    )
    x, state = jnp.array(0.0), None
    found = []
    for curvature in (
        1.0,
        1e-4,
        1e-4,
        1e-4,
        1e-4,
        1e3,
        1e3,
        1e6,
        1e6,
        1e6,
        1e6,
        1e6,
        1e6,
        1e6,
    ):
        _, state = rates(tx, x, jnp.array(1.0), along(-1.0, 0.5 * curvature), state)
        found.append(float(state.memory.rate[0]))
    np.testing.assert_allclose(found[:7], [1, 3, 9, 27, 50, 50 / 3, 50 / 9])
    np.testing.assert_allclose(found[-1], 1e-2)


def test_averages_are_of_slope_and_curvature_or_of_rates():
    for name, expected in (
        ("curvature_decay", (0.5 * 2 + 0.5 * 1) / (0.5 * 2 + 0.5 * 4)),
        ("rate_decay", 0.5 * 1 + 0.5 * 1 / 4),
    ):
        tx = scale_by_generalized_newton(
            **{"curvature_decay": 0.0, "safeguard": False, name: 0.5}
        )
        _, state = rates(tx, jnp.array(0.0), jnp.array(1.0), along(-2.0, 1.0))
        _, state = rates(tx, jnp.array(0.0), jnp.array(1.0), along(-1.0, 2.0), state)
        np.testing.assert_allclose(state.info.rate, expected)


def test_learning_rate_multiplies_what_is_found():
    schedule = optax.piecewise_constant_schedule(0.5, {1: 0.1})
    tx = scale_by_generalized_newton(learning_rate=schedule)
    step, state = rates(tx, jnp.array(0.0), jnp.array(1.0), along(-2.0, 1.0))
    np.testing.assert_allclose(step, 0.5)
    step, state = rates(tx, jnp.array(0.0), jnp.array(1.0), along(-2.0, 1.0), state)
    np.testing.assert_allclose(step, 0.05)
    np.testing.assert_allclose(state.memory.rate, 1.0)


def test_between_measurements_nothing_is_evaluated_and_no_step_is_longer():
    tx = scale_by_generalized_newton(update_every=3)
    evaluated = []

    def loss(x):
        jax.debug.callback(lambda: evaluated.append(None))
        return jnp.sum(x**2)

    x, state = jnp.array([3.0, 4.0]), None
    step = jax.jit(lambda u, s: tx.update(u, s, x, value_fn=loss))
    state = tx.init(x)
    for count in range(12):
        evaluated.clear()
        longer = 2.0 if count in (6, 10) else 1.0
        update, state = step(-0.1 * longer * x, state)
        jax.effects_barrier()
        # the first two periods are all measured
        assert bool(evaluated) == (count < 6 or count % 3 == 2)
        np.testing.assert_allclose(update, -x, rtol=1e-12)
        assert state.info.status == StepStatus.OK


def test_a_step_that_would_lead_uphill_is_measured():
    tx, x, loss = (
        scale_by_generalized_newton(update_every=100),
        jnp.array([3.0, 4.0]),
        lambda x: jnp.sum(x**2),
    )
    step = jax.jit(lambda u, s: tx.update(u, s, x, grad=2 * x, value_fn=loss))
    state = tx.init(x)._replace(count=jnp.int32(300))
    for u, measured in ((-x, True), (-x, False), (x, True)):  # the first is due
        _, state = step(u, state)
        assert (state.memory.age == 1) == measured
    assert state.info.status & StepStatus.STEP_REJECTED


def test_the_safeguard_halves_and_in_the_end_stays():
    # the parabola at 0 is deceived: behind it there is a wall
    wall = lambda x: jnp.where(x < 0.3, -x + 0.5 * x**2, 100.0 * x)
    step, state = rates(
        scale_by_generalized_newton(), jnp.array(0.0), jnp.array(1.0), wall
    )
    assert state.info.status == StepStatus.SAFEGUARDED
    np.testing.assert_allclose(step, 0.25)
    np.testing.assert_allclose(state.memory.rate, 1.0)  # only the step is halved
    step, _ = rates(
        scale_by_generalized_newton(safeguard=False),
        jnp.array(0.0),
        jnp.array(1.0),
        wall,
    )
    np.testing.assert_allclose(step, 1.0)
    steep = lambda x: jnp.where(x < 1e-3, -x + 0.5 * x**2, 100.0)
    step, state = rates(
        scale_by_generalized_newton(), jnp.array(0.0), jnp.array(1.0), steep
    )
    assert state.info.status == StepStatus.SAFEGUARDED | StepStatus.STEP_REJECTED
    assert step == 0.0
    assert state.info.halvings == MAX_HALVINGS
    np.testing.assert_allclose(state.memory.rate, 2.0**-MAX_HALVINGS)


def test_a_batch_that_rises_along_the_update_keeps_the_rate_and_may_stop_the_step():
    tx = scale_by_generalized_newton(curvature_decay=0.0)
    _, state = rates(tx, jnp.array(0.0), jnp.array(1.0), along(-1.0, 0.5))
    step, state = rates(tx, jnp.array(0.0), jnp.array(1.0), along(0.5, 0.5), state)
    assert state.info.status & StepStatus.RATE_KEPT
    assert state.info.status & StepStatus.NOT_DESCENT
    assert state.info.status & StepStatus.STEP_REJECTED
    assert step == 0.0


def test_a_probe_that_is_not_finite_halves_the_rate():
    tx = scale_by_generalized_newton(mode="forward", initial_rate=1.0, safeguard=False)
    loss = lambda x: jnp.where(x > 0.9, jnp.nan, (x - 0.25) ** 2)
    step, state = rates(tx, jnp.array(0.0), jnp.array(1.0), loss)
    assert state.info.status == StepStatus.NONFINITE | StepStatus.RATE_KEPT
    np.testing.assert_allclose(step, 0.5)
    step, state = rates(tx, jnp.array(0.0), jnp.array(1.0), loss, state)
    assert state.info.status == StepStatus.OK
    np.testing.assert_allclose(step, 0.25)


def test_what_was_measured_is_applied_and_the_base_counts_once():
    x, loss = jnp.array([1.0, -2.0]), lambda x: jnp.sum(x**4)
    base = optax.adam(1.0)
    tx = generalized_newton(base)
    value, grad = jax.value_and_grad(loss)(x)
    step = jax.jit(lambda g, s, v: tx.update(g, s, x, value=v, grad=g, value_fn=loss))
    update, state = step(grad, tx.init(x), value)
    u, _ = base.update(grad, base.init(x), x)
    np.testing.assert_allclose(update, state[1].info.rate * u)
    assert state[0][0].count == 1
    for bad in ((jnp.nan * grad, value), (grad, jnp.array(jnp.inf))):
        update, after = step(bad[0], state, bad[1])
        assert not np.any(update)
        assert after[1].info.status == StepStatus.NONFINITE
        for new, old in zip(*map(jax.tree.leaves, (after[0], state[0])), strict=True):
            np.testing.assert_array_equal(new, old)


def test_groups_that_are_empty_or_do_not_move_are_no_trouble():
    params = {"a": jnp.ones(2), "b": jnp.ones(3), "none": jnp.zeros((0, 2))}
    updates = {"a": -jnp.ones(2), "b": jnp.zeros(3), "none": jnp.zeros((0, 2))}
    tx = scale_by_generalized_newton(groups="leaf")
    step, state = rates(
        tx, params, updates, lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)
    )
    assert state.info.status == StepStatus.OK
    np.testing.assert_allclose(step["a"], -1.0)
    assert not np.any(step["b"])


def test_frozen_parameters_stay_and_the_others_have_their_own_rate():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    loss = lambda p: jnp.sum(p["a"] ** 2) * jnp.sum(p["b"] ** 2)
    tx = masked(generalized_newton(optax.sgd(1.0)), {"a": True, "b": False})
    value, grad = jax.value_and_grad(loss)(params)
    updates, _ = tx.update(
        grad, tx.init(params), params, value=value, grad=grad, value_fn=loss
    )
    np.testing.assert_allclose(updates["a"], -1.0)
    assert not np.any(updates["b"])


class Regularised(nn.Module):
    """Batch normalisation and dropout."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(jnp.tanh(x)))


def test_batch_normalisation_and_dropout_are_those_of_the_gradient():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)))
    model = Regularised()
    variables = jax.jit(model.init)(
        {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x
    )
    params, stats = variables["params"], variables["batch_stats"]

    def loss(params, key):
        out, _ = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return jnp.mean((out - 1.0) ** 2)

    tx, key, zero = generalized_newton(optax.sgd(1.0)), jax.random.key(7), jnp.zeros(1)

    @jax.jit
    def step(params):
        value, grad = jax.value_and_grad(loss)(params, key)
        updates, state = tx.update(
            grad,
            tx.init(params),
            params,
            value=value,
            grad=grad,
            value_fn=loss,
            key=key,
        )
        phi = restriction(
            lambda p: loss(p, key), params, jax.tree.map(jnp.negative, grad)
        )
        expected = -jax.grad(phi)(zero)[0] / jax.hessian(phi)(zero)[0, 0]
        return (
            state[1].info,
            expected,
            value,
            loss(optax.apply_updates(params, updates), key),
        )

    info, expected, before, after = step(params)
    np.testing.assert_allclose(info.rate[0], expected * 0.5**info.halvings, rtol=1e-5)
    assert after < before


def test_wrong_arguments_are_named():
    for name, value, bound in (
        ("max_change", 0.5, "at least 1"),
        ("initial_rate", 0.0, r"in \[1e-18, 1e\+18\]"),
        ("min_rate", -1.0, "at least 0"),
        ("max_rate", -1.0, "at least 0.0"),
        ("curvature_decay", 1.5, r"in \[0, 1\]"),
        ("update_every", 0, "an int, at least 1"),
        ("mode", "backward", "one of"),
        ("groups", "leaves", "one of"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {bound}"):
            scale_by_generalized_newton(**{name: value})
