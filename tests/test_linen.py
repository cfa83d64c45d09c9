import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import hessopt
from hessopt.linen import TrainState


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Dropout(0.5, deterministic=deterministic)(jnp.tanh(nn.Dense(4)(x)))
        return nn.Dense(2)(x)


MODEL = Net()
X = jax.random.normal(jax.random.key(1), (20, 3))
Y = (X[:, 0] > 0).astype(jnp.int32)


def create(tx):
    return TrainState.create(
        apply_fn=MODEL.apply, params=MODEL.init(jax.random.key(0), X), tx=tx
    )


def loss_fn(params, x, y):
    logits = MODEL.apply(params, x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss + 1e-2 * optax.tree.norm(params, squared=True)


def loss_with_aux(params, x, y):
    return loss_fn(params, x, y), {
        "accuracy": jnp.mean(jnp.argmax(MODEL.apply(params, x), -1) == y)
    }


def assert_trees_close(one, other, **tolerances):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, **tolerances)


def test_step_with_is_value_gradient_and_update():
    state = create(hessopt.newton())
    stepped, value, aux = jax.jit(lambda s: s.step_with(loss_fn, X, Y))(state)

    @jax.jit
    def step_by_hand(s):
        value, grads = jax.value_and_grad(loss_fn)(s.params, X, Y)
        return value, s.apply_gradients(
            grads=grads, value=value, value_fn=lambda p: loss_fn(p, X, Y)
        )

    expected, by_hand = step_by_hand(state)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert aux is None
    assert stepped.step == 1
    assert_trees_close(stepped.params, by_hand.params, rtol=1e-3, atol=1e-5)
    assert loss_fn(stepped.params, X, Y) < value


def test_newton_trains_a_flax_model_and_aux_is_returned():
    state = create(hessopt.newton())
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return state.step_with(loss_with_aux, X, Y)

    for _ in range(15):
        state, _, aux = step(state)
    assert len(traces) == 1
    assert aux["accuracy"] == 1.0
    grads = jax.grad(loss_fn)(state.params, X, Y)
    assert optax.tree.norm(grads) < 1e-3


def test_params_of_a_flax_model_stay_within_bounds():
    params = create(optax.sgd(1.0)).params
    largest = max(jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(params))
    tx = hessopt.newton_cg(bounds=(-largest, largest))

    @jax.jit
    def run(state):
        step = lambda state, _: (state.step_with(loss_fn, X, Y)[0], None)
        return jax.lax.scan(step, state, None, length=10)[0]

    found = run(create(tx)).params
    sizes = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(found)]
    assert max(sizes) == largest
    assert loss_fn(found, X, Y) < loss_fn(params, X, Y)


def test_any_optax_optimizer_takes_the_same_step_as_in_flax():
    from flax.training import train_state

    grads = jax.grad(loss_fn)(create(optax.adam(1e-2)).params, X, Y)
    ours = create(optax.adam(1e-2)).apply_gradients(grads=grads)
    params = MODEL.init(jax.random.key(0), X)
    theirs = train_state.TrainState.create(
        apply_fn=MODEL.apply, params=params, tx=optax.adam(1e-2)
    )
    assert_trees_close(
        ours.params, theirs.apply_gradients(grads=grads).params, rtol=1e-6
    )


def test_optax_lbfgs_gets_what_it_needs():
    state, value, _ = create(optax.lbfgs()).step_with(loss_fn, X, Y)
    assert loss_fn(state.params, X, Y) < value


def test_what_an_optimizer_misses_is_named_and_fields_are_replaced():
    state = create(hessopt.newton())
    grads = jax.grad(loss_fn)(state.params, X, Y)
    with pytest.raises(
        TypeError, match="scale_by_newton needs the objective"
    ) as raised:
        state.apply_gradients(grads=grads)
    assert "step_with" in raised.value.__notes__[0]
    assert (
        create(optax.sgd(0.1)).apply_gradients(grads=grads, apply_fn=loss_fn).apply_fn
        is loss_fn
    )


