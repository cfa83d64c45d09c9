import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_iris

from hessopt import (
    StepStatus,
    composite,
    scale_by_newton,
    scale_by_wolfe_linesearch,
    subsampled,
)
from tests.problems import cross_entropy, init_mlp

PARAMS = {
    "a": jnp.array([1.0, 2.0]),
    "b": jnp.array([3.0]),
    "c": jnp.array([-1.0, 1.0]),
}
CURVATURE = {"a": 2.0, "b": 8.0, "c": 4.0}


def f(params):
    return sum(
        0.5 * CURVATURE[name] * jnp.sum(leaf**2) for name, leaf in params.items()
    )


def run(tx, steps=1, params=PARAMS, grads=None):
    """The updates of `steps` calls at the same parameters, and the last state."""
    grads = jax.grad(f)(params) if grads is None else grads
    update = jax.jit(lambda state: tx.update(grads, state, params, value_fn=f))
    state, all_updates = tx.init(params), []
    for _ in range(steps):
        updates, state = update(state)
        all_updates.append(updates)
    return all_updates, state


def drawn(updates):
    return [bool(jnp.allclose(updates[name], PARAMS[name])) for name in PARAMS]


def test_probability_one_is_the_inner_direction_by_blocks_and_zero_the_gradient():
    (updates,), state = run(
        subsampled(scale_by_newton(), probability=1.0, blocks="leaf")
    )
    assert drawn(updates) == [True] * 3
    assert state.info.drawn == 3
    (updates,), state = run(
        subsampled(scale_by_newton(), probability=0.0, blocks="leaf")
    )
    for name in PARAMS:
        np.testing.assert_allclose(updates[name], CURVATURE[name] * PARAMS[name])
    assert state.info.drawn == 0


def test_blocks_are_drawn_independently_with_the_given_frequency_and_reproducibly():
    tx = subsampled(scale_by_newton(), probability=0.3, blocks="leaf", seed=1)
    draws = np.array([drawn(u) for u in run(tx, 300)[0]])
    np.testing.assert_allclose(draws.mean(0), 0.3, atol=0.1)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.2
    assert draws.tolist() == [drawn(u) for u in run(tx, 300)[0]]


def test_the_inner_state_advances_only_when_its_block_is_drawn():
    tx = subsampled(scale_by_newton(), probability=0.5, blocks="leaf")
    all_updates, state = run(tx, 20)
    times = np.sum([drawn(u) for u in all_updates], axis=0)
    assert [int(state.inner[name].count) for name in PARAMS] == times.tolist()
    assert state.count == 20


def test_norm_matched_blocks_move_by_the_mean_ratio_of_the_drawn_ones_and_remember_it():
    tx = subsampled(
        scale_by_newton(), probability=0.4, blocks="leaf", rest="norm_matched"
    )
    ratio = 1.0
    for updates in run(tx, 30)[0]:
        names = [name for name, yes in zip(PARAMS, drawn(updates), strict=True) if yes]
        if names:
            ratio = np.mean([1 / CURVATURE[name] for name in names])
        for name in set(PARAMS) - set(names):
            np.testing.assert_allclose(
                updates[name], ratio * CURVATURE[name] * PARAMS[name], rtol=1e-12
            )


def test_a_nonfinite_block_does_not_move():
    grads = jax.grad(f)(PARAMS) | {"b": jnp.array([jnp.nan])}
    for probability in (0.0, 1.0):
        (updates,), state = run(
            subsampled(scale_by_newton(), probability=probability, blocks="leaf"),
            grads=grads,
        )
        assert updates["b"] == 0
        assert jnp.all(jnp.isfinite(updates["a"]))
    # the inner direction dealt with it
    assert StepStatus(int(state.info.status)) == StepStatus.OK
    assert StepStatus.NONFINITE in StepStatus(int(state.inner["b"].info.status))


