import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.kinds.agreement import (
    DECAY,
    PRIOR_STEPS,
    STANDARD_ERRORS,
    confirmed,
    lower_bound,
    no_agreement,
)

RNG = np.random.default_rng(0)
STEPS = 12
P, G = RNG.normal(size=(2, STEPS, 3))
B, CURVATURE = RNG.uniform(1.0, 2.0, (2, STEPS))


def after(scale=1.0, dtype=np.float64, descents=B):
    """The agreement after all steps, with the objective in units of `scale`."""
    found = no_agreement(jnp.zeros(3, dtype), dtype)
    add = jax.jit(confirmed)
    for p, g, b, c in zip(P, G, descents, CURVATURE, strict=True):
        numbers = (jnp.asarray(scale * x, dtype) for x in (b, c))
        last = found._replace(step=jnp.asarray(p, dtype), measured=jnp.bool_(True))
        descent, curvature = numbers
        last = last._replace(descent=descent, curvature=curvature)
        found = add(last, jnp.asarray(scale * g, dtype))
    return found


def test_the_share_is_that_of_weighted_sums():
    found = after()
    weights = DECAY ** np.arange(STEPS)[::-1]
    confirmations = CURVATURE - np.sum(P * G, axis=1)
    share = np.sum(weights * confirmations) / np.sum(weights * B)
    np.testing.assert_allclose(found.share, share, rtol=1e-12)
    np.testing.assert_allclose(found.promised, np.sum(weights * B), rtol=1e-12)
    np.testing.assert_allclose(found.steps, np.sum(weights), rtol=1e-12)

    # the error of a step is that from the share when it was seen
    squares = 0.0
    for t in range(STEPS):
        w = DECAY ** np.arange(t + 1)[::-1]
        here = np.sum(w * confirmations[: t + 1]) / np.sum(w * B[: t + 1])
        squares = DECAY**2 * squares + (confirmations[t] - here * B[t]) ** 2
    np.testing.assert_allclose(
        found.variance, squares / np.sum(weights * B) ** 2, rtol=1e-12
    )


@pytest.mark.parametrize(
    ("scale", "dtype", "rtol"),
    [(1e-200, np.float64, 1e-12), (1e25, np.float32, 1e-4), (1e-25, np.float32, 1e-4)],
)
def test_the_unit_of_the_objective_does_not_matter(scale, dtype, rtol):
    found, expected = after(scale, dtype), after()
    for name in ("share", "variance", "steps"):
        a, b = (getattr(x, name) for x in (found, expected))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def test_the_bound_is_below_the_share_by_its_error_and_the_prior():
    found = after()._replace(share=jnp.array(0.9), variance=jnp.array(0.01))
    shrunk = 0.9 * found.steps / (found.steps + PRIOR_STEPS)
    np.testing.assert_allclose(lower_bound(found), shrunk - STANDARD_ERRORS * 0.1)
    assert lower_bound(found._replace(variance=jnp.array(100.0))) == 0.0
    assert lower_bound(found._replace(share=jnp.array(50.0))) == 1.0


def test_steps_that_promise_nothing_start_the_sums_again():
    found = after(descents=np.append(B[:-1], -1e3))
    assert found.promised == found.share == found.variance == found.steps == 0.0


def test_a_step_without_a_promise_or_a_finite_gradient_changes_nothing():
    found = after()
    for last, grad in (
        (found._replace(measured=jnp.bool_(False)), jnp.ones(3)),
        (found, jnp.full(3, jnp.nan)),
    ):
        new = confirmed(last, grad)
        for name in ("share", "variance", "steps", "promised"):
            assert getattr(new, name) == getattr(found, name)
