import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.numerics.nystrom import nystrom, preconditioner


def decaying(rank, n=60):
    Q = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (n, n)))[0]
    w = jnp.where(jnp.arange(n) < rank, 2.0 ** -jnp.arange(n), 0.0)
    return (Q * w) @ Q.T


def sketch(A, k):
    W = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (len(A), k), A.dtype))[0]
    return nystrom(W, A @ W)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_matrix_of_small_rank_is_reproduced(dtype):
    A = decaying(5).astype(dtype)
    U, w = sketch(A, 9)
    eps = jnp.finfo(dtype).eps
    np.testing.assert_allclose((U * w) @ U.T, A, atol=50 * eps)
    assert jnp.all(jnp.isfinite(U))
    assert jnp.all(w >= 0)


def test_the_preconditioned_matrix_is_well_conditioned():
    A, damping = decaying(60), jnp.array(1e-4)
    apply = preconditioner(sketch(A, 20), damping)
    eigenvalues = jnp.linalg.eigvals(jax.vmap(apply)(A + damping * jnp.eye(60))).real
    assert jnp.max(eigenvalues) / jnp.min(eigenvalues) < 4
    assert jnp.linalg.cond(A + damping * jnp.eye(60)) > 5e3


def test_zero_is_left_alone():
    apply = preconditioner(sketch(jnp.zeros((6, 6)), 3), jnp.array(0.0))
    np.testing.assert_array_equal(apply(jnp.arange(6.0)), jnp.arange(6.0))
