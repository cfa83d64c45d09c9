"""Objectives with a `jax.custom_vjp`, which have no forward derivatives: the same
function without the rule is the oracle, and the true constants of a differential
equation."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.ode import odeint

import hessopt
from hessopt import composite
from hessopt.calculus.curvature import curvature_product
from hessopt.calculus.least_squares import root
from hessopt.driver import minimize
from hessopt.trees.vectors import real_leaves
from tests.marks import slow_if


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


@jax.custom_vjp
def cosine(x):
    return jnp.cos(x)


# each calls the other, so that no derivative has a forward rule
sine.defvjp(lambda x: (sine(x), x), lambda x, g: (g * cosine(x),))
cosine.defvjp(lambda x: (cosine(x), x), lambda x, g: (-g * sine(x),))

DATA = np.random.default_rng(0).normal(size=(5, 3))
PARAMS = {
    "b": jnp.array([0.3, 0.7]),
    "W": jnp.asarray(np.random.default_rng(1).normal(size=(3, 2))),
}
STEP = jax.tree.map(jnp.cos, PARAMS)


def objective(sin, wrap=lambda f: f):
    """A composite of sines."""
    model_fn = lambda p: wrap(sin)(DATA @ p["W"]) * sin(p["b"]) + p["b"]
    return composite(model_fn, lambda z: jnp.sum(sin(z / 3 + 1.0) ** 2 + 0.1 * z**2))


def scanned(f):
    return lambda h: jax.lax.scan(lambda h, _: (f(h) + 0.1, None), h, length=2)[0]


WRAPS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "scan": scanned,
    "cond": lambda f: lambda h: jax.lax.cond(h[0, 0] < 9, f, jnp.exp, h),
    "checkpoint": jax.checkpoint,
    "vmap": jax.vmap,
}


def kernels(value_fn):
    leaves, restore = real_leaves(PARAMS)
    flat = composite(lambda parts: value_fn.model_fn(restore(parts)), value_fn.loss_fn)
    terms = functools.partial(
        hessopt.taylor, value_fn, PARAMS, STEP, groups="leaf", order=2
    )
    found = root(flat, leaves)
    return {
        "hessian": hessopt.hessian(value_fn, PARAMS),
        "blocks": hessopt.hessian(value_fn, PARAMS, blocks="leaf"),
        "hvp": hessopt.hvp(value_fn, PARAMS, STEP),
        "gauss_newton": hessopt.hessian(value_fn, PARAMS, curvature="gauss_newton"),
        "times": curvature_product(value_fn, PARAMS, "gauss_newton")(STEP),
        "root": None if found is None else found.K.T @ found.K,
        "taylor": terms()[:3],
        "rows": terms(chunk_size=1)[:3],
    }


@pytest.mark.parametrize("name", slow_if(lambda name: name != "scan", WRAPS))
def test_kernels_equal_those_of_the_function_without_the_rule(name):
    found = jax.jit(lambda: kernels(objective(sine, WRAPS[name])))()
    expected = jax.jit(lambda: kernels(objective(jnp.sin, WRAPS[name])))()
    assert found["root"] is not None
    chex.assert_trees_all_close(found, expected, rtol=1e-11, atol=1e-13)


def test_the_root_follows_from_the_transposed_jacobian():
    """For squares, whose Hessian is diagonal for the function with the rule as well."""
    model_fn = lambda p: sine(DATA @ p[0])
    K, _, _ = root(composite(model_fn, lambda z: 0.5 * jnp.sum(z**2)), [PARAMS["W"]])
    J = jax.jacrev(lambda w: jnp.sin(DATA @ w).ravel())(PARAMS["W"]).reshape(-1, 6)
    np.testing.assert_allclose(K.T @ K, J.T @ J, rtol=1e-11, atol=1e-13)


def test_a_rule_with_a_forward_pass_keeps_the_forward_derivative():
    """The derivative of this rule is not symmetric: forward over reverse is the
    derivative of the gradient."""

    @jax.custom_vjp
    def skewed(x):
        return jnp.sum(x**2)

    skewed.defvjp(lambda x: (x @ x, x), lambda x, g: (g * jnp.cumsum(x),))
    x, v = jnp.arange(3.0), jnp.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(hessopt.hvp(skewed, x, v), jnp.cumsum(v))


GAUSS_NEWTON = {"curvature": "gauss_newton"}
METHODS = {
    "newton": hessopt.newton(),
    # J'J is nearly singular, and its inverse would magnify rounding
    "newton, Gauss-Newton": hessopt.newton(damping=1e-3, **GAUSS_NEWTON),
    "newton_cg": hessopt.newton_cg(),
    "newton_cg, rematerialized": hessopt.newton_cg(rematerialize=True),
    "newton_cg, Gauss-Newton": hessopt.newton_cg(**GAUSS_NEWTON),
    "trust region": hessopt.trust_region_newton(),
    "trust region, cg": hessopt.trust_region_newton(subproblem="cg"),
    "trust region, Gauss-Newton": hessopt.trust_region_newton(**GAUSS_NEWTON),
    "trust region, Gauss-Newton, cg": hessopt.trust_region_newton(
        subproblem="cg", **GAUSS_NEWTON
    ),
    "bfgs": hessopt.bfgs(),
    "ssbroyden": hessopt.bfgs(formula="ssbroyden"),
    "lbfgs": hessopt.lbfgs(),
    "generalized_newton": hessopt.generalized_newton(optax.sgd(1.0, momentum=0.5)),
    "generalized_newton, forward": hessopt.generalized_newton(
        optax.sgd(1.0, momentum=0.5), mode="forward"
    ),
    "grouped_newton": hessopt.grouped_newton(optax.sgd(1.0), cubic_damping=0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_step_of_the_function_without_the_rule(name):
    @functools.partial(jax.jit, static_argnums=0)
    def step(sin):
        value_fn, tx = objective(sin), METHODS[name]
        value, grad = jax.value_and_grad(value_fn)(PARAMS)
        return tx.update(
            grad, tx.init(PARAMS), PARAMS, value=value, grad=grad, value_fn=value_fn
        )[0]

    chex.assert_trees_all_close(step(sine), step(jnp.sin), rtol=1e-8, atol=1e-10)


TRUE = {"rates": jnp.array([2.0, 0.3]), "start": jnp.array(1.5)}
GUESS = {"rates": jnp.array([1.6, 0.5]), "start": jnp.array(1.2)}
TIMES = np.linspace(0, 4, 9)


def oscillator(p):
    """The positions of a damped oscillator, y'' = -k y - c y', at eight times."""
    rhs = lambda y, t, k, c: jnp.stack([y[1], -k * y[0] - c * y[1]])
    begin = jnp.stack([p["start"], 0 * p["start"]])
    return odeint(rhs, begin, TIMES, *p["rates"], rtol=1e-9, atol=1e-9)[1:, 0]


