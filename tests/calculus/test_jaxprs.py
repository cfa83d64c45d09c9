"""The interpreter against JAX's own evaluation and JAX's own derivatives."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.calculus.jaxprs import (
    CALLS,
    REMATERIALIZED,
    depends,
    inner_programs,
    interpret,
    selected,
)

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
MATRIX = np.random.default_rng(1).normal(size=(3, 3))
CUSTOM = {"custom_jvp_call": "call_jaxpr"}


def evaluate(equation, values):
    return equation.fun(*values)


@jax.custom_jvp
def rounded(x):
    return jnp.round(x)


rounded.defjvp(lambda x, t: (rounded(x[0]), t[0]))


@jax.custom_vjp
def clipped(x):
    return 2 * x


clipped.defvjp(lambda x: (2 * x, None), lambda _, g: (jnp.clip(g, -1, 1),))


@jax.jit
def inner(x, y):
    return jax.jit(jnp.tanh)(x) * y, x - y


def looped(x):
    body = lambda carry, row: (jnp.tanh(carry + row), carry[0])
    carry, rows = jax.lax.scan(body, x[0], x)
    count = jax.lax.while_loop(lambda n: n < 3, lambda n: n + 1, 0)
    return carry * count, jax.lax.cond(rows[0] > 0, jnp.sin, jnp.cos, rows)


PROGRAMS = {
    "arithmetic": lambda x: jnp.exp(x) @ MATRIX + 2.0,
    "one variable twice": lambda x: x * x,
    "nested jit": lambda x: inner(x, x + 1.0),
    "jit with a literal argument": lambda x: jax.jit(lambda a, b: a * b)(x, 3.0),
    "jit that closes over a constant": lambda x: jax.jit(lambda a: a @ MATRIX)(x),
    "same jit twice": lambda x: inner(inner(x, x)[0], x)[1],
    "unused results": lambda x: inner(x, x)[1] + jax.lax.top_k(x, 2)[0][0, 0],
    "unused input of a call": lambda x: jax.jit(lambda a, b: a, keep_unused=True)(x, 1),
    "custom jvp": lambda x: rounded(3 * x) + jax.nn.relu(x),
    "custom vjp": lambda x: clipped(x) * x,
    "rematerialized": jax.checkpoint(lambda x: jnp.sin(inner(x, x)[0])),
    "rematerialized with a constant": jax.checkpoint(lambda x: jnp.sin(x @ MATRIX)),
    "loops and branches": looped,
    "literal output": lambda x: (x, 2.0, jnp.int32(3)),
    "constant output": lambda x: (jnp.asarray(MATRIX), x),
    "the input, twice": lambda x: (x, x),
    "no outputs": lambda x: (),
    "an equation without results": lambda x: (jax.debug.callback(np.shape, x), x),
    "integers": lambda x: jnp.argsort(x, axis=0)[jnp.array([2, 0])],
    "complex": lambda x: jnp.abs(jnp.fft.fft(x)) ** 2,
    "derivative": jax.grad(lambda x: jnp.sum(inner(rounded(x), x)[0] ** 2)),
    "random": lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
}


@pytest.mark.parametrize("enter", [{}, CALLS, CALLS | REMATERIALIZED | CUSTOM])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_rule_that_evaluates_equals_the_function(name, enter):
    fun = PROGRAMS[name]
    program = jax.make_jaxpr(fun)(X)
    found = interpret(program, [X], evaluate, constant=jnp.asarray, enter=enter)
    expected = [jnp.asarray(value) for value in jax.tree.leaves(fun(X))]
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, rtol=1e-14)


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_compiled_differentiated_and_batched(name):
    fun = lambda x: jax.tree.leaves(PROGRAMS[name](x))
    program = jax.make_jaxpr(fun)(X)

    def transformed(some):
        sums = lambda x: [jnp.sum(value * 1.0) for value in (x, *some(x))]
        batched = jax.vmap(some, axis_size=3)(jnp.stack([X, 2 * X, -X]))
        return jax.jit(some)(X), jax.jacrev(sums)(X), batched

    found = transformed(
        lambda x: interpret(program, [x], evaluate, constant=jnp.asarray)
    )
    chex.assert_trees_all_close(found, transformed(fun), rtol=1e-12)


def seen(fun, enter=CALLS):
    """How often a rule sees each primitive."""
    names = collections.Counter()

    def rule(equation, values):
        names[equation.name] += 1
        return evaluate(equation, values)

    interpret(jax.make_jaxpr(fun)(X), [X], rule, constant=jnp.asarray, enter=enter)
    return names


def test_a_rule_sees_each_equation_once_and_none_that_is_entered():
    names = seen(PROGRAMS["same jit twice"])
    assert names == {"tanh": 2, "mul": 2, "sub": 2}
    outside = seen(PROGRAMS["same jit twice"], enter={})
    assert sum(outside.values()) == 2
    assert set(outside) <= set(CALLS)


def test_loops_branches_and_derivative_rules_are_one_equation():
    names = seen(looped)
    assert (names["scan"], names["while"], names["cond"]) == (1, 1, 1)
    assert names["tanh"] == names["sin"] == 0
    assert seen(PROGRAMS["custom jvp"])["custom_jvp_call"] == 2
    entered = seen(PROGRAMS["custom jvp"], enter=CALLS | CUSTOM)
    assert entered["custom_jvp_call"] == 0
    assert (entered["round"], entered["max"]) == (1, 1)


def test_rematerialized_calls_are_entered_on_request():
    fun = PROGRAMS["rematerialized"]
    (whole,) = seen(fun)
    assert whole in REMATERIALIZED
    assert seen(fun, CALLS | REMATERIALIZED) == {
        "tanh": 1,
        "mul": 1,
        "sub": 1,
        "sin": 1,
    }


def test_an_operand_is_given_once_with_its_shape_and_without_literals():
    equations = []

    def rule(equation, values):
        equations.append((equation, values))
        return evaluate(equation, values)

    fun = lambda x: jnp.sum(2.0 * (x * x), axis=1)
    interpret(jax.make_jaxpr(fun)(X), [X], rule, constant=jnp.asarray)
    assert [e.name for e, _ in equations] == ["mul", "mul", "reduce_sum"]
    assert [len(values) for _, values in equations] == [1, 1, 1]
    for equation, values in equations:
        assert [v.shape for v in values] == [a.shape for a in equation.operands]
        results = equation.fun(*values)
        assert [v.shape for v in results] == [a.shape for a in equation.results]
    assert equations[2][0].params["axes"] == (1,)
    # the square as a function of x, not of two factors
    (slope,) = jax.jvp(equations[0][0].fun, (X,), (jnp.ones_like(X),))[1]
    np.testing.assert_allclose(slope, 2 * X)


def test_a_rule_may_replace_a_primitive_at_any_depth():
    replaced = lambda e, values: (
        [jnp.sin(values[0])] if e.name == "tanh" else evaluate(e, values)
    )
    program = jax.make_jaxpr(PROGRAMS["nested jit"])(X)
    found = interpret(program, [X], replaced, constant=jnp.asarray)
    np.testing.assert_allclose(found[0], jnp.sin(X) * (X + 1))


def test_values_are_of_any_kind_and_nothing_is_computed():
    """Which inputs an output has seen, as text, by a rule that never looks at arrays."""
    program = jax.make_jaxpr(
        lambda a, b, c: (jax.jit(jnp.add)(a, jnp.sin(b)), c * MATRIX[0, 0], 5.0, b)
    )(1.0, 2.0, 3.0)
    union = lambda equation, values: (
        ["".join(sorted(set("".join(values))))] * len(equation.results)
    )
    found = interpret(program, ["a", "b", "c"], union, constant=lambda _: "")
    assert found == ["ab", "c", "", "b"]


def test_constants_and_literals_are_handed_over():
    handed = []

    def constant(array):
        handed.append(np.shape(array))
        return array

    fun = lambda x: (jax.jit(lambda a, b: a * b)(x @ MATRIX, 3.0), 4.0)
    program = jax.make_jaxpr(fun)(X)
    found = interpret(program, [X], evaluate, constant=constant)
    np.testing.assert_allclose(found[0], 3 * X @ MATRIX)
    # the matrix, and the literals among outputs and arguments of calls
    assert collections.Counter(handed)[3, 3] == 1
    assert () in handed


def test_a_rule_with_too_few_results_is_an_error():
    program = jax.make_jaxpr(jnp.sin)(X)
    with pytest.raises(ValueError, match="zip"):
        interpret(program, [X], lambda *_: [], constant=jnp.asarray)
    with pytest.raises(ValueError, match="zip"):
        interpret(program, [], evaluate, constant=jnp.asarray)


def test_outputs_that_do_not_depend_on_inputs_are_known():
    fun = lambda x: (jnp.sin(x), jnp.ones(3) * 2, 1.0, x, jax.jit(lambda a: a)(x))
    assert depends(jax.make_jaxpr(fun)(X)) == [True, False, False, True, True]
    assert depends(jax.make_jaxpr(lambda: jnp.ones(3))()) == [False]
    # a zero derivative is a constant of the program
    turned = lambda t: jax.jvp(jax.grad(lambda x: jnp.sum(3 * x)), (X,), (t,))[1]
    assert depends(jax.make_jaxpr(turned)(X)) == [False]


def test_selected_outputs_are_those_of_the_function():
    fun = lambda x: (jnp.sin(x), x @ MATRIX, jnp.sum(x))
    found = selected(jax.make_jaxpr(fun)(X), [True, False, True])(X)
    chex.assert_trees_all_close(found, [jnp.sin(X), jnp.sum(X)], rtol=1e-14)


def test_inner_programs_are_found_in_every_parameter():
    count = lambda fun: [
        len(inner_programs(e.params)) for e in jax.make_jaxpr(fun)(X).jaxpr.eqns
    ]
    assert count(jnp.sin) == [0]
    assert count(lambda x: inner(x, x)) == [1]
    branched = lambda x: jax.lax.cond(True, jnp.sin, jnp.cos, x)
    assert max(count(branched)) == 2
    assert max(count(lambda x: jax.lax.while_loop(lambda v: v[0, 0] < 1, abs, x))) == 2
