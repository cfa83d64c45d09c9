"""Second-order steps for a random part of the blocks, first-order steps for the rest.

In every update, each block b of the parameters is drawn at random or not. The update of
a drawn block is the direction of `inner`, computed on the objective restricted to the
block; the update of any other block is its gradient. A block that is not drawn costs
nothing: its branch of a `lax.cond` does not run. (Under `vmap` both branches run.)

Source: block sub-sampling as in randomized block Newton methods, Qu, Richtarik, Takac
and Fercoq, arXiv 1502.02268.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import (
    check_params,
    check_range,
    check_transformation,
    check_word,
    injectable,
)
from hessopt.kinds.reports import evaluations, reports
from hessopt.numerics.guards import divide, select, zero_unless
from hessopt.numerics.norms import norm
from hessopt.objective.binding import of_group, require_params
from hessopt.trees.groups import Groups, check_groups, combine, group_labels, take
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import ravel, solve_dtype
from hessopt.typing import Params, StepStatus, Vector, step_status

_NAME = "subsampled"


class SubsampledInfo(NamedTuple):
    """Report of the last update. The reports of the blocks' own steps are in their
    states of `inner`."""

    status: jax.Array  # int32 scalar, StepStatus
    drawn: jax.Array  # int32 scalar, blocks that got the inner direction
    # int32 scalar, of the objective by `inner`, over all blocks; -1 where not counted
    evaluations: jax.Array


class SubsampledState(NamedTuple):
    """State of `subsampled`."""

    count: jax.Array  # int32 scalar, updates so far; with `seed` it determines the draw
    # scalar, |step| / |gradient| averaged over the blocks of the last update that drew
    # one
    ratio: jax.Array
    # {name: state of `inner` for that block}, each from the block's last draw; a scalar
    # zero if there are no parameters
    inner: Any
    info: SubsampledInfo


@injectable
def subsampled(
    inner: optax.GradientTransformation,
    *,
    probability: float | jax.Array,
    blocks: Groups = "layer",
    rest: str = "gradient",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Apply `inner` to randomly drawn blocks of the parameters, and use the gradient
    for the rest.

    Args:
      inner: a direction such as `scale_by_newton()`. It receives each block as a
        separate problem: the block's leaves (None in place of the others), and
        `value_fn` with the other parameters held fixed. Its state, including counters
        and schedules, advances only when the block is drawn.
      probability: probability of drawing a block, in [0, 1]; draws are independent for
        each block and update.
      blocks: groups as in `hessopt.group_labels`.
      rest: update of the other blocks: `"gradient"`, or `"norm_matched"`, the gradient
        times the mean ratio |step| / |gradient| of the drawn blocks (of the last update
        that drew one; 1 before the first), so that the steps of all blocks have similar
        lengths.
      seed: seed of the draws; update number t uses the key `fold_in(key(seed), t)`.

    Returns:
      A transformation of the gradient into a direction, which takes the same arguments
      as `inner`. A block whose update is not finite gets an update of zero (status
      NONFINITE).

    Raises:
      ValueError: for a probability outside [0, 1] or an unknown word.
      TypeError: in `update`, if params is missing.

    Cost per update: that of `inner` on the drawn blocks; nothing else is evaluated.
    Memory: a state of `inner` per block.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from hessopt import scale_by_newton
      >>> def loss(p):
      ...     return 2.0 * jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)
      >>> tx = subsampled(scale_by_newton(), probability=0.5, blocks="leaf")
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
      >>> grads, state = jax.grad(loss)(params), tx.init(params)
      >>> updates, state = tx.update(grads, state, params, value_fn=loss)
      >>> int(state.info.drawn) <= 2
      True

    Source: block sub-sampling as in Qu, Richtarik, Takac and Fercoq, "SDNA: Stochastic
    dual Newton ascent for empirical risk minimization", arXiv 1502.02268.
    """
    check_range("probability", probability, 0, 1)
    check_groups("blocks", blocks)
    check_word("rest", rest, ("gradient", "norm_matched"))
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)
    options = _Options(inner, probability, blocks, rest == "norm_matched", seed)
    # every keyword of `update` is for `inner`: nothing is bound here
    return optax.GradientTransformationExtraArgs(
        functools.partial(_init, options), functools.partial(_update, options)
    )


class _Options(NamedTuple):
    """The arguments of `subsampled`, checked."""

    inner: optax.GradientTransformationExtraArgs
    probability: float | jax.Array
    blocks: Groups
    norm_matched: bool
    seed: int


class _Block(NamedTuple):
    """The arguments of `inner.update` for one block; the trees have None in place of
    the leaves of other blocks."""

    updates: Params
    state: optax.OptState
    params: Params
    keywords: dict[str, Any]  # including the objective with the other leaves fixed


