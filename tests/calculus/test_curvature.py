"""Oracles: `jax.hessian` on the raveled parameters, explicit Jacobians, central
differences in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from hessopt import composite, group_labels, hessian, hvp
from hessopt.calculus.curvature import curvature_product
from tests.problems import cross_entropy, init_mlp, mlp

PARAMS = init_mlp(0, (5, 7, 3)) | {
    "scale": {"s": jnp.asarray(0.7)},
    "empty": {"e": jnp.zeros((0, 2))},
}
X = jax.random.normal(jax.random.key(1), (11, 5), jnp.float64)
Y = jax.random.randint(jax.random.key(2), (11,), 0, 3)


def loss(params):
    layers = {name: params[name] for name in ("layer0", "layer1")}
    return (
        cross_entropy(layers, params["scale"]["s"] * X, Y, 1e-2)
        + params["scale"]["s"] ** 2
    )


def dense(value_fn, params):
    vector, unravel = ravel_pytree(params)
    return jax.jit(jax.hessian(lambda v: value_fn(unravel(v))))(vector)


@functools.cache
def oracle():
    return np.asarray(dense(loss, PARAMS))


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 1000])
def test_the_hessian_equals_jax_hessian_for_every_chunk_size(chunk_size):
    H = jax.jit(lambda p: hessian(loss, p, chunk_size=chunk_size))(PARAMS)
    np.testing.assert_allclose(H, oracle(), rtol=1e-10, atol=1e-13)
    np.testing.assert_array_equal(H, H.T)


@pytest.mark.parametrize("blocks", ["leaf", "layer", "weights_biases"])
def test_blocks_equal_those_of_the_whole_matrix(blocks):
    labels, names = group_labels(PARAMS, blocks)
    owner = np.concatenate(
        [
            np.full(leaf.size, label)
            for label, leaf in zip(*map(jax.tree.leaves, (labels, PARAMS)), strict=True)
        ]
    )
    matrices = hessian(loss, PARAMS, blocks=blocks)
    assert tuple(matrices) == names
    for group, name in enumerate(names):
        np.testing.assert_allclose(
            matrices[name],
            oracle()[np.ix_(owner == group, owner == group)],
            rtol=1e-10,
            atol=1e-13,
        )


def test_hvp_equals_a_central_difference_of_the_gradient():
    vector = jax.tree.map(
        lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), PARAMS
    )
    eps = 1e-6
    ahead = jax.grad(loss)(optax.tree.add_scale(PARAMS, eps, vector))
    behind = jax.grad(loss)(optax.tree.add_scale(PARAMS, -eps, vector))
    difference = jax.tree.map(lambda a, b: (a - b) / (2 * eps), ahead, behind)
    for one, other in zip(
        *map(jax.tree.leaves, (hvp(loss, PARAMS, vector), difference)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def test_hvp_refuses_another_tree():
    with pytest.raises(ValueError, match="vector must have the shapes of params"):
        hvp(loss, PARAMS, PARAMS["layer0"])


LOSSES = {
    "squared": lambda z: 0.5 * jnp.mean((z - 1.0) ** 2),
    "softmax": lambda z: optax.softmax_cross_entropy_with_integer_labels(z, Y).mean(),
    "poisson": lambda z: jnp.mean(jnp.exp(z) - z),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gauss_newton_equals_the_explicit_product_of_jacobians(name):
    params = init_mlp(3, (5, 4, 3))
    vector, unravel = ravel_pytree(params)
    model = lambda v: mlp(unravel(v), X).ravel()
    J = jax.jacfwd(model)(vector)
    L = jax.hessian(lambda z: LOSSES[name](z.reshape(11, 3)))(model(vector))
    value_fn = composite(lambda p: mlp(p, X), LOSSES[name])
    G = hessian(value_fn, params, curvature="gauss_newton")
    np.testing.assert_allclose(G, J.T @ L @ J, rtol=1e-10, atol=1e-13)
    times = curvature_product(value_fn, params, "gauss_newton")(
        unravel(jnp.ones_like(vector))
    )
    np.testing.assert_allclose(
        ravel_pytree(times)[0],
        J.T @ (L @ (J @ jnp.ones_like(vector))),
        rtol=1e-10,
        atol=1e-13,
    )


def test_gauss_newton_with_the_parameters_among_the_outputs_keeps_a_penalty_exact():
    params = init_mlp(3, (5, 4, 3))
    n = ravel_pytree(params)[0].size

    def penalised(out):
        logits, p = out
        return LOSSES["softmax"](logits) + 0.5 * 0.3 * sum(
            jnp.sum(leaf**2) for leaf in jax.tree.leaves(p)
        )

    plain = hessian(
        composite(lambda p: mlp(p, X), LOSSES["softmax"]),
        params,
        curvature="gauss_newton",
    )
    both = hessian(
        composite(lambda p: (mlp(p, X), p), penalised), params, curvature="gauss_newton"
    )
    np.testing.assert_allclose(both, plain + 0.3 * np.eye(n), rtol=1e-10, atol=1e-13)


def test_gauss_newton_needs_a_composite_and_words_are_checked():
    with pytest.raises(TypeError, match=r"hessopt\.composite"):
        hessian(loss, PARAMS, curvature="gauss_newton")
    with pytest.raises(ValueError, match=r"curvature must be one of .* got 'fisher'"):
        hessian(loss, PARAMS, curvature="fisher")
    with pytest.raises(
        ValueError, match="chunk_size must be an int, at least 1, got 0"
    ):
        hessian(loss, PARAMS, chunk_size=0)


def test_a_complex_leaf_is_two_real_ones_and_products_follow_optax_convention():
    A = jnp.array([[2.0, 1.0j], [-1.0j, 3.0]])  # Hermitian; f = z* A z

    def f(z):
        return jnp.real(jnp.vdot(z, A @ z))

    def real(v):
        return f(v[:2] + 1j * v[2:])

    z, v = jnp.array([1.0 + 2.0j, -1.0 + 0.5j]), jnp.array([0.3 - 1.0j, 2.0 + 1.0j])
    expected = jax.hessian(real)(jnp.concatenate([z.real, z.imag]))
    np.testing.assert_allclose(hessian(f, z), expected, rtol=1e-12, atol=1e-12)
    product = expected @ jnp.concatenate([v.real, v.imag])
    np.testing.assert_allclose(hvp(f, z, v), product[:2] + 1j * product[2:], rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 0.05)])
def test_low_precision_parameters_give_a_float32_matrix(dtype, tol):
    params = jax.tree.map(lambda p: p.astype(dtype), init_mlp(0, (5, 7, 3)))
    x = X.astype(dtype)
    H = hessian(lambda p: LOSSES["softmax"](mlp(p, x)), params)
    exact = dense(
        lambda p: LOSSES["softmax"](mlp(p, X)),
        jax.tree.map(lambda p: p.astype(jnp.float64), params),
    )
    assert H.dtype == jnp.float32
    assert jnp.max(jnp.abs(H - exact)) < tol * jnp.max(jnp.abs(exact))


def test_vmap_equals_a_loop_and_trivial_trees_work():
    points = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    f = lambda x: x[0] ** 3 * x[1] ** 2
    batched = jax.vmap(lambda x: hessian(f, x))(points)
    for lane, x in enumerate(points):
        np.testing.assert_allclose(batched[lane], hessian(f, x), rtol=1e-12)
    assert hessian(lambda x: x**3, jnp.asarray(2.0)).tolist() == [[12.0]]
    assert hessian(lambda _: jnp.asarray(0.0), {}).shape == (0, 0)
    assert hessian(lambda _: jnp.asarray(0.0), {}, blocks="leaf") == {}


@pytest.fixture(scope="module")
def kernels():
    """The 64-32-10 network at batch 1500 in float32, compiled: jax.hessian, ours whole,
    ours by leaves."""
    params = init_mlp(0, (64, 32, 10), jnp.float32)
    x = jax.random.uniform(jax.random.key(1), (1500, 64), jnp.float32)
    y = jax.random.randint(jax.random.key(2), (1500,), 0, 10)

    def value_fn(p):
        return cross_entropy(p, x, y)

    vector, unravel = ravel_pytree(params)
    theirs = (
        jax.jit(jax.hessian(lambda v: value_fn(unravel(v)))).lower(vector).compile()
    )
    whole = jax.jit(lambda p: hessian(value_fn, p)).lower(params).compile()
    leaves = (
        jax.jit(lambda p: hessian(value_fn, p, blocks="leaf")).lower(params).compile()
    )
    return params, vector, theirs, whole, leaves


def test_temporary_memory_is_a_25th_of_jax_hessian_and_the_entries_agree(kernels):
    params, vector, theirs, whole, _ = kernels
    assert (
        whole.memory_analysis().temp_size_in_bytes
        <= theirs.memory_analysis().temp_size_in_bytes / 25
    )
    expected = theirs(vector)
    assert jnp.max(jnp.abs(whole(params) - expected)) <= 1e-5 * jnp.max(
        jnp.abs(expected)
    )


def test_leaf_blocks_never_hold_the_whole_matrix(kernels):
    params, vector, _, whole, leaves = kernels
    n = vector.size
    assert f"f32[{n},{n}]" in whole.as_text()
    assert f"f32[{n},{n}]" not in leaves.as_text()
    assert leaves(params)["layer1/kernel"].shape == (320, 320)
