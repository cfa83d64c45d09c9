"""Oracles: a step that returns what it was called with."""

import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.kinds.protocol import transformation


def echo(*needs):
    return transformation(
        "echo", lambda params: (), lambda call, state: (call, state), needs=needs
    )


X, G = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 4.0])}


def value_fn(params, scale):
    return scale * jnp.sum(params["a"] ** 2)


def test_the_objective_comes_bound_to_its_data_and_nothing_else_comes_through():
    call, _ = echo("value_fn").update(
        G, (), X, value_fn=value_fn, scale=2.0, nobody_knows=1
    )
    assert call.objective(X) == 10.0
    assert (call.updates, call.params, call.grad, call.value) == (G, X, None, None)


@pytest.mark.parametrize(
    ("value", "finite"), [(None, True), (1.0, True), (np.inf, False), (np.nan, False)]
)
def test_only_a_value_that_was_given_can_be_not_finite(value, finite):
    assert bool(echo().update(G, (), X, value=value)[0].finite) is finite


def test_updates_are_the_gradient_where_none_is_given_or_the_same_leaves_are():
    other = {"a": 2 * G["a"]}
    for grad, gradient, same in (
        (None, G, True),
        (dict(G), G, True),
        (other, other, False),
    ):
        call, _ = echo().update(G, (), X, grad=grad)
        assert call.gradient == gradient
        assert call.is_gradient is same


@pytest.mark.parametrize("name", ["value", "grad", "value_fn"])
def test_names_what_is_missing_and_the_call_to_write(name):
    given = {"value": 1.0, "grad": G, "value_fn": lambda params: 0.0}
    del given[name]
    with pytest.raises(TypeError, match=rf"^echo needs .*tx\.update\(.*{name}="):
        echo("value", "grad", "value_fn").update(G, (), X, **given)
    with pytest.raises(TypeError, match=r"^echo needs the parameters"):
        echo().update(G, ())
