import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hessopt.numerics import broyden
from hessopt.trees.sharding import zeros

EVERY = sorted(broyden.FORMULAS)


def spd(rng, n, spread=2.0):
    """A random matrix with eigenvalues 10^-spread to 10^spread."""
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    A = (Q * 10 ** rng.uniform(-spread, spread, n)) @ Q.T
    return (A + A.T) / 2


def of(base, room=4):
    """A matrix, held as the base."""
    H = zeros(broyden.shapes(len(base), room, float))
    return H._replace(weights=jnp.array([0.0, 1.0]), base=jnp.asarray(base))


def factors(formula, H, s, y):
    """tau and phi, with b by a solve."""
    b, h = s @ np.linalg.solve(H, s) / (s @ y), y @ H @ y / (s @ y)
    return tuple(
        map(float, broyden.FORMULAS[formula](jnp.asarray(b), jnp.asarray(h), len(s)))
    )


def textbook(H, s, y, tau, phi):
    """The update as the literature writes it."""
    Hy, sy = H @ y, s @ y
    yHy = y @ Hy
    v = np.sqrt(yHy) * (s / sy - Hy / yHy)
    return (H - np.outer(Hy, Hy) / yHy + phi * np.outer(v, v)) / tau + np.outer(
        s, s
    ) / sy


