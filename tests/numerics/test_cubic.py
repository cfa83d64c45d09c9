import functools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from scipy.optimize import brentq

from hessopt import StepStatus
from hessopt.numerics.cubic import solve_cubic

SIZE = 6
COUNT = 50
DIGITS = 80


def symmetric(rng, spectrum):
    Q = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))[0]
    A = (Q * spectrum) @ Q.T
    return (A + A.T) / 2, Q


def definite(rng):
    return (
        rng.normal(size=SIZE),
        symmetric(rng, 10 ** rng.uniform(-2, 1, SIZE))[0],
        10 ** rng.uniform(-1, 1, SIZE),
    )


def indefinite(rng):
    return (
        rng.normal(size=SIZE),
        symmetric(rng, rng.normal(size=SIZE))[0],
        10 ** rng.uniform(-1, 1, SIZE),
    )


def zero_scale_with_definite_complement(rng):
    g, H, d = indefinite(rng)
    d[:2] = 0
    H[:2, :2] = symmetric(rng, rng.uniform(0.5, 2, 2))[0]
    return g, H, d


def zero_scale_with_indefinite_complement(rng):
    g, H, d = indefinite(rng)
    d[:2] = 0
    H[:2, :2] = symmetric(rng, np.array([1.0, -0.5]))[0]
    return g, H, d


def hard(rng):
    """The gradient is orthogonal to the lowest eigenvector of the pencil, exactly so: a
    block of its own."""
    g, H, d = indefinite(rng)
    g[0], H[0], H[:, 0] = 0, 0, 0
    H[0, 0] = -(10 ** rng.uniform(0, 2)) * d[0] ** 2
    H[1:, 1:] = symmetric(rng, rng.uniform(0.1, 1, SIZE - 1))[0]
    return g, H, d


def nearly_hard(rng):
    g, H, d = hard(rng)
    g[0] = 10 ** rng.uniform(-14, -4)
    return g, H, d


def without_gradient(rng):
    return np.zeros(SIZE), *indefinite(rng)[1:]


def without_gradient_definite(rng):
    return np.zeros(SIZE), *definite(rng)[1:]


def one_scale(rng):
    g, H, d = indefinite(rng)
    return g, H, np.full_like(d, d[0])


def nearly_singular(rng):
    return (
        rng.normal(size=SIZE),
        symmetric(rng, np.array([1e-5, 1, 1, 2, 3, 4]))[0],
        10 ** rng.uniform(-1, 1, SIZE),
    )


def no_curvature(rng):
    return rng.normal(size=SIZE), np.zeros((SIZE, SIZE)), 10 ** rng.uniform(-3, 3, SIZE)


def without_damping(rng):
    return *definite(rng), 0.0


def without_damping_indefinite(rng):
    return *indefinite(rng), 0.0


def idle_group(rng):
    g, H, d = indefinite(rng)
    g[0], d[0], H[0], H[:, 0] = 0, 0, 0, 0
    return g, H, d


KINDS = [
    definite,
    indefinite,
    zero_scale_with_definite_complement,
    zero_scale_with_indefinite_complement,
    hard,
    nearly_hard,
    without_gradient,
    without_gradient_definite,
    one_scale,
    nearly_singular,
    no_curvature,
    idle_group,
    without_damping,
    without_damping_indefinite,
]
SPREADS = (0.0, 10.0)


def case(kind, spread, seed):
    """A case, its groups stretched over this many orders of magnitude."""
    rng = np.random.default_rng(seed)
    g, H, d, *damping = kind(rng)
    stretch = 2.0 ** np.round(rng.uniform(-spread / 2, spread / 2, SIZE) * np.log2(10))
    return (
        g * stretch,
        H * stretch * stretch[:, None],
        d * stretch,
        damping[0] if damping else 10 ** rng.uniform(-3, 2),
    )


