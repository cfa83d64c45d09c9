"""Second-order steps for a random part of the blocks, first-order steps for the rest.

At every update each block b of the parameters draws whether it gets the direction of
`inner`, computed on the objective restricted to the block, or the gradient. A block
that is not drawn costs nothing: its branch of a `lax.cond` does not run. (Under `vmap`
both branches run.)

Source: block sub-sampling as in randomised block Newton methods, Qu, Richtarik, Takac
and Fercoq, arXiv 1502.02268.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_range, check_transformation, check_word
from hessopt.kinds.reports import evaluations, reports
from hessopt.numerics.guards import divide, select, zero_unless
from hessopt.numerics.norms import norm
from hessopt.objective.binding import of_group, require_params
from hessopt.trees.groups import Groups, check_groups, combine, group_labels, take
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import ravel, solve_dtype
from hessopt.typing import Params, StepStatus, step_status

_NAME = "subsampled"


class SubsampledInfo(NamedTuple):
    """What the last update drew; what the blocks' own steps found is in their inner
    states."""

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
    # {label: state of `inner` for that block}, each as of the block's last draw
    inner: Any
    info: SubsampledInfo


def subsampled(
    inner: optax.GradientTransformation,
    *,
    probability: float | jax.Array,
    blocks: Groups = "layer",
    rest: str = "gradient",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Give `inner`'s direction to randomly drawn blocks of the parameters, and the
    gradient to the rest.

    Args:
      inner: a direction such as `scale_by_newton()`. It sees each block as a problem of
        its own: the block's leaves (None in place of the others), and `value_fn` with
        the other parameters held fixed. Its state, counters and schedules included,
        advances only when the block is drawn.
      probability: of drawing a block, in [0, 1], independently per block and update.
      blocks: groups as in `hessopt.group_labels`.
      rest: what the other blocks get: `"gradient"`, or `"norm_matched"`, the gradient
        times the mean ratio |step| / |gradient| of the drawn blocks (of the last update
        that drew one; 1 before the first), so that all blocks move alike.
      seed: of the draws; update number t draws with `fold_in(key(seed), t)`.

    Returns:
      A transformation, gradient in and direction out, that takes what `inner` takes. A
      block whose update is not finite does not move (status NONFINITE).

    Raises:
      ValueError: for a probability outside [0, 1] or an unknown word.
      TypeError: in `update`, when params is missing.

    Cost per update: that of `inner` on the drawn blocks; nothing else is evaluated.
    Memory: a state of `inner` per block.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from hessopt import scale_by_newton
      >>> def loss(p):
      ...     return 2.0 * jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)
      >>> tx = subsampled(scale_by_newton(), probability=0.5, blocks="leaf")
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
      >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> int(state.info.drawn) <= 2
      True

    Source: see the head of this file.
    """
    check_range("probability", probability, 0, 1)
    check_groups("blocks", blocks)
    check_word("rest", rest, ("gradient", "norm_matched"))
    check_transformation("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> SubsampledState:
        labels, names = group_labels(params, blocks)
        states = {
            name: inner.init(take(params, labels, group))
            for group, name in enumerate(names)
        }
        state = SubsampledState(
            count=jnp.zeros((), jnp.int32),
            ratio=jnp.ones((), solve_dtype(params)),
            # of no block a leaf, so that `optax.tree.map_params` sees a non-parameter
            # there
            inner=states or jnp.zeros(()),
            info=SubsampledInfo(
                status=jnp.zeros((), jnp.int32),
                drawn=jnp.zeros((), jnp.int32),
                evaluations=jnp.zeros((), jnp.int32),
            ),
        )
        return beside(state, params)

    def update(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        **keywords: Any,
    ) -> tuple[optax.Updates, SubsampledState]:
        require_params(params, caller=_NAME)
        labels, names = group_labels(params, blocks)
        drawn = jax.random.bernoulli(
            jax.random.fold_in(jax.random.key(seed), state.count),
            probability,
            (len(names),),
        )

        def step(group: int) -> tuple[Any, Any]:
            """The block's update, and the state of `inner` for it: both as they were if
            the block is not drawn."""
            part, kept_state = take(updates, labels, group), state.inner[names[group]]
            own = of_group(labels, group, params, keywords, caller=_NAME)

            def inner_step() -> tuple[Any, Any]:
                new, new_state = inner.update(
                    part, kept_state, take(params, labels, group), **own
                )
                new = optax.tree.cast_like(new, part)
                finite = jnp.isfinite(norm(ravel(new)))
                return new, select(finite, new_state, kept_state)

            return jax.lax.cond(drawn[group], inner_step, lambda: (part, kept_state))

        steps = [step(group) for group in range(len(names))]
        dtype = state.ratio.dtype
        lengths = jnp.array([norm(ravel(part)) for part, _ in steps], dtype)
        before = jnp.array(
            [norm(ravel(take(updates, labels, group))) for group in range(len(names))],
            dtype,
        )
        usable = (
            drawn
            & (before > 0)
            & (lengths > 0)
            & jnp.isfinite(before)
            & jnp.isfinite(lengths)
        )
        ratios = divide(lengths, before, usable)
        ratio = jnp.where(
            usable.any(), ratios.sum() / jnp.maximum(usable.sum(), 1), state.ratio
        )

        factor = jnp.where(drawn | (rest == "gradient"), 1.0, ratio)
        direction = updates
        for group, (part, _) in enumerate(steps):
            scaled = jax.tree.map(
                lambda u, r=factor[group]: (r * u).astype(u.dtype), part
            )
            finite = jnp.isfinite(lengths[group])
            direction = combine(zero_unless(finite, scaled), direction)

        new_states = {name: s for name, (_, s) in zip(names, steps, strict=True)}
        states = new_states or state.inner
        return direction, SubsampledState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            ratio=ratio,
            inner=states,
            info=SubsampledInfo(
                status=step_status(
                    {StepStatus.NONFINITE: ~jnp.all(jnp.isfinite(lengths))}
                ),
                drawn=jnp.sum(drawn, dtype=jnp.int32),
                evaluations=evaluations(reports(states, state.inner)),
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)
