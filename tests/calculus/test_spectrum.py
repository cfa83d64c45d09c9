"""Oracle: matrices with given eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt import spectrum


def quadratic(eigenvalues, seed=0, dtype: type = np.float64):
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    A = jnp.asarray((q * eigenvalues) @ q.T, dtype)
    return lambda p: 0.5 * jnp.vdot(p["x"], A @ p["x"]), {"x": jnp.zeros(n, dtype)}


@pytest.mark.parametrize("spread", [np.geomspace, np.linspace])
@pytest.mark.parametrize("n", [7, 300])
def test_the_condition_number_1e6_is_found_to_1e_6(spread, n):
    smallest, largest = spectrum(*quadratic(spread(1e-3, 1e3, n)))
    np.testing.assert_allclose(smallest, [1e-3], rtol=1e-6)
    np.testing.assert_allclose(largest, [1e3], rtol=1e-6)


def test_several_eigenvalues_of_an_indefinite_matrix_at_both_ends():
    eigenvalues = np.linspace(-5, 3, 60)
    smallest, largest = spectrum(*quadratic(eigenvalues), k=3, seed=4)
    np.testing.assert_allclose(smallest, eigenvalues[:3], rtol=1e-8)
    np.testing.assert_allclose(largest, eigenvalues[-3:], rtol=1e-8)


def test_multiple_eigenvalues_are_found_as_often_as_they_occur():
    smallest, largest = spectrum(
        *quadratic(np.array([1.0, 1.0, 2.0, 5.0, 5.0, 5.0])), k=3
    )
    np.testing.assert_allclose(smallest, [1.0, 1.0, 2.0], rtol=1e-10)
    np.testing.assert_allclose(largest, [5.0, 5.0, 5.0], rtol=1e-10)


def test_multiplicities_survive_a_basis_that_ends_with_an_invariant_subspace():
    # 16 values: the second copies start at a block's end
    eigenvalues = jnp.repeat(jnp.arange(1.0, 17.0), 4)
    smallest, largest = spectrum(
        lambda x: 0.5 * jnp.sum(eigenvalues * x**2), jnp.ones(64), k=3
    )
    np.testing.assert_allclose(smallest, 1.0, rtol=1e-10)
    np.testing.assert_allclose(largest, 16.0, rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_in_float32_the_scale_of_the_objective_does_not_matter(scale):
    eigenvalues = np.linspace(1.0, 100.0, 50, dtype=np.float32) * np.float32(scale)
    smallest, largest = spectrum(
        lambda x: 0.5 * jnp.sum(eigenvalues * x**2), jnp.ones(50, jnp.float32)
    )
    np.testing.assert_allclose(
        [smallest[0] / scale, largest[0] / scale], [1.0, 100.0], rtol=1e-3
    )


def test_a_limited_basis_gives_values_inside_the_spectrum(monkeypatch):
    monkeypatch.setattr("hessopt.calculus.spectrum.BASIS_ENTRIES", 1)
    eigenvalues = np.geomspace(1e-3, 1e3, 200)
    smallest, largest = spectrum(*quadratic(eigenvalues))
    np.testing.assert_allclose(largest, [1e3], rtol=1e-6)
    assert 1e-3 <= smallest[0] < 1.0


def test_float32_zero_and_nonfinite_hessians_and_a_scalar():
    smallest, largest = spectrum(*quadratic(np.linspace(1, 10, 50), dtype=np.float32))
    np.testing.assert_allclose([smallest[0], largest[0]], [1.0, 10.0], rtol=1e-4)
    assert spectrum(lambda x: jnp.sum(x), jnp.ones(4))[1] == 0
    assert not jnp.isfinite(
        spectrum(lambda x: jnp.sum(x**2) * jnp.nan, jnp.ones(4))[0][0]
    )
    assert spectrum(lambda x: x**2, jnp.asarray(3.0))[0] == 2.0


def test_it_runs_under_jit_and_checks_k():
    f, params = quadratic(np.array([1.0, 4.0]))
    np.testing.assert_allclose(
        jax.jit(lambda p: spectrum(f, p))(params), [[1.0], [4.0]]
    )
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\], got 3"):
        spectrum(f, params, k=3)