def value(g, H, d, lam, eta):
    """The model, without rounding."""
    g, d, eta, H = (mp.matrix(np.asarray(a, float).tolist()) for a in (g, d, eta, H))
    rows = range(len(g))
    radius = mp.sqrt(sum((d[i] * eta[i]) ** 2 for i in rows))
    return (
        (g.T * eta)[0] + (eta.T * H * eta)[0] / 2 + mp.mpf(float(lam)) * radius**3 / 6
    )


@functools.cache
def lowest(kind, spread, seed):
    """The global minimum of a case, None where there is none; and whether H is positive
    definite."""
    with mp.workdps(DIGITS):
        g, H, d, lam = case(kind, spread, seed)
        keep = [i for i in range(SIZE) if d[i] or g[i] or H[i].any()]
        free, tied = [i for i in keep if not d[i]], [i for i in keep if d[i]]
        H, g = mp.matrix(H.tolist()), mp.matrix(g.tolist())
        block = lambda rows, columns: mp.matrix(
            [[H[i, j] for j in columns] for i in rows]
        )
        convex = len(keep) == SIZE and min(mp.eigsy(H, eigvals_only=True)) > 0
        A, b, constant = block(tied, tied), mp.matrix([g[i] for i in tied]), mp.mpf(0)
        if free:
            F, C, f = (
                block(free, free),
                block(free, tied),
                mp.matrix([g[i] for i in free]),
            )
            if min(mp.eigsy(F, eigvals_only=True)) <= 0:
                return None, convex
            A, b, constant = (
                A - C.T * (F**-1) * C,
                b - C.T * (F**-1) * f,
                -(f.T * (F**-1) * f)[0] / 2,
            )
        if not lam:
            return (-(b.T * (A**-1) * b)[0] / 2 if convex else None), convex
        D = mp.diag([1 / mp.mpf(d[i]) for i in tied])
        E, Q = mp.eigsy(D * A * D)
        z, lam, rows = Q.T * (D * b), mp.mpf(float(lam)), range(len(tied))
        # r = |y| with y = -(E + lam r / 2)^-1 z, from the right of the singularity
        size = lambda r: mp.sqrt(
            sum((z[i] / (E[i] + lam * r / 2)) ** 2 for i in rows if z[i])
        )
        pole = max(mp.mpf(0), -2 * min(E) / lam)
        low, high = pole, pole + 2 * mp.sqrt(2 * mp.norm(z) / lam) + mp.mpf(10) ** -60
        for _ in range(300):
            r = (low + high) / 2
            low, high = (r, high) if size(r) > r else (low, r)
        r = high
        # -z'(E + lam r / 2)^-1 z / 2 - lam r^3 / 12 also holds in the hard case
        terms = (
            z[i] ** 2 / (E[i] + lam * r / 2)
            for i in rows
            if abs(E[i] + lam * r / 2) > mp.mpf(10) ** -50
        )
        best = constant - sum(terms) / 2 - lam * r**3 / 12
        return (best if abs(best) > mp.mpf(10) ** -DIGITS else mp.mpf(0)), convex


