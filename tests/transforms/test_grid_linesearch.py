import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessopt
from hessopt import StepStatus


def once(tx, value_fn, x, update):
    run = jax.jit(
        lambda x, u: tx.update(u, tx.init(x), x, value=value_fn(x), value_fn=value_fn)
    )
    found, state = run(x, update)
    return found, state.info


def test_the_rate_is_the_best_of_the_grid():
    value_fn = lambda x: jnp.sin(5 * x) + 0.1 * x**2
    tx = hessopt.scale_by_grid_linesearch(7, max_rate=4.0, factor=0.7)
    rates = 4.0 * 0.7 ** np.arange(7)
    for direction in (1.0, -1.0, 0.3):
        found, info = once(tx, value_fn, jnp.array(0.4), jnp.array(direction))
        values = value_fn(0.4 + rates * direction)
        best = rates[np.argmin(values)] if min(values) < value_fn(0.4) else 0.0
        np.testing.assert_allclose(found, best * direction, rtol=1e-14)
        np.testing.assert_allclose(info.rate, best)
        assert info.evaluations == info.trials == 7


def test_without_a_decrease_the_step_is_zero():
    found, info = once(
        hessopt.scale_by_grid_linesearch(), lambda x: x**2, jnp.array(0.0), jnp.ones(())
    )
    assert found == 0
    assert info.status == StepStatus.SEARCH_FAILED


def test_rates_with_values_that_are_not_finite_are_not_used():
    value_fn = lambda x: jnp.where(x > -0.3, x, jnp.nan)
    tx = hessopt.scale_by_grid_linesearch()
    found, info = once(tx, value_fn, jnp.array(0.0), jnp.array(-1.0))
    assert found == -0.25
    assert info.status == StepStatus.OK
    found, info = once(tx, value_fn, jnp.array(0.0), jnp.array(jnp.nan))
    assert found == 0
    assert info.status == StepStatus.NONFINITE


def test_gauss_newton_fits_with_it():
    def residual(params, x, y):
        return params[0] * jnp.exp(params[1] * x) - y

    value_fn = hessopt.composite(
        hessopt.rowwise(residual), lambda r: 0.5 * jnp.sum(r**2)
    )
    x = jnp.linspace(0.0, 1.0, 20)
    tx = hessopt.gauss_newton(linesearch=hessopt.scale_by_grid_linesearch())
    data = {"x": x, "y": 2 * jnp.exp(-3 * x)}
    solution = hessopt.minimize(value_fn, jnp.array([1.0, 1.0]), tx, data=data)
    np.testing.assert_allclose(solution.params, [2.0, -3.0], rtol=1e-5)
    assert solution.evaluations > 12 * solution.steps


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"count": 0}, "count must be an int, at least 1"),
        ({"factor": 1.0}, "factor must be in"),
        ({"max_rate": 0.0}, "max_rate must be at least"),
    ],
)
def test_wrong_arguments_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        hessopt.scale_by_grid_linesearch(**arguments)
