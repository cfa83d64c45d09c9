"""Oracles: the same training by optax's own loop on the pure parameters; a forward pass
by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hessopt
from hessopt.nnx import Optimizer
from tests.marks import slow_if

X = jax.random.normal(jax.random.key(1), (20, 3), jnp.float32)
Y = (X[:, 0] > 0).astype(jnp.int32)


class Net(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs, momentum=0.9)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def cross_entropy(model):
    return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()


@nnx.jit
def step(model, optimizer):
    value, grads = nnx.value_and_grad(cross_entropy)(model)
    optimizer.update(model, grads, value=value, loss_fn=cross_entropy)
    return value


def leaves(model, kind):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, kind))]


OPTIMIZERS = {
    "adam": lambda: optax.adam(0.05),
    "generalized_newton": lambda: hessopt.generalized_newton(optax.sgd(0.1)),
    "grouped_newton": lambda: hessopt.grouped_newton(optax.sgd(0.1)),
    "lbfgs": hessopt.lbfgs,
    "newton_cg": hessopt.newton_cg,
    "lbfgs, bounds": lambda: hessopt.lbfgs(bounds=(-1.5, 1.2)),
}


@pytest.mark.parametrize(
    "name",
    slow_if(("lbfgs, bounds", "grouped_newton", "newton_cg").__contains__, OPTIMIZERS),
)
def test_a_model_trains_as_its_pure_parameters_do(name):
    model, tx = Net(nnx.Rngs(0)), OPTIMIZERS[name]()
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    params, treedef = jax.tree.flatten(state)

    def loss(params):
        return cross_entropy(
            nnx.merge(
                graph,
                jax.tree.unflatten(treedef, params),
                jax.tree.map(jnp.asarray, rest),
            )
        )

    @jax.jit
    def pure(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        given = (
            {} if name == "adam" else {"value": value, "grad": grads, "value_fn": loss}
        )
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    optimizer, inner = Optimizer(model, tx), tx.init(params)
    for _ in range(5):
        step(model, optimizer)
        params, inner = pure(params, inner)
    for got, expected in zip(leaves(model, nnx.Param), params, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert cross_entropy(model) < 0.7


@pytest.mark.parametrize("name", ["generalized_newton", "lbfgs"])
def test_running_statistics_are_those_of_one_forward_pass(name):
    model = Net(nnx.Rngs(0))
    optimizer = Optimizer(model, OPTIMIZERS[name]())
    for _ in range(2):
        twin = nnx.clone(model)
        twin(X)
        step(model, optimizer)
        for got, expected in zip(
            leaves(model, nnx.BatchStat), leaves(twin, nnx.BatchStat), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("jit", [True, False])
def test_evaluations_draw_the_random_numbers_of_the_gradient(jit):
    seen = []

    def update(updates, state, params=None, *, value, value_fn, **data):
        return updates, (value, value_fn(params))

    spy = optax.GradientTransformationExtraArgs(
        lambda params: (jnp.zeros(()), jnp.zeros(())), update
    )
    model = Net(nnx.Rngs(0), rate=0.5)
    optimizer = Optimizer(model, spy)
    run = step if jit else step.__wrapped__
    for _ in range(2):
        twin = nnx.clone(model)
        twin(X)
        value = run(model, optimizer)
        again = jax.tree.leaves(nnx.state(optimizer))[1]  # behind the value given
        np.testing.assert_allclose(again, value, rtol=1e-6)
        assert leaves(model, nnx.RngCount) == leaves(twin, nnx.RngCount)
        seen.append(float(value))
    assert seen[0] != seen[1]


@pytest.mark.parametrize("name", ["generalized_newton", "lbfgs"])
def test_what_is_not_asked_for_does_not_change_by_one_bit(name):
    model = Net(nnx.Rngs(0))
    is_half = nnx.All(nnx.Param, nnx.PathContains("last"))
    optimizer = Optimizer(model, OPTIMIZERS[name](), wrt=is_half)

    @nnx.jit
    def step_half(model, optimizer):
        value, grads = nnx.value_and_grad(
            cross_entropy, argnums=nnx.DiffState(0, is_half)
        )(model)
        optimizer.update(model, grads, value=value, loss_fn=cross_entropy)
        return value

    before = leaves(model, nnx.Param)
    values = [step_half(model, optimizer) for _ in range(4)]
    assert values[-1] < values[0]
    after = leaves(model, nnx.Param)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    for path, a, b in zip(paths, before, after, strict=True):
        assert np.array_equal(a, b) == ("last" not in path)


def test_what_an_optimizer_misses_is_named():
    model = Net(nnx.Rngs(0))
    optimizer = Optimizer(model, hessopt.newton())
    grads = nnx.grad(cross_entropy)(model)
    with pytest.raises(
        TypeError, match="scale_by_newton needs the objective"
    ) as raised:
        optimizer.update(model, grads)
    assert "loss_fn=" in raised.value.__notes__[0]


def test_a_composite_keeps_its_parts_for_gauss_newton_and_aux_is_left_out():
    model = Net(nnx.Rngs(0))
    parts = hessopt.composite(
        lambda model: model(X),
        lambda out: optax.softmax_cross_entropy_with_integer_labels(out, Y).mean(),
    )
    optimizer = Optimizer(model, hessopt.newton(damping=1e-2, curvature="gauss_newton"))
    value, grads = nnx.value_and_grad(cross_entropy)(model)
    optimizer.update(model, grads, value=value, loss_fn=parts)
    assert cross_entropy(model) < value

    optimizer = Optimizer(model, hessopt.generalized_newton(optax.sgd(0.1)))
    grads = nnx.grad(cross_entropy)(model)
    optimizer.update(model, grads, loss_fn=lambda model: (cross_entropy(model), "aux"))
