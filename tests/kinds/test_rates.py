import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from sklearn.datasets import load_digits

from hessopt import (
    StepStatus,
    generalized_newton,
    grouped_newton,
    scale_by_grouped_newton,
)
from hessopt.kinds.agreement import lower_bound
from tests.problems import run_on_noise


@pytest.mark.parametrize("method", [generalized_newton, grouped_newton])
def test_evaluations_are_not_counted(method):
    tx, x = method(optax.sgd(1.0), update_every=2), jnp.ones(2)
    step = jax.jit(lambda s: tx.update(2 * x, s, x, value_fn=lambda x: jnp.sum(x**2)))
    state = tx.init(x)
    for _ in range(6):  # measured ones, and others after them
        evaluations = state[1].info.evaluations
        assert (evaluations, evaluations.dtype) == (-1, jnp.int32)
        _, state = step(state)


@pytest.mark.parametrize("method", [generalized_newton, grouped_newton])
def test_a_model_that_is_measured_almost_never(method):
    tx, x = method(optax.sgd(1.0), update_every=10**6), jnp.ones(2)
    updates, _ = tx.update(2 * x, tx.init(x), x, value_fn=lambda x: jnp.sum(x**2))
    np.testing.assert_allclose(x + updates, 0.0, atol=1e-6)


@pytest.mark.parametrize("method", [generalized_newton, grouped_newton])
def test_without_safeguard_trouble_gives_finite_updates_and_a_status(method):
    tx = method(optax.sgd(1.0), update_every=2, safeguard=False)
    x = jnp.ones(2)
    wall = lambda x: jnp.where(x < 1.5, 0.5 * (x - 3.0) ** 2, jnp.nan).sum()

    @jax.jit
    def step(x, state):
        value, grad = jax.value_and_grad(wall)(x)
        return tx.update(grad, state, x, value=value, grad=grad, value_fn=wall)

    updates, state = step(x, tx.init(x))
    np.testing.assert_allclose(updates, 2.0)  # into the wall
    for there in (x + updates, jnp.array([jnp.inf, 1.0])):
        updates, state = step(there, state)
        np.testing.assert_array_equal(updates, 0.0)
        assert state[1].info.status & StepStatus.NONFINITE


def test_a_step_that_cannot_be_represented_is_not_taken():
    tx, x = scale_by_grouped_newton(safeguard=False), jnp.float32(0.0)
    wide = lambda x: jnp.float32(-1e10) * x + jnp.float32(5e-36) * x**2
    step, state = jax.jit(lambda u, s: tx.update(u, s, x, value_fn=wide))(
        jnp.float32(1e18), tx.init(x)
    )
    assert step == 0.0
    assert state.info.status & StepStatus.NONFINITE
    np.testing.assert_allclose(state.memory.rate, 1e27, rtol=1e-5)


# The published algorithms, written from their formulas

EVERY, STEPS = 5, 40
START = {
    "a": jnp.array([0.4, -0.3]),
    "b": jnp.array([1.1, -0.2, 0.7]),
    "c": jnp.array(0.5),
}
BASES = {
    "momentum": optax.sgd(1.0, momentum=0.9),
    "adam": optax.adam(1.0),
}


def coupled(params):
    """Not quadratic, with entries between all groups."""
    every = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
    target = jnp.arange(1.0, 1.0 + every.size) / every.size
    return (
        jnp.sum(jnp.cosh(every - target))
        + jnp.sum(jnp.sin(every)) ** 2
        + 0.1 * jnp.sum(every) ** 3
    )


def grouped_phi(eta, params, u):
    """The objective along the updates, one rate for each leaf."""
    moved = [p + eta[s] * x for s, (p, x) in enumerate(zip(params, u, strict=True))]
    return coupled(moved)


def single_phi(eta, params, u):
    return grouped_phi(jnp.full(len(params), eta[0]), params, u)


