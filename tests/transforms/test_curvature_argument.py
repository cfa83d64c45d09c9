"""A curvature is the same in whatever way it is named: by a word, by its function, or
by its record."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessopt
from hessopt.calculus.curvature import (
    CURVATURES,
    gauss_newton_product,
    hessian_product,
)

A = jax.random.normal(jax.random.key(0), (7, 3), jnp.float64)
Y = jnp.linspace(-1.0, 2.0, 7)
VALUE_FN = hessopt.composite(
    lambda x: jnp.tanh(A @ x), lambda z: 0.5 * jnp.sum((z - Y) ** 2)
)
FUNCTIONS = {"hessian": hessian_product, "gauss_newton": gauss_newton_product}
METHODS = {
    "newton": hessopt.scale_by_newton,
    "newton, blocks": lambda **given: hessopt.scale_by_newton(blocks="leaf", **given),
    "newton_cg": hessopt.scale_by_newton_cg,
    "newton_cg, rematerialized": lambda **given: hessopt.scale_by_newton_cg(
        rematerialize=True, **given
    ),
    "trust_region_newton": hessopt.trust_region_newton,
    "trust_region_newton, cg": lambda **given: hessopt.trust_region_newton(
        subproblem="cg", **given
    ),
    "alias newton": lambda **given: hessopt.newton(linesearch=None, **given),
    "alias newton_cg": lambda **given: hessopt.newton_cg(linesearch=None, **given),
}


def three_steps(tx):
    x = jnp.array([0.3, -0.2, 0.5])
    state, iterates = tx.init(x), []
    for _ in range(3):
        value, grad = jax.value_and_grad(VALUE_FN)(x)
        updates, state = jax.jit(tx.update, static_argnames="value_fn")(
            grad, state, x, value=value, grad=grad, value_fn=VALUE_FN
        )
        x = x + (updates if "TrustRegion" in type(state).__name__ else -0.5 * updates)
        iterates.append(x)
    return np.asarray(iterates)


@pytest.mark.parametrize("word", CURVATURES)
@pytest.mark.parametrize("name", METHODS)
def test_a_callable_curvature_equals_its_word(name, word):
    by_word = three_steps(METHODS[name](curvature=word))
    assert np.isfinite(by_word).all()
    for curvature in (FUNCTIONS[word], CURVATURES[word]):
        np.testing.assert_array_equal(
            three_steps(METHODS[name](curvature=curvature)), by_word
        )


def test_a_callable_gauss_newton_bends_its_steps_like_its_word():
    by_word, by_function = (
        three_steps(
            hessopt.trust_region_newton(curvature=curvature, geodesic_acceleration=True)
        )
        for curvature in ("gauss_newton", gauss_newton_product)
    )
    np.testing.assert_array_equal(by_function, by_word)
