import functools

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
    grouped_newton,
    restriction,
    scale_by_generalized_newton,
    scale_by_grouped_newton,
    taylor,
)
from tests.problems import digits, init_mlp

RNG = np.random.default_rng(0)
PARAMS = {
    "a": jnp.asarray(RNG.normal(size=2)),
    "b": jnp.asarray(RNG.normal(size=3)),
    "c": jnp.array(0.4),
}
# drawn here, or they would depend on which tests ran before
SCALARS = dict(enumerate(jnp.asarray(RNG.normal(size=5))))
INPUTS = jnp.asarray(RNG.normal(size=(64, 3)))


def convex(params):
    """Not quadratic, with entries between all groups."""
    every = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
    return (
        jnp.sum(jnp.cosh(every))
        + jnp.sum(jnp.sin(every)) ** 2
        + 0.1 * jnp.sum(every) ** 3
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def first(tx, value_fn, params, scale=1.0):
    """The first update of `scale * -gradient`, and its state."""
    value, grad = jax.value_and_grad(value_fn)(params)
    factors = (
        scale if isinstance(scale, dict) else jax.tree.map(lambda _: scale, params)
    )
    updates = jax.tree.map(lambda g, c: -c * g, grad, factors)
    step, state = tx.update(
        updates, tx.init(params), params, value=value, grad=grad, value_fn=value_fn
    )
    return step, state


@functools.partial(jax.jit, static_argnums=0)
def terms(value_fn, params):
    """What the first update goes by: the Taylor terms along the gradient."""
    return taylor(
        value_fn,
        params,
        jax.tree.map(jnp.negative, jax.grad(value_fn)(params)),
        groups="leaf",
    )


def test_the_rates_make_the_cubic_model_stationary():
    for damping in (0.5, 2.0):
        tx = scale_by_grouped_newton(cubic_damping=damping, safeguard=False)
        _, state = first(tx, convex, PARAMS)
        _, gradient, H, third = terms(convex, PARAMS)
        eta, d = state.info.rate, jnp.cbrt(jnp.abs(third))
        pull = 0.5 * damping * jnp.linalg.norm(d * eta) * d**2 * eta
        np.testing.assert_allclose(
            gradient + H @ eta + pull, 0.0, atol=1e-9 * np.abs(gradient).max()
        )


def test_one_group_without_third_derivative_is_generalized_newton():
    loss = lambda p: sum(
        jnp.sum((i + 1.0) * (leaf - 0.1) ** 2)
        for i, leaf in enumerate(jax.tree.leaves(p))
    )
    ours, _ = first(scale_by_grouped_newton(groups="all"), loss, PARAMS)
    theirs, _ = first(scale_by_generalized_newton(), loss, PARAMS)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_every_scalar_its_own_group_without_damping_is_newtons_step():
    step, _ = first(scale_by_grouped_newton(cubic_damping=0.0), convex, SCALARS)
    flat = jnp.stack(list(SCALARS.values()))
    of_vector = lambda x: convex(dict(enumerate(x)))
    newton = -jnp.linalg.solve(jax.hessian(of_vector)(flat), jax.grad(of_vector)(flat))
    np.testing.assert_allclose(jnp.stack(list(step.values())), newton, rtol=1e-9)


SCALED = scale_by_grouped_newton(ridge=0.1)


@settings(max_examples=30, deadline=None)
@given(st.floats(-5, 5), st.floats(-5, 5))
def test_the_unit_of_a_group_does_not_matter(log_a, log_c):
    units = {"a": 10.0**log_a, "b": 1.0, "c": 10.0**log_c}
    step, state = first(SCALED, convex, PARAMS, units)
    plain, expected = first(SCALED, convex, PARAMS, dict.fromkeys(PARAMS, 1.0))
    np.testing.assert_allclose(
        state.info.rate * jnp.array(list(units.values())), expected.info.rate, rtol=1e-7
    )
    for name in PARAMS:
        np.testing.assert_allclose(step[name], plain[name], rtol=1e-7)


def test_options_change_the_model_as_they_say():
    _, gradient, H, _ = terms(convex, PARAMS)
    g, diagonal = -gradient, jnp.diagonal(H)
    for options, expected in (
        ({"cross_groups": False}, g / diagonal),
        ({"ridge": 0.5}, jnp.linalg.solve(H + 0.5 * jnp.diag(jnp.abs(diagonal)), g)),
        ({"learning_rate": 0.5}, 0.5 * jnp.linalg.solve(H, g)),
        ({"groups": "all"}, jnp.sum(g) / jnp.sum(H)),
        ({"cubic_damping": lambda count: 0.0 * count}, jnp.linalg.solve(H, g)),
    ):
        tx = scale_by_grouped_newton(
            **{"cubic_damping": 0.0, "safeguard": False, **options}
        )
        _, state = first(tx, convex, PARAMS)
        np.testing.assert_allclose(state.info.rate, expected, rtol=1e-8)


def test_negative_rates_may_be_refused():
    loss = lambda p: (p["a"] + p["b"] - 3.0) ** 2 + (p["b"] - 0.1) ** 2
    # the joint minimum has a larger b, the gradient a smaller one
    params = {"a": jnp.array(5.0), "b": jnp.array(0.0)}
    _, signed = first(scale_by_grouped_newton(safeguard=False), loss, params)
    _, clipped = first(
        scale_by_grouped_newton(nonnegative=True, safeguard=False), loss, params
    )
    assert signed.info.rate[1] < 0
    np.testing.assert_allclose(clipped.info.rate, jnp.maximum(signed.info.rate, 0.0))


def test_a_model_without_a_minimiser_gives_a_step_that_lowers_it():
    # each group alone makes a parabola
    loss = lambda p: jnp.sum((p["scale"] * p["w"] - 3.0) ** 2)
    params = {"scale": jnp.array(1.0), "w": jnp.array([0.1, 5.0])}
    _, state = first(scale_by_grouped_newton(safeguard=False), loss, params)
    _, gradient, H, third = terms(loss, params)
    assert not np.any(third)
    assert np.linalg.eigvalsh(H)[0] < 0
    assert (
        state.info.status == StepStatus.UNBOUNDED_MODEL | StepStatus.NEGATIVE_CURVATURE
    )
    eta = state.info.rate
    assert gradient @ eta + 0.5 * eta @ H @ eta < 0


def walk(tx, loss, params, steps):
    """Parameters after some steps, and every status."""

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(params, updates), state

    state, statuses = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        statuses.append(int(state[1].info.status))
    return params, state, statuses


def test_a_step_that_was_refused_is_not_taken_later():
    cliff = lambda p: jnp.where(p < 1.0, 0.5 * (p - 10.0) ** 2, jnp.nan)
    p, _, statuses = walk(grouped_newton(optax.sgd(1.0)), cliff, jnp.array(0.999), 8)
    assert any(status & StepStatus.STEP_REJECTED for status in statuses)
    assert 0.999 <= p < 1.0  # only shorter ones


def test_a_converged_group_does_not_hold_the_others_when_the_model_has_no_minimiser():
    def loss(p):
        saddle = (p["a"] * p["b"] - 6.0) ** 2
        return (
            0.5 * (p["x"] - 1.0) ** 2
            + 0.01 * p["x"] * p["z"]
            + 0.5 * p["z"] ** 2
            + saddle
        )

    start = {
        "a": jnp.array(1.0),
        "b": jnp.array(1.0),
        "x": jnp.array(5.0),
        "z": jnp.array(-0.050001),
    }
    p, _, _ = walk(grouped_newton(optax.sgd(1.0)), loss, start, 100)
    assert loss(p) < 1e-2


def test_a_model_that_is_not_finite_keeps_the_rates_and_says_so():
    tx = grouped_newton(
        optax.sgd(1.0),
        learning_rate=0.5,
        cubic_damping=lambda count: jnp.where(count < 1, 0.0, jnp.nan),
    )
    _, state, statuses = walk(
        tx, lambda p: 0.5 * jnp.sum(p**2) + jnp.sum(p), jnp.ones(2), 3
    )
    assert not statuses[0]
    assert statuses[1] & StepStatus.NONFINITE
    assert statuses[1] & StepStatus.RATE_KEPT
    np.testing.assert_allclose(state[1].memory.rate, 1.0)


@pytest.mark.parametrize("every", [2, 3])
def test_a_base_that_accumulates_is_measured_where_it_moves(every):
    base = optax.MultiSteps(optax.sgd(1.0), every).gradient_transformation()
    target = jnp.array([1.0, -2.0])
    p, _, _ = walk(
        grouped_newton(base, cubic_damping=jnp.array(1.0)),
        lambda p: jnp.sum(jnp.cosh(p - target)),
        0 * target,
        40,
    )
    np.testing.assert_allclose(p, target, atol=0.05)


def test_wide_hyperparameters_leave_the_state_as_it_is():
    x = jnp.ones(2, jnp.float32)
    for tx in (
        grouped_newton(optax.sgd(1.0), ridge=np.float64(1e-3)),
        generalized_newton(
            optax.sgd(1.0),
            max_change=np.float64(2),
            min_rate=np.float64(1e-4),
            update_every=2,
        ),
    ):
        _, state, _ = walk(tx, lambda p: jnp.sum(jnp.cosh(p)), x, 1)
        assert jax.tree.map(jnp.result_type, state) == jax.tree.map(
            jnp.result_type, tx.init(x)
        )


def test_curvature_of_the_whole_data_and_damping_on_plateau():
    """The two recommendations of the paper, by pieces of optax and a closure."""
    x = INPUTS
    y = x @ jnp.array([1.0, -2.0, 0.5])
    loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    plateau = optax.contrib.reduce_on_plateau(
        factor=0.5, patience=1, accumulation_size=1
    )
    tx = optax.chain(grouped_newton(optax.sgd(1.0)), plateau)
    whole = lambda w: loss(w, x, y)

    @jax.jit
    def step(w, state, x, y, value):
        grad = jax.grad(loss)(w, x, y)
        updates, state = tx.update(grad, state, w, value=value, value_fn=whole)
        return updates, state, grad

    w = jnp.zeros(3)
    state = tx.init(w)
    for turn in range(5):
        updates, state, grad = step(w, state, x[:8], y[:8], jnp.array(1.0))
        phi = restriction(whole, w, -grad)
        curvature, slope = (
            jax.hessian(phi)(jnp.zeros(1))[0, 0],
            jax.grad(phi)(jnp.zeros(1))[0],
        )
        np.testing.assert_allclose(
            updates,
            -state[1].scale * -slope / curvature * grad,
            rtol=1e-6,
            err_msg=str(turn),
        )
    assert state[1].scale < 1.0


@pytest.mark.slow  # to compile
def test_thirty_layers_at_their_start_take_a_finite_decreasing_step_in_float32():
    *hidden, last = init_mlp(0, (64, *[16] * 29, 10), np.float32).values()
    # of variance 1/(3 n), a usual default: signals shrink from layer to layer, and
    # gradients with them
    params = [
        leaf
        for layer in (*hidden, last)
        for leaf in (layer["kernel"] / 3**0.5, layer["bias"])
    ]
    data = digits(np.float32)

    def loss(params):
        h = data.x[:128]
        for i in range(0, 58, 2):
            h = jnp.tanh(h @ params[i] + params[i + 1])
        logits = h @ params[58] + params[59]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, data.y[:128]
        ).mean()

    @jax.jit
    def step(params):
        tx = grouped_newton(optax.sgd(1.0))
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(
            grad, tx.init(params), params, value=value, grad=grad, value_fn=loss
        )
        return value, loss(optax.apply_updates(params, updates)), state[1]

    before, after, state = step(params)
    spread = state.memory.model.scale
    assert spread.max() > 1e6 * spread[spread > 0].min()
    assert np.isfinite(after)
    assert after < before
    assert not state.info.status & (StepStatus.NONFINITE | StepStatus.STEP_REJECTED)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="ridge must be a number, got None"):
        scale_by_grouped_newton(ridge=None)  # pyright: ignore[reportArgumentType]
    tx = scale_by_grouped_newton()
    with pytest.raises(
        TypeError, match=r"needs value to be a scalar, got shape \(1,\)"
    ):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.ones(1), value_fn=convex)
    for name, value, bound in (
        ("cubic_damping", -1.0, "at least 0"),
        ("ridge", -1.0, "at least 0"),
        ("initial_rate", -1.0, "at least 0"),
        ("rate_decay", -0.1, r"in \[0, 1\]"),
        ("learning_rate", -0.1, "at least 0"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {bound}"):
            scale_by_grouped_newton(**{name: value})
    with pytest.raises(TypeError, match="scale_by_grouped_newton needs the objective"):
        grouped_newton(optax.sgd(1.0)).update(
            PARAMS, grouped_newton(optax.sgd(1.0)).init(PARAMS), PARAMS
        )
