"""Minimizers with bounds: solutions against closed forms and SciPy, iterates and
evaluations within the bounds, endings and derivatives."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import hessopt
from hessopt import StepStatus
from hessopt.trees import boxes

METHODS = {
    "lbfgs": hessopt.lbfgs,
    "bfgs": hessopt.bfgs,
    "ssbroyden": functools.partial(hessopt.bfgs, formula="ssbroyden"),
    "newton": hessopt.newton,
    "newton_cg": hessopt.newton_cg,
    "trust region": hessopt.trust_region_newton,
    "trust region, cg": functools.partial(hessopt.trust_region_newton, subproblem="cg"),
}
GAUSS_NEWTON = {
    "newton, Gauss-Newton": functools.partial(
        hessopt.newton, curvature="gauss_newton", damping=1e-9
    ),
    "trust region, Gauss-Newton": functools.partial(
        hessopt.trust_region_newton, curvature="gauss_newton"
    ),
}
FAST = ("lbfgs", "newton")


def _marked(*methods: str) -> Any:
    return [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in methods
    ]


every_method = pytest.mark.parametrize("method", _marked(*METHODS))
every_fit = pytest.mark.parametrize("method", _marked(*METHODS, *GAUSS_NEWTON))


def make(method: str, **arguments: Any) -> Any:
    return (METHODS | GAUSS_NEWTON)[method](**arguments)


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


class Quadratic:
    """`(x - c)' A (x - c) / 2` with a known minimum within [-1, 1], where half of the
    entries are at bounds."""

    def __init__(self, seed: int, size: int = 50, condition: float = 1e6):
        rng = np.random.default_rng(seed)
        Q, _ = np.linalg.qr(rng.normal(size=(size, size)))
        self.A = (Q * np.geomspace(1.0, condition, size)) @ Q.T / condition**0.5
        side = rng.permutation(
            np.repeat(
                [-1, 1, 0, 0], [size // 4] * 2 + [size // 4, size - 3 * (size // 4)]
            )
        )
        self.x = np.where(side == 0, rng.uniform(-0.9, 0.9, size), side)
        # the gradient at the minimum points outward at bounds
        g = -side * rng.uniform(0.1, 1.0, size)
        self.b = self.A @ self.x - g
        self.data = {"A": jnp.asarray(self.A), "b": jnp.asarray(self.b)}


def quadratic(x: jax.Array, A: jax.Array, b: jax.Array) -> jax.Array:
    return 0.5 * x @ A @ x - b @ x


def minimum(method: str, value_fn: Any, start: Any, bounds: Any, **data: Any) -> Any:
    """Return the solution of a method, to the last digits."""
    if method in GAUSS_NEWTON:
        assert isinstance(value_fn, type(LEAST_SQUARES))
    tx = make(method, bounds=bounds)
    return hessopt.minimize(value_fn, start, tx, data=data, max_steps=5000, gtol=1e-12)


def after(method: str, value_fn: Any, start: Any, bounds: Any, steps: int, data: Any):
    """Return the parameters after a number of steps."""
    tx = make(method, bounds=bounds)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        x, state = carry
        value, grad = jax.value_and_grad(value_fn)(x, **data)
        given = {"value": value, "grad": grad, "value_fn": value_fn}
        updates, state = tx.update(grad, state, x, **given, **data)
        return (optax.apply_updates(x, updates), state), None

    return jax.lax.scan(step, (start, tx.init(start)), None, length=steps)[0][0]


@every_method
def test_quadratics_end_at_the_minimum(method):
    problems = [Quadratic(seed) for seed in range(20)]
    data = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[p.data for p in problems])

    # a run of `minimize` would end where rounding hides the decrease of the objective
    @jax.jit
    @jax.vmap
    def solve(data):
        steps = 3000 if method == "lbfgs" else 200
        return after(method, quadratic, jnp.zeros(50), (-1.0, 1.0), steps, data)

    expected = np.stack([problem.x for problem in problems])
    np.testing.assert_allclose(solve(data), expected, atol=1e-8)


def residuals(x: jax.Array, A: jax.Array, b: jax.Array) -> jax.Array:
    return A @ x - b


def half_squares(r: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum(r**2)


LEAST_SQUARES = hessopt.composite(residuals, half_squares)


@every_fit
def test_non_negative_least_squares_agrees_with_scipy(method):
    rng = np.random.default_rng(0)
    A, b = rng.normal(size=(50, 20, 8)), rng.normal(size=(50, 20))
    tx = make(method, bounds=(0.0, None))

    @jax.jit
    @jax.vmap
    def solve(data):
        return hessopt.minimize(
            LEAST_SQUARES, jnp.ones(8), tx, data=data, gtol=1e-12, max_steps=500
        )

    solution = solve({"A": jnp.asarray(A), "b": jnp.asarray(b)})
    expected = [scipy.optimize.nnls(*problem)[0] for problem in zip(A, b, strict=True)]
    np.testing.assert_allclose(solution.params, expected, atol=1e-8)
    assert np.array_equal(solution.held, np.array(expected) == 0)
    assert np.array_equal(solution.info.held, np.sum(np.array(expected) == 0, axis=1))
    assert np.all(solution.converged)


def logistic(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w))) + 1e-3 * jnp.sum(w**2)


@every_method
def test_logistic_regression_in_a_box_agrees_with_scipy(method):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(100, 6))
    y = np.sign(x @ rng.normal(size=6) + 0.1 * rng.normal(size=100))
    data = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    solution = minimum(method, logistic, jnp.zeros(6), (-0.5, 0.5), **data)
    value_and_grad = jax.jit(jax.value_and_grad(logistic))

    def both(w: Any) -> tuple[float, Any]:
        value, grad = value_and_grad(w, **data)
        return float(value), np.asarray(grad)

    found = scipy.optimize.minimize(
        both,
        np.zeros(6),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-0.5, 0.5)] * 6,
        options={"ftol": 0.0, "gtol": 1e-12},
    )
    assert 0 < int(solution.info.held) < 6
    np.testing.assert_allclose(solution.params, found.x, atol=1e-8)


VALLEY = {
    "on a face": ((None, jnp.array([0.5, jnp.inf])), [0.5, 0.25]),
    "in a corner": ((jnp.array([0.8, -1.0]), jnp.array([0.9, 0.5])), [0.8, 0.5]),
    "at the free minimum": ((-2.0, 2.0), [1.0, 1.0]),
    "with a fixed entry": ((jnp.array([-2.0, 0.49]), jnp.array([2.0, 0.49])), None),
}


@every_method
@pytest.mark.parametrize("where", list(VALLEY))
def test_the_minimum_of_a_valley(method, where):
    bounds, expected = VALLEY[where]
    lower = jnp.broadcast_to(-jnp.inf if bounds[0] is None else bounds[0], 2)
    start = jnp.clip(jnp.array([0.4, 0.4]), lower, bounds[1])
    solution = minimum(method, rosenbrock, start, bounds)
    if expected is None:  # d/dx of 100 (0.49 - x^2)^2 + (1 - x)^2
        roots = np.roots([400.0, 0.0, 2 - 196.0, -2.0])
        expected = [roots[roots.real > 0.5].real.item(), 0.49]
    np.testing.assert_allclose(solution.params, expected, atol=1e-8)
    x = jnp.asarray(expected)
    at_bound = (x <= lower) | (x >= jnp.asarray(bounds[1]))
    assert np.array_equal(solution.held, at_bound)
    assert solution.converged


@every_method
def test_a_start_with_all_entries_held_is_a_solution(method):
    solution = minimum(method, lambda x: jnp.sum(x), jnp.zeros(3), (0.0, 1.0))
    assert solution.reason == "GRADIENT"
    assert int(solution.steps) == 0
    assert np.all(solution.held)


@every_method
def test_entries_leave_the_bounds_where_all_start(method):
    corner = jnp.array([1.0, 0.0, 1.0, 0.0])
    target = jnp.array([0.3, 0.6, 2.0, -1.0])
    value_fn = lambda x: jnp.sum((x - target) ** 2 * jnp.array([1.0, 10.0, 5.0, 2.0]))
    solution = minimum(method, value_fn, corner, (0.0, 1.0))
    np.testing.assert_allclose(solution.params, jnp.clip(target, 0, 1), atol=1e-9)


# within the bounds


@every_fit
def test_nothing_is_evaluated_outside(method):
    outside = []

    def model_fn(x: Any) -> Any:
        x = jnp.concatenate([x["a"], x["b"].ravel()])
        within = jnp.all((x >= 0.1) & (x <= 0.7))
        jax.debug.callback(lambda ok: None if ok else outside.append(1), within)
        chain = 10 * (x[1:] - x[:-1] ** 2), 1.0 - x[:-1]
        return jnp.where(within, jnp.concatenate(chain), jnp.nan)

    value_fn = hessopt.composite(model_fn, half_squares)
    start = {"a": jnp.full(3, 0.1), "b": jnp.linspace(0.15, 0.7, 4).reshape(2, 2)}
    tx = make(method, bounds=(0.1, 0.7))

    @jax.jit
    def run(x: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            x, state = carry
            value, grad = jax.value_and_grad(value_fn)(x)
            given = {"value": value, "grad": grad, "value_fn": value_fn}
            updates, state = tx.update(grad, state, x, **given)
            x = optax.apply_updates(x, updates)
            return (x, state), (x, value)

        return jax.lax.scan(step, (x, tx.init(x)), None, length=200)[1]

    path, values = jax.block_until_ready(run(start))
    jax.effects_barrier()
    assert not outside
    chex.assert_tree_all_finite((path, values))
    assert all(np.all((leaf >= 0.1) & (leaf <= 0.7)) for leaf in jax.tree.leaves(path))
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_a_step_to_a_bound_never_passes_it(dtype):
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-8, 8, (4, 1000))
    x, lower, width, step = (jnp.asarray(row, dtype) for row in sizes)
    upper = lower + width
    x = jnp.clip(x, lower, upper)
    step = step * jnp.asarray(rng.choice([-1, 1], 1000), dtype)
    box = boxes.Box(lower, upper)
    short = jax.jit(boxes.step_within)(box, x, step)
    reached = optax.apply_updates(x, short)
    assert short.dtype == dtype
    assert np.all((reached >= lower) & (reached <= upper))
    plain = optax.apply_updates(x, step)
    inside = (plain >= lower) & (plain <= upper)
    assert np.array_equal(np.where(inside, reached, 0), np.where(inside, plain, 0))
    near = np.abs(reached - jnp.clip(plain, lower, upper)) <= 2 * jnp.finfo(
        dtype
    ).eps * jnp.maximum(jnp.abs(x), jnp.abs(reached))
    assert np.all(near)


@every_method
def test_a_start_outside_is_an_error_where_it_is_known(method):
    tx = make(method, bounds=(0.0, {"a": 1.0, "b": None}))
    params = {"a": jnp.array([0.5, 1.5]), "b": jnp.array(3.0)}
    with pytest.raises(ValueError, match=r"params\['a'\] is"):
        hessopt.minimize(lambda p: jnp.sum(p["a"]) * p["b"], params, tx)
    with pytest.raises(ValueError, match=r"params\['a'\] is"):
        tx.init(params)


@every_method
def test_a_start_outside_is_projected_where_it_is_traced(method):
    tx = make(method, bounds=(0.0, 1.0))
    value_fn = lambda x: jnp.sum((x - 0.3) ** 2 + jnp.where(x < 0, jnp.nan, 0.0))
    run = jax.jit(lambda x: hessopt.minimize(value_fn, x, tx))
    solution = run(jnp.array([-1.0, 0.5]))
    np.testing.assert_allclose(solution.params, 0.3, atol=1e-6)
    assert bool(solution.info.projected)
    assert not bool(run(jnp.array([0.0, 0.5])).info.projected)

    @jax.jit
    def step(x: Any) -> Any:
        state = tx.init(x)
        value, grad = jax.value_and_grad(lambda x: jnp.sum((x - 0.3) ** 2))(x)
        given = {"value": value, "grad": grad, "value_fn": value_fn}
        return tx.update(grad, state, x, **given)

    # a loop that starts outside goes on within
    @jax.jit
    def walk(x: Any) -> Any:
        return after(method, inward, x, (0.0, 1.0), 30, {})

    inward = lambda x: jnp.sum(5 * (x - jnp.array([0.5, 3.0])) ** 2)
    np.testing.assert_allclose(walk(jnp.array([5.0, 5.0])), [0.5, 1.0], atol=1e-6)
    np.testing.assert_allclose(walk(jnp.array([5.0, 0.2])), [0.5, 1.0], atol=1e-6)

    updates, state = step(jnp.array([-1.0, 0.5]))
    assert float(updates[0]) == 1.0
    statuses = {n: int(s) for n, s in hessopt.diagnostics(state).items() if "stat" in n}
    assert any(s & StepStatus.OUTSIDE_BOUNDS for s in statuses.values())


# arguments


def test_arguments_are_checked():
    params = {"a": jnp.zeros(3), "b": jnp.array(0.0)}
    with pytest.raises(TypeError, match="pair"):
        hessopt.lbfgs(bounds=3.0)
    with pytest.raises(ValueError, match="NaN"):
        hessopt.lbfgs(bounds=(jnp.nan, 1.0))
    with pytest.raises(TypeError, match="numbers or arrays"):
        hessopt.lbfgs(bounds=("a", 1.0))
    with pytest.raises(ValueError, match=r"lower bounds.*params\['b'\]"):
        hessopt.lbfgs(bounds=({"a": -1.0, "b": 2.0}, {"a": 1.0, "b": 1.0})).init(params)
    with pytest.raises(ValueError, match=r"broadcast to params\['a'\]"):
        hessopt.lbfgs(bounds=({"a": jnp.zeros(2), "b": 0.0}, None)).init(params)
    with pytest.raises(ValueError, match="trees like params"):
        hessopt.lbfgs(bounds=({"a": 0.0}, None)).init(params)
    with pytest.raises(TypeError, match=r"params\['c'\] is complex"):
        hessopt.lbfgs(bounds=(0.0, None)).init({"c": jnp.zeros(2, complex)})
    search = hessopt.scale_by_wolfe_linesearch(5)
    with pytest.raises(ValueError, match="linesearch needs the bounds"):
        hessopt.lbfgs(bounds=(0.0, None), linesearch=search).init(params)


@every_method
def test_infinite_bounds_are_no_bounds(method):
    def program(**arguments: Any) -> str:
        tx = make(method, **arguments)

        def step(x: Any) -> Any:
            given = {"value": rosenbrock(x), "grad": x, "value_fn": rosenbrock}
            return tx.update(x, tx.init(x), x, **given)

        return str(jax.make_jaxpr(step)(jnp.zeros(3)))

    infinite = -jnp.full(3, jnp.inf), {"x": np.inf}["x"]
    assert program(bounds=infinite) == program()


@every_method
def test_traced_infinite_bounds_change_no_step(method):
    start = jnp.linspace(-1.0, 1.0, 6)

    def run(bounds: Any) -> Any:
        return after(method, rosenbrock, start, bounds, 12, {})

    bounded = jax.jit(lambda inf: run((-inf, inf)))(jnp.inf)
    np.testing.assert_allclose(bounded, jax.jit(run)(None), rtol=1e-6)


# pieces


def test_lanes_with_their_own_bounds_equal_a_loop():
    rng = np.random.default_rng(0)
    starts = jnp.asarray(rng.uniform(-0.2, 0.1, (256, 4)))
    lowers = jnp.asarray(rng.uniform(-1.0, -0.2, (256, 4)))
    uppers = jnp.asarray(rng.uniform(0.1, 1.5, (256, 4)))
    traces = []

    def value_fn(x: Any) -> Any:
        traces.append(1)
        return rosenbrock(x)

    def solve(x: Any, low: Any, up: Any) -> Any:
        tx = hessopt.lbfgs(bounds=(low, up))
        return hessopt.minimize(value_fn, x, tx)

    lanes = jax.jit(jax.vmap(solve))(starts, lowers, uppers)
    count = len(traces)
    single = jax.jit(solve)
    for i in range(256):
        alone = single(starts[i], lowers[i], uppers[i])
        np.testing.assert_allclose(lanes.params[i], alone.params, atol=1e-7)
        assert np.array_equal(lanes.held[i], alone.held)
    assert np.all(lanes.converged)
    assert len(traces) <= 2 * count


def test_a_masked_part_is_bounded():
    value_fn = lambda p: jnp.sum((p["a"] - 4.0) ** 2) + jnp.sum((p["b"] + p["a"]) ** 2)
    inner = hessopt.newton(bounds=(None, {"a": 1.0, "b": 5.0}))
    tx = hessopt.masked(inner, {"a": True, "b": False})
    start = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    solution = hessopt.minimize(value_fn, start, tx, max_steps=10)
    np.testing.assert_allclose(solution.params["a"], 1.0)
    assert np.all(solution.held["a"])
    assert not np.any(solution.held["b"])


def test_a_hand_written_search_takes_the_bounds():
    bounds = (0.0, 0.5)
    search = hessopt.scale_by_wolfe_linesearch(initial_guess="quadratic", bounds=bounds)
    tx = hessopt.bfgs(bounds=bounds, linesearch=search)
    solution = hessopt.minimize(rosenbrock, jnp.zeros(2), tx)
    np.testing.assert_allclose(solution.params, [0.5, 0.25], atol=1e-6)


@pytest.mark.parametrize("method", ["newton", "newton_cg", "lbfgs", "bfgs"])
def test_steps_without_a_search_are_cut_at_the_bounds(method):
    target = jnp.array([0.2, 3.0])
    value_fn = lambda x: jnp.sum((x - target) ** 2)
    tx = make(method, bounds=(0.0, 1.0), linesearch=None, learning_rate=0.5)
    solution = hessopt.minimize(value_fn, jnp.zeros(2), tx, max_steps=200)
    np.testing.assert_allclose(solution.params, [0.2, 1.0], atol=1e-4)


def test_diagnostics_count_held_entries():
    start, bounds = jnp.array([1.0, 1.0, 0.5]), (0.0, 1.0)
    value_fn = lambda x: jnp.sum((x - jnp.array([2.0, 3.0, 0.2])) ** 2)
    solution = minimum("newton", value_fn, start, bounds)
    names = hessopt.diagnostics(solution.state)
    assert int(names["newton.held"]) == 2
    assert not any("box" in name for name in names)


# derivatives


@pytest.mark.parametrize("size", [6, pytest.param(600, marks=pytest.mark.slow)])
def test_derivatives_hold_the_set_of_held_entries(size):
    rng = np.random.default_rng(3)
    A = jnp.asarray(rng.normal(size=(size + 10, size)) / size**0.5)
    b = jnp.asarray(rng.normal(size=size + 10))

    def fitted(b: Any, low: Any = -0.1, high: Any = 0.2) -> Any:
        def value_fn(x: Any, b: Any) -> Any:
            return half_squares(A @ x - b) + 0.1 * jnp.sum(jnp.cosh(x))

        solver = hessopt.newton_cg(bounds=(low, high))
        found = hessopt.minimize(
            value_fn, jnp.zeros(size), solver, data={"b": b}, gtol=1e-13
        )
        return found.params

    x = fitted(b)
    held = (x == -0.1) | (x == 0.2)
    assert 0 < np.sum(held) < size
    direction, h = jnp.asarray(rng.normal(size=size + 10)), 1e-6
    expected = (fitted(b + h * direction) - fitted(b - h * direction)) / (2 * h)
    _, along = jax.jvp(fitted, (b,), (direction,))
    np.testing.assert_allclose(along, expected, atol=1e-6)
    assert not np.any(along[held])
    weights = jnp.asarray(rng.normal(size=size))
    back = jax.grad(lambda b: weights @ fitted(b))(b)
    np.testing.assert_allclose(back @ direction, weights @ expected, atol=1e-5)
    expected = (fitted(b, -0.1 + h) - fitted(b, -0.1 - h)) / (2 * h)
    _, along = jax.jvp(lambda low: fitted(b, low), (-0.1,), (1.0,))
    np.testing.assert_allclose(along, expected, atol=1e-6)
    np.testing.assert_allclose(along[x == -0.1], 1.0, rtol=1e-12)


def test_derivatives_are_nan_where_a_held_entry_could_be_released():
    tx = hessopt.newton(bounds=(0.0, None))

    def solution(c: Any) -> Any:
        value_fn = lambda x, c: jnp.sum((x - c) ** 2)
        return hessopt.minimize(value_fn, jnp.ones(2), tx, data={"c": c}).params

    weak = jax.jacobian(solution)(jnp.array([0.0, 1.0]))
    assert np.all(np.isnan(weak[0]))
    strict = jax.jacobian(solution)(jnp.array([-1.0, 1.0]))
    np.testing.assert_allclose(strict, [[0.0, 0.0], [0.0, 1.0]], atol=1e-12)
