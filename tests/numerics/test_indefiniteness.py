"""Oracle: NumPy's eigendecomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.numerics.indefiniteness import INDEFINITE_TREATMENTS

MATRIX = np.array([[1.0, 2.0, 0.0], [2.0, -3.0, 0.5], [0.0, 0.5, 4.0]])
VECTOR = np.array([1.0, -2.0, 3.0])


def solve(word, matrix):
    treatment = INDEFINITE_TREATMENTS[word]
    found = jax.jit(treatment.factorize)(jnp.asarray(matrix), jnp.zeros(()))
    return found, treatment.solve(found.factor, jnp.asarray(VECTOR))


@pytest.mark.parametrize("word", INDEFINITE_TREATMENTS)
def test_a_positive_definite_matrix_is_solved_exactly(word):
    matrix = MATRIX @ MATRIX.T + np.eye(3)
    found, x = solve(word, matrix)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, VECTOR), rtol=1e-12)
    assert found.ok
    assert not found.indefinite


def test_an_indefinite_matrix_becomes_what_the_word_says():
    w, v = np.linalg.eigh(MATRIX)
    for word, expected in [("absolute", (v * np.abs(w)) @ v.T), ("none", MATRIX)]:
        found, x = solve(word, MATRIX)
        np.testing.assert_allclose(x, np.linalg.solve(expected, VECTOR), rtol=1e-12)
        assert found.indefinite
    found, x = solve("shift", MATRIX)
    np.testing.assert_allclose(
        x, np.linalg.solve(MATRIX + found.shift * np.eye(3), VECTOR), rtol=1e-12
    )
    assert found.indefinite


def test_a_remembered_shift_does_not_hide_a_negative_diagonal():
    found = INDEFINITE_TREATMENTS["shift"].factorize(
        jnp.diag(jnp.array([1.0, -0.01])), jnp.asarray(1.0)
    )
    assert (found.attempts, found.indefinite) == (1, True)


@pytest.mark.parametrize("word", INDEFINITE_TREATMENTS)
def test_a_nonfinite_matrix_is_not_ok(word):
    assert not solve(word, np.full((3, 3), np.nan))[0].ok


def test_a_singular_matrix_has_no_solution_as_it_is_and_a_finite_one_made_positive():
    singular = np.diag([0.0, 1.0, 2.0])
    assert not solve("none", singular)[0].ok
    for word in ("shift", "absolute"):
        found, x = solve(word, singular)
        assert found.ok
        assert jnp.all(jnp.isfinite(x))