@functools.partial(jax.jit, static_argnums=0)
def derivatives(phi, params, u):
    """Slopes, Hessian and third derivatives of each rate, dense."""
    params, u = jax.tree.leaves(params), jax.tree.leaves(u)
    zero = jnp.zeros(len(params) if phi is grouped_phi else 1)
    along = lambda s: lambda x: phi(zero.at[s].set(x), params, u)
    third = [jax.grad(jax.grad(jax.grad(along(s))))(0.0) for s in range(zero.size)]
    return (
        jax.grad(phi)(zero, params, u),
        jax.hessian(phi)(zero, params, u),
        jnp.array(third),
    )


def minimizer_of_cubic(g, H, d, damping):
    """The eta with `(H + lambda/2 rho D^2) eta = g` and `rho = |D eta|`, for the rho
    that makes the matrix positive definite."""
    at = lambda rho: np.linalg.solve(H + damping / 2 * rho * np.diag(d**2), g)
    excess = lambda rho: np.linalg.norm(d * at(rho)) - rho
    lowest = np.linalg.eigvalsh(H / np.outer(d, d))[0]
    low = max(0.0, -2 * lowest / damping) * (1 + 1e-12)
    high = low + 1.0
    while excess(high) > 0:
        high *= 2
    return at(scipy.optimize.brentq(excess, low, high, xtol=1e-300))


def grouped_rates(damping, curvature_decay, rate_decay):
    """Wolinski: a cubic model every few steps, averages of models and of rates."""
    model, eta = None, None

    def renew(params, u):
        nonlocal model, eta
        slopes, H, third = map(np.asarray, derivatives(grouped_phi, params, u))
        new = [-slopes, H, np.cbrt(np.abs(third))]
        w = curvature_decay
        old = new if model is None else model
        model = [w * m + (1 - w) * n for m, n in zip(old, new, strict=True)]
        found = minimizer_of_cubic(model[0], model[1], model[2], damping)
        old = found if eta is None else eta
        eta = rate_decay * old + (1 - rate_decay) * found
        return eta

    return renew


def one_rate(measure, curvature_decay, rate_decay, initial_rate):
    """Bu and Xu: b / A every few steps if both are positive, else the last rate."""
    model, eta, solved = None, initial_rate, False

    def renew(params, u):
        nonlocal model, eta, solved
        new = np.array(measure(params, u, eta))
        if model is not None:
            new = curvature_decay * model + (1 - curvature_decay) * new
        model = new
        b, A = model
        if b > 0 and A > 0:
            w = rate_decay if solved else 0.0
            eta, solved = w * eta + (1 - w) * b / A, True
        return np.full(3, eta)

    return renew


def by_derivatives(params, u, r):
    slope, H, _ = derivatives(single_phi, params, u)
    return -float(slope[0]), float(H[0, 0])


def by_value_and_slope(params, u, r):
    """phi(r) - phi(0) = -b r + A r^2 / 2"""
    b = -float(derivatives(single_phi, params, u)[0][0])
    change = along_update(params, u, r) - along_update(params, u, 0.0)
    return b, 2 * float(change + b * r) / r**2


def by_two_values(params, u, r):
    """phi(+-r) - phi(0) = -+b r + A r^2 / 2"""
    start = along_update(params, u, 0.0)
    ahead, back = (along_update(params, u, x) - start for x in (r, -r))
    return float(back - ahead) / (2 * r), float(ahead + back) / r**2


@jax.jit
def along_update(params, u, eta):
    return coupled(jax.tree.map(lambda p, x: p + eta * x, params, u))


def published(base, renew, learning_rate):
    """Parameters after every step of a base optimizer with published rates."""
    gradient, advance = jax.jit(jax.grad(coupled)), jax.jit(base.update)
    params, state, walked, eta = START, base.init(START), [], np.zeros(3)
    for t in range(STEPS):
        u, state = advance(gradient(params), state, params)
        if t % EVERY == 0:
            eta = learning_rate * renew(params, u)
        leaves, treedef = jax.tree.flatten(u)
        step = [e * x for e, x in zip(eta, leaves, strict=True)]
        params = optax.apply_updates(params, jax.tree.unflatten(treedef, step))
        walked.append(params)
    return walked


