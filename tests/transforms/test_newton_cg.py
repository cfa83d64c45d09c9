"""Oracles: a dense transliteration of CG, closed forms, the compiler's own counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt
from hessopt import StepStatus, Termination, composite, scale_by_newton_cg
from tests.numerics.test_cg import G, H, textbook
from tests.problems import init_mlp, mlp
from tests.transforms.test_trust_region import once, rosenbrock, saddle, status

TREE = {"a": jnp.zeros(5), "b": jnp.zeros((7, 1))}


def flat(tree):
    return jnp.concatenate([tree["a"], tree["b"].ravel()])


def quadratic(tree):
    return flat(tree) @ H @ flat(tree) / 2 - G @ flat(tree)


@pytest.mark.parametrize("iterations", [1, 4, 12])
def test_on_a_quadratic_it_gives_the_iterates_of_conjugate_gradients(iterations):
    updates, state = once(
        scale_by_newton_cg(max_iterations=iterations), quadratic, TREE
    )
    done = int(state.info.products)
    np.testing.assert_allclose(-flat(updates), textbook(H, G, done), rtol=1e-9)
    assert done == min(iterations, 2)  # by then less than half of the residual is left


def test_it_stops_where_the_residual_is_as_small_as_it_must_be():
    tx, x = scale_by_newton_cg(), TREE
    state = tx.init(x)
    for _ in range(4):
        grads = jax.grad(quadratic)(x)
        updates, state = once(tx, quadratic, x, state)
        length = jnp.linalg.norm(flat(grads))
        left = jnp.linalg.norm(H @ flat(updates) - flat(grads)) / length
        np.testing.assert_allclose(state.info.residual, left, rtol=1e-6)
        assert left <= min(0.5, (length / jnp.linalg.norm(G)) ** 0.5)
        x = optax.apply_updates(x, optax.tree.scale(-1.0, updates))


@pytest.mark.parametrize("along", [1e-3, 1e-12])
def test_a_saddle_is_left_given_any_gradient_along_the_way_out(along):
    found = hessopt.minimize(
        saddle, jnp.array([1.0, along]), hessopt.newton_cg(), gtol=1e-13
    )
    np.testing.assert_allclose(jnp.abs(found.params), [0.0, 0.5**0.5], atol=1e-6)


def test_negative_curvature_is_used_and_reported():
    updates, state = once(scale_by_newton_cg(), saddle, jnp.array([0.0, 0.1]))
    assert status(state) == StepStatus.NEGATIVE_CURVATURE
    np.testing.assert_allclose(
        updates, jax.grad(saddle)(jnp.array([0.0, 0.1])) / jnp.abs(12 * 0.1**2 - 2)
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"warm_start": True}, {"rematerialize": True}]
)
def test_rosenbrock_is_minimized_with_every_option(arguments):
    found = hessopt.minimize(rosenbrock, jnp.zeros(6), hessopt.newton_cg(**arguments))
    assert found.termination == Termination.GRADIENT
    np.testing.assert_allclose(found.params, 1.0, atol=1e-4)


def test_a_good_preconditioner_needs_one_product():
    curvatures = jnp.logspace(0, 6, 20)
    f = lambda x: jnp.sum(curvatures * x**2) / 2
    tx = scale_by_newton_cg(preconditioner=lambda r, x: r / curvatures)
    updates, state = once(tx, f, jnp.ones(20))
    assert state.info.products == 1
    np.testing.assert_allclose(updates, 1.0, rtol=1e-12)


def test_a_preconditioner_that_is_not_positive_leaves_the_gradient():
    updates, state = once(
        scale_by_newton_cg(preconditioner=lambda r, x: -r), rosenbrock, jnp.zeros(4)
    )
    assert status(state) == StepStatus.NOT_DESCENT
    np.testing.assert_array_equal(updates, jax.grad(rosenbrock)(jnp.zeros(4)))


def test_a_warm_start_begins_with_the_best_multiple_of_the_last_direction():
    tx = scale_by_newton_cg(warm_start=True)
    updates, state = once(tx, quadratic, TREE)
    again, state = once(tx, quadratic, TREE, state)
    # the same system: what was solved to a half is solved already, and one product
    # tells
    assert state.info.products == 1
    np.testing.assert_allclose(flat(again), flat(updates), rtol=1e-6)
    opposite = optax.tree.scale(-1.0, jax.grad(quadratic)(TREE))
    _, cold = once(tx, quadratic, TREE, updates=opposite)
    # points uphill: not used
    _, state = once(tx, quadratic, TREE, state, updates=opposite)
    assert state.info.products == cold.info.products


@pytest.mark.parametrize("arguments", [{}, {"warm_start": True}])
@pytest.mark.parametrize("what", ["gradient", "value", "curvature"])
def test_what_is_not_finite_gives_no_step_and_keeps_the_state(arguments, what):
    tx, x = scale_by_newton_cg(**arguments), jnp.array([1.0, 2.0])
    f = lambda x: jnp.sum(x**4)
    _, state = once(tx, f, x)
    given = {
        "gradient": {"updates": jnp.array([jnp.nan, 1.0])},
        "value": {"value": jnp.inf},
        "curvature": {"updates": jnp.ones(2)},
    }[what]
    bad = (
        (lambda x: jnp.sum(jnp.abs(x - jnp.array([1.0, 2.0])) ** 1.5))
        if what == "curvature"
        else f
    )
    updates, new = once(tx, bad, x, state, **given)
    assert status(new) & StepStatus.NONFINITE
    np.testing.assert_array_equal(updates, 0.0)
    kept = [(s.first_length, s.direction) for s in (state, new)]
    jax.tree.map(np.testing.assert_array_equal, *kept)


def test_gauss_newton_is_semidefinite_where_the_hessian_is_not():
    x = jax.random.normal(jax.random.key(1), (40, 5))
    y = jnp.argmax(x[:, :3] ** 2, axis=1)
    value_fn = composite(
        lambda p: mlp(p, x),
        lambda z: optax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
    )
    params = init_mlp(0, (5, 6, 3))
    met = [
        status(
            once(
                scale_by_newton_cg(curvature=word, max_iterations=60), value_fn, params
            )[1]
        )
        for word in ("hessian", "gauss_newton")
    ]
    assert met == [StepStatus.NEGATIVE_CURVATURE, StepStatus.OK]
    found = hessopt.minimize(
        value_fn, params, hessopt.newton_cg(curvature="gauss_newton"), max_steps=60
    )
    assert found.value < 0.05


@pytest.fixture(scope="module")
def large():
    """A gradient of 1.1 million parameters and its Newton-CG updates, compiled."""
    params = init_mlp(0, (784, 1024, 256, 128, 10), np.float32)
    params = {f"layer{i}": params[f"layer{i}"] for i in range(4)}
    x, y = jnp.ones((2048, 784), jnp.float32), jnp.zeros(2048, jnp.int32)

    def f(p, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(mlp(p, x), y).mean()

    def update(rematerialize):
        tx = scale_by_newton_cg(rematerialize=rematerialize)
        fun = lambda g, s, p, x, y: tx.update(g, s, p, value_fn=f, x=x, y=y)
        return jax.jit(fun).lower(params, tx.init(params), params, x, y).compile()

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return (
        count,
        jax.jit(jax.grad(f)).lower(params, x, y).compile(),
        update(False),
        update(True),
    )


def test_memory_is_a_few_gradients_and_less_with_rematerialization(large):
    count, gradient, update, lean = large
    assert count > 1.1e6
    base, full, less = (
        program.memory_analysis().temp_size_in_bytes
        for program in (gradient, update, lean)
    )
    assert full <= 6 * base
    assert less < full


def test_a_product_costs_two_gradients_and_is_computed_once(large):
    _, gradient, update, _ = large
    ratio = update.cost_analysis()["flops"] / gradient.cost_analysis()["flops"]
    # the linearisation, and one product in the body of the loop
    assert ratio < 1.1 + 2.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_iterations": 0}, "max_iterations must be an int, at least 1, got 0"),
        ({"curvature": "fisher"}, "curvature must be one of"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        scale_by_newton_cg(**arguments)