def test_a_nonfinite_inner_step_leaves_the_inner_memory_as_it_was():
    tx = subsampled(optax.scale_by_adam(), probability=1.0, blocks="leaf")
    state = tx.init(PARAMS)
    _, poisoned = tx.update(PARAMS | {"b": jnp.array([jnp.nan])}, state, PARAMS)
    assert poisoned.inner["b"].count == 0
    assert poisoned.inner["a"].count == 1
    assert StepStatus(int(poisoned.info.status)) == StepStatus.NONFINITE
    updates, _ = tx.update(PARAMS, poisoned, PARAMS)
    assert updates["b"] > 0


def test_gauss_newton_blocks_see_named_data_and_low_precision_gradients_are_kept():
    value_fn = composite(
        lambda p, x: x * p["a"] + p["b"], lambda out, y: jnp.sum((out - y) ** 2)
    )
    params, data = (
        {"a": jnp.ones(2), "b": jnp.ones(1)},
        {"x": jnp.array([1.0, 2.0]), "y": jnp.zeros(2)},
    )
    tx = subsampled(
        scale_by_newton(curvature="gauss_newton"), probability=1.0, blocks="leaf"
    )
    grads = jax.grad(value_fn)(params, **data)
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=value_fn, **data)
    np.testing.assert_allclose(updates["a"], grads["a"] / (2 * data["x"] ** 2))
    tx = subsampled(optax.scale_by_adam(), probability=0.5)
    half = jax.tree.map(lambda g: g.astype(jnp.bfloat16), params)
    updates, _ = tx.update(half, tx.init(params), params)
    assert updates["a"].dtype == jnp.bfloat16


def test_an_undrawn_block_costs_no_curvature():
    def flops(probability):
        tx = subsampled(scale_by_newton(), probability=probability)
        compiled = (
            jax.jit(lambda s: tx.update(PARAMS, s, PARAMS, value_fn=f))
            .lower(tx.init(PARAMS))
            .compile()
        )
        return compiled.as_text()

    assert "conditional" in flops(0.5)


def test_any_optax_transformation_can_be_inside_and_map_params_works():
    tx = subsampled(optax.scale_by_adam(), probability=0.5, blocks="leaf")
    _, state = run(tx, 3)
    assert jnp.all(jnp.isfinite(state.inner["a"].mu["a"]))
    optax.tree.map_params(tx, lambda p: p, state)
    empty = subsampled(scale_by_newton(), probability=0.5)
    assert empty.update({}, empty.init({}), {}, value_fn=lambda _: 0.0)[0] == {}


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 1.5"):
        subsampled(scale_by_newton(), probability=1.5)
    with pytest.raises(ValueError, match=r"rest must be one of .* got 'zero'"):
        subsampled(scale_by_newton(), probability=0.5, rest="zero")
    tx = subsampled(scale_by_newton(), probability=1.0)
    with pytest.raises(TypeError, match="scale_by_newton needs the objective"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="subsampled needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS), value_fn=f)


@pytest.mark.slow
def test_on_iris_randomly_drawn_newton_layers_beat_every_constant_rate_of_gradient_descent_after_50_steps():
    x, y = load_iris(return_X_y=True)
    x, y = jnp.asarray((x - x.mean(0)) / x.std(0)), jnp.asarray(y)

    def loss(params):
        return cross_entropy(params, x, y)

    def final_loss(tx):
        @jax.jit
        @jax.vmap
        def train(params):
            def step(carry, _):
                params, state = carry
                value, grad = jax.value_and_grad(loss)(params)
                updates, state = tx.update(
                    grad, state, params, value=value, grad=grad, value_fn=loss
                )
                return (optax.apply_updates(params, updates), state), None

            (params, _), _ = jax.lax.scan(
                step, (params, tx.init(params)), None, length=50
            )
            return loss(params)

        starts = [init_mlp(seed, (4, 15, 10, 3)) for seed in range(5)]
        return np.asarray(
            train(jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts))
        )

    newton = optax.chain(
        subsampled(scale_by_newton(1e-3), probability=0.5),
        optax.scale(-1.0),
        scale_by_wolfe_linesearch(),
    )
    descents = [
        final_loss(optax.with_extra_args_support(optax.sgd(rate)))
        for rate in (0.3, 1.0, 2.0, 3.0, 5.0)
    ]
    ours = final_loss(newton)
    assert np.all(ours < 0.5 * np.min(descents, axis=0)), (ours, descents)
