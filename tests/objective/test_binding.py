import functools

import jax
import jax.numpy as jnp
import pytest

from hessopt import composite
from hessopt.objective.binding import bind, precompose, require_params


def loss(params, x, y, *, scale=1.0):
    return scale * jnp.sum((params * x - y) ** 2)


def test_named_data_is_passed_and_the_rest_ignored():
    bound = bind(loss, {"x": 2.0, "y": 1.0, "unknown": "nobody"}, caller="test")
    assert bound(jnp.ones(1)) == 1.0
    assert (
        bind(loss, {"x": 2.0, "y": 1.0, "scale": 3.0}, caller="test")(jnp.ones(1))
        == 3.0
    )


def test_a_function_that_takes_any_keyword_gets_all_of_them():
    assert (
        bind(lambda p, **data: data["a"] * p, {"a": 2.0, "b": 1.0}, caller="test")(1.0)
        == 2.0
    )


@pytest.mark.parametrize("fn", [jax.jit(loss), functools.partial(loss, scale=1.0)])
def test_jitted_and_partial_objectives_are_bound_alike(fn):
    assert bind(fn, {"x": 2.0, "y": 1.0}, caller="test")(jnp.ones(1)) == 1.0


def test_what_is_missing_is_named_with_the_call_to_write():
    with pytest.raises(
        TypeError,
        match=r"scale_by_newton cannot evaluate loss.*\['y'\].*value_fn=loss, y=y\)",
    ):
        bind(loss, {"x": 1.0}, caller="scale_by_newton")
    with pytest.raises(TypeError, match="scale_by_newton needs the objective"):
        bind(None, {}, caller="scale_by_newton")
    with pytest.raises(TypeError, match="needs the parameters"):
        require_params(None, caller="scale_by_newton")


def test_auxiliary_outputs_and_vectors_are_refused():
    with pytest.raises(TypeError, match="a scalar, got a tuple"):
        bind(lambda p: (jnp.sum(p), p), {}, caller="test")(jnp.ones(2))
    with pytest.raises(TypeError, match=r"a scalar, got shape \(2,\)"):
        bind(lambda p: p, {}, caller="test")(jnp.ones(2))


def model_fn(params, x):
    return params * x


def half_square(outputs, y):
    return 0.5 * jnp.sum((outputs - y) ** 2)


def test_a_composite_takes_data_by_name_and_by_position_for_the_part_that_names_it():
    value_fn = composite(model_fn, half_square)
    assert value_fn(jnp.ones(2), 2.0, 1.0) == value_fn(jnp.ones(2), y=1.0, x=2.0) == 1.0
    bound = bind(value_fn, {"x": 2.0, "y": 1.0, "z": 0.0}, caller="test")
    assert bound.loss_fn(bound.model_fn(jnp.ones(2))) == 1.0
    with pytest.raises(TypeError, match=r"requires \['y'\]"):
        value_fn(jnp.ones(2), 2.0)
    with pytest.raises(TypeError, match="takes 2 data arguments"):
        value_fn(jnp.ones(2), 1.0, 2.0, 3.0)


def test_precompose_keeps_the_parts_of_a_composite_apart():
    inner = precompose(
        bind(composite(model_fn, half_square), {"x": 2.0, "y": 1.0}, caller="test"),
        lambda p: p["w"],
    )
    assert (
        inner.loss_fn(inner.model_fn({"w": jnp.ones(2)}))
        == inner({"w": jnp.ones(2)})
        == 1.0
    )


def test_a_composite_refuses_what_it_cannot_place():
    value_fn = composite(model_fn, half_square)
    with pytest.raises(TypeError, match=r"got \['x'\] twice"):
        value_fn(jnp.ones(2), 2.0, x=2.0, y=1.0)
    with pytest.raises(TypeError, match=r"got \['z'\] but takes only \['x', 'y'\]"):
        value_fn(jnp.ones(2), 2.0, 1.0, z=0.0)
    with pytest.raises(TypeError, match="pass the data by name"):
        composite(lambda p, *x: p, half_square)(jnp.ones(2), 2.0, 1.0)


def test_a_bound_objective_can_be_bound_again():
    data = {"x": 2.0, "y": 1.0}
    once = bind(composite(model_fn, half_square), data, caller="test")
    assert bind(once, data, caller="test")(jnp.ones(2)) == 1.0
    assert (
        bind(bind(loss, data, caller="test"), data, caller="test")(jnp.ones(1)) == 1.0
    )