def test_a_composite_keeps_its_parts_for_gauss_newton():
    value_fn = hessopt.composite(
        lambda params, x: MODEL.apply(params, x),
        lambda logits, y: optax.softmax_cross_entropy_with_integer_labels(
            logits, y
        ).mean(),
    )
    state = create(hessopt.newton(damping=1e-2, curvature="gauss_newton"))
    state, value, _ = jax.jit(lambda s: s.step_with(value_fn, X, Y))(state)
    assert value_fn(state.params, X, Y) < value


def test_the_optimizers_evaluations_use_the_gradients_dropout_mask():
    def noisy(params, x, y, rngs):
        logits = MODEL.apply(params, x, deterministic=False, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    state = create(hessopt.newton(damping=1e-2))
    rngs = {"dropout": jax.random.key(3)}
    new, value, _ = state.step_with(noisy, X, Y, rngs=rngs)
    assert noisy(new.params, X, Y, rngs) < value


def test_multi_steps_hands_the_objective_on():
    state = create(optax.MultiSteps(hessopt.newton(), 2))
    for _ in range(2):
        state, value, _ = state.step_with(loss_fn, X, Y)
    assert loss_fn(state.params, X, Y) < value


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.Dropout(0.25, deterministic=False)(jnp.tanh(x)))


def normed_loss(params, x, y, rngs, collections):
    logits, new = Normed().apply(
        {"params": params, **collections}, x, rngs=rngs, mutable=list(collections)
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (
        new,
        logits,
    )


def create_normed(tx):
    variables = Normed().init(
        {"params": jax.random.key(0), "dropout": jax.random.key(1)}, X
    )
    collections = {"batch_stats": variables["batch_stats"]}
    return TrainState.create(
        apply_fn=Normed().apply,
        params=variables["params"],
        tx=tx,
        collections=collections,
    )


WITH_PROBES = {
    "generalized_newton": lambda: hessopt.generalized_newton(optax.sgd(0.1)),
    "forward": lambda: hessopt.generalized_newton(optax.sgd(0.1), mode="forward"),
    "grouped_newton": lambda: hessopt.grouped_newton(optax.sgd(0.1)),
    "lbfgs": hessopt.lbfgs,
}


@pytest.mark.parametrize("name", ["generalized_newton", "forward"])
def test_running_statistics_are_those_of_one_forward_pass(name):
    state, rngs = create_normed(WITH_PROBES[name]()), {"dropout": jax.random.key(3)}
    step = jax.jit(lambda s, x: s.step_with(normed_loss, x, Y, rngs=rngs))
    for x in (X, 2.0 * X):
        expected, (statistics, logits) = normed_loss(
            state.params, x, Y, rngs, state.collections
        )
        state, value, aux = step(state, x)
        assert_trees_close(state.collections, statistics, rtol=1e-6)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(aux, logits, rtol=1e-5)


def test_a_loss_that_forgets_its_collections_is_told_so():
    def forgets(params, x, y, rngs, collections):
        loss, (_, logits) = normed_loss(params, x, y, rngs, collections)
        return loss, logits

    with pytest.raises(TypeError, match="loss_fn must return"):
        create_normed(optax.sgd(0.1)).step_with(
            forgets, X, Y, rngs={"dropout": jax.random.key(3)}
        )


@pytest.mark.parametrize("name", ["generalized_newton", "grouped_newton", "lbfgs"])
def test_a_frozen_half_does_not_change_by_one_bit(name):
    mask = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: path[1].key == "Dense_1", params
    )
    state = create(hessopt.masked(WITH_PROBES[name](), mask))
    first, step = state, jax.jit(lambda s: s.step_with(loss_fn, X, Y))
    values = []
    for _ in range(4):
        state, value, _ = step(state)
        values.append(value)
    assert values[-1] < values[0]
    frozen, moved = (
        jax.tree.leaves(s.params["params"]["Dense_0"]) for s in (first, state)
    )
    for a, b in zip(frozen, moved, strict=True):
        np.testing.assert_array_equal(a, b)
