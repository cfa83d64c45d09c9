import dataclasses
import functools
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import hessopt
from hessopt import Termination, minimize
from hessopt.kinds.line_searches import SEARCH_STATES

NEWTON = hessopt.newton()


def rosenbrock(x):
    return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2


def ridge(w, A, b, penalty):
    return 0.5 * jnp.sum((A @ w - b) ** 2) + 0.5 * penalty * jnp.sum(w**2)


def ended(solution):
    return Termination(int(solution.termination))


@pytest.mark.parametrize("reason", Termination)
def test_a_solution_names_its_reason_and_says_whether_that_is_convergence(reason):
    one = hessopt.Solution(*[None] * 7, jnp.int32(reason))
    lanes = one._replace(
        termination=jnp.array([[reason, Termination.VALUE]], jnp.int32)
    )
    is_convergence = reason in (
        Termination.GRADIENT,
        Termination.VALUE,
        Termination.STEP,
    )
    assert (one.reason, bool(one.converged)) == (reason.name, is_convergence)
    assert (lanes.reason, lanes.converged.tolist()) == (
        [[reason.name, "VALUE"]],
        [[is_convergence, True]],
    )


@pytest.mark.parametrize(
    ("tx", "recycles"),
    [
        (NEWTON, True),
        (hessopt.newton(linesearch=optax.scale_by_backtracking_linesearch(20)), False),
        (hessopt.newton(linesearch=None), False),
        (
            hessopt.newton(
                linesearch=optax.scale_by_zoom_linesearch(
                    20, initial_guess_strategy="one"
                )
            ),
            True,
        ),
        (optax.lbfgs(), True),
        (optax.adam(0.1), False),
        (optax.inject_hyperparams(optax.adam)(learning_rate=0.1), False),
        (optax.MultiSteps(optax.sgd(1e-3, momentum=0.9), 2), False),
    ],
    ids=[
        "newton",
        "backtracking",
        "no search",
        "zoom",
        "lbfgs",
        "adam",
        "injected",
        "multi",
    ],
)
def test_every_transformation_is_driven_to_scipys_minimum(tx, recycles):
    solution = minimize(
        rosenbrock, jnp.array([-1.2, 1.0]), tx, max_steps=20_000, gtol=1e-7
    )
    oracle = scipy.optimize.minimize(
        rosenbrock, [-1.2, 1.0], jac=jax.grad(rosenbrock), tol=1e-10
    )
    assert ended(solution) == Termination.GRADIENT
    np.testing.assert_allclose(solution.params, oracle.x, atol=1e-3)
    np.testing.assert_allclose(solution.value, rosenbrock(solution.params), atol=1e-14)
    np.testing.assert_allclose(
        solution.grad, jax.grad(rosenbrock)(solution.params), atol=1e-10
    )
    # one value and gradient per step, and one at the start
    nodes = jax.tree.leaves(
        solution.state, is_leaf=lambda node: isinstance(node, SEARCH_STATES)
    )
    if not any(isinstance(node, SEARCH_STATES) for node in nodes):
        assert solution.evaluations == solution.steps + 1
    elif recycles:
        assert solution.evaluations <= 4 * solution.steps + 1


def test_a_foreign_transformation_that_evaluates_and_does_not_count_gives_minus_one():
    def update(updates, state, params=None, *, value_fn, **_):
        larger = value_fn(
            jax.tree.map(lambda p, u: p - 0.2 * u, params, updates)
        ) > value_fn(params)
        return jax.tree.map(lambda u: jnp.where(larger, 0.0, -0.1 * u), updates), state

    tx = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    assert minimize(lambda x: jnp.sum(x**2), jnp.ones(2), tx).evaluations == -1


def test_evaluations_are_those_really_made():
    made = []

    def counted(x):
        jax.debug.callback(lambda: made.append(1))
        return rosenbrock(x)

    tx = optax.chain(optax.scale(-1.0), optax.scale_by_backtracking_linesearch(20))
    solution = minimize(counted, jnp.array([-1.2, 1.0]), tx, max_steps=10)
    jax.effects_barrier()
    assert solution.evaluations == len(made)