def ours(tx):
    params, state, walked = START, tx.init(START), []

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(coupled)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=coupled
        )
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
        walked.append(params)
    return walked


def same_path(a, b):
    for t, (x, y) in enumerate(zip(a, b, strict=True)):
        for p, q in zip(*map(jax.tree.leaves, (x, y)), strict=True):
            np.testing.assert_allclose(p, q, rtol=1e-8, err_msg=f"step {t}")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("damping", "curvature_decay", "rate_decay"),
    [pytest.param(1.0, 0.0, 0.0, marks=pytest.mark.slow), (0.3, 0.6, 0.5)],
)
def test_without_safeguard_grouped_newton_is_the_published_algorithm(
    base, damping, curvature_decay, rate_decay
):
    tx = grouped_newton(
        BASES[base],
        cubic_damping=damping,
        learning_rate=0.3,
        update_every=EVERY,
        curvature_decay=curvature_decay,
        rate_decay=rate_decay,
        safeguard=False,
    )
    renew = grouped_rates(damping, curvature_decay, rate_decay)
    same_path(ours(tx), published(BASES[base], renew, 0.3))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("mode", "measure", "curvature_decay", "rate_decay"),
    [
        ("exact", by_derivatives, 0.0, 0.0),
        ("exact", by_derivatives, 0.6, 0.5),
        ("forward", by_value_and_slope, 0.0, 0.0),
        ("central", by_two_values, 0.0, 0.5),
    ],
)
def test_without_safeguard_generalized_newton_is_the_published_algorithm(
    base, mode, measure, curvature_decay, rate_decay
):
    tx = generalized_newton(
        BASES[base],
        mode=mode,
        learning_rate=0.3,
        update_every=EVERY,
        curvature_decay=curvature_decay,
        rate_decay=rate_decay,
        initial_rate=0.05,
        safeguard=False,
    )
    renew = one_rate(measure, curvature_decay, rate_decay, 0.05)
    same_path(ours(tx), published(BASES[base], renew, 0.3))


# Horizon, momentum and shrinkage


@pytest.mark.parametrize("m", [0.0, 0.5, 0.9])
def test_a_gradient_of_noise_leads_as_far_for_every_momentum(m):
    curvature = 4.0
    tx = generalized_newton(
        optax.sgd(1.0, momentum=m), momentum=m, curvature_decay=0.98, safeguard=False
    )
    # without grad the agreement of batches is not known, and the factor the lower one
    rates = run_on_noise(tx, curvature, with_grad=False).rate.info.rate[300:]
    np.testing.assert_allclose(rates.mean(), (1 - m) / curvature, rtol=0.02)


@pytest.mark.parametrize("method", [generalized_newton, grouped_newton])
@pytest.mark.parametrize("m", [0.0, 0.9])
def test_batches_agree_by_half_of_the_factor_in_noise_and_wholly_without(method, m):
    """In noise the losses are stationary: a step c b / A along u decreases the average
    parabola by b' c b / A - c^2 b^2 / 2 A = 0, so b' / b = c / 2."""
    base, low = optax.sgd(1.0, momentum=m), 1 / (1 + 1.5 * m)
    state = run_on_noise(method(base)).rate.memory.agreement
    np.testing.assert_allclose(np.mean(state.share[300:]), low / 2, rtol=0.25)
    assert np.mean(lower_bound(state)[300:]) < low / 2 + 0.05

    curvatures = jnp.logspace(0, -3, 8)
    f, x = lambda x: 0.5 * curvatures @ x**2, jnp.ones(8)
    tx = method(base)

    @jax.jit
    def step(x, state):
        value, grad = jax.value_and_grad(f)(x)
        updates, state = tx.update(grad, state, x, value=value, grad=grad, value_fn=f)
        return x + updates, state

    state = tx.init(x)
    for _ in range(30):
        x, state = step(x, state)
    agreement = state.rate.memory.agreement
    np.testing.assert_allclose(agreement.share, 1.0, rtol=1e-5)
    np.testing.assert_allclose(agreement.variance, 0.0, atol=1e-9)
    assert lower_bound(agreement) > 0.85  # the steps assumed before the first one