solve = jax.jit(jax.vmap(solve_cubic))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_it_is_the_global_minimum(kind, spread, dtype):
    cases = [case(kind, spread, seed) for seed in range(COUNT)]
    solutions = solve(
        *(jnp.asarray(np.stack(a), dtype) for a in zip(*cases, strict=True))
    )
    for seed in range(COUNT):
        best, convex = lowest(kind, spread, seed)
        eta, status = (
            np.asarray(solutions.eta[seed], float),
            StepStatus(int(solutions.status[seed])),
        )
        expected = StepStatus.OK if convex else StepStatus.NEGATIVE_CURVATURE
        assert status == (
            expected | StepStatus.UNBOUNDED_MODEL if best is None else expected
        )
        np.testing.assert_allclose(
            solutions.radius[seed], np.linalg.norm(cases[seed][2] * eta), rtol=1e-6
        )
        if best is None:
            assert not eta.any()
            continue
        with mp.workdps(DIGITS):
            excess = float(value(*cases[seed], eta) - best) / float(abs(best) or 1)
        assert abs(excess) < (1e-12 if dtype == np.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_one_group_has_a_closed_form(dtype):
    rng = np.random.default_rng(0)
    g, h = rng.normal(size=(2, COUNT)) * 10 ** rng.uniform(-6, 6, (2, COUNT))
    d, lam = 10 ** rng.uniform(-3, 3, (2, COUNT))
    c = lam * d**3
    root = np.sqrt(h**2 + 2 * c * np.abs(g))
    r = np.where(h > 0, 2 * np.abs(g) / (np.abs(h) + root), (root - h) / c)
    arrays = (g[:, None], h[:, None, None], d[:, None], lam)
    solutions = solve(*(jnp.asarray(a, dtype) for a in arrays))
    np.testing.assert_allclose(
        solutions.eta[:, 0],
        -np.sign(g) * r,
        rtol=1e-12 if dtype == np.float64 else 1e-5,
    )


def test_many_groups_in_single_precision():
    rng = np.random.default_rng(0)
    size = 60
    Q = np.linalg.qr(rng.normal(size=(size, size)))[0]
    d = 10 ** rng.uniform(-5, 5, size)
    E, lam = rng.normal(size=size), 1.0
    z = rng.normal(size=size)
    H, g = (Q * E) @ Q.T * d * d[:, None], d * (Q @ z)
    y = lambda r: -z / (E + lam * r / 2)
    exact = y(
        brentq(lambda r: np.linalg.norm(y(r)) - r, -2 * E.min() / lam + 1e-9, 1e3)
    )
    found = Q.T @ (
        d
        * np.asarray(
            solve_cubic(*(jnp.asarray(a, jnp.float32) for a in (g, H, d, lam))).eta,
            float,
        )
    )
    model = lambda y: z @ y + E @ y**2 / 2 + lam * np.linalg.norm(y) ** 3 / 6
    np.testing.assert_allclose(model(found), model(exact), rtol=1e-6)


def test_what_is_not_finite_is_named_and_gives_no_step():
    good = (np.ones(2), np.eye(2), np.ones(2), 1.0)
    for place in range(3):
        bad = list(good)
        bad[place] = bad[place] * np.nan
        eta, radius, status = solve_cubic(*map(jnp.asarray, bad))
        assert not eta.any()
        assert radius == 0
        assert StepStatus(int(status)) == StepStatus.NONFINITE


@pytest.mark.parametrize(
    ("g", "h", "d", "lam"),
    [
        (1e-15, 1.0, 3e-13, 1.0),
        (1e-6, 1.0, 1e-16, 1.0),
        (7.29e-3, 2.87e5, 1e-10, 1.5e-10),
        (1.76e8, 1.35e-14, 5.27e12, 2.23e12),
        (1e22, 1.0, 1.0, 1e-22),
        (1e-22, 1.0, 1.0, 1e22),
    ],
)
def test_single_precision_has_room_for_small_and_large(g, h, d, lam):
    c = lam * d**3
    r = 2 * g / (h + np.sqrt(h**2 + 2 * c * g))
    eta, radius, status = solve_cubic(
        *(jnp.asarray(a, jnp.float32) for a in ([g], [[h]], [d], lam))
    )
    np.testing.assert_allclose(eta, [-r], rtol=1e-4)
    np.testing.assert_allclose(radius, d * r, rtol=1e-4)
    assert status == 0


def test_no_groups_give_no_rates():
    eta, radius, status = solve_cubic(
        jnp.zeros(0), jnp.zeros((0, 0)), jnp.zeros(0), 1.0
    )
    assert (eta.shape, float(radius), int(status)) == ((0,), 0.0, 0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="damping must be at least 0, got -1"):
        solve_cubic(jnp.ones(2), jnp.eye(2), jnp.ones(2), -1.0)
    with pytest.raises(
        ValueError, match=r"must be .*, got \(2,\), \(3, 3\), \(2,\) and \(\)"
    ):
        solve_cubic(jnp.ones(2), jnp.eye(3), jnp.ones(2), 1.0)