def test_the_data_is_bound_by_name_and_a_change_of_it_does_not_recompile():
    traces = []

    def loss(x, target, weight=1.0):
        traces.append(1)
        return weight * jnp.sum((x - target) ** 2)

    for target in (1.0, 2.0):
        solution = minimize(
            loss,
            jnp.zeros(2),
            NEWTON,
            data={"target": jnp.full(2, target)},
            gtol=1e-3 * target,
        )
        np.testing.assert_allclose(solution.params, target)
        if target == 1.0:
            first = len(traces)
    assert len(traces) == first
    with pytest.raises(
        TypeError,
        match=r"requires \['target'\]; call `hessopt.minimize\(loss, params, tx, data=dict",
    ):
        minimize(loss, jnp.zeros(2), NEWTON)
    with pytest.raises(
        TypeError,
        match=r"got data \['wieght'\], but value_fn takes only \['target', 'weight'\]",
    ):
        minimize(loss, jnp.zeros(2), NEWTON, data={"target": 1.0, "wieght": 2.0})


def test_wrong_arguments_are_named():
    for name in ("gtol", "ftol", "xtol"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            minimize(rosenbrock, jnp.zeros(2), NEWTON, **{name: -1})
    for steps, says in (
        (-1, "in [0, 2147483647], got -1"),
        (2.7, "a whole number, got 2.7"),
        (jnp.float32(2.5), "a whole number, got 2.5"),
        (2**31, "in [0, 2147483647]"),
        (np.inf, "in [0, "),
    ):
        with pytest.raises(ValueError, match=re.escape(f"max_steps must be {says}")):
            minimize(rosenbrock, jnp.zeros(2), NEWTON, max_steps=steps)
    with pytest.raises(
        TypeError,
        match=r"data\['mode'\] must be an array, got 'train': bind it to value_fn",
    ):
        minimize(
            lambda x, mode: rosenbrock(x), jnp.zeros(2), NEWTON, data={"mode": "train"}
        )
    with pytest.raises(ValueError, match="log_every must be an int, at least 1, got 0"):
        minimize(rosenbrock, jnp.zeros(2), NEWTON, log_every=0)
    with pytest.raises(
        TypeError, match="minimize needs value_fn to return a scalar, got a tuple"
    ):
        minimize(lambda x: (rosenbrock(x), 1), jnp.zeros(2), NEWTON)
    with pytest.raises(
        TypeError, match=r"with has_aux=True needs value_fn to return \(scalar, aux\)"
    ):
        minimize(rosenbrock, jnp.zeros(2), NEWTON, has_aux=True)


def test_what_cannot_be_minimized_over_is_named():
    with pytest.raises(
        TypeError, match=r"floating or complex params, but params\['a'\] is int64"
    ):
        minimize(rosenbrock, {"a": jnp.zeros(2, int)}, NEWTON)
    with pytest.raises(
        TypeError,
        match="tx must be an optax transformation, with init and update, got <function sgd",
    ):
        minimize(rosenbrock, jnp.zeros(2), optax.sgd)
    with pytest.raises(TypeError, match="value_fn must be a function"):
        minimize(jnp.zeros(2), rosenbrock, NEWTON)
    with pytest.raises(TypeError, match="data must be a mapping"):
        minimize(lambda x, y: rosenbrock(x), jnp.zeros(2), NEWTON, data=(jnp.zeros(2),))


def test_what_stands_behind_a_search_is_seen():
    loss = lambda x: jnp.sum((x - jnp.array([1.0, -2.0])) ** 2)
    behind = minimize(
        loss,
        jnp.full(2, 3.0),
        optax.chain(optax.lbfgs(), optax.keep_params_nonnegative()),
    )
    np.testing.assert_allclose(behind.value, loss(behind.params))
    assert ended(behind) != Termination.GRADIENT
    poison = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: u * jnp.nan, updates)
    )
    assert (
        ended(minimize(loss, jnp.full(2, 3.0), optax.chain(optax.lbfgs(), poison)))
        == Termination.NONFINITE
    )


