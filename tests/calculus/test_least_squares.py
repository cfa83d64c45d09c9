import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from hessopt import composite, hessian
from hessopt.calculus.least_squares import root
from hessopt.calculus.separability import is_diagonal
from hessopt.trees.vectors import real_leaves
from tests.problems import init_mlp, mlp

X = jax.random.normal(jax.random.key(0), (11, 5))
Y = jnp.arange(11) % 3
PARAMS = init_mlp(3, (5, 4, 3))
WEIGHTS = jnp.linspace(0.1, 3, 33).reshape(11, 3)
DIAGONAL = {
    "squared": lambda z: 0.5 * jnp.mean((z - 1.0) ** 2),
    "weighted": lambda z: jnp.sum(WEIGHTS * optax.l2_loss(z, jnp.ones_like(z))),
    "poisson": lambda z: jnp.mean(jnp.exp(z) - z),
    "huber": lambda z: jnp.mean(optax.huber_loss(z, jnp.ones_like(z), delta=0.7)),
    "logistic": lambda z: jnp.mean(
        optax.sigmoid_binary_cross_entropy(z, jnp.ones_like(z))
    ),
}


def flat(value_fn):
    leaves, restore = real_leaves(PARAMS)
    return root(
        composite(lambda parts: value_fn.model_fn(restore(parts)), value_fn.loss_fn),
        leaves,
    )


