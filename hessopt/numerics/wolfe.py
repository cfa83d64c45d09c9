"""The Wolfe search over scalars: a bracket of trial rates that shrinks, one trial at a
time.

In units of the start, `psi(t) = (phi(t) - phi(0)) / |phi'(0)|`, so that `psi(0) = 0`
and `psi'(0) = -1`. A rate t is accepted by the strong Wolfe conditions; where the
values differ by rounding alone, the slopes decide, as in Hager and Zhang's approximate
conditions (for a parabola `psi(t) <= -c1 t` says the same as `psi'(t) <= 1 - 2 c1`):

    |psi'(t)| <= c2  and  (psi(t) <= -c1 t  or  |psi(t)| <= noise).

The bracket `[low, high]` contains a minimiser: psi falls at `low`, and at `high` it
rises, is higher, or not finite.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., section 3.5; Hager and
Zhang, "A new conjugate gradient method with guaranteed descent and an efficient line
search", 2005, section 4.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import or_one, select
from hessopt.typing import Vector

SEARCHING, ACCEPTED, FAILED = 0, 1, 2

NOISE_POWER = 0.5
"""Values of the objective are trusted to its machine epsilon to this power, relative:
sums of large terms cancel."""

MAX_TRIALS_TOO_FAR = 4
"""Trials that are all too far, after which the next one is a tenth as far at most: a
first step may be in other units than the parameters, and where the objective is of high
order beyond a minimiser, a cubic is a poor guide to it."""


class Trial(NamedTuple):
    """One point of psi."""

    rate: jax.Array
    value: jax.Array
    slope: jax.Array


class Bracket(NamedTuple):
    """The search between two trials; scalars of one dtype, and two int32."""

    low: Trial
    high: Trial  # its rate is inf as long as nothing bounds the search
    # the accepted trial, or the one of largest decrease so far; of rate 0 while there
    # is none
    best: Trial
    trial: jax.Array  # rate to try next
    width: jax.Array  # of the bracket one trial ago
    older_width: jax.Array  # and two trials ago
    noise: jax.Array  # change of psi that may be rounding
    trials: jax.Array  # int32, trials so far
    outcome: jax.Array  # int32, SEARCHING, ACCEPTED or FAILED


class Conditions(NamedTuple):
    """What is accepted and how far the search goes."""

    slope_rtol: jax.Array | float  # c1
    curv_rtol: jax.Array | float  # c2
    max_rate: jax.Array | float
    max_steps: jax.Array | int


_LEAVES: Any = [0.0] * 6
_STRUCTURE = jax.tree.structure(Bracket(*[Trial(*_LEAVES[:3])] * 3, *_LEAVES))  # pyright: ignore[reportArgumentType]


def pack(bracket: Bracket) -> Vector:
    """One vector of all scalars, for loops: they run a kernel for each array that they
    carry."""
    leaves = jax.tree.leaves(bracket)
    index, packed = jnp.arange(len(leaves)), jnp.zeros(len(leaves), bracket.trial.dtype)
    # fused into one kernel, which a concatenation would not be
    for i, leaf in enumerate(leaves):
        packed = jnp.where(index == i, leaf.astype(packed.dtype), packed)
    return packed


def unpack(packed: Vector) -> Bracket:
    """The inverse of `pack`."""
    bracket = jax.tree.unflatten(_STRUCTURE, [packed[i] for i in range(len(packed))])
    return bracket._replace(
        trials=bracket.trials.astype(jnp.int32),
        outcome=bracket.outcome.astype(jnp.int32),
    )


def begin(first: jax.Array, noise: jax.Array, max_rate: jax.Array) -> Bracket:
    """Open a bracket whose first trial is the rate `first`; all in units of psi."""
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
    bracket: Bracket, value: jax.Array, slope: jax.Array, conditions: Conditions
) -> Bracket:
    """Take in psi and psi' at `bracket.trial`, and choose what to try next."""
    c1, c2, max_rate, max_steps = conditions
    low, high, noise, t = bracket.low, bracket.high, bracket.noise, bracket.trial
    finite = jnp.isfinite(value) & jnp.isfinite(slope)
    here = Trial(
        t, jnp.where(finite, value, jnp.inf), jnp.where(finite, slope, jnp.inf)
    )

    decreased = here.value <= -c1 * t
    flat = jnp.abs(here.slope) <= c2
    capped = decreased & (here.slope < 0) & (t >= max_rate)
    accepted = (flat & (decreased | (jnp.abs(here.value) <= noise))) | capped

    beyond = (here.value > low.value + noise) | (here.slope >= 0)  # of a minimiser
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
    failed = collapsed | (trials >= max_steps) | (~bounded & (t >= max_rate))
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
    """Where between the ends to try: the minimiser of the cubic that interpolates them,
    or what replaces it.

    In `u = (t - low) / width` the cubic is `a u^3 + b u^2 + c u` above psi(low), and c
    < 0. Where the values differ by rounding alone, the root of the line through the
    slopes.
    """
    width = jnp.where(jnp.isfinite(high.rate), high.rate - low.rate, 1.0)
    finite = jnp.isfinite(high.value)
    rise = jnp.where(finite, high.value - low.value, 1.0)
    c, e = low.slope * width, jnp.where(finite, high.slope, 1.0) * width
    largest = jnp.maximum(jnp.maximum(jnp.abs(rise), jnp.abs(e)), jnp.abs(c))
    # or squares overflow
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
    """The root of the line through the slopes of two descending trials, 2 to 10 times
    as far as the second."""
    bend = here.slope - low.slope
    ahead = -here.slope * (here.rate - low.rate) / or_one(bend)
    root = here.rate + jnp.where(bend > 0, ahead, jnp.inf)
    return jnp.clip(root, 2 * here.rate, 10 * here.rate)
