import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt
from hessopt import StepStatus, inverse_hessian, minimize, scale_by_bfgs
from hessopt.numerics import broyden
from hessopt.transforms import bfgs as module

EVERY = sorted(broyden.FORMULAS)
SEARCH = hessopt.scale_by_wolfe_linesearch(curv_rtol=1e-3, max_steps=60)


def recursion(H, s, y, formula):
    """The textbook update, dense, with b by a solve."""
    Hy, sy = H @ y, s @ y
    yHy = y @ Hy
    tau, phi = map(
        float,
        broyden.FORMULAS[formula](s @ np.linalg.solve(H, s) / sy, yHy / sy, len(s)),
    )
    v = np.sqrt(yHy) * (s / sy - Hy / yHy)
    return (H - np.outer(Hy, Hy) / yHy + phi * np.outer(v, v)) / tau + np.outer(
        s, s
    ) / sy


def status(state):
    return StepStatus(int(state.info.status))


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def valley(x):
    """Curvatures over four orders, with a quartic term."""
    return 0.5 * jnp.sum(jnp.logspace(0, 4, x.size) * x**2) + 0.025 * jnp.sum(x**4)


@pytest.fixture(params=[0, 1, 3], ids=lambda room: f"room for {room}")
def _room(request, monkeypatch):
    """Terms kept aside, on few parameters."""
    monkeypatch.setattr(module, "MAX_DIRECT_SIZE", 0)
    monkeypatch.setattr(module, "FOLD_PERIOD", request.param)


@pytest.mark.usefixtures("_room")
@pytest.mark.parametrize("formula", EVERY)
def test_directions_are_those_of_the_dense_recursion(formula):
    tx = scale_by_bfgs(formula)
    update, gradient = jax.jit(tx.update), jax.jit(jax.grad(valley))
    x = np.random.default_rng(0).normal(size=30)
    state, H, old, worst = tx.init(jnp.asarray(x)), None, None, 0.0
    for _ in range(40):
        g = np.asarray(gradient(x))
        if old is not None:
            s, y = x - old[0], g - old[1]
            H = recursion(
                10 * (s @ s) / (s @ y) * np.eye(30) if H is None else H, s, y, formula
            )
        p, state = update(jnp.asarray(g), state, jnp.asarray(x))
        exact = g / np.linalg.norm(g) if H is None else H @ g
        worst, old = max(worst, relative(p, exact)), (x, g)
        curvature = exact @ (np.logspace(0, 4, 30) * exact)
        x = x - 0.9 * (g @ exact) / curvature * exact
    assert worst < 1e-10
    assert int(state.info.pairs) == 39
    assert status(state) == StepStatus.OK
    np.testing.assert_allclose(
        inverse_hessian(state), H, rtol=1e-8, atol=1e-10 * np.abs(H).max()
    )


