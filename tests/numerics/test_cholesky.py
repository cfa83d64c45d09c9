"""Oracle: NumPy's eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hessopt.numerics.cholesky import FIRST_SHIFT, shifted_cholesky

factorize = jax.jit(shifted_cholesky)


def symmetric(eigenvalues, seed=0, dtype=np.float64):
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    matrix = (q * np.asarray(eigenvalues)) @ q.T
    return jnp.asarray((matrix + matrix.T) / 2, dtype)


def residual(found, matrix):
    L = np.tril(found.factor)
    shifted = np.asarray(matrix) + found.shift * np.eye(len(matrix))
    return np.linalg.norm(L @ L.T - shifted) / np.linalg.norm(shifted)


def test_a_positive_definite_matrix_is_factorised_as_it_is():
    matrix = symmetric([1e-6, 1.0, 2.0, 30.0])
    found = factorize(matrix, 0.0)
    assert found.ok
    assert found.shift == 0
    assert found.attempts == 1
    assert residual(found, matrix) < 1e-14


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-10, 10), min_size=4, max_size=4),
    st.integers(0, 99),
    st.floats(0, 100),
)
def test_the_shift_makes_the_matrix_positive_definite_and_is_not_much_too_large(
    eigenvalues, seed, remembered
):
    matrix = symmetric(eigenvalues, seed)
    norm = np.linalg.norm(matrix)
    if norm < 1e-6:
        return
    found = factorize(matrix, remembered)
    needed = max(0.0, -min(eigenvalues))
    assert found.ok
    assert residual(found, matrix) < 1e-13
    assert found.shift >= needed - 1e-12 * norm
    assert found.shift <= max(4.01 * needed + 1.01 * FIRST_SHIFT * norm, remembered)


def test_a_quarter_of_the_remembered_shift_is_tried_and_then_four_times_as_much():
    matrix, remembered = symmetric([-1.0, 1.0, 2.0]), (8.0, 3.0, 0.8)
    shifts = [float(factorize(matrix, s).shift) for s in remembered]
    np.testing.assert_allclose(shifts, [2.0, 3.0, 3.2])
    assert [int(factorize(matrix, s).attempts) for s in remembered] == [1, 2, 3]
    np.testing.assert_allclose(factorize(matrix, 1e9).shift, np.linalg.norm(matrix))


def test_a_remembered_shift_ends_at_zero_on_a_positive_definite_matrix():
    matrix, shift, steps = symmetric([1.0, 2.0, 3.0]), jnp.asarray(1.0), 0
    while shift > 0:
        shift, steps = factorize(matrix, shift).shift, steps + 1
    assert steps < 40


@settings(max_examples=30, deadline=None)
@given(st.integers(-100, 100), st.integers(0, 20))
def test_scaling_the_matrix_scales_the_shift_and_changes_no_decision(exponent, seed):
    matrix = symmetric([-3.0, -1.0, 0.5, 2.0], seed, np.float32)
    scale = np.float32(2.0) ** exponent
    one, other = (
        factorize(matrix, np.float32(0)),
        factorize(matrix * scale, np.float32(0)),
    )
    assert other.ok
    assert one.attempts == other.attempts
    np.testing.assert_allclose(other.shift, one.shift * scale, rtol=1e-6)


def test_a_singular_matrix_is_shifted_off_its_null_space():
    found = factorize(symmetric([0.0, 1.0, 2.0]), 0.0)
    assert found.ok
    assert 0 < found.shift < 1e-2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_matrix_is_not_ok_and_costs_nothing(bad):
    found = factorize(symmetric([1.0, 2.0]).at[0, 1].set(bad), 0.0)
    assert not found.ok
    assert found.attempts == 0


def test_a_zero_matrix_is_not_ok_and_an_empty_one_is():
    assert not factorize(jnp.zeros((2, 2)), 0.0).ok
    assert factorize(jnp.zeros((0, 0)), 0.0).ok


def test_vmap_equals_a_loop():
    matrices = jnp.stack(
        [symmetric([-1.0, 2.0]), symmetric([1.0, 2.0]), symmetric([-5.0, -4.0])]
    )
    batched = jax.jit(jax.vmap(shifted_cholesky))(matrices, jnp.zeros(3))
    for lane, matrix in enumerate(matrices):
        alone = factorize(matrix, 0.0)
        np.testing.assert_allclose(
            batched.factor[lane], alone.factor, rtol=1e-12, atol=1e-15
        )
        assert batched.attempts[lane] == alone.attempts
