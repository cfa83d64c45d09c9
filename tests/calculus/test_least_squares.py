import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from hessopt import composite, hessian
from hessopt.calculus.flat import real_leaves
from hessopt.calculus.least_squares import is_diagonal, root
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
    "logistic": lambda z: jnp.mean(optax.sigmoid_binary_cross_entropy(z, jnp.ones_like(z))),
}


def flat(value_fn):
    leaves, restore = real_leaves(PARAMS)
    return root(composite(lambda parts: value_fn.model_fn(restore(parts)), value_fn.loss_fn), leaves)


@pytest.mark.parametrize("name", DIAGONAL)
def test_its_square_is_the_gauss_newton_matrix_and_its_product_the_gradient(name):
    value_fn = composite(lambda p: mlp(p, X), DIAGONAL[name])
    K, r, rest = flat(value_fn)
    G = hessian(value_fn, PARAMS, curvature="gauss_newton")
    np.testing.assert_allclose(K.T @ K, G, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(K.T @ r + rest, ravel_pytree(jax.grad(value_fn)(PARAMS))[0], rtol=1e-10, atol=1e-13)
    assert (jnp.abs(rest).max() > 0) == (name == "huber")
    assert K.shape == (33, ravel_pytree(PARAMS)[0].size)  # fewer outputs than parameters


def test_several_outputs_are_stacked():
    value_fn = composite(
        lambda p: {"a": mlp(p, X), "b": p}, lambda o: jnp.sum(o["a"] ** 2) + optax.tree.norm(o["b"], squared=True)
    )
    K, r, _ = flat(value_fn)
    assert K.shape == (ravel_pytree(PARAMS)[0].size,) * 2
    np.testing.assert_allclose(K.T @ K, hessian(value_fn, PARAMS, curvature="gauss_newton"), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(K.T @ r, ravel_pytree(jax.grad(value_fn)(PARAMS))[0], rtol=1e-10)


@pytest.mark.parametrize(
    ("loss", "seen"),
    [
        (lambda z: jnp.sum(z[0] ** 2) + jnp.sum(jnp.exp(z[1])), True),
        (lambda z: jnp.sum((z[0] - z[1]) ** 2), False),  # entrywise, but across outputs
        (lambda z: jnp.sum(z[0]) ** 2, False),
        (lambda z: jnp.sum(jnp.cumsum(z[0]) ** 2), False),
        (lambda z: jnp.sum(z[0][::-1] * z[0]), False),
        (lambda z: jax.nn.logsumexp(z[0]), False),
        (lambda z: jax.jit(lambda a: jnp.sum(a**4))(z[0]) + jnp.sum(jnp.where(z[1] > 0, z[1] ** 2, 0.0)), True),
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
    squared = np.sqrt(np.abs(np.linalg.eigvalsh(hessian(value_fn, jnp.ones(12), curvature="gauss_newton"))))
    assert np.abs(squared[0] / expected[-1] - 1) > 1e-3  # by rounding, between 1e-2 and 1
