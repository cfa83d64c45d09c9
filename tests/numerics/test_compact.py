import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.numerics import compact
from hessopt.trees.sharding import zeros


def curved_pairs(count, n=6, seed=0):
    """Pairs of a convex quadratic."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n))
    steps = rng.normal(size=(count, n))
    return [(s, (root @ root.T + np.eye(n)) @ s) for s in steps]


def inverse_bfgs(pairs, gamma):
    """The textbook product form, from the oldest pair to the newest."""
    n = len(pairs[0][0]) if pairs else 6
    H = gamma * np.eye(n)
    for s, y in pairs:
        rho = 1 / (s @ y)
        V = np.eye(n) - rho * np.outer(y, s)
        H = V.T @ H @ V + rho * np.outer(s, s)
    return H


def filled(pairs, memory):
    """The compact form after these pairs, and its slots."""
    small, S, Y = (
        zeros(compact.shapes(memory, float)),
        np.zeros((memory, 6)),
        np.zeros((memory, 6)),
    )
    for s, y in pairs:
        S[small.slot], Y[small.slot] = s, y
        small = compact.append(small, jnp.asarray(S @ y), jnp.asarray(Y @ y))
    return small, S, Y


@pytest.mark.parametrize("memory", [1, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_the_product_is_that_of_the_product_form_over_the_last_pairs(memory, count):
    pairs, g = curved_pairs(count), np.arange(1.0, 7.0)
    small, S, Y = filled(pairs, memory)
    gamma = (
        pairs[-1][0] @ pairs[-1][1] / (pairs[-1][1] @ pairs[-1][1]) if pairs else 0.3
    )
    v, w = compact.coefficients(
        small, jnp.asarray(S @ g), jnp.asarray(Y @ g), jnp.asarray(gamma)
    )
    np.testing.assert_allclose(
        gamma * g + v @ S + w @ Y, inverse_bfgs(pairs[-memory:], gamma) @ g, rtol=1e-10
    )
    assert int(small.used.sum()) == min(memory, count)
    if count:
        np.testing.assert_allclose(small.gamma, gamma)


def test_an_emptied_memory_keeps_its_scale():
    small, S, Y = filled(curved_pairs(3), 5)
    empty = compact.emptied(small)
    assert not empty.used.any()
    assert empty.gamma == small.gamma
    v, w = compact.coefficients(
        empty, jnp.asarray(S @ S[0]), jnp.asarray(Y @ S[0]), empty.gamma
    )
    assert not v.any()
    assert not w.any()


def test_what_stands_in_a_free_slot_is_ignored():
    small, S, Y = filled(curved_pairs(2), 3)
    garbage = jnp.where(small.used, 1.0, jnp.inf)
    v, w = compact.coefficients(
        small, garbage * (S @ S[0]), garbage * (Y @ S[0]), small.gamma
    )
    assert np.isfinite(v).all()
    assert np.isfinite(w).all()


def test_a_pair_without_curvature_makes_no_infinities():
    small, *_ = filled(curved_pairs(2), 3)
    spoilt = compact.append(small, jnp.zeros(3), jnp.zeros(3))
    assert np.isfinite(spoilt.R_inv).all()
    assert spoilt.gamma == 0  # none is known
