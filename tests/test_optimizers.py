import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt

BACKTRACKING = optax.scale_by_backtracking_linesearch(20)
ZOOM = optax.scale_by_zoom_linesearch(20, initial_guess_strategy="one")


def f(x, target):
    return jnp.sum((x - target) ** 4) + jnp.sum((x - target) ** 2)


def minimize(tx, x, target, steps):
    state = tx.init(x)

    @jax.jit
    def step(x, state):
        value, grad = jax.value_and_grad(f)(x, target)
        updates, state = tx.update(
            grad,
            state,
            x,
            value=value,
            grad=grad,
            value_fn=f,
            target=target,
            unknown_to_everyone=1.0,
        )
        return optax.apply_updates(x, updates), state

    for _ in range(steps):
        x, state = step(x, state)
    return x, state


@pytest.mark.parametrize(
    "linesearch",
    [hessopt.optimizers.CAPPED_LINESEARCH, BACKTRACKING, ZOOM, None],
    ids=["ours", "optax", "zoom", "no"],
)
def test_newton_minimizes_with_every_search_and_without_and_ignores_unknown_keywords(
    linesearch,
):
    target = jnp.array([1.0, -2.0])
    x, _ = minimize(
        hessopt.newton(linesearch=linesearch), jnp.array([5.0, 3.0]), target, 15
    )
    np.testing.assert_allclose(x, target, atol=1e-10)


def test_the_learning_rate_scales_the_step_and_may_be_a_schedule():
    x, target = jnp.array([3.0]), jnp.array([0.0])
    full, _ = minimize(hessopt.newton(linesearch=None), x, target, 1)
    half, _ = minimize(hessopt.newton(0.5, linesearch=None), x, target, 1)
    scheduled, _ = minimize(
        hessopt.newton(optax.constant_schedule(0.5), linesearch=None), x, target, 1
    )
    np.testing.assert_allclose(half, (x + full) / 2)
    np.testing.assert_allclose(scheduled, half)


def test_the_search_needs_value_and_grad_and_says_so():
    x = jnp.ones(2)
    g = jax.grad(f)(x, 0.0)
    ours, foreign = hessopt.newton(), hessopt.newton(linesearch=BACKTRACKING)
    for tx, name in ((ours, "scale_by_wolfe_linesearch"), (foreign, "the line search")):
        with pytest.raises(TypeError, match=f"{name} needs value: call"):
            tx.update(g, tx.init(x), x, grad=g, value_fn=f, target=0.0)
        with pytest.raises(TypeError, match=f"{name} needs grad: call"):
            tx.update(g, tx.init(x), x, value=f(x, 0.0), value_fn=f, target=0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "linesearch",
    [hessopt.optimizers.CAPPED_LINESEARCH, BACKTRACKING],
    ids=["ours", "optax"],
)
def test_one_compilation_serves_in_either_precision(dtype, linesearch):
    tx, x = hessopt.newton(linesearch=linesearch), jnp.array([4.0, -3.0], dtype)
    state = tx.init(x)

    @jax.jit
    def step(x, state):
        value, grad = jax.value_and_grad(f)(x, 1.0)
        updates, state = tx.update(
            grad, state, x, value=value, grad=grad, value_fn=f, target=1.0
        )
        return optax.apply_updates(x, updates), state

    for _ in range(12):
        x, state = step(x, state)
    assert x.dtype == dtype
    np.testing.assert_allclose(x, 1.0, atol=1e-2)
    assert step._cache_size() == 1


def test_the_step_never_increases_the_objective_from_where_newton_diverges():
    loss = lambda x: jnp.sum(jnp.sqrt(1 + x**2))  # Newton's map is x -> -x^3
    tx, x = hessopt.newton(), jnp.array([2.0])
    state, values = tx.init(x), [math.inf]
    for _ in range(8):
        value, grad = jax.value_and_grad(loss)(x)
        assert value <= values[-1]
        values.append(float(value))
        updates, state = tx.update(
            grad, state, x, value=value, grad=grad, value_fn=loss
        )
        x = optax.apply_updates(x, updates)
    np.testing.assert_allclose(x, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    "linesearch",
    ["default", optax.scale_by_backtracking_linesearch(max_backtracking_steps=3)],
)
def test_a_search_that_runs_out_of_trials_takes_no_step_uphill(linesearch):
    def loss(x):
        return jnp.sum(jnp.logaddexp(x, -x))

    x = jnp.array([80.0])  # where curvature is 1e-69
    tx = (
        hessopt.newton()
        if linesearch == "default"
        else hessopt.newton(linesearch=linesearch)
    )
    value, grad = jax.value_and_grad(loss)(x)
    updates, _ = tx.update(grad, tx.init(x), x, value=value, grad=grad, value_fn=loss)
    assert loss(x + updates) <= value


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize(
    "linesearch",
    [hessopt.optimizers.CAPPED_LINESEARCH, BACKTRACKING, ZOOM],
    ids=["ours", "optax", "zoom"],
)
def test_a_nonfinite_objective_costs_one_step_and_no_more(bad, linesearch):
    def loss(x, weight):
        return jnp.sum(weight * ((x - 1.0) ** 2 + x**4))

    tx, x = hessopt.newton(linesearch=linesearch), jnp.array([3.0, 2.0])
    state, path = tx.init(x), []
    for weight in (1.0, bad, 1.0, 1.0):
        value, grad = jax.value_and_grad(loss)(x, weight)
        updates, state = tx.update(
            grad, state, x, value=value, grad=grad, value_fn=loss, weight=weight
        )
        x = optax.apply_updates(x, updates)
        path.append(float(x[0]))
    assert path[1] == path[0]
    assert path[3] < path[2] < path[1]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("linesearch", lambda: hessopt.newton(linesearch="wolfe")),
        ("base", lambda: hessopt.generalized_newton("adamw")),
        ("inner", lambda: hessopt.masked(optax.sgd, True)),
        ("inner", lambda: hessopt.subsampled("newton", probability=0.5)),
    ],
)
def test_what_is_no_transformation_is_named(name, make):
    with pytest.raises(TypeError, match=f"{name} must be an optax transformation"):
        make()


def test_placeholders_empty_trees_and_python_scalars():
    tx = hessopt.newton()
    params = {"a": jnp.ones(2)}
    optax.tree.map_params(tx, lambda p: p, tx.init(params))
    assert (
        tx.update(
            {}, tx.init({}), {}, value=0.0, grad={}, value_fn=lambda _: jnp.asarray(0.0)
        )[0]
        == {}
    )
    loss = lambda x: (x - 3.0) ** 2
    value, grad = jax.value_and_grad(loss)(5.0)
    updates, _ = tx.update(
        grad, tx.init(5.0), 5.0, value=value, grad=grad, value_fn=loss
    )
    np.testing.assert_allclose(updates, -2.0)