def test_aux_is_that_of_the_solution():
    loss = lambda x, target: (
        jnp.sum((x - target) ** 2),
        {"residual": x - target, "n": x.size},
    )
    solution = minimize(
        loss,
        jnp.zeros(3),
        optax.sgd(0.1),
        data={"target": jnp.arange(3.0)},
        has_aux=True,
    )
    np.testing.assert_allclose(
        solution.aux["residual"], solution.params - jnp.arange(3.0)
    )
    assert solution.aux["n"] == 3


def test_a_warm_start_continues_where_the_state_left_off():
    tx = optax.adam(1e-3)
    start = jnp.array([-1.2, 1.0])
    whole = minimize(rosenbrock, start, tx, max_steps=60, gtol=0.0)
    half = minimize(rosenbrock, start, tx, max_steps=30, gtol=0.0)
    rest = minimize(
        rosenbrock, half.params, tx, state=half.state, max_steps=30, gtol=0.0
    )
    assert half.value > whole.value  # the best point is the last one here
    np.testing.assert_array_equal(rest.params, whole.params)


def test_the_best_point_is_returned_not_the_last():
    loss = lambda x: jnp.sum(x**2)
    grow = optax.chain(
        optax.scale(-1.0),
        optax.scale_by_schedule(lambda count: jnp.where(count < 3, 0.25, -2.0)),
    )
    solution = minimize(loss, jnp.ones(2), grow, max_steps=10)
    assert ended(solution) == Termination.MAX_STEPS
    np.testing.assert_allclose(solution.params, 0.5**3)
    np.testing.assert_allclose(solution.value, loss(solution.params))
    np.testing.assert_allclose(solution.grad, 2 * solution.params)


CASES = {  # objective, start, transformation, options
    Termination.GRADIENT: (rosenbrock, jnp.array([-1.2, 1.0]), NEWTON, {}),
    Termination.VALUE: (
        rosenbrock,
        jnp.array([-1.2, 1.0]),
        optax.sgd(1e-3),
        {"ftol": 1e-4, "gtol": 0.0},
    ),
    Termination.STEP: (
        rosenbrock,
        jnp.array([-1.2, 1.0]),
        NEWTON,
        {"xtol": 1e-2, "gtol": 0.0},
    ),
    Termination.MAX_STEPS: (
        rosenbrock,
        jnp.array([-1.2, 1.0]),
        optax.adam(1e-4),
        {"max_steps": 7},
    ),
    Termination.STALLED_AT_NOISE: (
        lambda x: 1.0 + jnp.sum(x**4) / 1e20,
        jnp.ones(2),
        optax.sgd(1.0),
        {},
    ),
    Termination.UNBOUNDED: (lambda x: -jnp.sum(x**2), jnp.ones(2), optax.sgd(1.0), {}),
    Termination.NONFINITE: (
        lambda x: jnp.sum(x**4),
        jnp.full(2, 10.0),
        optax.sgd(1.0),
        {},
    ),
}


@pytest.mark.parametrize("reason", CASES, ids=lambda reason: reason.name)
def test_terminations(reason):
    objective, start, tx, options = CASES[reason]
    solution = minimize(objective, start, tx, **options)
    assert ended(solution) == reason
    chex.assert_tree_all_finite((solution.params, solution.value, solution.grad))
    assert solution.value <= objective(start)
    if reason == Termination.MAX_STEPS:
        assert solution.steps == 7


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_nonfinite_start_takes_no_step_and_says_so(bad):
    solution = minimize(lambda x: jnp.sum(x * bad), jnp.ones(2), NEWTON)
    assert (ended(solution), int(solution.steps)) == (Termination.NONFINITE, 0)


def test_a_stationary_start_and_an_empty_tree_are_converged():
    assert (
        ended(minimize(lambda x: jnp.sum(x**2), jnp.zeros(2), NEWTON))
        == Termination.GRADIENT
    )
    assert (
        ended(minimize(lambda _: jnp.asarray(1.0), {}, NEWTON)) == Termination.GRADIENT
    )