@pytest.mark.parametrize("formula", EVERY)
def test_on_a_quadratic_with_an_exact_search_it_ends_in_n_steps(formula):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(8, 8))
    A = jnp.asarray(root @ root.T + np.eye(8))
    tx, x = scale_by_bfgs(formula), jnp.asarray(rng.normal(size=8))
    state, start = tx.init(x), jnp.linalg.norm(A @ x)
    for _ in range(9):
        g = A @ x
        p, state = tx.update(g, state, x)
        if float(jnp.linalg.norm(g)) > 1e-10 * start:
            x = x - (g @ p) / (p @ A @ p) * p
    assert jnp.linalg.norm(A @ x) < 1e-9 * start
    if formula in ("bfgs", "dfp"):
        np.testing.assert_allclose(
            inverse_hessian(state), jnp.linalg.inv(A), rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("formula", ["ssbfgs", "ssbroyden"])
def test_self_scaling_knows_the_step_that_was_taken(formula):
    """b = s'Bs / s'y, whatever the rate between the direction and the step."""
    x, H, old = np.array([1.0, -0.5, 2.0, 0.3]), None, None
    tx = scale_by_bfgs(formula)
    state, gradient = tx.init(jnp.asarray(x)), jax.grad(valley)
    for rate in (1e-4, 0.3, 0.02, 1.7, 0.5, 0.9):
        g = np.asarray(gradient(x))
        if old is not None:
            s, y = x - old[0], g - old[1]
            H = recursion(
                10 * (s @ s) / (s @ y) * np.eye(4) if H is None else H, s, y, formula
            )
        p, state = tx.update(jnp.asarray(g), state, jnp.asarray(x))
        if H is not None:
            np.testing.assert_allclose(p, H @ g, rtol=1e-9)
        old, x = (x, g), x - rate * np.asarray(p) * (1e-4 if H is None else 1.0)


@pytest.mark.parametrize("formula", ["ssbfgs", "ssbroyden"])
def test_a_step_that_left_the_direction_is_not_self_scaled(formula):
    tx, x = scale_by_bfgs(formula), jnp.array([1.0, 1.0, 1.0])
    state = tx.init(x)
    for _ in range(3):
        p, state = tx.update(jax.grad(valley)(x), state, x)
        H, old, x = (
            np.asarray(inverse_hessian(state)),
            x,
            x - 0.1 * p / jnp.linalg.norm(p),
        )
    x = old - jnp.clip(10 * p, -0.05, 0.05)  # not a multiple of p
    s, y = np.asarray(x - old), np.asarray(jax.grad(valley)(x) - jax.grad(valley)(old))
    _, state = tx.update(jax.grad(valley)(x), state, x)
    np.testing.assert_allclose(
        inverse_hessian(state), recursion(H, s, y, "bfgs"), rtol=1e-9, atol=1e-12
    )


def test_the_pairs_come_from_grad_and_the_direction_is_applied_to_the_updates():
    tx, x = scale_by_bfgs(), jnp.array([1.0, -2.0, 0.5])
    A, v = jnp.diag(jnp.array([1.0, 10.0, 100.0])), jnp.array([0.3, 0.2, -0.1])
    state = tx.init(x)
    for scale in (1.0, 0.7, 0.2, 0.4):
        point = x**scale if scale == 1.0 else x + scale
        p, state = tx.update(v, state, point, grad=A @ point)
        if scale != 1.0:
            np.testing.assert_allclose(p, inverse_hessian(state) @ v, rtol=1e-12)
    _, same = tx.update(A @ x, state, x)
    _, other = tx.update(v, state, x, grad=A @ x)
    chex.assert_trees_all_close(same.inverse, other.inverse, rtol=1e-12)


def test_bad_curvature_is_skipped_and_counted_or_damped():
    well = lambda x: jnp.sum(jnp.cos(x))  # concave around 0
    for word in ("skip", "powell"):
        tx, x = scale_by_bfgs(on_bad_curvature=word), jnp.array([0.5, -0.2])
        state, skipped = tx.init(x), 0
        for _ in range(4):
            old, (p, state) = state, tx.update(jax.grad(well)(x), state, x)
            skipped += StepStatus.PAIR_SKIPPED in status(state)
            x = x - 0.1 * p / jnp.linalg.norm(p)
        assert int(state.info.pairs_skipped) == skipped == (3 if word == "skip" else 0)
        assert int(state.info.pairs) == 3 - skipped
        if word == "powell":
            s, g = state.last[0] - old.last[0], jax.grad(well)
            y, Bs = (
                g(state.last[0]) - g(old.last[0]),
                jnp.linalg.solve(inverse_hessian(old), s),
            )
            theta = 0.8 * (s @ Bs) / (s @ Bs - s @ y)
            damped = theta * y + (1 - theta) * Bs
            np.testing.assert_allclose(s @ damped, 0.2 * s @ Bs, rtol=1e-9)
            np.testing.assert_allclose(inverse_hessian(state) @ damped, s, rtol=1e-7)
            assert jnp.linalg.eigvalsh(inverse_hessian(state)).min() > 0


def test_parameters_that_have_not_moved_reset_the_matrix():
    tx, x = scale_by_bfgs(), jnp.array([1.0, -2.0])
    state = tx.init(x)
    for factor in (1.0, 0.5, 0.2):
        _, state = tx.update(factor * x, state, factor * x)
    p, state = tx.update(0.2 * x, state, 0.2 * x)
    assert status(state) == StepStatus.MEMORY_RESET
    assert (int(state.info.pairs), int(state.info.resets)) == (0, 1)
    # the scale is still the best guess
    np.testing.assert_allclose(p, float(state.gamma * state.factor) * 0.2 * x)
    p, state = tx.update(5.0 * x, state, 0.2 * x)
    # but a long step is cut to unit length
    np.testing.assert_allclose(jnp.linalg.norm(p), 1.0)
    assert status(state) == StepStatus.OK
    p, state = tx.update(0.1 * x, state, 0.1 * x)
    assert int(state.info.pairs) == 1


def test_after_a_failed_search_the_matrix_can_be_read_until_the_next_pair():
    tx, x = scale_by_bfgs(), jnp.array([1.0, -2.0])
    state, A = tx.init(x), jnp.array([1.0, 10.0])
    for point in (x, 0.5 * x, 0.2 * x + 0.1):
        _, state = tx.update(A * point, state, point)
    H = inverse_hessian(state)
    for _ in range(2):
        _, state = tx.update(A * point, state, point)
        assert int(state.info.pairs) == 0
        np.testing.assert_array_equal(inverse_hessian(state), H)
    assert int(state.info.resets) == 1
    s = 0.1 * x - point
    _, state = tx.update(0.1 * A * x, state, 0.1 * x)
    expected = recursion(10 * (s @ s) / (s @ (A * s)) * np.eye(2), s, A * s, "bfgs")
    np.testing.assert_allclose(inverse_hessian(state), expected, rtol=1e-12)


@pytest.mark.usefixtures("_room")
@pytest.mark.parametrize("factor", [-1.0, np.inf, np.nan])
def test_a_matrix_that_is_no_longer_positive_definite_begins_anew(factor):
    tx, x = scale_by_bfgs(), jnp.array([1.0, -2.0])
    state = tx.init(x)
    for scale in (1.0, 0.5):
        _, state = tx.update(scale * x, state, scale * x)
    H, last = state.inverse, state.last.at[2].multiply(factor)
    spoilt = jax.tree.map(lambda leaf: factor * leaf, H)._replace(columns=H.columns)
    p, state = tx.update(0.4 * x, state._replace(inverse=spoilt, last=last), 0.4 * x)
    assert StepStatus.MEMORY_RESET in status(state)
    # the pair itself is sound
    assert (int(state.info.pairs), int(state.info.resets)) == (1, 1)
    s = -0.1 * x
    np.testing.assert_allclose(
        inverse_hessian(state), recursion(10 * np.eye(2), s, s, "bfgs"), rtol=1e-12
    )
    assert x @ p > 0


def test_a_curvature_that_vanishes_never_ends_the_run():
    """H overflows on separable data, again and again."""
    value_fn = lambda w: jnp.sum(
        jnp.logaddexp(0.0, -jnp.array([1.0, 0.01, 100.0], jnp.float32) * w)
    )
    tx, w = hessopt.bfgs(1.0, linesearch=None), jnp.zeros(3, jnp.float32)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(value_fn)(w), state, w)
        return (optax.apply_updates(w, updates), state), hessopt.diagnostics(state)[
            "bfgs.status"
        ]

    (w, _), statuses = jax.lax.scan(step, (w, tx.init(w)), length=400)
    assert jnp.isfinite(w).all()
    assert not (statuses & StepStatus.NONFINITE.value).any()
    assert value_fn(w) < 1e-6


