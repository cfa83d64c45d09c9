import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest

from hessopt.numerics.secular import divided, with_cubic_term, within_radius

SIZE, COUNT = 6, 30
RULES = {
    "radius": jax.jit(jax.vmap(within_radius)),
    "cubic": jax.jit(jax.vmap(with_cubic_term)),
}


def cases(kind, seed=0):
    """Eigenvalues, coefficients and sizes, over many orders of magnitude."""
    rng = np.random.default_rng(seed)
    w = {
        "definite": 10 ** rng.uniform(-3, 3, (COUNT, SIZE)),
        "indefinite": rng.normal(size=(COUNT, SIZE))
        * 10 ** rng.uniform(-3, 3, (COUNT, 1)),
        "singular": np.where(
            np.arange(SIZE) == 0, 0.0, 10 ** rng.uniform(-3, 3, (COUNT, SIZE))
        ),
        "hard": np.where(np.arange(SIZE) < 2, -1.0, rng.uniform(0, 3, (COUNT, SIZE))),
        "nearly hard": np.where(
            np.arange(SIZE) == 0, -1.0, rng.uniform(0, 3, (COUNT, SIZE))
        ),
    }[kind]
    z = rng.normal(size=(COUNT, SIZE)) * 10 ** rng.uniform(-3, 3, (COUNT, 1))
    if kind == "hard":
        z = np.where(np.arange(SIZE) < 2, 0.0, z)
    if kind == "nearly hard":
        z[:, 0] *= 10.0 ** -rng.uniform(3, 14, COUNT)
    return np.sort(w), z, 10 ** rng.uniform(-4, 4, COUNT)


KINDS = ("definite", "indefinite", "singular", "hard", "nearly hard")


def model_value(rule, w, z, y, size):
    value = sum(
        mp.mpf(c) * a + mp.mpf(e) * a * a / 2 for e, c, a in zip(w, z, y, strict=True)
    )
    return (
        value
        if rule == "radius"
        else value + mp.mpf(size) / 3 * mp.sqrt(sum(a * a for a in y)) ** 3
    )


def reference(rule, w, z, size):
    """The minimiser by bisection of the shift, in 60 digits; the hard case completed
    along the lowest eigenvector."""
    w, z, size = [mp.mpf(x) for x in w], [mp.mpf(x) for x in z], mp.mpf(size)
    lowest = max(mp.mpf(0), -w[0])

    def step(kappa):
        return [
            -c / (e + kappa) if c != 0 else mp.mpf(0) for e, c in zip(w, z, strict=True)
        ]

    def length(y):
        return mp.sqrt(sum(a * a for a in y))

    def wanted(kappa):
        return size if rule == "radius" else kappa / size

    edge = [c != 0 for e, c in zip(w, z, strict=True) if e + lowest == 0]
    if not any(edge) and length(step(lowest)) <= wanted(lowest):
        y = step(lowest)
        if lowest > 0:
            y[0] = mp.sqrt(wanted(lowest) ** 2 - length(y) ** 2)
        return y
    low, high = mp.mpf(10) ** -60, mp.mpf(10) ** 30
    for _ in range(130):
        middle = mp.sqrt(low * high)
        too_long = length(step(lowest + middle)) > wanted(lowest + middle)
        low, high = (middle, high) if too_long else (low, middle)
    return step(lowest + high)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_a_global_minimiser_of_the_model(kind, rule, dtype):
    w, z, size = (x.astype(dtype) for x in cases(kind))
    found = RULES[rule](w, z, size)
    w, z, size = (x.astype(np.float64) for x in (w, z, size))
    with mp.workdps(40):
        for i in range(COUNT if dtype is np.float64 else COUNT // 3):
            best = model_value(
                rule, w[i], z[i], reference(rule, w[i], z[i], size[i]), size[i]
            )
            y = [mp.mpf(float(a)) for a in np.asarray(found.y[i])]
            if rule == "radius":
                assert mp.sqrt(sum(a * a for a in y)) <= mp.mpf(float(size[i])) * (
                    1 + 1000 * np.finfo(dtype).eps
                )
            short = (model_value(rule, w[i], z[i], y, size[i]) - best) / abs(best)
            # the shift is known to |log shift| roundings
            assert short <= 1000 * np.finfo(dtype).eps, (i, w[i], z[i], size[i])


@pytest.mark.parametrize("rule", RULES)
def test_length_shift_and_decrease_are_those_of_the_step(rule):
    w, z, size = cases("indefinite", seed=1)
    y, shift, length, decrease = map(np.asarray, RULES[rule](w, z, size))
    np.testing.assert_allclose(length, np.linalg.norm(y, axis=1), rtol=1e-14)
    rounding = 1e-14 * np.max(shift[:, None] * np.abs(y))  # where w + shift cancels
    np.testing.assert_allclose((w + shift[:, None]) * y, -z, rtol=1e-9, atol=rounding)
    np.testing.assert_allclose(decrease, -(z * y + w * y**2 / 2).sum(1), rtol=1e-9)
    if rule == "cubic":
        np.testing.assert_allclose(shift, size * length, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("factor", [1e-120, 1e120])
def test_no_unit_of_the_objective_matters(rule, factor):
    w, z, size = cases("indefinite", seed=2)
    unit = factor if rule == "cubic" else 1.0
    plain, scaled = (
        RULES[rule](w, z, size),
        RULES[rule](factor * w, factor * z, unit * size),
    )
    np.testing.assert_allclose(scaled.y, plain.y, rtol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_a_zero_gradient_gives_no_step_at_a_minimum_and_one_at_a_saddle(rule):
    w = jnp.array([[1.0, 2.0], [-1.0, 2.0]])
    y = RULES[rule](w, jnp.zeros((2, 2)), jnp.full(2, 0.5)).y
    assert jnp.abs(y[0]).max() < 1e-100
    np.testing.assert_allclose(
        jnp.abs(y[1]), [0.5 if rule == "radius" else 2.0, 0.0], atol=1e-12
    )


def test_a_shift_that_is_too_small_gives_no_finite_step():
    np.testing.assert_array_equal(
        divided(jnp.array([-1.0, 0.0, 1.0]), jnp.array([1.0, 0.0, 2.0]), jnp.zeros(())),
        [jnp.inf, 0.0, -2.0],
    )
