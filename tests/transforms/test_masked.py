import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hessopt import (
    bfgs,
    composite,
    grouped_newton,
    lbfgs,
    masked,
    minimize,
    newton,
    scale_by_newton,
)

PARAMS = {
    "body": {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)},
    "head": jnp.array([0.3, 0.7]),
}
HEAD = {"body": False, "head": True}


def f(params):
    w, b = params["body"]["w"], params["body"]["b"]
    return (
        jnp.sum((params["head"] * w - b) ** 2)
        + jnp.sum(jnp.cosh(params["head"]))
        + jnp.sum(w**4) * b**2
    )


def step(tx, params=PARAMS, value_fn=f):
    value, grad = jax.value_and_grad(f)(params)
    update = jax.jit(
        lambda g, s, p: tx.update(g, s, p, value=value, grad=grad, value_fn=value_fn)
    )
    return update(grad, tx.init(params), params)


@pytest.mark.parametrize(
    "inner",
    [newton(), lbfgs(), bfgs(), grouped_newton(optax.sgd(1.0)), optax.adam(0.1)],
    ids=lambda _: "",
)
def test_a_step_is_that_of_the_smaller_problem(inner):
    updates, _ = step(masked(inner, HEAD))
    smaller = lambda head: f({"body": PARAMS["body"], "head": head})
    value, grad = jax.value_and_grad(smaller)(PARAMS["head"])
    head = PARAMS["head"]
    inner = optax.with_extra_args_support(inner)
    alone, _ = inner.update(
        grad, inner.init(head), head, value=value, grad=grad, value_fn=smaller
    )
    np.testing.assert_allclose(updates["head"], alone, rtol=1e-9)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["body"]))


def test_masks_are_trees_prefixes_or_callables():
    whole = {"body": {"w": False, "b": False}, "head": np.bool_(True)}
    expected, _ = step(masked(scale_by_newton(), HEAD))
    for mask in (
        whole,
        lambda params: jax.tree.map(lambda leaf: leaf is params["head"], params),
    ):
        updates, _ = step(masked(scale_by_newton(), mask))
        np.testing.assert_allclose(updates["head"], expected["head"])
    everything, _ = step(masked(scale_by_newton(), True))
    plain, _ = step(scale_by_newton())
    for a, b in zip(*map(jax.tree.leaves, (everything, plain)), strict=True):
        np.testing.assert_allclose(a, b)
    nothing, _ = step(masked(newton(), False))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))


def test_frozen_parameters_do_not_change_by_one_bit_in_minimize():
    solution = minimize(f, PARAMS, masked(lbfgs(), HEAD), max_steps=50)
    np.testing.assert_array_equal(solution.params["body"]["w"], PARAMS["body"]["w"])
    np.testing.assert_array_equal(solution.params["body"]["b"], PARAMS["body"]["b"])
    np.testing.assert_allclose(jax.grad(f)(solution.params)["head"], 0.0, atol=1e-6)


def test_gauss_newton_curvature_reaches_the_inner_transformation():
    x, y = jnp.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.1]]), jnp.array([1.0, 0.0, 2.0])
    objective = composite(
        lambda p: jnp.tanh(x @ p["w"]) * p["s"], lambda out: jnp.mean((out - y) ** 2)
    )
    params = {"s": jnp.array(1.2), "w": jnp.array([0.1, 0.2])}
    tx = masked(scale_by_newton(curvature="gauss_newton"), {"s": False, "w": True})
    grad = jax.grad(objective)(params)
    updates, _ = tx.update(grad, tx.init(params), params, value_fn=objective)
    J = jax.jacobian(lambda w: jnp.tanh(x @ w) * params["s"])(params["w"])
    np.testing.assert_allclose(
        updates["w"], jnp.linalg.solve(2 / 3 * J.T @ J, grad["w"]), rtol=1e-6
    )


def test_masks_nest_and_integers_may_be_held():
    whole = {"body": {"w": True, "b": False}, "head": True}
    updates, _ = step(masked(masked(scale_by_newton(), whole), HEAD))
    expected, _ = step(masked(scale_by_newton(), HEAD))
    np.testing.assert_allclose(updates["head"], expected["head"])
    params = {"n": jnp.array(3), "w": jnp.ones(2)}
    loss = lambda p: jnp.sum(p["w"] ** 2) * p["n"]
    tx = masked(grouped_newton(optax.sgd(1.0)), {"n": False, "w": True})
    grad = jax.grad(loss, allow_int=True)(params)
    updates, _ = tx.update(grad, tx.init(params), params, value_fn=loss)
    after = optax.apply_updates(params, updates)
    assert after["n"] == 3
    np.testing.assert_allclose(after["w"], 0.0, atol=1e-12)


def test_what_does_not_match_is_named():
    with pytest.raises(
        ValueError, match="mask must be a tree like params: 'body/b' has no label"
    ):
        masked(optax.sgd(0.1), {"body": {"w": True}, "head": True}).init(PARAMS)
    with pytest.raises(
        ValueError,
        match="mask must be a tree like params: 'tail' is labelled but no parameter",
    ):
        masked(optax.sgd(0.1), {"body": True, "head": True, "tail": True}).init(PARAMS)
    with pytest.raises(TypeError, match="mask must be a tree of bools, got 'head'"):
        masked(optax.sgd(0.1), {"body": False, "head": "head"}).init(PARAMS)
    with pytest.raises(TypeError, match="masked needs the parameters"):
        masked(optax.sgd(0.1), HEAD).update(
            PARAMS, masked(optax.sgd(0.1), HEAD).init(PARAMS)
        )
