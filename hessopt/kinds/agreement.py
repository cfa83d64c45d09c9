"""The agreement of batches: the share of the promised descent that the next batch
confirms.

A step p is chosen by the slope along it on one batch, which is partly the noise of that
batch. The gradient of the next batch at the end of the step, and the curvature along it,
yield the slope at its start on a batch that did not choose it:

    b = -g.p,    b' = -g_next.p + p.H p,    share = sum b' / sum b.

The share is 1 if all batches are the same. It is c/2 where the losses no longer decrease,
for steps of c times the length that minimizes the model. Since a few batches do not
determine it, its lower confidence bound is used.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hessopt.numerics.guards import divide, select, zero_unless
from hessopt.trees.sharding import zeros
from hessopt.trees.vectors import inner
from hessopt.typing import Params

DECAY = 0.97
"""Weight of the past in the sums over steps."""
PRIOR_STEPS = 2.0
"""Number of steps with a share of 0 that are assumed before the first one."""
STANDARD_ERRORS = 2.0
"""Number of standard errors from the share to its lower bound."""


class Agreement(NamedTuple):
    """The last step with its promise, and the sums over the steps before."""

    step: Params  # p, tree like params; None where only the sums are needed
    descent: jax.Array  # scalar, b of p
    curvature: jax.Array  # scalar, p.H p
    measured: jax.Array  # bool scalar, whether these two belong to p
    steps: jax.Array  # scalar, weighted number of steps
    promised: jax.Array  # scalar, weighted sum of b, in units of the objective
    share: jax.Array  # scalar
    variance: jax.Array  # scalar, squared standard error of the share


def no_agreement(params: Params, dtype: DTypeLike) -> Agreement:
    """Return the state before the first step."""
    shape: Any = jax.ShapeDtypeStruct
    number, flag = shape((), dtype), shape((), bool)
    scalars = zeros((number, number, flag, number, number, number, number), params)
    return Agreement(jax.tree.map(jnp.zeros_like, params), *scalars)


def confirmed(old: Agreement, grad: Params) -> Agreement:
    """Add the last step to the sums, by the gradient of the next batch at its end."""
    dtype = old.share.dtype
    b = old.descent
    found = (old.curvature - inner(grad, old.step)).astype(dtype)

    # a weighted sum that is not positive promises nothing: start again
    promised = DECAY * old.promised + b
    positive = promised > 0
    past = divide(DECAY * old.promised, promised, positive)
    share = past * old.share + divide(found, promised, positive)

    # errors of single steps are independent
    error = divide(found - share * b, promised, positive)
    variance = past**2 * old.variance + error**2
    steps = DECAY * old.steps + 1
    sums = zero_unless(positive, (steps, promised, share, variance))
    before = old.steps, old.promised, old.share, old.variance
    known = old.measured & jnp.isfinite(found)
    return Agreement(
        old.step, b, old.curvature, old.measured, *select(known, sums, before)
    )


def lower_bound(agreement: Agreement) -> jax.Array:
    """Return the lower confidence bound of the share, in [0, 1]."""
    shrunk = agreement.share * agreement.steps / (agreement.steps + PRIOR_STEPS)
    return jnp.clip(shrunk - STANDARD_ERRORS * jnp.sqrt(agreement.variance), 0, 1)