def test_a_step_of_zero_is_never_convergence():
    loss = lambda x: jnp.sum(jnp.abs(x) ** 1.5)
    solution = minimize(loss, jnp.ones(2), optax.scale(0.0), ftol=0.5, xtol=0.5)
    assert ended(solution) == Termination.MAX_STEPS
    uphill = optax.chain(optax.scale(1.0), optax.scale_by_backtracking_linesearch(5))
    assert (
        ended(minimize(loss, jnp.ones(2), uphill, ftol=0.5, xtol=0.5))
        == Termination.STALLED_AT_NOISE
    )


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_no_decision_depends_on_the_units(factor):
    start, tolerances = (
        jnp.array([-1.2, 1.0]),
        {"ftol": 1e-9, "xtol": 1e-9, "gtol": 1e-9},
    )
    plain = minimize(rosenbrock, start, NEWTON, **tolerances)
    scaled = minimize(
        lambda x: factor * rosenbrock(x / factor), factor * start, NEWTON, **tolerances
    )
    assert (plain.steps, plain.termination) == (scaled.steps, scaled.termination)
    np.testing.assert_allclose(factor * plain.params, scaled.params, rtol=1e-12)


def test_vmapped_lanes_equal_the_loop_and_the_second_call_does_not_recompile():
    traces = []

    def counted(x):
        traces.append(1)
        return rosenbrock(x)

    starts = jax.random.uniform(jax.random.key(0), (32, 2), minval=-2.0, maxval=2.0)
    batched = jax.vmap(lambda start: minimize(counted, start, NEWTON, max_steps=17))
    lanes = batched(starts)
    first = len(traces)
    alone = [minimize(counted, start, NEWTON, max_steps=17) for start in starts]
    chex.assert_trees_all_equal(
        lanes.termination, jnp.array([int(s.termination) for s in alone])
    )
    chex.assert_trees_all_equal(lanes.steps, jnp.array([int(s.steps) for s in alone]))
    chex.assert_trees_all_close(
        lanes.params, jnp.stack([s.params for s in alone]), rtol=1e-12
    )
    # some lanes run out of steps, some end before the others do
    assert len(set(lanes.termination.tolist())) == 2
    batched(starts + 0.1)
    minimize(counted, starts[0], NEWTON, max_steps=13)
    assert len(traces) == first  # one program serves lanes, loop and all later calls


@pytest.mark.parametrize("jacobian", [jax.jacrev, jax.jacfwd])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_the_solution_is_differentiated_in_the_data(jacobian, argument):
    rng = np.random.default_rng(0)
    data = (
        jnp.asarray(rng.normal(size=(20, 4))),
        jnp.asarray(rng.normal(size=20)),
        jnp.asarray(0.7),
    )

    def solved(A, b, penalty):
        solution = minimize(
            ridge,
            jnp.zeros(4),
            NEWTON,
            data={"A": A, "b": b, "penalty": penalty},
            gtol=1e-12,
        )
        return solution.params, solution.value

    def closed_form(A, b, penalty):
        w = jnp.linalg.solve(A.T @ A + penalty * jnp.eye(4), A.T @ b)
        return w, ridge(w, A, b, penalty)

    ours, exact = (
        jacobian(solved, argument)(*data),
        jacobian(closed_form, argument)(*data),
    )
    chex.assert_trees_all_close(ours, exact, rtol=1e-8, atol=1e-8)


def test_derivatives_pass_jit_vmap_aux_and_integer_data_and_complex_parameters():
    def loss(z, c, label):
        # jnp.abs(z - c) ** 2 has no second derivative in JAX where z = c
        square = jnp.real((z - c) * jnp.conj(z - c))
        return jnp.sum(square) * (1.0 + label), jnp.abs(z)

    def solved(c, label):
        start = jnp.zeros(2, jnp.complex128)
        solution = minimize(
            loss, start, NEWTON, data={"c": c, "label": label}, has_aux=True, gtol=1e-12
        )
        return jnp.real(solution.params), solution.aux

    jacobian = jax.vmap(jax.jit(jax.jacfwd(solved)), in_axes=(0, None))(
        jnp.array([1.0, 2.0]), jnp.array(3)
    )
    chex.assert_trees_all_close(
        jacobian, (jnp.ones((2, 2)), jnp.ones((2, 2))), rtol=1e-10
    )


