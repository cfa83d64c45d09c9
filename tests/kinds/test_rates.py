import jax
import jax.numpy as jnp
import optax
import pytest

from hessopt import generalized_newton, grouped_newton
from hessopt.kinds import rates


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Restricted", "RateProblem"),
        ("Measured", "Measurement"),
        ("Solved", "RateSolution"),
    ],
)
def test_an_old_name_is_the_new_type_and_says_until_when(old: str, new: str):
    with pytest.warns(DeprecationWarning, match=rf"{old} .*{new}.*until 0\.3") as said:
        assert getattr(rates, old) is getattr(rates, new)
    assert [warning.filename for warning in said] == [__file__]


def test_other_names_are_missing_as_in_any_module():
    with pytest.raises(AttributeError, match="has no attribute 'Restrictions'"):
        _ = rates.Restrictions


@pytest.mark.parametrize("method", [generalized_newton, grouped_newton])
def test_evaluations_are_not_counted(method):
    tx, x = method(optax.sgd(1.0), update_every=2), jnp.ones(2)
    step = jax.jit(lambda s: tx.update(2 * x, s, x, value_fn=lambda x: jnp.sum(x**2)))
    state = tx.init(x)
    for _ in range(6):  # measured ones, and others after them
        evaluations = state[1].info.evaluations
        assert (evaluations, evaluations.dtype) == (-1, jnp.int32)
        _, state = step(state)
