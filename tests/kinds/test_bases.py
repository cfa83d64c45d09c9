import numpy as np
import optax
import pytest

from hessopt import generalized_newton
from tests.problems import run_on_noise


@pytest.mark.parametrize(
    ("base", "low", "high"),
    [
        (optax.sgd(1.0), 0.0, 0.0),
        (optax.sgd(1.0, momentum=0.9), 0.899, 0.901),
        (optax.sgd(1.0, momentum=0.9, nesterov=True), 0.4, 0.9),
        (optax.sgd(1.0, momentum=0.5), 0.499, 0.501),
        (optax.adam(1.0), 0.87, 0.93),
        (optax.rmsprop(1.0), 0.0, 0.0),
        (optax.MultiSteps(optax.sgd(1.0), 3).gradient_transformation(), 0.0, 0.0),
    ],
    ids=["sgd", "momentum", "Nesterov", "half", "adam", "rmsprop", "MultiSteps"],
)
def test_the_momentum_of_a_base_is_measured(base, low, high):
    found = run_on_noise(generalized_newton(base), steps=60).momentum[-1]
    assert low <= found <= high


def test_the_momentum_is_not_measured_without_safeguard_or_if_given():
    base = optax.sgd(1.0, momentum=0.9)
    for arguments, expected in (({"safeguard": False}, 0), ({"momentum": 0.3}, 0.3)):
        state = run_on_noise(generalized_newton(base, **arguments), steps=10)
        np.testing.assert_allclose(state.momentum[-1], expected)