class Residual:
    def __init__(self, target):
        self.target = target

    def __call__(self, x):
        return x - self.target

    def squared(self, x):
        return jnp.sum(self(x) ** 2)


class Slotted(Residual):
    __slots__ = ("target",)


def over_an_object(target):
    box = types.SimpleNamespace(target=target)
    return lambda x: jnp.sum((x - box.target) ** 2)


CLOSED_OVER = {
    "function": lambda target: lambda x: jnp.sum((x - target) ** 2),
    "default": lambda target: lambda x, t=target: jnp.sum((x - t) ** 2),
    "keyword's default": lambda target: lambda x, *, t=target: jnp.sum((x - t) ** 2),
    "partial": lambda target: functools.partial(
        lambda x, t: jnp.sum((x - t) ** 2), t=target
    ),
    "compiled": lambda target: jax.jit(lambda x: jnp.sum((x - target) ** 2)),
    "object behind a function": over_an_object,
    "method": lambda target: Residual(target).squared,
    "slot": lambda target: Slotted(target).squared,
    "composite": lambda target: hessopt.composite(
        lambda x: x - target, lambda r: jnp.sum(r**2)
    ),
    "composite's loss": lambda target: hessopt.composite(
        lambda x: x, lambda x: jnp.sum((x - target) ** 2)
    ),
    "composite's object": lambda target: hessopt.composite(
        Residual(target), lambda r: jnp.sum(r**2)
    ),
    "composite's default": lambda target: hessopt.composite(
        lambda x, t=target: x - t, lambda r: jnp.sum(r**2)
    ),
}


def nearest(kind, target):
    return minimize(
        CLOSED_OVER[kind](target), jnp.zeros(2), optax.sgd(0.5)
    ).params.sum()


@pytest.mark.parametrize("kind", CLOSED_OVER)
def test_what_value_fn_closes_over_is_differentiated_too(kind):
    solved = functools.partial(nearest, kind)
    # unnoticed, this would raise
    np.testing.assert_allclose(jax.jacfwd(solved)(1.0), 2.0)
    # and this would be 0
    np.testing.assert_allclose(jax.jit(jax.grad(solved))(1.0), 2.0)


@pytest.mark.parametrize("kind", ["default", "composite's default"])
def test_what_value_fn_closes_over_passes_every_transformation(kind):
    solved = functools.partial(nearest, kind)
    for derivative in (
        jax.grad(solved),
        jax.jacrev(solved),
        jax.grad(jax.jit(solved)),
        jax.jit(jax.jacfwd(solved)),
    ):
        np.testing.assert_allclose(derivative(1.0), 2.0)
    for f, exact in ((solved, [2.0, 4.0]), (jax.grad(solved), [2.0, 2.0])):
        np.testing.assert_allclose(jax.vmap(f)(jnp.array([1.0, 2.0])), exact)


@pytest.mark.parametrize("as_composite", [False, True])
def test_traced_labels_and_keys_may_be_closed_over_too(as_composite):
    def solved(scale, labels, key):
        residual = lambda x: x - scale * (labels + jax.random.normal(key, (2,)))
        total = lambda r: jnp.sum(r**2)
        value_fn = (
            hessopt.composite(residual, total)
            if as_composite
            else lambda x: total(residual(x))
        )
        return minimize(value_fn, jnp.zeros(2), optax.sgd(0.5)).params.sum()

    labels, key = jnp.array([3, 5]), jax.random.key(0)
    exact = jnp.sum(labels + jax.random.normal(key, (2,)))
    for derivative in (
        jax.grad(solved),
        jax.jit(jax.grad(solved)),
        jax.grad(jax.jit(solved)),
        jax.jacfwd(solved),
    ):
        np.testing.assert_allclose(derivative(1.0, labels, key), exact, rtol=1e-12)
    lanes = jax.vmap(jax.grad(solved), in_axes=(None, None, 0))(1.0, labels, key[None])
    np.testing.assert_allclose(lanes, exact[None], rtol=1e-12)