@pytest.mark.parametrize("method", [generalized_newton, grouped_newton])
def test_the_first_rates_are_multiplied_by_the_factor_of_momentum(method):
    x, m = jnp.array([1.0, -2.0]), 0.9
    f = lambda x: jnp.sum(jnp.cosh(x))

    def first(**arguments):
        tx = method(optax.sgd(1.0), safeguard=False, **arguments)
        return tx.update(jax.grad(f)(x), tx.init(x), x, value_fn=f)[0]

    c = 1 / (1 + 1.5 * m)  # without a second batch the factor is the lower one
    for h in (1.0, 2.0):
        found = first(horizon=h, momentum=m)
        np.testing.assert_allclose(found, c * first(), rtol=1e-6)


@pytest.mark.parametrize("shrinkage", [0.0, 1.0, 1e9])
def test_shrinkage_draws_the_rates_towards_the_best_rate_for_all(shrinkage):
    H = jnp.array([[2.0, 0.5, 0.1], [0.5, 1.0, -0.3], [0.1, -0.3, 4.0]])
    params = {"a": jnp.array(1.0), "b": jnp.array(-2.0), "c": jnp.array(0.5)}
    f = lambda p: 0.5 * (x := jnp.array([p["a"], p["b"], p["c"]])) @ H @ x
    tx = scale_by_grouped_newton(
        cubic_damping=0.0, shrinkage=shrinkage, safeguard=False
    )
    grad = jax.grad(f)(params)
    u = jax.tree.map(jnp.negative, grad)
    _, state = jax.jit(lambda: tx.update(u, tx.init(params), params, value_fn=f))()

    # phi(eta) = f(params + eta * u)
    u, x = np.array([*u.values()]), np.array([*params.values()])
    A, b = H * u * u[:, None], -u * (H @ x)
    one = b.sum() / A.sum()
    w = shrinkage * np.diag(A)
    expected = np.linalg.solve(A + np.diag(w), b + w * one)
    np.testing.assert_allclose(state.info.rate, expected, rtol=1e-5)
    if shrinkage > 1e6:
        np.testing.assert_allclose(state.info.rate, one, rtol=1e-5)


@pytest.mark.parametrize("method", [generalized_newton, grouped_newton])
@pytest.mark.parametrize(
    "base",
    [
        optax.sgd(1.0, momentum=0.9),
        pytest.param(optax.adam(1.0), marks=pytest.mark.slow),
    ],
    ids=["momentum", "adam"],
)
def test_a_plain_relu_network_trains_without_diverging(base, method):
    """With rates of 0.1 for momentum and 0.01 for Adam, the best of a grid, the losses
    of the twelfth epoch are 0.034 and 0.036. An epoch may be above the one before."""
    digits = load_digits()
    x = jnp.asarray((digits.data - digits.data.mean(0)) / (digits.data.std(0) + 1e-8))
    x, y = x.astype(jnp.float32), jnp.asarray(digits.target)
    sizes, keys = (64, 48, 48, 10), jax.random.split(jax.random.key(0), 15)
    params = [
        {"w": jax.random.normal(key, (m, n), jnp.float32) * (2 / m) ** 0.5}
        | {"b": jnp.zeros(n, jnp.float32)}
        for key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]

    def loss(params, x, y):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        z = x @ params[-1]["w"] + params[-1]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    tx = method(base)

    def step(carry, rows):
        params, state = carry
        data = {"x": x[rows], "y": y[rows]}
        value, grad = jax.value_and_grad(loss)(params, **data)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=loss, **data
        )
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def epoch(carry, key):
        rows = jax.random.permutation(key, len(x))[:1700].reshape(17, 100)
        return jax.lax.scan(step, carry, rows)

    carry, losses = (params, tx.init(params)), []
    for key in keys[3:]:
        carry, values = epoch(carry, key)
        losses.append(float(values.mean()))
    assert losses[-1] < 0.08
    assert max(np.array(losses) / np.minimum.accumulate(losses)) < 3.0