@pytest.mark.parametrize("name", DIAGONAL)
def test_its_square_is_the_gauss_newton_matrix_and_its_product_the_gradient(name):
    value_fn = composite(lambda p: mlp(p, X), DIAGONAL[name])
    K, r, rest = flat(value_fn)
    G = hessian(value_fn, PARAMS, curvature="gauss_newton")
    np.testing.assert_allclose(K.T @ K, G, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(
        K.T @ r + rest,
        ravel_pytree(jax.grad(value_fn)(PARAMS))[0],
        rtol=1e-10,
        atol=1e-13,
    )
    assert (jnp.abs(rest).max() > 0) == (name == "huber")
    # fewer outputs than parameters
    assert K.shape == (33, ravel_pytree(PARAMS)[0].size)


def test_several_outputs_are_stacked():
    value_fn = composite(
        lambda p: {"a": mlp(p, X), "b": p},
        lambda o: jnp.sum(o["a"] ** 2) + optax.tree.norm(o["b"], squared=True),
    )
    K, r, _ = flat(value_fn)
    assert K.shape == (ravel_pytree(PARAMS)[0].size,) * 2
    np.testing.assert_allclose(
        K.T @ K,
        hessian(value_fn, PARAMS, curvature="gauss_newton"),
        rtol=1e-10,
        atol=1e-13,
    )
    np.testing.assert_allclose(
        K.T @ r, ravel_pytree(jax.grad(value_fn)(PARAMS))[0], rtol=1e-10
    )


@pytest.mark.parametrize(
    ("loss", "seen"),
    [
        (lambda z: jnp.sum(z[0] ** 2) + jnp.sum(jnp.exp(z[1])), True),
        (lambda z: jnp.sum((z[0] - z[1]) ** 2), False),  # entrywise, but across outputs
        (lambda z: jnp.sum(z[0]) ** 2, False),
        (lambda z: jnp.sum(jnp.cumsum(z[0]) ** 2), False),
        (lambda z: jnp.sum(z[0][::-1] * z[0]), False),
        (lambda z: jax.nn.logsumexp(z[0]), False),
        (
            lambda z: (
                jax.jit(lambda a: jnp.sum(a**4))(z[0])
                + jnp.sum(jnp.where(z[1] > 0, z[1] ** 2, 0.0))
            ),
            True,
        ),
        (lambda z: jnp.sum(z[0]), True),
    ],
)
def test_a_diagonal_loss_is_seen_and_nothing_else_taken_for_one(loss, seen):
    z = (jnp.arange(1.0, 4), jnp.arange(2.0, 5))
    assert is_diagonal(jax.linearize(jax.grad(loss), z)[1], z) == seen


def test_other_losses_and_objectives_have_no_root():
    softmax = lambda z: optax.softmax_cross_entropy_with_integer_labels(z, Y).mean()
    assert flat(composite(lambda p: mlp(p, X), softmax)) is None
    assert root(lambda p: jnp.sum(p[0] ** 2), [jnp.ones(3)]) is None


def test_singular_values_are_kept_where_their_squares_are_lost():
    A = jnp.asarray(np.vander(np.linspace(0, 1, 30), 12))  # condition number 5e8
    value_fn = composite(lambda p: A @ p, lambda z: 0.5 * jnp.sum((z - 1.0) ** 2))
    K, _, _ = root(composite(lambda p: A @ p[0], value_fn.loss_fn), [jnp.ones(12)])
    expected = np.linalg.svd(A, compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(K, compute_uv=False), expected, rtol=1e-7)
    squared = np.sqrt(
        np.abs(
            np.linalg.eigvalsh(
                hessian(value_fn, jnp.ones(12), curvature="gauss_newton")
            )
        )
    )
    # by rounding, between 1e-2 and 1
    assert np.abs(squared[0] / expected[-1] - 1) > 1e-3


@pytest.mark.parametrize(
    ("dtype", "heavy", "rtol"), [(jnp.float32, 1e8, 2e-3), (jnp.float64, 1e20, 1e-4)]
)
def test_light_outputs_keep_their_curvature_and_their_slopes_beside_heavy_ones(
    dtype, heavy, rtol
):
    rng = np.random.default_rng(1)
    A, z, W = (
        rng.normal(size=(20, 6)),
        rng.normal(size=20),
        np.r_[[heavy] * 3, np.ones(17)],
    )
    z[:3] /= heavy  # slopes of one size
    a, b, weights = (jnp.asarray(v, dtype) for v in (A, z, W))
    K, r, rest = root(
        composite(lambda p: a @ p[0] + b, lambda z: 0.5 * jnp.sum(weights * z**2)),
        [jnp.zeros(6, dtype)],
    )
    assert K.dtype == r.dtype == rest.dtype == dtype
    expected = np.linalg.svd(A * np.sqrt(W)[:, None], compute_uv=False)
    np.testing.assert_allclose(
        np.linalg.svd(np.asarray(K, np.float64), compute_uv=False), expected, rtol=rtol
    )
    np.testing.assert_allclose(K.T @ r + rest, A.T @ (W * z), rtol=rtol)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: jnp.sum(jnp.abs(z) ** 1.5),  # infinite curvature at 0
        lambda z: jnp.sum(jnp.where(z == 0, jnp.nan, 1.0) * z**2),
        # infinite slope, no curvature
        lambda z: jnp.sum(jnp.where(z == 0, jnp.inf, 1.0) * z),
    ],
)
def test_what_is_not_finite_shows_in_the_root(loss):
    for outputs in (1, 3, 4):
        found = root(
            composite(lambda p, k=outputs: jnp.arange(k) * jnp.sum(p[0]), loss),
            [jnp.ones(3)],
        )
        assert not all(jnp.all(jnp.isfinite(part)) for part in found)


def test_negative_curvature_of_a_loss_counts_as_none():
    z = jnp.array([0.5, 3.0])  # the Hessian of log(1 + z^2) is positive, negative there
    J = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    K, r, rest = root(
        composite(lambda p: J @ p[0] + z, lambda z: jnp.sum(jnp.log1p(z**2))),
        [jnp.zeros(2)],
    )
    slopes = 2 * z / (1 + z**2)
    np.testing.assert_allclose(
        K.T @ K,
        2 * (1 - 0.25) / 1.25**2 * jnp.outer(J[0], J[0]),
        rtol=1e-12,
        atol=1e-14,
    )
    np.testing.assert_allclose(K.T @ r + rest, J.T @ slopes, rtol=1e-12)
    np.testing.assert_allclose(rest, J[1] * slopes[1], rtol=1e-12)