def test_damping_keeps_the_matrix_positive_definite_where_the_step_is_slightly_turned():
    well, tx = (
        lambda x: jnp.sum(jnp.cos(x) + 10.0 * jnp.cos(3.0 * x)),
        scale_by_bfgs(on_bad_curvature="powell"),
    )
    rng = np.random.default_rng(0)
    for turn in (0.0, 1e-9, 1e-4, 0.02):
        x = jnp.asarray(rng.normal(size=4))
        state = tx.init(x)
        for _ in range(30):
            p, state = tx.update(jax.grad(well)(x), state, x)
            assert StepStatus.MEMORY_RESET not in status(state)
            H = inverse_hessian(state)
            assert jnp.linalg.eigvalsh(H).min() >= -1e-12 * jnp.abs(H).max()
            across = rng.normal(size=4)
            x = (
                x
                - 0.3 * p / jnp.linalg.norm(p)
                + 0.3 * turn * across / np.linalg.norm(across)
            )


def test_a_gradient_may_be_a_number_or_wider_than_the_params():
    tx = scale_by_bfgs()
    p, state = tx.update(2.0, tx.init(1.0), 1.0, value=None)
    assert p == 1.0
    x = jnp.array([1.0, 2.0], jnp.float32)
    state = tx.init(x)
    for factor in (1.0, 0.5, 0.2):
        p, after = tx.update(factor * x.astype(jnp.float64), state, factor * x)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        state = after
    assert p.dtype == jnp.float64
    assert int(state.info.pairs) == 2