def ours(H, s, y, tau, phi):
    r, terms = broyden.term(*map(jnp.asarray, (s @ y, y @ H @ y, tau, phi)))
    columns = jnp.stack([s - r * (H @ y), H @ y])
    aside, direct = (
        broyden.updated(
            of(H, room),
            jnp.array(room // 2),
            columns,
            terms,
            jnp.asarray(tau),
            jnp.array(True),
        )
        for room in (3, 0)
    )
    np.testing.assert_array_equal(broyden.dense(aside), direct.base)
    return np.asarray(direct.base)


@given(
    seed=st.integers(0, 2**32 - 1), n=st.integers(1, 6), formula=st.sampled_from(EVERY)
)
@settings(max_examples=100, deadline=None)
def test_the_secant_equation_holds_and_the_matrix_stays_symmetric_and_positive_definite(
    seed, n, formula
):
    rng = np.random.default_rng(seed)
    H, s, y = spd(rng, n), rng.normal(size=n), rng.normal(size=n)
    y = y * np.sign(s @ y)
    new = ours(H, s, y, *factors(formula, H, s, y))
    size = np.linalg.norm(new) * np.linalg.norm(y) + np.linalg.norm(s)
    np.testing.assert_allclose(new @ y, s, atol=1e-10 * size)
    np.testing.assert_array_equal(new, new.T)
    assert np.linalg.eigvalsh(new).min() > -1e-13 * np.linalg.norm(new)
    np.testing.assert_allclose(
        new,
        textbook(H, s, y, *factors(formula, H, s, y)),
        atol=1e-9 * np.linalg.norm(new),
    )


def least_change(H, W, s, y):
    """The symmetric matrix nearest to H in the norm of W that maps y to s, by the
    equations of the minimum."""
    n = len(s)
    root = np.linalg.cholesky(W).T
    basis = []
    for i in range(n):
        for j in range(i, n):
            E = np.zeros((n, n))
            E[i, j] = E[j, i] = 1.0
            basis.append(E)
    A = np.stack([(root @ E @ root.T).ravel() for E in basis], 1)
    C = np.stack([E @ y for E in basis], 1)
    k = len(basis)
    kkt = np.block([[A.T @ A, C.T], [C, np.zeros((n, n))]])
    change = np.linalg.lstsq(kkt, np.concatenate([np.zeros(k), s - H @ y]), rcond=None)[
        0
    ][:k]
    return H + sum(c * E for c, E in zip(change, basis, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_bfgs_changes_the_inverse_least_and_dfp_the_matrix(seed):
    rng = np.random.default_rng(seed)
    W, H, s = spd(rng, 4, 0.5), spd(rng, 4, 0.5), rng.normal(size=4)
    y = W @ s  # any W with W s = y gives the same
    np.testing.assert_allclose(
        ours(H, s, y, 1.0, 1.0), least_change(H, W, s, y), rtol=1e-8, atol=1e-9
    )
    B = least_change(np.linalg.inv(H), np.linalg.inv(W), y, s)
    np.testing.assert_allclose(
        ours(H, s, y, 1.0, 0.0), np.linalg.inv(B), rtol=1e-7, atol=1e-8
    )


def test_self_scaling_is_the_literature_s():
    rng = np.random.default_rng(0)
    n, size = 50, 20_000
    b, a = 10 ** rng.uniform(-4, 4, size), 10 ** rng.uniform(-9, 6, size)
    h = (1 + a) / b
    a = b * h - 1
    c = np.sqrt(a / (1 + a))
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = (np.minimum(1, h * (1 - c)) - 1) / a, 1 / np.minimum(1, h * (1 - c))
        theta = np.maximum(low, np.minimum(high, (1 - b) / b))
        theta = np.where(b <= 0.5, 1.0, theta)
    sigma = 1 + a * theta
    root, plain = sigma ** (-1 / (n - 1)), np.minimum(1, 1 / b)
    tau = np.where(
        theta > 0, plain * np.minimum(root, 1 / np.where(theta > 0, theta, 1)), 0
    )
    tau = np.where(theta > 0, tau, np.minimum(plain * root, sigma))
    ours = broyden.ssbroyden(jnp.asarray(b), jnp.asarray(h), n)
    sound = a > 1e-5  # below, the literature's form cancels
    np.testing.assert_allclose(ours[0][sound], tau[sound], rtol=1e-6)
    np.testing.assert_allclose(
        ours[1][sound], ((1 - theta) / sigma)[sound], rtol=1e-5, atol=1e-9
    )
    tau, phi = broyden.ssbfgs(jnp.asarray(b), jnp.asarray(h), n)
    np.testing.assert_allclose(tau, np.minimum(1, 1 / b))
    np.testing.assert_array_equal(phi, 1)


@pytest.mark.parametrize("b", [1e-6, 0.5, 1.0, 3.0, 1e6])
@pytest.mark.parametrize("n", [1, 2, 100])
def test_self_scaling_has_its_limits(b, n):
    for h in (1 / b, (1 - 1e-15) / b, 1e9 / b):  # a = 0, a < 0 by rounding, a large
        tau, phi = broyden.ssbroyden(jnp.asarray(b), jnp.asarray(h), n)
        assert 0 < tau < np.inf
        assert 0 <= phi < np.inf
    exact = broyden.ssbroyden(jnp.asarray(1.0), jnp.asarray(1.0), n)
    np.testing.assert_array_equal(exact, (1.0, 1.0))


def test_a_fold_changes_how_the_matrix_is_held_and_nothing_else():
    rng = np.random.default_rng(0)
    H = broyden.InverseHessian(
        *(jnp.asarray(rng.normal(size=s)) for s in [(2,), (7, 7), (6, 7), (6,)])
    )
    H = H._replace(base=H.base + H.base.T)
    full = (
        H.weights[0] * np.eye(7)
        + H.weights[1] * H.base
        + H.columns.T @ jnp.diag(H.terms) @ H.columns
    )
    new = broyden.folded(H)
    assert not new.terms.any()
    np.testing.assert_array_equal(new.weights, [0.0, 1.0])
    np.testing.assert_allclose(new.base, full, rtol=1e-12)
    np.testing.assert_array_equal(new.base, new.base.T)
    np.testing.assert_allclose(broyden.dense(H), full, rtol=1e-12)
    for g in (jnp.arange(7.0), jnp.eye(7)[6]):
        np.testing.assert_allclose(broyden.product(H, g), full @ g, rtol=1e-12)


@pytest.mark.parametrize("room", [0, 3])
def test_a_restart_forgets_even_what_is_not_finite(room):
    H = of(np.full((5, 5), np.nan), room)
    if room:
        H = H._replace(terms=H.terms + np.inf)
    H = broyden.restarted(H, jnp.array(True), jnp.array(3.0))
    g = jnp.arange(5.0)
    np.testing.assert_array_equal(broyden.product(H, g), 3.0 * g)
    np.testing.assert_array_equal(broyden.dense(H), 3.0 * np.eye(5))


@pytest.mark.parametrize("n", [5, 67, 300])
def test_a_compiled_fold_keeps_the_matrix_exactly_symmetric(n):
    rng = np.random.default_rng(0)
    H = of(spd(rng, n), 8)
    H = H._replace(
        base=H.base + H.base.T,
        columns=jnp.asarray(rng.normal(size=(16, n))),
        terms=jnp.asarray(rng.normal(size=16)),
    )
    for _ in range(3):
        base = jax.jit(broyden.folded)(H).base
        np.testing.assert_array_equal(base, base.T)
        H = H._replace(weights=jnp.array([0.3, 0.7]), base=base)


@pytest.mark.parametrize("n", [127, 128])  # columns as they are, and copied
def test_stored_terms_are_folded_into_the_base(n):
    rng = np.random.default_rng(n)
    base, columns = spd(rng, n), rng.normal(size=(8, n))
    terms = rng.normal(size=8)
    H = broyden.InverseHessian(
        *map(jnp.asarray, (np.array([0.5, 2.0]), base, columns, terms))
    )
    expected = 0.5 * np.eye(n) + 2.0 * base + (columns.T * terms) @ columns
    found = broyden.dense(H)
    np.testing.assert_allclose(found, expected, atol=1e-11 * np.abs(expected).max())
    np.testing.assert_array_equal(found, found.T)
