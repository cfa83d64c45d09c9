import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.kinds.step_bounds import GOOD_RATIO, POOR_RATIO, STEP_BOUNDS, gain_ratio
from hessopt.numerics.secular import within_radius

W, Z = jnp.array([1.0, 4.0]), jnp.array([3.0, 1.0])


@pytest.mark.parametrize(
    ("actual", "predicted", "noise", "ratio"),
    [
        (1.0, 2.0, 0.0, 0.5),
        (-3e-17, 1e-17, 1e-15, 0.96),
        (jnp.nan, 1.0, 0.0, -jnp.inf),
        (-jnp.inf, 1.0, 0.0, -jnp.inf),
    ],
)
def test_it_is_actual_over_predicted_unless_both_are_noise(
    actual, predicted, noise, ratio
):
    found = gain_ratio(jnp.asarray(actual), jnp.asarray(predicted), jnp.asarray(noise))
    np.testing.assert_allclose(found, ratio, rtol=1e-2)


def test_nothing_promised_is_nothing_gained():
    assert gain_ratio(jnp.zeros(()), jnp.zeros(()), jnp.zeros(())) == -jnp.inf


@pytest.mark.parametrize("name", STEP_BOUNDS)
def test_a_poor_trial_shortens_the_next_and_a_good_one_lengthens_it(name):
    bound = STEP_BOUNDS[name]
    size = bound.first(W, within_radius(W, Z, jnp.asarray(0.1)))
    step = bound.minimize(W, Z, size)
    lengths = [
        bound.minimize(W, Z, bound.adapt(W, Z, size, jnp.asarray(r), step)).length
        for r in (POOR_RATIO / 2, 0.3, 1.0)
    ]
    assert lengths[0] < lengths[1] < lengths[2]
    assert lengths[1] == step.length
    assert GOOD_RATIO > POOR_RATIO


@pytest.mark.parametrize("name", STEP_BOUNDS)
def test_every_poor_trial_halves_the_step_at_least_also_after_any_number_of_good_ones(
    name,
):
    bound = STEP_BOUNDS[name]
    step = jax.jit(lambda size: bound.minimize(W, Z, size))
    after = jax.jit(lambda size, ratio: bound.adapt(W, Z, size, ratio, step(size)))
    size = jnp.asarray(1.0)
    for _ in range(400):
        size = after(size, 1.0)
    longest = step(size).length
    for _ in range(3):
        size = after(size, -1.0)
    assert step(size).length <= longest / 8 * (1 + 1e-12)
