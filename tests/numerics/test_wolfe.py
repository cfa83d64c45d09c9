import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.numerics import wolfe

C1, C2 = 1e-4, 0.9


@jax.jit
def advance(bracket, value, slope, c2, max_rate, max_steps):
    return wolfe.advance(
        bracket, value, slope, wolfe.Conditions(C1, c2, max_rate, max_steps, max_steps)
    )


def search(phi, slope_of, first=1.0, noise=0.0, max_rate=math.inf, max_steps=30, c2=C2):
    """Run the search on a function of one variable; return the bracket at the end and
    the rates tried."""
    unit = -slope_of(0.0)
    bracket, rates = (
        wolfe.begin(
            jnp.asarray(first), jnp.asarray(noise / unit), jnp.asarray(max_rate)
        ),
        [],
    )
    while bracket.outcome == wolfe.SEARCHING:
        t = float(bracket.trial)
        rates.append(t)
        bracket = advance(
            bracket,
            (phi(t) - phi(0.0)) / unit,
            slope_of(t) / unit,
            c2,
            max_rate,
            max_steps,
        )
    return bracket, rates


def exp(t):
    return math.exp(t) if t < 700 else math.inf


def overflowing(t):
    return math.inf if t > 1e-3 else (t - 5e-4) ** 2


FUNCTIONS = {  # phi and its derivative
    "parabola, minimum far": (lambda t: (t - 300.0) ** 2, lambda t: 2 * (t - 300.0)),
    "parabola, minimum near": (lambda t: (t - 1e-6) ** 2, lambda t: 2 * (t - 1e-6)),
    "quartic": (lambda t: (t - 0.1) ** 4, lambda t: 4 * (t - 0.1) ** 3),
    "exponential": (lambda t: exp(20 * t) - 40 * t, lambda t: 20 * exp(20 * t) - 40),
    "waves": (
        lambda t: t**2 / 50 - math.sin(3 * t),
        lambda t: t / 25 - 3 * math.cos(3 * t),
    ),
    "plateau": (lambda t: -t / (t * t + 2), lambda t: (t * t - 2) / (t * t + 2) ** 2),
    "overflow": (overflowing, lambda t: math.nan if t > 1e-3 else 2 * (t - 5e-4)),
}


@pytest.mark.parametrize("c2", [0.9, 0.1])
@pytest.mark.parametrize("first", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_rate_satisfies_the_wolfe_conditions(name, first, c2):
    phi, slope_of = FUNCTIONS[name]
    bracket, rates = search(phi, slope_of, first, c2=c2)
    assert bracket.outcome == wolfe.ACCEPTED
    t = float(bracket.best.rate)
    assert t == rates[-1]
    assert phi(t) <= phi(0.0) + C1 * t * slope_of(0.0)
    assert abs(slope_of(t)) <= c2 * abs(slope_of(0.0))
    assert len(rates) <= 16


def test_a_good_first_trial_is_the_only_one():
    bracket, rates = search(lambda t: (t - 1.1) ** 2, lambda t: 2 * (t - 1.1))
    assert rates == [1.0]
    assert bracket.trials == 1


def test_the_bracket_shrinks_around_a_minimiser():
    phi, slope_of = FUNCTIONS["waves"]
    unit = -slope_of(0.0)
    bracket, width = (
        wolfe.begin(jnp.asarray(40.0), jnp.asarray(0.0), jnp.asarray(math.inf)),
        math.inf,
    )
    for _ in range(12):
        t = float(bracket.trial)
        bracket = advance(
            bracket, (phi(t) - phi(0.0)) / unit, slope_of(t) / unit, 1e-12, math.inf, 50
        )
        assert bracket.high.rate - bracket.low.rate < width or not math.isfinite(width)
        width = float(bracket.high.rate - bracket.low.rate)
        assert bracket.low.slope < 0
        assert bracket.high.slope >= 0 or bracket.high.value > bracket.low.value
    assert width < 1e-2


def test_slopes_decide_where_values_are_noise():
    rng = np.random.default_rng(0)
    noisy = lambda t: 1.0 + 1e-16 * (t - 0.2) ** 2 + 1e-14 * rng.normal()
    slope_of = lambda t: 2e-16 * (t - 0.2)
    bracket, _ = search(noisy, slope_of, noise=1e-13, c2=0.5)
    assert bracket.outcome == wolfe.ACCEPTED
    assert abs(float(bracket.best.rate) - 0.2) <= 0.1


def test_without_an_acceptable_rate_the_best_decrease_is_kept():
    kink = lambda t: abs(t - 0.3)
    bracket, rates = search(kink, lambda t: math.copysign(1.0, t - 0.3), max_steps=8)
    assert bracket.outcome == wolfe.FAILED
    assert len(rates) == 8
    assert float(bracket.best.rate) == min(rates, key=kink)
    # a slope that lies
    rising, _ = search(lambda t: t, lambda t: -1.0 if t == 0 else 1.0, max_steps=8)
    assert (float(rising.best.rate), int(rising.outcome)) == (0.0, wolfe.FAILED)


def test_a_descent_that_reaches_the_largest_rate_is_accepted_there():
    bracket, rates = search(lambda t: -t, lambda t: -1.0, max_rate=7.0)
    assert (bracket.outcome, float(bracket.best.rate), rates[-1]) == (
        wolfe.ACCEPTED,
        7.0,
        7.0,
    )
    # without one it expands while it may
    assert max(search(lambda t: -t, lambda t: -1.0)[1]) > 1e20