@functools.cache
def fit():
    seen = oscillator(TRUE)
    return composite(oscillator, lambda z: 0.5 * jnp.sum((z - seen) ** 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_the_constants_of_a_differential_equation(name):
    found = hessopt.minimize(fit(), GUESS, METHODS[name], gtol=1e-5, max_steps=300)
    assert found.converged
    chex.assert_trees_all_close(found.params, TRUE, atol=1e-4)


SIGNAL = jnp.abs(jnp.fft.rfft(jnp.array([1.0, -0.5, 0.3, 0.8, 0.1, -0.2]))) ** 2


FOURIER = composite(
    lambda x: jnp.abs(jnp.fft.rfft(x)) ** 2, lambda z: jnp.sum((z - SIGNAL) ** 2)
)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_fits_a_power_spectrum(name):
    x = jnp.array([0.8, -0.3, 0.4, 0.6, 0.2, -0.1])
    # phases are free: the Gauss-Newton matrix is singular
    damped = {
        "newton, Gauss-Newton": hessopt.newton(damping=1e-3, **GAUSS_NEWTON),
    }
    tx = damped.get(name, METHODS[name])
    found = hessopt.minimize(FOURIER, x, tx, gtol=1e-7, max_steps=2000)
    assert found.value < 1e-8 * FOURIER(x)


def test_what_needs_forward_derivatives_names_the_argument():
    value_fn = objective(sine)
    with pytest.raises(TypeError, match=r"sine has a jax.custom_vjp; use order=2"):
        hessopt.taylor(value_fn, PARAMS, STEP)
    grads = jax.grad(value_fn)(PARAMS)
    tx = hessopt.grouped_newton(optax.sgd(1.0))
    with pytest.raises(TypeError, match=r"cubic_damping=0\.0 with grouped_newton"):
        tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=value_fn)
    squares = composite(value_fn.model_fn, lambda z: jnp.sum(z**2))
    tx = hessopt.trust_region_newton(geodesic_acceleration=True, **GAUSS_NEWTON)
    with pytest.raises(TypeError, match="use geodesic_acceleration=False"):
        tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=squares)


@pytest.mark.parametrize("dense", [True, False])
def test_solutions_have_reverse_derivatives_in_the_data(dense, monkeypatch):
    monkeypatch.setattr(minimize, "MAX_DENSE_SIZE", 512 if dense else 0)

    def solution(sin, a):
        value_fn = lambda x, a: jnp.sum(sin(x * a) ** 2 + (x - a) ** 2 + 0.1 * x**4)
        start, tx = jnp.ones(2), hessopt.lbfgs()
        return hessopt.minimize(value_fn, start, tx, data={"a": a}, gtol=1e-10).params

    a = jnp.array([0.5, 0.8])
    found, expected = (
        jax.jacrev(functools.partial(solution, sin))(a) for sin in (sine, jnp.sin)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