def test_aux_keeps_its_structure_where_something_is_closed_over():
    def solved(target):
        loss = lambda x: (
            jnp.sum((x - target) ** 2),
            {"n": x.size, "residual": x - 2 * target, "none": None},
        )
        return minimize(loss, jnp.zeros(2), optax.sgd(0.5), has_aux=True).aux

    aux, tangent = jax.jvp(solved, (1.0,), (1.0,))
    chex.assert_trees_all_close(
        aux, {"n": jnp.array(2), "residual": jnp.full(2, -1.0), "none": None}
    )
    np.testing.assert_allclose(tangent["residual"], -1.0)


def test_an_objective_that_holds_an_unused_traced_value_is_compiled_once():
    traces, box = [], types.SimpleNamespace()

    def loss(x, unused=box):
        traces.append(1)
        return jnp.sum((x - 1.0) ** 2)

    def solved(t):
        box.t = t
        return minimize(loss, jnp.zeros(2), tx).params

    tx, lanes = optax.sgd(0.5), jax.vmap(solved)
    lanes(jnp.ones(3))
    first = len(traces)
    lanes(jnp.ones(3))
    assert len(traces) == first + 1  # to see what it uses


def test_an_objective_may_name_what_is_defined_after_the_call():
    def loss(x):
        return jnp.sum(x**2) if x.ndim == 1 else helper(x)

    np.testing.assert_allclose(minimize(loss, jnp.ones(2), optax.sgd(0.5)).params, 0.0)
    helper = jnp.sum


def test_derivatives_of_ill_conditioned_problems_are_right_or_nan():
    curvatures = jnp.logspace(0, 9, 30)
    loss = lambda x, target, weights: (
        0.5 * jnp.sum(weights * x**2) - jnp.sum(x) * target
    )
    solved = lambda weights, copies=1: jax.grad(
        lambda t: minimize(
            lambda x, t: loss(x, t, weights),
            jnp.zeros(weights.size),
            optax.scale(0.0),
            data={"t": t},
            max_steps=1,
        ).params.sum()
    )(1.0)
    np.testing.assert_allclose(solved(curvatures), jnp.sum(1 / curvatures), rtol=1e-6)
    assert jnp.isnan(solved(curvatures.at[3].set(0.0)))  # singular
    large = jnp.tile(jnp.logspace(0, 3, 20), 30)  # by conjugate gradients
    np.testing.assert_allclose(solved(large), jnp.sum(1 / large), rtol=1e-6)
    assert jnp.isnan(solved(large.at[3].set(0.0)))


@pytest.mark.parametrize("jacobian", [jax.jacrev, jax.jacfwd])
@pytest.mark.parametrize("units", [[1.0, 1e4], [1e-12, 1e12]])
def test_derivatives_are_nan_where_the_hessian_is_singular_in_any_units(
    units, jacobian
):
    units = jnp.array(units, jnp.float32)

    @jacobian
    def solved(target, curvature):
        loss = lambda x, target: (
            0.5 * (units * (x - target)) @ curvature @ (units * (x - target))
        )
        return minimize(
            loss, jnp.zeros(2, jnp.float32), optax.scale(0.0), data={"target": target}
        ).params

    target = jnp.ones(2, jnp.float32)
    for regular in (jnp.eye(2), jnp.array([[2.0, 1.0], [1.0, -3.0]])):
        unitless = units[:, None] * solved(target, regular.astype(jnp.float32)) / units
        np.testing.assert_allclose(unitless, jnp.eye(2), atol=1e-5)
    for singular in (
        jnp.ones((2, 2)),
        jnp.diag(jnp.array([0.0, 1.0])),
        jnp.diag(jnp.array([1.0, 0.0])),
    ):
        assert jnp.all(jnp.isnan(solved(target, singular.astype(jnp.float32))))


