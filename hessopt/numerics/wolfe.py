"""The Wolfe line search on scalars: a bracket of trial rates that shrinks by one trial
at a time.

The search uses the normalized function `psi(t) = (phi(t) - phi(0)) / |phi'(0)|`, so
that `psi(0) = 0` and `psi'(0) = -1`. A rate t is accepted by the strong Wolfe
conditions. Where the values differ only by rounding, the slopes decide, as in Hager and
Zhang's approximate conditions (for a parabola `psi(t) <= -c1 t` is equivalent to
`psi'(t) <= 1 - 2 c1`):

    |psi'(t)| <= c2  and  (psi(t) <= -c1 t  or  |psi(t)| <= noise).

The bracket `[low, high]` contains a minimizer: psi decreases at `low`; at `high` it
increases, is higher than at `low`, or is not finite.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., section 3.5; Hager and
Zhang, "A new conjugate gradient method with guaranteed descent and an efficient line
search", 2005, section 4; Ferry, Gill, Wong and Zhang, "Projected-search methods for
bound-constrained optimization", 2024, for bounds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import or_one, select
from hessopt.typing import Vector

SEARCHING, ACCEPTED, FAILED = 0, 1, 2

NOISE_POWER = 0.5
"""Exponent of the relative noise: values of the objective are assumed accurate to the
machine epsilon to this power, since large terms of a sum can cancel."""

MAX_TRIALS_TOO_FAR = 4
"""Number of trials beyond the minimizer after which the next rate is at most a tenth of
the last one. The units of a first step can differ from those of the parameters, and a
cubic is a poor model of an objective that grows with high order."""


class Trial(NamedTuple):
    """One point of psi."""

    rate: jax.Array
    value: jax.Array
    slope: jax.Array


class Bracket(NamedTuple):
    """The state of the search: scalars of one dtype, and two int32 scalars."""

    low: Trial
    high: Trial  # rate inf as long as no upper bound is known
    best: Trial  # accepted, or of largest decrease so far; rate 0 at first
    trial: jax.Array  # rate to try next
    width: jax.Array  # width of the bracket one trial ago
    older_width: jax.Array  # width of the bracket two trials ago
    noise: jax.Array  # change of psi that rounding can cause
    trials: jax.Array  # int32, trials so far
    outcome: jax.Array  # int32, SEARCHING, ACCEPTED or FAILED


class Conditions(NamedTuple):
    """The acceptance conditions and the limits of the search."""

    slope_rtol: jax.Array | float  # c1
    curv_rtol: jax.Array | float  # c2
    max_rate: jax.Array | float
    max_steps: jax.Array | int
    # trials after which a search with a bracket fails; at most max_steps
    max_bracketed: jax.Array | int


_LEAVES = [0.0] * 6
_STRUCTURE = jax.tree.structure(Bracket(*[Trial(*_LEAVES[:3])] * 3, *_LEAVES))  # pyright: ignore[reportArgumentType]


def pack(bracket: Bracket) -> Vector:
    """Pack all scalars into one vector, since a loop runs a kernel for each array that
    it carries."""
    leaves = jax.tree.leaves(bracket)
    parts = [leaf.astype(bracket.trial.dtype) for leaf in leaves]
    # selections by the bits of the index are fused into one kernel, unlike a
    # concatenation; the noise is never negative, but XLA would move constant bits out of
    # all loops, as kernels of their own
    index, bit = jnp.arange(len(parts)) + (bracket.noise < 0), 1
    while len(parts) > 1:
        odd = parts[1::2] + parts[-1:] * (len(parts) % 2)
        is_odd = index & bit != 0
        parts = [jnp.where(is_odd, *pair) for pair in zip(odd, parts[::2], strict=True)]
        bit *= 2
    return parts[0]


def unpack(packed: Vector) -> Bracket:
    """Invert `pack`."""
    bracket = jax.tree.unflatten(_STRUCTURE, [packed[i] for i in range(len(packed))])
    return bracket._replace(
        trials=bracket.trials.astype(jnp.int32),
        outcome=bracket.outcome.astype(jnp.int32),
    )


def begin(first: jax.Array, noise: jax.Array, max_rate: jax.Array) -> Bracket:
    """Start a search with the rate `first`; `noise` is in units of psi."""
    zero, one = jnp.zeros_like(first), jnp.ones_like(first)
    infinite = jnp.full_like(first, jnp.inf)
    start = Trial(zero, zero, -one)
    return Bracket(
        low=start,
        high=Trial(infinite, infinite, infinite),
        best=start,
        trial=jnp.minimum(first, max_rate).astype(first.dtype),
        width=infinite,
        older_width=infinite,
        noise=jnp.asarray(noise, first.dtype),
        trials=jnp.zeros((), jnp.int32),
        outcome=jnp.full((), SEARCHING, jnp.int32),
    )


def advance(
    bracket: Bracket,
    value: jax.Array,
    slope: jax.Array,
    conditions: Conditions,
    promise: jax.Array | None = None,
) -> Bracket:
    """Update the bracket with psi and psi' at `bracket.trial`, and choose the next
    trial.

    Where bounds cut a step, psi' is that of the entries that still move, and `promise`
    is the decrease that the gradient at the start promises for the step taken, at most
    t; it is t where nothing is cut. The slope jumps up where an entry reaches its bound,
    so only a lower limit is required of it (Ferry, Gill, Wong and Zhang).
    """
    c1, c2, max_rate, max_steps, max_bracketed = conditions
    low, high, noise, t = bracket.low, bracket.high, bracket.noise, bracket.trial
    finite = jnp.isfinite(value) & jnp.isfinite(slope)
    here = Trial(
        t, jnp.where(finite, value, jnp.inf), jnp.where(finite, slope, jnp.inf)
    )

    decreased = here.value <= -c1 * (t if promise is None else promise)
    flat = jnp.abs(here.slope) <= c2
    if promise is not None:
        flat |= (promise < t) & (here.slope > 0)
    capped = decreased & (here.slope < 0) & (t >= max_rate)
    accepted = (flat & (decreased | (jnp.abs(here.value) <= noise))) | capped

    # whether a minimizer lies between `low` and `here`
    beyond = (here.value > low.value + noise) | (here.slope >= 0)
    new_low, new_high = select(beyond, low, here), select(beyond, here, high)
    width = new_high.rate - new_low.rate
    bounded = jnp.isfinite(width)
    trials = bracket.trials + 1
    far = (trials >= MAX_TRIALS_TOO_FAR) & (new_low.rate == 0)
    inside = new_low.rate + width * jnp.minimum(
        _fraction(new_low, new_high, noise), jnp.where(far, 0.1, 1.0)
    )
    middle = new_low.rate + 0.5 * width
    slow = width > 0.66 * bracket.older_width
    trial = jnp.where(
        bounded,
        jnp.where(slow, middle, inside),
        jnp.minimum(_extrapolation(low, here), max_rate),
    )
    collapsed = bounded & ((trial <= new_low.rate) | (trial >= new_high.rate))

    better = finite & (here.value < jnp.minimum(bracket.best.value, 0.0))
    exhausted = trials >= jnp.where(bounded, max_bracketed, max_steps)
    failed = collapsed | exhausted | (~bounded & (t >= max_rate))
    return Bracket(
        low=new_low,
        high=new_high,
        best=select(accepted | better, here, bracket.best),
        trial=trial,
        width=width,
        older_width=bracket.width,
        noise=noise,
        trials=trials,
        outcome=jnp.where(
            accepted, ACCEPTED, jnp.where(failed, FAILED, SEARCHING)
        ).astype(jnp.int32),
    )


def _fraction(low: Trial, high: Trial, noise: jax.Array) -> jax.Array:
    """Choose the next trial, as a fraction of the bracket: the minimizer of the cubic
    that interpolates the ends, or a safeguard.

    In `u = (t - low) / width` the cubic is `psi(low) + a u^3 + b u^2 + c u` with c < 0.
    If the values differ only by rounding, the root of the line through the slopes is
    used instead.
    """
    width = jnp.where(jnp.isfinite(high.rate), high.rate - low.rate, 1.0)
    finite = jnp.isfinite(high.value)
    rise = jnp.where(finite, high.value - low.value, 1.0)
    c, e = low.slope * width, jnp.where(finite, high.slope, 1.0) * width
    largest = jnp.maximum(jnp.maximum(jnp.abs(rise), jnp.abs(e)), jnp.abs(c))
    # normalized, since squares could overflow
    per_unit = 1.0 / jnp.maximum(largest, jnp.finfo(c.dtype).tiny)
    rise, c, e, noise = rise * per_unit, c * per_unit, e * per_unit, noise * per_unit
    a, b = c + e - 2 * rise, 3 * rise - 2 * c - e
    root = jnp.sqrt(jnp.maximum(b * b - 3 * a * c, 0.0))
    by_slopes = (jnp.abs(rise) <= noise) & (e > 0)
    above = jnp.where(by_slopes | (b > 0), -c, root - b)
    below = jnp.where(by_slopes, e - c, jnp.where(b > 0, b + root, 3 * a))
    chosen = above / or_one(below)
    sound = (below > 0) & (chosen > 0) & jnp.isfinite(chosen)
    return jnp.where(finite, jnp.where(sound, jnp.clip(chosen, 0.05, 0.9), 0.5), 0.1)


def _extrapolation(low: Trial, here: Trial) -> jax.Array:
    """Return the root of the line through the slopes of two descending trials, limited
    to 2 to 10 times the second rate."""
    bend = here.slope - low.slope
    ahead = -here.slope * (here.rate - low.rate) / or_one(bend)
    root = here.rate + jnp.where(bend > 0, ahead, jnp.inf)
    return jnp.clip(root, 2 * here.rate, 10 * here.rate)
