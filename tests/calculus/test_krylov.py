import functools

import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.calculus.krylov import combination, krylov, within
from hessopt.numerics.secular import with_cubic_term, within_radius

N = 14
RNG = np.random.default_rng(0)
Q = np.linalg.qr(RNG.normal(size=(N, N)))[0]
H = jnp.asarray((Q * np.linspace(-2, 9, N)) @ Q.T)
G = jnp.asarray(RNG.normal(size=N))
RULES = {"radius": within_radius, "cubic": with_cubic_term}


def run(rule, tolerance, size=N):
    minimize = functools.partial(lambda w, z: RULES[rule](w, z, jnp.asarray(0.7)))
    found = krylov(
        lambda v: {"x": H @ v["x"]}, {"x": G}, size, minimize, jnp.asarray(tolerance)
    )
    step = minimize(found.w, found.z)
    return found, step, combination(found.S @ step.y, found.V)["x"]


@pytest.mark.parametrize("rule", RULES)
def test_in_all_dimensions_it_gives_the_step_of_all_eigenvectors(rule):
    found, _, p = run(rule, 0.0)
    w, V = np.linalg.eigh(H)
    exact = RULES[rule](jnp.asarray(w), jnp.asarray(V.T @ G), jnp.asarray(0.7))
    np.testing.assert_allclose(p, V @ exact.y, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.V["x"] @ found.V["x"].T, np.eye(N), atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_the_residual_is_that_of_the_shifted_system_and_ends_the_iteration(rule):
    found, step, p = run(rule, 0.1)
    assert 0 < found.used < N
    np.testing.assert_allclose(
        found.residual, jnp.linalg.norm(H @ p + step.shift * p + G), rtol=1e-8
    )
    assert found.residual <= 0.1


def test_what_is_not_in_use_says_nothing():
    found, _, _ = run("radius", 0.0, size=4)
    few, _, p = run("radius", 1e9, size=9)
    assert few.used == 1
    assert not jnp.any(few.z[1:])
    np.testing.assert_allclose(
        p,
        -G
        / jnp.linalg.norm(G)
        * min(0.7, float(jnp.linalg.norm(G) ** 3 / (G @ H @ G))),
    )
    np.testing.assert_allclose(
        found.w[:4], np.linalg.eigvalsh(found.V["x"] @ H @ found.V["x"].T), rtol=1e-10
    )
    np.testing.assert_allclose(
        within(found.V, {"x": G}), [jnp.linalg.norm(G), 0, 0, 0], atol=1e-12
    )


def test_an_invariant_space_ends_it():
    found = krylov(
        lambda v: 2.0 * v,
        G,
        N,
        lambda w, z: within_radius(w, z, jnp.asarray(1e9)),
        jnp.asarray(1e-12),
    )
    assert found.used == 1
