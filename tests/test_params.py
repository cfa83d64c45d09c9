"""What params may be: trees with Python floats, NumPy arrays, None, records and holes
work everywhere, and a leaf that is not floating or complex is named."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt
from tests.table import HESSOPT, Case

CASES = pytest.mark.parametrize("case", HESSOPT, ids=[case.name for case in HESSOPT])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any = None


def good_params() -> dict[str, Any]:
    return {
        "float": 0.5,
        "numpy": np.array([1.0, -2.0]),
        "none": None,
        "record": Layer(jnp.ones((2, 2))),
        "empty": {},
    }


def squares(params: Any) -> Any:
    return sum((jnp.sum(jnp.cosh(leaf)) for leaf in jax.tree.leaves(params)), 0.0)


def objective_of(case: Case) -> Any:
    if not case.composite:
        return lambda params: jnp.asarray(squares(params))
    outputs = lambda params: [jnp.sin(leaf) for leaf in jax.tree.leaves(params)]
    return hessopt.composite(
        outputs, lambda out: jnp.asarray(sum((jnp.sum(x**2) for x in out), 0.0))
    )


def updated(case: Case, tx: Any, params: Any, value_fn: Any = None) -> Any:
    """One update at params, with the state after it."""
    value_fn = objective_of(case) if value_fn is None else value_fn
    value, grad = jax.value_and_grad(value_fn)(params)
    return tx.update(
        grad, tx.init(params), params, value=value, grad=grad, value_fn=value_fn
    )


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@CASES
def test_floats_arrays_of_numpy_none_and_records_are_params(case):
    params, tx = good_params(), case.make()
    updates, state = jax.eval_shape(lambda: updated(case, tx, params))
    arrays = jax.tree.map(jnp.asarray, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert shapes(updates) == shapes(arrays)
    assert shapes(state) == shapes(jax.eval_shape(tx.init, arrays))


@CASES
def test_a_state_has_no_empty_arrays(case):
    # Orbax refuses them, and `jax.lax.map` in batches cannot divide them
    state = jax.eval_shape(case.make().init, jax.tree.map(jnp.asarray, good_params()))
    assert all(leaf.size for leaf in jax.tree.leaves(state))


@CASES
def test_an_empty_tree_is_params(case):
    updates, _ = jax.eval_shape(lambda: updated(case, case.make(), {}))
    assert updates == {}


@CASES
def test_a_tree_with_holes_of_optax_is_params(case):
    params = {"a": jnp.array([0.5, -1.0]), "b": jnp.array(2), "c": jnp.array(0.1)}
    # value_fn sees the tree with holes
    for tx in (
        optax.masked(case.make(), {"a": True, "b": False, "c": True}),
        optax.partition(
            {"ours": case.make(), "still": optax.set_to_zero()},
            {"a": "ours", "b": "still", "c": "ours"},
        ),
    ):
        value_fn = objective_of(case)
        tx = optax.with_extra_args_support(tx)

        def update(tx=tx, value_fn=value_fn):
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
            part = {"a": params["a"], "b": optax.MaskedNode(), "c": params["c"]}
            value, grad = jax.value_and_grad(value_fn)(part)
            given = {"value": value, "grad": grad, "value_fn": value_fn}
            return tx.update(zeros, tx.init(params), params, **given)[0]

        assert shapes(jax.eval_shape(update))["a"] == ((2,), jnp.zeros(2).dtype)


def relu(x):
    return jnp.maximum(x, 0.0)


AWKWARD = (
    (jnp.array([1, 2]), r"is int64: .*mask"),
    (3, r"is int64: .*mask"),
    (np.array(True), r"is bool: .*mask"),
    (relu, r"is <function relu .*>: separate the arrays"),
    ("relu", r"is 'relu': separate the arrays"),
    (np.array("relu"), r"is array\('relu'.*\): separate the arrays"),
    (object(), r"is <object .*>: separate the arrays"),
    (jax.random.key(0), r"is key<fry>: "),
)
"""Leaves that are no parameters, and what is said of them."""


def of_all(case: Case) -> Any:
    """The transformation; for `masked`, of all parameters."""
    if case.name == "masked":
        return hessopt.masked(hessopt.newton(), lambda params: True)
    return case.make()


@CASES
def test_a_leaf_that_is_not_floating_is_named_with_the_way_to_go_on(case):
    tx, good = of_all(case), {"a": jnp.ones(2), "leaf": 0.5}
    state, value_fn = jax.eval_shape(tx.init, good), objective_of(case)
    for leaf, said in AWKWARD:
        bad = good | {"leaf": leaf}
        message = rf"needs .* params, but params\['leaf'\] {said}.*eqx\.partition\("
        with pytest.raises(TypeError, match=message):
            tx.init(bad)
        with pytest.raises(TypeError, match=message):
            tx.update(good, state, bad, value=1.0, grad=good, value_fn=value_fn)


@CASES
def test_a_module_of_equinox_given_whole_is_told_to_be_partitioned(case):
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    message = r"params\.activation.* is .*: separate the arrays from the rest"
    with pytest.raises(TypeError, match=message):
        of_all(case).init(model)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def model_fn(params):
        return eqx.combine(params, static)(jnp.ones(2))

    loss_fn = lambda out: jnp.sum(out**2)
    value_fn = hessopt.composite(model_fn, loss_fn)
    updates, _ = jax.eval_shape(lambda: updated(case, case.make(), params, value_fn))
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_minimize_names_a_leaf_and_the_way_to_go_on():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    with pytest.raises(
        TypeError, match=r"minimize .*params\.activation.*eqx\.partition"
    ):
        hessopt.minimize(lambda model: model(jnp.ones(2))[0], model, hessopt.lbfgs())
    with pytest.raises(
        TypeError,
        match=r"minimize .*params\['n'\] is int64: pass it to value_fn as data",
    ):
        hessopt.minimize(squares, {"n": 3, "x": 1.0}, hessopt.lbfgs())
    solution = hessopt.minimize(squares, good_params(), hessopt.lbfgs())
    assert solution.converged
    assert jax.tree.structure(solution.params) == jax.tree.structure(good_params())
    nothing = hessopt.minimize(lambda params: jnp.array(1.0), {}, hessopt.lbfgs())
    assert nothing.params == {}


def test_a_mask_names_what_it_lets_through():
    tx = hessopt.masked(hessopt.newton(), {"n": True, "x": True})
    with pytest.raises(
        TypeError, match=r"params\['n'\] is int64: let mask hold it fixed"
    ):
        tx.init({"n": jnp.array(3), "x": jnp.ones(2)})
    tx = hessopt.masked(optax.sgd(0.1), {"n": False, "x": True})
    with pytest.raises(TypeError, match=r"numeric params, but params\['n'\] is 'relu'"):
        tx.init(dict[str, Any](n="relu", x=jnp.ones(2)))
