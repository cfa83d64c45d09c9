import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.numerics.cg import conjugate_gradients, forcing
from hessopt.trees.vectors import inner_products

N = 12


def spectrum_of(values, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(N, N)))[0]
    return (Q * values) @ Q.T


def solve(H, g, tolerance=0.0, max_iterations=N, precondition=lambda r: r, start=None):
    H = jnp.asarray(H)
    return conjugate_gradients(
        lambda v: H @ v,
        jnp.asarray(g),
        start,
        gram=inner_products,
        precondition=precondition,
        tolerance=jnp.asarray(tolerance),
        max_iterations=max_iterations,
    )


def textbook(H, g, steps):
    """Algorithm 5.2 of Nocedal and Wright."""
    x, r, p = np.zeros(N), -g, g
    for _ in range(steps):
        alpha = r @ r / (p @ H @ p)
        x, new = x + alpha * p, r + alpha * H @ p
        r, p = new, -new + (new @ new) / (r @ r) * p
    return x


G = np.random.default_rng(1).normal(size=N)
H = spectrum_of(np.linspace(1, 30, N))


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_iterates_are_those_of_the_textbook(steps):
    found = solve(H, G, max_iterations=steps)
    np.testing.assert_allclose(found.x, textbook(H, G, steps), rtol=1e-11)
    np.testing.assert_allclose(
        found.residual, np.linalg.norm(G - H @ found.x), rtol=1e-9
    )
    assert found.products == steps


def test_as_many_products_as_there_are_distinct_eigenvalues():
    found = solve(
        spectrum_of(np.repeat([1.0, 5.0, 20.0], N // 3)),
        G,
        tolerance=1e-10 * np.linalg.norm(G),
    )
    assert found.products == 3
    assert not found.negative


def test_preconditioned_by_the_inverse_one_product_suffices():
    inverse = jnp.asarray(np.linalg.inv(H))
    found = solve(H, G, tolerance=1e-10, precondition=lambda r: inverse @ r)
    assert found.products == 1
    np.testing.assert_allclose(found.x, np.linalg.solve(H, G), rtol=1e-10)


def test_from_a_start_it_solves_for_what_is_left():
    x = np.linalg.solve(H, G) + 1e-3
    found = solve(H, G, tolerance=1e-9, start=(jnp.asarray(x), jnp.asarray(H @ x)))
    np.testing.assert_allclose(H @ found.x, G, atol=1e-9)


def test_a_direction_of_negative_curvature_is_taken_by_its_magnitude():
    values = np.linspace(-3, 8, N)
    found = solve(spectrum_of(values), G)
    assert found.negative
    assert found.products < N
    before = textbook(spectrum_of(values), G, int(found.products) - 1)
    d = np.asarray(found.x) - before
    assert d @ spectrum_of(values) @ d <= 0 < d @ G
    # along an eigenvector it is the step that the curvature would ask for with the
    # other sign
    np.testing.assert_allclose(solve(-2 * np.eye(N), G).x, G / 2, rtol=1e-12)


def test_without_curvature_the_step_has_unit_length():
    found = solve(np.zeros((N, N)), G)
    assert found.negative
    np.testing.assert_allclose(found.x, G / np.linalg.norm(G), rtol=1e-12)


@pytest.mark.parametrize("at", [0, 2])
def test_a_product_that_is_not_finite_ends_it_with_what_came_before(at):
    def multiply(v):
        return jnp.where(
            jnp.abs(v - G).max() == 0 if at == 0 else jnp.abs(v - G).max() > 1,
            jnp.nan,
            H @ v,
        )

    found = conjugate_gradients(
        multiply,
        jnp.asarray(G),
        None,
        gram=inner_products,
        precondition=lambda r: r,
        tolerance=jnp.zeros(()),
        max_iterations=N,
    )
    assert not found.finite
    np.testing.assert_allclose(
        found.x, textbook(H, G, int(found.products) - 1), rtol=1e-10
    )


def test_the_forcing_term_falls_with_the_gradient_and_is_at_most_a_half():
    assert forcing(jnp.asarray(4.0), jnp.asarray(1.0)) == 0.5
    assert forcing(jnp.asarray(1e-4), jnp.asarray(1.0)) == pytest.approx(1e-2)
    assert forcing(jnp.zeros(()), jnp.zeros(())) == 0.0


def test_trees_are_solved_leaf_by_leaf():
    tree = {"a": jnp.asarray(G[:5]), "b": jnp.asarray(G[5:]).reshape(1, 7)}
    flat, restore = jax.flatten_util.ravel_pytree(tree)
    found = conjugate_gradients(
        lambda v: restore(jnp.asarray(H) @ jax.flatten_util.ravel_pytree(v)[0]),
        tree,
        None,
        gram=inner_products,
        precondition=lambda r: r,
        tolerance=jnp.asarray(1e-10),
        max_iterations=2 * N,
    )
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(found.x)[0], np.linalg.solve(H, flat), rtol=1e-9
    )
