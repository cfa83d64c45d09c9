import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import hessopt
import hessopt.nnx
from hessopt import diagnostics
from hessopt.linen import TrainState

PARAMS = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}


def loss(params):
    return sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(params))


def test_every_info_is_reported_under_its_transformations_name():
    tx = hessopt.newton()
    grad = jax.grad(loss)(PARAMS)
    _, state = tx.update(
        grad, tx.init(PARAMS), PARAMS, value=loss(PARAMS), grad=grad, value_fn=loss
    )
    found = diagnostics(state)
    assert found["newton.status"] == hessopt.StepStatus.OK
    assert (found["newton.count"], found["newton.attempts"]) == (1, 1)
    assert (found["linesearch.status"], found["linesearch.rate"]) == (
        hessopt.StepStatus.OK,
        1.0,
    )
    assert all(jnp.shape(x) == () for x in found.values())


def test_wrapped_nested_and_repeated_states_keep_distinct_names():
    inner = hessopt.subsampled(
        hessopt.scale_by_newton(), probability=1.0, blocks="leaf"
    )
    tx = optax.named_chain(
        ("first", optax.scale_by_adam()),
        ("second", optax.inject_hyperparams(optax.sgd)(0.1)),
        ("third", inner),
    )
    found = diagnostics(tx.init(PARAMS))
    assert {
        "first.adam.count",
        "third.subsampled.drawn",
        "third.subsampled.a.newton.status",
    } <= set(found)
    assert float(
        next(x for name, x in found.items() if name.endswith("learning_rate"))
    ) == pytest.approx(0.1)
    twice = diagnostics(
        optax.chain(optax.scale_by_adam(), optax.scale_by_adam()).init(PARAMS)
    )
    assert set(twice) == {"adam.count", "adam_2.count"}


def test_works_on_anything_under_jit_and_on_batches():
    assert diagnostics(optax.sgd(0.1).init(PARAMS)) == {}
    assert diagnostics(()) == {}
    state = hessopt.scale_by_newton().init(PARAMS)
    assert set(jax.jit(diagnostics)(state)) == set(diagnostics(state))
    lanes = jax.vmap(hessopt.scale_by_newton().init)(jnp.ones((4, 2)))
    assert diagnostics(lanes)["newton.status"].shape == (4,)


def test_rates_of_groups_are_numbered_unless_there_is_one():
    one, many = (
        diagnostics(hessopt.scale_by_generalized_newton(groups=g).init(PARAMS))
        for g in (None, "leaf")
    )
    count = len(jax.tree.leaves(PARAMS))
    assert one["generalized_newton.rate"].shape == ()
    assert [f"generalized_newton.rate.{i}" in many for i in range(count)] == [
        True
    ] * count
    lanes = jax.vmap(hessopt.scale_by_generalized_newton(groups="leaf").init)(
        jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    )
    assert diagnostics(lanes)["generalized_newton.rate.0"].shape == (2,)


def test_of_a_train_state_its_optimizers_state_is_reported():
    linen = TrainState.create(apply_fn=None, params=PARAMS, tx=hessopt.newton())
    module = hessopt.nnx.Optimizer(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), hessopt.newton())
    expected = diagnostics(linen.opt_state)
    for state in (linen, module):
        found = diagnostics(state)
        assert {name: float(x) for name, x in found.items()} == {
            name: float(x) for name, x in expected.items()
        }
        assert all(isinstance(x, jax.Array) for x in found.values())
