"""Old names work until 0.3, warn, and give what the new ones give."""

import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt
from hessopt._checks import renamed_arguments

ARGUMENTS = [
    (hessopt.newton, "positivity", "on_indefinite", "absolute"),
    (hessopt.scale_by_newton, "positivity", "on_indefinite", "absolute"),
    (hessopt.trust_region_newton, "model", "step_bound", "radius"),
]
"""Functions, old and new names of an argument, and a word that is not its default."""

ATTRIBUTES = [
    ("hessopt.calculus.rates", "Restricted", "hessopt.kinds.rates", "RateProblem"),
    ("hessopt.calculus.rates", "Measured", "hessopt.kinds.rates", "Measurement"),
    ("hessopt.calculus.rates", "Solved", "hessopt.kinds.rates", "RateSolution"),
    ("hessopt.calculus.rates", "RateInfo", "hessopt.kinds.rates", "RateInfo"),
    ("hessopt.calculus.groups", "Groups", "hessopt.trees.groups", "Groups"),
    (
        "hessopt.calculus.recycling",
        "LinesearchInfo",
        "hessopt.kinds.line_searches",
        "LinesearchInfo",
    ),
    (
        "hessopt.calculus.subproblems",
        "Subproblem",
        "hessopt.kinds.subproblems",
        "SubproblemSolver",
    ),
    ("hessopt.numerics.gain_ratio", "Model", "hessopt.kinds.step_bounds", "StepBound"),
    *(
        ("hessopt.numerics.positivity", old, "hessopt.numerics.indefiniteness", new)
        for old, new in [
            ("Positivity", "IndefiniteTreatment"),
            ("Factorization", "Factorization"),
            ("SHIFT", "SHIFT"),
            ("ABSOLUTE", "ABSOLUTE"),
            ("NONE", "NONE"),
            ("POSITIVITIES", "INDEFINITE_TREATMENTS"),
        ]
    ),
]
"""Old modules and names, and the new ones."""


def saddle(x):
    return (x[0] ** 2 - 1.0) ** 2 + jnp.sin(x[1])


def trained(tx: Any, steps: int = 3) -> Any:
    """Parameters and state after some steps."""
    x = jnp.array([0.2, 1.0])
    state = tx.init(x)

    @jax.jit
    def step(x, state):
        value, grad = jax.value_and_grad(saddle)(x)
        updates, state = tx.update(
            grad, state, x, value=value, grad=grad, value_fn=saddle
        )
        return optax.apply_updates(x, updates), state

    for _ in range(steps):
        x, state = step(x, state)
    return x, state


def identical(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


NAMED = pytest.mark.parametrize(
    ("function", "old", "new", "word"),
    ARGUMENTS,
    ids=[f"{function.__name__}, {old}" for function, old, *_ in ARGUMENTS],
)


@NAMED
def test_an_argument_by_its_old_name_gives_the_same_and_warns(function, old, new, word):
    message = rf"{old} is named {new}; .*until 0\.3"
    with pytest.warns(DeprecationWarning, match=message) as said:
        tx = function(**{old: word})
    assert [warning.filename for warning in said] == [__file__]
    identical(trained(tx), trained(function(**{new: word})))


@NAMED
def test_both_names_of_an_argument_are_refused(function, old, new, word):
    with pytest.raises(TypeError, match=rf"{old} is the old name of {new}"):
        function(**{old: word, new: word})


@NAMED
def test_a_signature_has_the_new_name_alone(function, old, new, word):
    parameters = inspect.signature(function).parameters
    assert new in parameters
    assert old not in parameters
    assert list(parameters) == list(
        inspect.signature(inspect.unwrap(function)).parameters
    )


@NAMED
def test_another_keyword_is_refused_as_ever(function, old, new, word):
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        function(wrong=word)


def injected(**arguments: Any) -> Any:
    return optax.inject_hyperparams(hessopt.newton)(damping=1e-3, **arguments)


def test_hyperparameters_are_injected_by_new_and_by_old_names():
    plain = trained(hessopt.newton(damping=1e-3, on_indefinite="absolute"))
    x, state = trained(injected(on_indefinite="absolute"))
    np.testing.assert_allclose(x, plain[0], rtol=1e-12)
    assert "damping" in state.hyperparams
    with pytest.warns(DeprecationWarning, match="positivity") as said:
        old = injected(positivity="absolute")
    assert len(said) == 1
    identical(trained(old), (x, state))
    identical(trained(injected()), trained(injected(on_indefinite="shift")))


def test_arguments_bind_by_old_names_also_in_part():
    signature = inspect.signature(hessopt.newton)
    with pytest.warns(DeprecationWarning, match="positivity"):
        bound = signature.bind_partial(0.5, positivity="none")
    assert bound.arguments == {"learning_rate": 0.5, "on_indefinite": "none"}
    with pytest.raises(TypeError, match="positivity is the old name"):
        signature.bind(positivity="none", on_indefinite="none")


def test_a_renamed_argument_is_told_from_the_others():
    @renamed_arguments({"a": "b"})
    def function(x: int, *, b: int = 2, **rest: int) -> tuple[int, int, dict[str, int]]:
        """Say what was given."""
        return x, b, rest

    assert function(1, c=3) == (1, 2, {"c": 3})
    with pytest.warns(DeprecationWarning, match="a is named b"):
        assert function(1, a=0, c=3) == (1, 0, {"c": 3})
    assert function.__doc__ == "Say what was given."


@pytest.mark.parametrize(
    ("old_module", "old", "new_module", "new"),
    ATTRIBUTES,
    ids=[f"{module}.{old}" for module, old, *_ in ATTRIBUTES],
)
def test_an_old_name_is_the_new_thing_and_says_until_when(
    old_module, old, new_module, new
):
    home, there = map(importlib.import_module, (old_module, new_module))
    message = rf"{old} is named .*{new}; .*until 0\.3"
    with pytest.warns(DeprecationWarning, match=message) as said:
        assert getattr(home, old) is getattr(there, new)
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize("module", sorted({module for module, *_ in ATTRIBUTES}))
def test_other_names_are_missing_as_in_any_module(module):
    with pytest.raises(AttributeError, match=f"'{module}' has no attribute 'Missing'"):
        _ = importlib.import_module(module).Missing


def test_a_field_by_its_old_name_gives_the_same_and_warns():
    info = trained(hessopt.scale_by_lbfgs())[1].info
    with pytest.warns(
        DeprecationWarning, match="gradients is named evaluations"
    ) as said:
        assert info.gradients is info.evaluations
    assert [warning.filename for warning in said] == [__file__]