def test_the_solution_is_differentiated_twice():
    def solved(t):  # of exp(x) - t x: log(t)
        loss = lambda x, t: jnp.sum(jnp.exp(x) - t * x)
        return minimize(
            loss, jnp.zeros(1), NEWTON, data={"t": t}, gtol=1e-12
        ).params.sum()

    np.testing.assert_allclose(jax.grad(jax.grad(solved))(2.0), -0.25, rtol=1e-8)


def test_an_objective_without_a_hash_is_compiled_once():
    traces = []

    @dataclasses.dataclass
    class Quadratic:
        target: jax.Array

        def __call__(self, x):
            traces.append(1)
            return jnp.sum((x - self.target) ** 2)

    with pytest.raises(TypeError):
        hash(Quadratic(jnp.ones(2)))
    tx, one = optax.sgd(0.5), Quadratic(jnp.ones(2))
    for value_fn in (
        one,
        hessopt.composite(one, lambda x: x),
        hessopt.composite(lambda x: x, one),
    ):
        np.testing.assert_allclose(minimize(value_fn, jnp.zeros(2), tx).params, 1.0)
    first = len(traces)
    minimize(one, jnp.ones(2), tx)
    assert len(traces) == first


def test_steps_of_zero_that_only_wait_are_no_stall():
    slow = optax.MultiSteps(optax.sgd(0.5), 25)
    assert (
        ended(minimize(lambda x: jnp.sum(x**2), jnp.ones(2), slow))
        == Termination.GRADIENT
    )
    late = optax.sgd(lambda count: jnp.where(count < 30, 0.0, 0.5))
    assert (
        ended(minimize(lambda x: jnp.sum(x**2), jnp.ones(2), late))
        == Termination.GRADIENT
    )


def test_wrapped_objects_and_transformations_with_few_keywords_get_what_they_take():
    loss = lambda x: jnp.sum((x - 1.0) ** 2)
    wrapped = optax.MultiSteps(
        optax.chain(optax.scale(-1.0), optax.scale_by_backtracking_linesearch(20)), 2
    )
    assert ended(minimize(loss, jnp.zeros(2), wrapped)) == Termination.GRADIENT
    seen = []

    def update(updates, state, params=None, *, value):
        seen.append(value)
        return jax.tree.map(lambda u: -0.5 * u, updates), state

    few = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    assert ended(minimize(loss, jnp.zeros(2), few)) == Termination.GRADIENT
    assert seen


def test_convergence_is_not_claimed_at_a_point_worse_than_an_earlier_one():
    loss = lambda x: jnp.sum(jnp.where(x < 5.0, x**2, 4.0 + 1e-9 * x))
    leap = optax.scale_by_schedule(lambda count: jnp.where(count == 1, 10.0, -0.25))
    solution = minimize(loss, jnp.full(1, 2.1), leap, ftol=1e-3, gtol=0.0, max_steps=30)
    assert ended(solution) != Termination.VALUE
    assert solution.value < 1.2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_value_is_that_of_the_rounded_parameters_in_the_precision_of_the_loss(
    dtype,
):
    x0 = jnp.full(4, 3.0, dtype)
    loss = lambda x: jnp.sum((x.astype(jnp.float32) - 1.001) ** 2)
    solution = minimize(
        loss,
        x0,
        optax.chain(optax.scale(-1.0), optax.scale_by_zoom_linesearch(10)),
        max_steps=5,
    )
    np.testing.assert_allclose(solution.value, loss(solution.params), rtol=1e-6)
    assert solution.value.dtype == jnp.float32


def test_progress_and_callback_see_every_block_and_change_nothing(capsys):
    seen = []
    start = jnp.array([-1.2, 1.0])
    solution = minimize(
        rosenbrock,
        start,
        NEWTON,
        progress=True,
        log_every=4,
        callback=lambda s: seen.append(int(s.steps)),
    )
    plain = minimize(rosenbrock, start, NEWTON)
    chex.assert_trees_all_close(solution._replace(history=None), plain, rtol=1e-12)
    assert seen == [*range(4, int(plain.steps), 4), int(plain.steps)]
    shown = capsys.readouterr().err
    assert all(f"{x}=" in shown for x in ("value", "gradient", "step", "evaluations"))


