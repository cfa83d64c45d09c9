"""Oracles: closed forms, dense derivatives, least squares by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hessopt
from hessopt import StepStatus, Termination, composite, trust_region_newton
from hessopt.transforms.trust_region import _bending
from tests.problems import init_mlp, mlp

VARIANTS = {
    "cubic": {},
    "radius": {"step_bound": "radius"},
    "cubic, cg": {"subproblem": "cg"},
    "radius, cg": {"step_bound": "radius", "subproblem": "cg"},
}


def rosenbrock(x):
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def saddle(x):
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


def once(tx, value_fn, params, state=None, **given):
    state = tx.init(params) if state is None else state
    grads = given.pop("updates", jax.grad(value_fn)(params))
    return jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=value_fn, **given))(
        grads, state, params
    )


def status(state):
    return StepStatus(int(state.info.status))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_quadratic_ends_at_its_minimum_whatever_its_condition(name):
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    H, b = (
        jnp.asarray((Q * np.logspace(0, 4, 8)) @ Q.T),
        jnp.asarray(rng.normal(size=8)),
    )
    tx = trust_region_newton(**VARIANTS[name])
    found = hessopt.minimize(
        lambda x: x @ H @ x / 2 - b @ x, jnp.zeros(8), tx, gtol=1e-10
    )
    assert found.termination == Termination.GRADIENT
    np.testing.assert_allclose(found.params, np.linalg.solve(H, b), rtol=1e-8)
    assert found.steps < 40


@pytest.mark.parametrize("name", VARIANTS)
def test_rosenbrock_is_minimized_and_every_trial_counted(name):
    tx = trust_region_newton(**VARIANTS[name])
    found = hessopt.minimize(rosenbrock, jnp.array([-1.2, 1.0, 0.5]), tx, gtol=1e-9)
    assert found.termination == Termination.GRADIENT
    np.testing.assert_allclose(found.params, 1.0, atol=1e-4)
    # a trial, and the value with the next gradient
    assert found.evaluations >= 2 * found.steps + 1


@pytest.mark.parametrize("step_bound", ["cubic", "radius"])
@pytest.mark.parametrize("start", [[1.0, 0.0], [0.0, 0.0]])
def test_a_saddle_is_left_without_any_gradient_along_the_way_out(step_bound, start):
    x, tx = jnp.array(start), trust_region_newton(step_bound=step_bound)

    def step(_, carry):
        x, state = carry
        updates, state = tx.update(jax.grad(saddle)(x), state, x, value_fn=saddle)
        return x + updates, state

    x, _ = jax.jit(lambda x: jax.lax.fori_loop(0, 30, step, (x, tx.init(x))))(x)
    np.testing.assert_allclose(jnp.abs(x), [0.0, 0.5**0.5], atol=1e-8)


def test_negative_curvature_is_reported_where_it_is():
    assert (
        status(once(trust_region_newton(), saddle, jnp.array([1.0, 0.0]))[1])
        == StepStatus.NEGATIVE_CURVATURE
    )
    _, state = once(trust_region_newton(), saddle, jnp.array([1.0, 1.0]))
    assert status(state) == StepStatus.OK
    assert state.info.lowest > 0


@pytest.mark.parametrize("step_bound", ["cubic", "radius"])
def test_the_unit_of_no_parameter_matters(step_bound):
    units = 2.0 ** jnp.array([-20, 3, 17])
    tx, start = trust_region_newton(step_bound=step_bound), jnp.array([-1.2, 1.0, 0.5])
    plain = hessopt.minimize(rosenbrock, start, tx, max_steps=12)
    scaled = hessopt.minimize(
        lambda x: 2.0**40 * rosenbrock(x / units), start * units, tx, max_steps=12
    )
    np.testing.assert_allclose(scaled.params / units, plain.params, rtol=1e-9)
    assert scaled.evaluations == plain.evaluations


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_a_scale_is_the_largest_so_far(curvature):
    tx, x = trust_region_newton(curvature=curvature), jnp.ones(3)

    def seen(state, c):
        c = jnp.array(c)
        value_fn = composite(lambda x: jnp.sqrt(c) * x, lambda z: 0.5 * jnp.sum(z**2))
        return once(tx, value_fn, x, state)[1]

    state = tx.init(x)
    for c, scales in (
        ([4.0, 0.0, 1.0], [2, 0, 1]),
        ([4**-9, 16.0, 4**9], [2, 4, 512]),
        ([0.0, 64.0, 1.0], [2, 8, 512]),
    ):
        state = seen(state, c)
        np.testing.assert_array_equal(state.scales, scales)


@pytest.mark.parametrize(("bend", "taken"), [(0.1, True), (10.0, False)])
def test_a_bend_is_left_out_where_it_is_longer_than_the_step(bend, taken):
    value_fn = composite(lambda x: x + bend * x**2 - 1.0, lambda z: 0.5 * jnp.sum(z**2))
    plain, bent = (
        once(
            trust_region_newton(
                curvature="gauss_newton",
                geodesic_acceleration=geodesic,
                max_trials=1,
                step_bound="radius",
            ),
            value_fn,
            jnp.full(1, -0.01),
        )
        for geodesic in (False, True)
    )
    assert (plain[1].info.ratio != bent[1].info.ratio) == taken
    assert (bent[0] < plain[0]) == taken


def test_one_decomposition_serves_all_trials():
    x, tx = (
        jnp.array([3.0, 4.0]),
        trust_region_newton(initial_radius=1e3, step_bound="radius"),
    )
    f = lambda x: jnp.sum(jnp.sqrt(1 + x**2))  # from here Newton's steps go to -x^3
    _, state = once(tx, f, x)
    assert state.info.trials > 1
    text = (
        jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=f))
        .lower(x, tx.init(x), x)
        .as_text()
    )
    assert text.count("stablehlo.custom_call @lapack_dsyevd") == 1


def test_where_no_trial_is_better_the_step_is_zero_and_the_next_one_shorter():
    # falls nowhere near by
    f = lambda x: jnp.sum(jnp.where(x > 2.9, x**2, 100.0 + x**2))
    x, tx = jnp.array([3.0, 3.0]), trust_region_newton(max_trials=2)
    updates, state = once(tx, f, x)
    np.testing.assert_array_equal(updates, 0.0)
    assert status(state) == StepStatus.STEP_REJECTED
    assert state.info.trials == 2
    again = jax.jit(lambda s: tx.update(jax.grad(f)(x), s, x, value_fn=f))
    sizes = [float(state.size)]
    while status(state) and len(sizes) < 20:
        updates, state = again(state)
        sizes.append(float(state.size))
    assert all(np.diff(sizes[:-1]) > 0)  # sigma grows
    assert f(x + updates) < f(x)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("what", ["value", "gradient", "curvature", "trial"])
def test_what_is_not_finite_gives_no_step_and_keeps_the_state(name, what):
    tx, x = (
        trust_region_newton(**VARIANTS[name], max_trials=3),
        jnp.array([-1.2, 1.0, 0.5]),
    )
    _, state = once(tx, rosenbrock, x)
    value_fn = {
        "curvature": lambda p: jnp.sum(jnp.abs(p - x) ** 1.5),
        "trial": lambda p: jnp.where(jnp.all(p == x), rosenbrock(p), jnp.nan),
    }.get(what, rosenbrock)
    given = {
        "gradient": {"updates": jnp.full(3, jnp.nan)},
        "value": {"value": jnp.inf},
    }.get(what, {})
    updates, new = once(tx, value_fn, x, state, **{"updates": jnp.ones(3)} | given)
    np.testing.assert_array_equal(updates, 0.0)
    if what == "trial":
        assert status(new) & StepStatus.STEP_REJECTED
        return
    assert status(new) == StepStatus.NONFINITE
    assert (new.size, new.first_length) == (state.size, state.first_length)


def test_the_value_is_evaluated_where_it_is_not_given():
    x, tx = jnp.array([-1.2, 1.0]), trust_region_newton()
    given, _ = once(tx, rosenbrock, x, value=rosenbrock(x))
    np.testing.assert_array_equal(once(tx, rosenbrock, x)[0], given)


def test_linear_least_squares_are_solved_though_their_normal_equations_are_singular():
    A = jnp.asarray(np.vander(np.linspace(0, 1, 40), 13))  # condition number 2e9
    y = A @ jnp.arange(1.0, 14)
    value_fn = composite(lambda x: A @ x, lambda z: 0.5 * jnp.sum((z - y) ** 2))
    tx = trust_region_newton(curvature="gauss_newton")
    x = hessopt.minimize(value_fn, jnp.zeros(13), tx, gtol=0.0, max_steps=30).params
    np.testing.assert_allclose(x, jnp.arange(1.0, 14), rtol=1e-6)
    # not seen to be diagonal
    squared = composite(lambda x: A @ x, lambda z: 0.5 * jnp.sum((z - y)[::-1] ** 2))
    units = 1 / np.linalg.norm(A, axis=0)
    lowest = np.linalg.svd(A * units, compute_uv=False)[-1] ** 2
    found, lost = (
        once(tx, f, jnp.zeros(13))[1].info.lowest for f in (value_fn, squared)
    )
    np.testing.assert_allclose(found, lowest, rtol=1e-5)
    assert abs(lost / lowest - 1) > 0.1


def test_a_loss_without_curvature_at_some_outputs_still_counts_their_slopes():
    x = jax.random.normal(jax.random.key(0), (60, 3))
    y = x @ jnp.array([1.0, -2.0, 0.5]) + 0.01 * jax.random.normal(
        jax.random.key(1), (60,)
    ).at[::7].add(500.0)
    value_fn = composite(
        lambda w: x @ w, lambda z: jnp.sum(optax.huber_loss(z, y, delta=0.1))
    )
    found = hessopt.minimize(
        value_fn, jnp.zeros(3), trust_region_newton(curvature="gauss_newton"), gtol=1e-9
    )
    assert found.termination == Termination.GRADIENT
    np.testing.assert_allclose(found.params, [1.0, -2.0, 0.5], atol=0.05)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
# outputs in the linear regime of Huber's loss
@pytest.mark.parametrize("far", [[], [0, 2], [0, 1, 2]])
def test_fewer_outputs_than_parameters_still_have_their_whole_gradient(far, dtype):
    """Oracle: the step within the radius, dense, in the scales found."""
    X = jax.random.normal(jax.random.key(0), (3, 6))
    y = jnp.full(3, 0.5).at[jnp.array(far, int)].set(10.0)
    value_fn = composite(
        lambda w: X.astype(dtype) @ w,
        lambda z: jnp.sum(optax.huber_loss(z, y.astype(dtype))),
    )
    tx = trust_region_newton(
        curvature="gauss_newton", step_bound="radius", initial_radius=0.05
    )
    step, state = once(tx, value_fn, jnp.zeros(6, dtype))
    assert status(state) == StepStatus.OK
    assert state.info.lowest == 0
    J, D = np.asarray(X), np.asarray(state.scales, float)
    D = np.where(D > 0, D, D.max() or 1.0)
    B = J.T @ np.diag([0.0 if i in far else 1.0 for i in range(3)]) @ J / np.outer(D, D)
    g = -J.T @ np.array([1.0 if i in far else 0.5 for i in range(3)]) / D
    length = lambda kappa: np.linalg.norm(np.linalg.solve(B + kappa * np.eye(6), g))
    low, high = 1e-9, 1e6
    for _ in range(100):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if length(middle) > 0.05 else (low, middle)
    expected = -np.linalg.solve(B + low * np.eye(6), g) / D
    np.testing.assert_allclose(
        step, expected, rtol=0, atol=1e-6 if dtype == jnp.float32 else 1e-12
    )


@pytest.mark.parametrize("step_bound", ["cubic", "radius"])
def test_parameters_that_no_curved_output_sees_move(step_bound):
    value_fn = composite(lambda x: x[3:] - 10.0, lambda z: jnp.sum(optax.huber_loss(z)))
    tx = trust_region_newton(curvature="gauss_newton", step_bound=step_bound)
    found = jax.jit(
        jax.vmap(lambda x: hessopt.minimize(value_fn, x, tx, max_steps=50))
    )(jnp.zeros((2, 4)))
    np.testing.assert_allclose(found.params, [[0.0, 0.0, 0.0, 10.0]] * 2, atol=1e-4)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_loss_of_infinite_curvature_gives_no_step(outputs):
    value_fn = composite(lambda x: x[:outputs], lambda z: jnp.sum(jnp.abs(z) ** 1.5))
    step, state = once(
        trust_region_newton(curvature="gauss_newton"),
        value_fn,
        jnp.arange(3.0),
        updates=jnp.ones(3),
    )
    assert status(state) == StepStatus.NONFINITE
    np.testing.assert_array_equal(step, 0.0)


def test_light_outputs_are_fitted_beside_heavy_ones_in_float32():
    W = jnp.array([1e8] * 3 + [1.0] * 17, jnp.float32)
    A = jax.random.normal(jax.random.key(2), (20, 6), jnp.float32)
    t = A @ jnp.arange(6, dtype=jnp.float32) + 0.1 * jax.random.normal(
        jax.random.key(3), (20,), jnp.float32
    )
    value_fn = composite(lambda x: A @ x - t, lambda z: 0.5 * jnp.sum(W * z**2))
    tx = trust_region_newton(curvature="gauss_newton")
    found = hessopt.minimize(
        value_fn, jnp.zeros(6, jnp.float32), tx, gtol=0.0, ftol=1e-9, max_steps=50
    )
    V, v = (
        np.asarray(A, float) * np.sqrt(W)[:, None],
        np.asarray(t * jnp.sqrt(W), float),
    )
    least = np.linalg.lstsq(V, v, rcond=None)[1][0] / 2
    np.testing.assert_allclose(
        np.sum((V @ np.asarray(found.params, float) - v) ** 2) / 2, least, rtol=1e-3
    )


def banana(x):
    return jnp.stack([100.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])


def test_acceleration_is_the_second_derivative_of_the_outputs_and_saves_steps():
    loss = lambda z: 0.5 * jnp.sum(z**2) + jnp.sum(jnp.cosh(z[:1]))
    x, p = jnp.array([-1.2, 1.0]), jnp.array([0.3, -0.2])
    J, L = jax.jacobian(banana)(x), jax.hessian(loss)(banana(x))
    second = jnp.einsum("kij,i,j->k", jax.hessian(banana)(x), p, p)
    bent = _bending(composite(lambda parts: banana(parts[0]), loss), [x], [p])[0]
    np.testing.assert_allclose(bent, J.T @ (L @ second), rtol=1e-12)

    value_fn = composite(banana, lambda z: 0.5 * jnp.sum(z**2))
    steps = [
        hessopt.minimize(
            value_fn,
            x,
            trust_region_newton(curvature="gauss_newton", geodesic_acceleration=bend),
            gtol=1e-9,
        ).steps
        for bend in (False, True)
    ]
    assert steps[1] < steps[0]


@pytest.mark.parametrize("subproblem", ["exact", "cg"])
def test_gauss_newton_trains_a_softmax_network(subproblem):
    x = jax.random.normal(jax.random.key(1), (40, 5))
    y = jnp.argmax(x[:, :3] ** 2, axis=1)
    value_fn = composite(
        lambda p: (mlp(p, x), p),
        lambda o: (
            optax.softmax_cross_entropy_with_integer_labels(o[0], y).mean()
            + 1e-3 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(o[1]))
        ),
    )
    tx = trust_region_newton(curvature="gauss_newton", subproblem=subproblem)
    assert (
        hessopt.minimize(value_fn, init_mlp(0, (5, 6, 3)), tx, max_steps=40).value < 0.2
    )


def test_by_cg_nothing_of_size_n_by_n_is_formed():
    params = init_mlp(0, (30, 40, 3), jnp.float32)
    n = ravel_pytree(params)[0].size
    x = jnp.ones((8, 30), jnp.float32)
    tx = trust_region_newton(subproblem="cg")
    f = lambda p: jnp.mean(mlp(p, x) ** 2)
    program = (
        jax.jit(lambda g, s, p: tx.update(g, s, p, value_fn=f))
        .lower(params, tx.init(params), params)
        .compile()
    )
    assert program.memory_analysis().temp_size_in_bytes < 4 * n * 200
    assert 4 * n * 200 < 4 * n * n / 6


def test_no_parameters_is_no_trouble():
    tx = trust_region_newton()
    updates, state = tx.update({}, tx.init({}), {}, value_fn=lambda p: jnp.ones(()))
    assert updates == {}
    assert status(state) == StepStatus.OK


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_bound": "ball"}, "step_bound must be one of"),
        ({"subproblem": "lanczos"}, "subproblem must be one of"),
        ({"curvature": "fisher"}, "curvature must be one of"),
        ({"initial_radius": 0.0}, "initial_radius must be at least"),
        ({"max_trials": 0}, "max_trials must be an int, at least 1, got 0"),
        ({"geodesic_acceleration": True}, "geodesic_acceleration needs curvature"),
        (
            {
                "geodesic_acceleration": True,
                "curvature": "gauss_newton",
                "subproblem": "cg",
            },
            "another subproblem",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        trust_region_newton(**arguments)


def test_gauss_newton_needs_a_composite():
    with pytest.raises(TypeError, match="composite"):
        once(trust_region_newton(curvature="gauss_newton"), rosenbrock, jnp.ones(3))


@pytest.mark.parametrize("subproblem", ["exact", "cg"])
@pytest.mark.parametrize("step_bound", ["cubic", "radius"])
def test_a_bound_that_promises_less_than_rounding_is_loosened(step_bound, subproblem):
    """From where curvature is nothing; once seen, it makes the bound of before far too
    strict."""
    tx = trust_region_newton(step_bound=step_bound, subproblem=subproblem)
    solution = hessopt.minimize(
        lambda x: jnp.sum(jnp.logaddexp(x, -x)),
        jnp.array([15.0], jnp.float32),
        tx,
        max_steps=100,
    )
    np.testing.assert_allclose(solution.params, 0.0, atol=1e-5)


@pytest.mark.parametrize("step_bound", ["cubic", "radius"])
def test_a_wide_value_is_not_rounded_to_the_parameters(step_bound):
    f = lambda x: rosenbrock(x.astype(jnp.float64)) + 1e4
    narrow, wide = (
        hessopt.minimize(
            f,
            jnp.full(6, -0.5, dtype),
            trust_region_newton(step_bound=step_bound),
            gtol=1e-5,
        )
        for dtype in (jnp.float32, jnp.float64)
    )
    assert narrow.termination == wide.termination == Termination.GRADIENT
    assert abs(narrow.steps - wide.steps) <= 1
    assert narrow.state.size.dtype == narrow.state.info.ratio.dtype == jnp.float32


@pytest.mark.parametrize("name", VARIANTS)
def test_a_trial_that_is_not_finite_makes_the_bound_stricter_whatever_it_promised(name):
    f = lambda x: jnp.where(
        jnp.all(x <= 0), 1e4 - 1e-3 * jnp.sum(x) + 5e-5 * jnp.sum(x**2), jnp.nan
    )
    x, tx = jnp.zeros(2, jnp.float32), trust_region_newton(**VARIANTS[name])
    again = jax.jit(
        lambda s: tx.update(jnp.full(2, -1e-3, jnp.float32), s, x, value_fn=f)
    )
    state, sizes = tx.init(x), []
    for _ in range(4):
        _, state = again(state)
        assert status(state) == StepStatus.STEP_REJECTED
        assert state.info.trials == 1  # it promises less than rounding
        sizes.append(float(state.size))
    assert all(np.diff(sizes) * (1 if "cubic" in name else -1) > 0)