class _Step(NamedTuple):
    """One block after the draw."""

    updates: Params
    state: optax.OptState


def _init(options: _Options, params: Params) -> SubsampledState:
    check_params(_NAME, params)
    labels, names = group_labels(params, options.blocks)
    states = {
        name: options.inner.init(take(params, labels, group))
        for group, name in enumerate(names)
    }
    state = SubsampledState(
        count=jnp.zeros((), jnp.int32),
        ratio=jnp.ones((), solve_dtype(params)),
        # `optax.tree.map_params` would take an empty dict for the parameters
        inner=states or jnp.zeros(()),
        info=SubsampledInfo(
            status=jnp.zeros((), jnp.int32),
            drawn=jnp.zeros((), jnp.int32),
            evaluations=jnp.zeros((), jnp.int32),
        ),
    )
    return beside(state, params)


def _update(
    options: _Options,
    updates: optax.Updates,
    state: Any,  # SubsampledState
    params: Params | None = None,
    **keywords: Any,
) -> tuple[optax.Updates, SubsampledState]:
    require_params(params, caller=_NAME)
    check_params(_NAME, params)
    labels, names = group_labels(params, options.blocks)

    def block(group: int) -> _Block:
        own = of_group(labels, group, params, keywords, caller=_NAME)
        part, at = (take(tree, labels, group) for tree in (updates, params))
        return _Block(part, state.inner[names[group]], at, own)

    # block b is drawn with the given probability, independently of the others
    key = jax.random.fold_in(jax.random.key(options.seed), state.count)
    # (in one dtype, or the draws would depend on that of an injected probability)
    probability = jnp.asarray(options.probability, float)
    drawn = jax.random.bernoulli(key, probability, (len(names),))

    # the update of a drawn block is p_b of `inner`, that of any other block g_b
    blocks = [block(group) for group in range(len(names))]
    steps = [
        _advance(options.inner, drawn[group], own) for group, own in enumerate(blocks)
    ]

    # the other blocks move by g_b, or by r g_b with r the mean of |p_b| / |g_b|
    dtype = state.ratio.dtype
    lengths = _lengths([step.updates for step in steps], dtype)
    before = _lengths([own.updates for own in blocks], dtype)
    ratio = _mean_ratio(state.ratio, drawn, lengths, before)
    factor = jnp.where(drawn | (not options.norm_matched), 1.0, ratio)

    # a block that is not finite does not move
    finite = jnp.isfinite(lengths)
    direction = updates
    for group, step in enumerate(steps):
        part = _scaled(step.updates, factor[group], finite[group])
        direction = combine(part, direction)

    states = dict(zip(names, (step.state for step in steps), strict=True))
    inner_states = states or state.inner
    return direction, SubsampledState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        ratio=ratio,
        inner=inner_states,
        info=SubsampledInfo(
            status=step_status({StepStatus.NONFINITE: ~jnp.all(finite)}),
            drawn=jnp.sum(drawn, dtype=jnp.int32),
            evaluations=evaluations(reports(inner_states, state.inner)),
        ),
    )


def _advance(
    inner: optax.GradientTransformationExtraArgs, drawn: jax.Array, block: _Block
) -> _Step:
    """Return the update of `inner` and its state if the block is drawn, else the given
    ones. The state is unchanged if the step is not finite."""

    def by_inner() -> _Step:
        new, state = inner.update(
            block.updates, block.state, block.params, **block.keywords
        )
        new = optax.tree.cast_like(new, block.updates)
        finite = jnp.isfinite(norm(ravel(new)))
        return _Step(new, select(finite, state, block.state))

    return jax.lax.cond(drawn, by_inner, lambda: _Step(block.updates, block.state))


def _lengths(parts: Sequence[Params], dtype: jax.typing.DTypeLike) -> Vector:
    """Return the length of each tree."""
    return jnp.array([norm(ravel(part)) for part in parts], dtype)


def _mean_ratio(
    old: jax.Array, drawn: jax.Array, lengths: Vector, before: Vector
) -> jax.Array:
    """Return the mean of `lengths / before` over the drawn blocks for which both are
    positive and finite, or the old mean if there are none."""
    positive = (before > 0) & (lengths > 0)
    usable = drawn & positive & jnp.isfinite(before) & jnp.isfinite(lengths)
    ratios = divide(lengths, before, usable)
    count = jnp.sum(usable, dtype=ratios.dtype)
    return divide(ratios.sum(), count, count > 0, otherwise=old)


def _scaled(part: Params, factor: jax.Array, finite: jax.Array) -> Params:
    """Return the factor times a tree, or zeros if the condition does not hold."""
    scaled = jax.tree.map(lambda u: (factor * u).astype(u.dtype), part)
    return zero_unless(finite, scaled)
