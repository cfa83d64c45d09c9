import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt
from hessopt.calculus.curvature import CURVATURES
from hessopt.calculus.least_squares import root
from hessopt.objective.binding import bind, precompose
from hessopt.objective.rowwise import Rows

X = jax.random.normal(jax.random.key(0), (7, 3))
PARAMS = {"w": jnp.arange(3.0), "b": jnp.array(0.5)}


def of_sample(params, x, scale=1.0):
    return scale * jnp.tanh(x @ params["w"] + params["b"])


def of_all(params, x, scale=1.0):
    return scale * jnp.tanh(x @ params["w"] + params["b"])


def half_squares(outputs, y=0.0):
    return sum(0.5 * jnp.sum((leaf - y) ** 2) for leaf in jax.tree.leaves(outputs))


def test_it_is_the_function_mapped_over_its_data():
    mapped = hessopt.rowwise(of_sample)
    expected = of_all(PARAMS, X)
    np.testing.assert_allclose(mapped(PARAMS, X), expected, rtol=1e-14)
    np.testing.assert_allclose(mapped(PARAMS, x=X), expected, rtol=1e-14)
    every_scale = jnp.arange(7.0)
    np.testing.assert_allclose(
        mapped(PARAMS, X, every_scale), every_scale * expected, rtol=1e-14
    )


def test_other_data_are_shared():
    mapped = hessopt.rowwise(of_sample, over=["x"])
    np.testing.assert_allclose(
        mapped(PARAMS, X, 3.0), 3.0 * of_all(PARAMS, X), rtol=1e-14
    )


def test_every_sample_has_its_own_key():
    keys = jax.random.split(jax.random.key(1), 5)
    noise = hessopt.rowwise(lambda p, key: p * jax.random.normal(key, (2,)))
    expected = jnp.stack([2.0 * jax.random.normal(key, (2,)) for key in keys])
    np.testing.assert_array_equal(noise(2.0, keys), expected)


def test_several_models_have_the_tuple_of_their_outputs():
    def at_zero(params, start):
        return params["b"] - start

    value_fn = hessopt.composite(
        (hessopt.rowwise(of_sample), hessopt.rowwise(at_zero), lambda params: params),
        half_squares,
    )
    data = {"x": X, "scale": jnp.ones(7), "start": jnp.ones(2)}
    expected = half_squares(
        (of_all(PARAMS, X), PARAMS["b"] - jnp.ones(2), PARAMS), y=0.0
    )
    np.testing.assert_allclose(value_fn(PARAMS, **data), expected, rtol=1e-14)
    with pytest.raises(TypeError, match=r"requires \['start'\]"):
        bind(value_fn, {"x": X}, caller="test")


def test_rows_stay_rows_when_parameters_are_restricted():
    value_fn = hessopt.composite(hessopt.rowwise(of_sample, over=["x"]), half_squares)
    bound = bind(value_fn, {"x": X}, caller="test")
    inside = precompose(bound, lambda w: PARAMS | {"w": w})
    assert inside.model_fn.samples["x"] is X
    np.testing.assert_allclose(
        inside(PARAMS["w"]), half_squares(of_all(PARAMS, X)), rtol=1e-14
    )
    again = bind(inside, {"x": 0}, caller="test")  # bound already
    assert again.model_fn.samples["x"] is X


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"x": X, "scale": jnp.ones(6)}, r"lengths \{'x': 7, 'scale': 6\}"),
        ({"x": X, "scale": 1.0}, "'scale': None"),
    ],
)
def test_data_without_a_common_axis_are_refused(data, match):
    with pytest.raises(ValueError, match=match):
        hessopt.rowwise(of_sample)(PARAMS, **data)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"over must name data of fn, .*\['z'\]"):
        hessopt.rowwise(of_sample, over=["z"])


@pytest.mark.parametrize(
    "tx",
    [
        hessopt.trust_region_newton(curvature="gauss_newton"),
        hessopt.gauss_newton(),
        hessopt.newton(curvature="gauss_newton"),
        hessopt.newton_cg(curvature="gauss_newton"),
        hessopt.lbfgs(),
        hessopt.generalized_newton(optax.sgd(1.0)),
    ],
    ids=["trust region", "gauss newton", "newton", "newton-cg", "lbfgs", "rate"],
)
def test_every_method_takes_it_for_the_model_of_all_samples(tx):
    data = {"x": X, "y": jnp.sin(jnp.arange(7.0))}
    mapped = hessopt.rowwise(of_sample, over=["x"])
    params = [
        hessopt.minimize(
            hessopt.composite(model, half_squares), PARAMS, tx, data=data, max_steps=2
        ).params
        for model in (mapped, functools.partial(of_all))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), *params)


@pytest.mark.parametrize("m", [3, 7])  # fewer samples than parameters, or more
def test_geodesic_acceleration_takes_rows(m):
    data = {"x": X[:m], "y": jnp.sin(jnp.arange(float(m)))}
    tx = hessopt.trust_region_newton(
        curvature="gauss_newton", geodesic_acceleration=True
    )
    found = [
        hessopt.minimize(
            hessopt.composite(model, half_squares), PARAMS, tx, data=data, max_steps=1
        ).params
        for model in (hessopt.rowwise(of_sample, over=["x"]), of_all)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), *found)


def test_some_of_the_parameters_may_be_fixed():
    data = {"x": X, "y": jnp.sin(jnp.arange(7.0))}
    value_fn = hessopt.composite(hessopt.rowwise(of_sample, over=["x"]), half_squares)
    tx = hessopt.masked(hessopt.gauss_newton(), {"w": True, "b": False})
    solution = hessopt.minimize(value_fn, PARAMS, tx, data=data)
    assert solution.params["b"] == PARAMS["b"]
    grad = jax.grad(value_fn)(solution.params, **data)
    np.testing.assert_allclose(grad["w"], 0.0, atol=1e-5)
    assert jnp.abs(grad["b"]) > 1e-3


class Scaled:
    """A model that holds an array, and has no hash."""

    __hash__ = None

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, params, x):
        return self.scale * params - x


@pytest.mark.parametrize("bound", [False, True])
def test_a_model_without_a_hash_keeps_its_rows(bound):
    seen = []

    def recorded(objective, parts):
        seen.append(type(objective.model_fn.fns[0]))
        return root(objective, parts)

    curvature = CURVATURES["gauss_newton"]._replace(root=recorded)
    value_fn = hessopt.composite(
        [hessopt.rowwise(Scaled(jnp.array(2.0)))], half_squares
    )
    data = {"x": jnp.ones(3)}
    if bound:
        value_fn, data = bind(value_fn, data, caller="test"), {}
    tx = hessopt.trust_region_newton(curvature=curvature)
    solution = hessopt.minimize(value_fn, 0.0, tx, data=data)
    np.testing.assert_allclose(solution.params, 0.5, rtol=1e-12)
    assert set(seen) == {Rows}


def test_it_may_close_over_traced_values():
    def solve(target):
        value_fn = hessopt.composite(
            hessopt.rowwise(lambda p, x: p * x - target), half_squares
        )
        tx = hessopt.trust_region_newton(curvature="gauss_newton")
        return hessopt.minimize(value_fn, 0.0, tx, data={"x": jnp.ones(3)}).params

    np.testing.assert_allclose(jax.vmap(solve)(jnp.arange(3.0)), jnp.arange(3.0))
    np.testing.assert_allclose(jax.grad(solve)(2.0), 1.0, rtol=1e-6)
