import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.numerics.semidefinite import solve_semidefinite

FACTORS = np.random.default_rng(0).normal(size=(6, 9))


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("rank", [0, 2, 6])
def test_the_solution_is_that_of_least_length(rank, damping):
    A, b = FACTORS[:, :rank] @ FACTORS[:, :rank].T, FACTORS[:, 8]
    found = solve_semidefinite(jnp.asarray(A), jnp.asarray(b), jnp.array(damping))
    expected = np.linalg.pinv(A + damping * np.eye(6), rcond=1e-10) @ b
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_refinement_gains_digits_in_single_precision():
    n = 8
    hilbert = 1.0 / (1.0 + jnp.arange(n)[:, None] + jnp.arange(n))
    A = hilbert.astype(jnp.float32)
    x = jnp.ones(n, jnp.float32)
    found = solve_semidefinite(A, A @ x + 1e-2 * x, jnp.float32(1e-2))
    np.testing.assert_allclose(found, x, rtol=1e-4)


def test_lanes_choose_separately():
    matrices = jnp.stack([jnp.eye(3), jnp.diag(jnp.array([1.0, 0.0, 4.0]))])
    b = jnp.ones((2, 3))
    found = jax.vmap(solve_semidefinite)(matrices, b, jnp.zeros(2))
    np.testing.assert_allclose(found, [[1, 1, 1], [1, 0, 0.25]], rtol=1e-14)
