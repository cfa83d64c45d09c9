"""Oracles: powers of two by NumPy; a matrix in other units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.numerics.equilibration import equilibration, unit_power


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_scales_are_exact_powers_of_two(dtype):
    exponents = np.arange(jnp.finfo(dtype).minexp + 3, jnp.finfo(dtype).maxexp - 3)
    sizes = jnp.asarray(2.0 ** exponents.astype(float), dtype)
    np.testing.assert_array_equal(
        jax.jit(unit_power)(sizes), 2.0 ** -exponents.astype(float)
    )
    np.testing.assert_array_equal(unit_power(jnp.zeros(2, dtype)), 1.0)


def test_every_row_comes_near_one_and_a_change_of_units_is_followed_exactly():
    rng = np.random.default_rng(0)
    H = rng.normal(size=(6, 6))
    H, units = jnp.asarray(H + H.T), 2.0 ** jnp.asarray([-60.0, -13, 0, 5, 40, 71])
    t = equilibration(H)
    largest = jnp.max(jnp.abs(H * t * t[:, None]), axis=1)
    assert jnp.all((largest > 0.4) & (largest < 2.5))
    np.testing.assert_array_equal(equilibration(H * units * units[:, None]) * units, t)