def test_the_history_is_that_of_single_steps_by_hand():
    start, seen, points = jnp.array([-1.2, 1.0]), [], []

    def callback(solution):
        seen.append(solution.history)
        points.append(solution.params)

    solution = minimize(rosenbrock, start, NEWTON, log_every=1, callback=callback)
    history = solution.history
    assert history.steps.tolist() == list(range(int(solution.steps) + 1))
    assert [h.steps[-1] for h in seen] == history.steps[1:].tolist()
    chex.assert_trees_all_equal(seen[-1], history)
    assert history.evaluations[-1] == solution.evaluations
    assert np.all(np.diff(history.seconds) > 0)
    # Newton's method with this search decreases the value at every step
    values = [rosenbrock(x) for x in (start, *points)]
    np.testing.assert_allclose(history.values, values, rtol=1e-9, atol=1e-20)
    sizes = [jnp.max(jnp.abs(jax.grad(rosenbrock)(x))) for x in (start, *points)]
    np.testing.assert_allclose(history.gradients, sizes, rtol=1e-6, atol=1e-12)
    moves = np.max(np.abs(np.diff([start, *points], axis=0)), axis=1)
    np.testing.assert_allclose(history.step_sizes, [0.0, *moves], rtol=1e-9)


def test_log_every_alone_keeps_a_history():
    start = jnp.array([-1.2, 1.0])
    solution = minimize(rosenbrock, start, NEWTON, log_every=5)
    steps = int(solution.steps)
    assert solution.history.steps.tolist() == [*range(0, steps, 5), steps]
    assert minimize(rosenbrock, start, NEWTON).history is None


def test_a_callback_may_end_the_run():
    solution = minimize(
        rosenbrock,
        jnp.array([-1.2, 1.0]),
        NEWTON,
        log_every=5,
        callback=lambda s: s.value < 3.0,
    )
    assert (ended(solution), int(solution.steps)) == (Termination.INTERRUPTED, 5)


def test_progress_needs_a_run_of_its_own():
    for transform in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(TypeError, match="not under jit, vmap or grad"):
            transform(
                lambda x: (
                    minimize(
                        lambda y: jnp.sum((y - x) ** 2), x, NEWTON, progress=True
                    ).value
                )
            )(jnp.ones(2))


def test_ctrl_c_returns_the_best_point_so_far():
    program = textwrap.dedent(
        """
        import signal
        import jax, jax.numpy as jnp, optax, hessopt
        jax.config.update("jax_enable_x64", True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # some parents have it ignored
        loss = lambda x: jnp.sum(jnp.cosh(x - 1.0))
        options = dict(max_steps=10**9, gtol=0.0, progress=True, log_every=20_000)
        started = lambda solution: print("running", flush=True)
        solution = hessopt.minimize(loss, jnp.zeros(3), optax.sgd(1e-8), callback=started, **options)
        print(solution.reason, int(solution.steps), float(solution.value) < 4.6292)
        """
    )
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=root,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    reason, steps, better = output.split()[-3:]
    assert (reason, better) == ("INTERRUPTED", "True")
    assert int(steps) >= 20_000
    assert process.returncode == 0


def test_steps_of_zero_that_wait_are_no_stall():
    f = lambda x: jnp.sum((x - 1.0) ** 4)
    waiting = hessopt.newton(lambda count: jnp.where(count < 5, 0.0, 1.0))
    for tx in (optax.MultiSteps(hessopt.newton(), 5), waiting):
        assert ended(minimize(f, jnp.zeros(2), tx)) == Termination.GRADIENT


def test_the_gradients_of_pairs_of_one_batch_are_counted():
    made = []

    def counted(x):
        jax.debug.callback(lambda: made.append(1))
        return rosenbrock(x)

    solution = minimize(
        counted,
        jnp.array([-1.2, 1.0]),
        hessopt.lbfgs(same_batch_pairs=True),
        max_steps=6,
    )
    jax.effects_barrier()
    assert solution.evaluations == len(made)