def test_a_converged_run_without_a_search_stays_where_it_is():
    center = jnp.array([1.0, -1.0, 1.0], jnp.float32)
    tx, x = (
        hessopt.bfgs(0.3, linesearch=None),
        jnp.array([-1.0, 10.0, 1.0], jnp.float32),
    )

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(2 * (x - center), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), jnp.max(jnp.abs(x - center))

    _, error = jax.lax.scan(step, (x, tx.init(x)), length=400)
    assert jnp.max(error[100:]) < 1e-6


def test_what_is_not_finite_leaves_the_state_alone():
    tx, x = scale_by_bfgs(), jnp.array([1.0, -2.0, 3.0])
    state = tx.init(x)
    for factor in (1.0, 0.5):
        _, state = tx.update(factor * x, state, factor * x)
    for bad in ({"value": jnp.nan}, {"grad": x * jnp.inf}):
        p, after = tx.update(x, state, x, **bad)
        assert not p.any()
        assert status(after) == StepStatus.NONFINITE
        chex.assert_trees_all_equal(after._replace(info=state.info), state)


def test_a_step_copies_nothing_of_the_size_of_the_matrix():
    n = 300
    tx, x = scale_by_bfgs(), jnp.arange(1.0, n + 1)
    step = jax.jit(
        lambda state, x: tx.update(2.0 * x, state, x)[::-1], donate_argnums=0
    )
    program = step.lower(tx.init(x), x).compile()
    blocks = re.split(r"\n(?=\S)", program.as_text())
    bodies = [block for block in blocks if not re.match(r"%?fused", block)]
    written = [
        line
        for line in "\n".join(bodies).splitlines()
        if re.search(rf"= f64\[{n},{n}\]\S* (?!param|get-t)", line)
    ]
    # the fold
    assert [re.search(r" (\w+)\(", line)[1] for line in written] == ["fusion"]
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 8 * n * n
    assert memory.temp_size_in_bytes < 8 * 8 * module.FOLD_PERIOD * n


@pytest.mark.parametrize("formula", EVERY)
def test_it_minimizes_and_the_inverse_hessian_is_there_for_laplace(formula):
    rosenbrock = lambda x: jnp.sum(
        100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2
    )
    solution = minimize(
        rosenbrock,
        jnp.zeros(6),
        hessopt.bfgs(formula=formula, linesearch=SEARCH),
        gtol=1e-9,
    )
    assert solution.reason == "GRADIENT"
    np.testing.assert_allclose(solution.params, 1.0, rtol=1e-6)
    H = inverse_hessian(solution.state)
    np.testing.assert_array_equal(H, H.T)
    if formula != "ssbroyden":
        exact = jnp.linalg.inv(jax.hessian(rosenbrock)(solution.params))
        assert relative(H, exact) < 0.3


def test_the_inverse_hessian_wants_one_state_of_bfgs():
    x = {"a": jnp.ones(2), "b": jnp.ones((1, 3), complex)}
    tx = optax.chain(
        optax.clip(1.0), optax.inject_hyperparams(hessopt.bfgs)(learning_rate=1.0)
    )
    np.testing.assert_array_equal(inverse_hessian(tx.init(x)), np.zeros((8, 8)))
    for state, count in (
        (optax.adam(0.1).init(x), 0),
        (optax.chain(tx, tx).init(x), 2),
    ):
        with pytest.raises(ValueError, match=f"one part of scale_by_bfgs, got {count}"):
            inverse_hessian(state)


def test_words_are_checked():
    with pytest.raises(ValueError, match="formula must be one of"):
        scale_by_bfgs("broyden")
    with pytest.raises(ValueError, match=r"formula must be one of .* got None"):
        scale_by_bfgs(None)
    for word in ("damp", True):
        with pytest.raises(ValueError, match="on_bad_curvature must be one of"):
            scale_by_bfgs(on_bad_curvature=word)


def test_a_formula_may_be_a_function():
    half = lambda b, h, n: (jnp.ones_like(b), jnp.full_like(b, 0.5))
    solution = minimize(valley, jnp.ones(5), hessopt.bfgs(formula=half))
    assert solution.reason == "GRADIENT"
