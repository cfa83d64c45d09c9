"""Reports of an update: whether it failed, how often it evaluated the objective, and
which decrease its model predicts.

Every state of hessopt has an `info` with a `status` and a count of `evaluations`, and
with `predicted` if the method has a model of the objective; the line searches of optax
count their steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt.kinds.line_searches import OPTAX_SEARCH_STATES, LinesearchInfo
from hessopt.typing import StepStatus


class Report(NamedTuple):
    """The report of one transformation on its last update."""

    failed: jax.Array  # bool scalar, whether a step of zero may be due to a failure
    # int32 scalar, evaluations of the objective; -1 if they are not counted
    evaluations: jax.Array
    # scalar, decrease of the objective that the model predicts; inf if the state was not
    # updated; None for a method without a model
    predicted: jax.Array | None = None
    # scalar, share of the direction that a line search accepted; None for other methods
    rate: jax.Array | None = None
    # bool scalar, whether a value or a derivative was not finite
    nonfinite: jax.Array | bool = False


def reports(state: optax.OptState, old: optax.OptState) -> list[Report]:
    """Return the reports of all transformations in a state that make one, on the update
    from `old` to `state`.

    A transformation that was not updated, as under `optax.MultiSteps`, reports no
    evaluations, and no failure except a value that is not finite: some wrappers restore
    its count in that case.
    """
    nodes, olds = (
        [node for node in jax.tree.leaves(tree, is_leaf=_reports) if _reports(node)]
        for tree in (state, old)
    )
    return [_report(*pair) for pair in zip(nodes, olds, strict=True)]


def evaluations(found: list[Report]) -> jax.Array:
    """Return the sum of the evaluations of all reports, an int32 scalar; -1 if one of
    them does not count."""
    counts = [report.evaluations for report in found]
    total = sum(counts, jnp.zeros((), jnp.int32))
    return jnp.where(jnp.any(jnp.array([count < 0 for count in counts])), -1, total)


def failed(found: list[Report]) -> jax.Array:
    """Return whether any transformation reports a failure, a bool scalar."""
    return jnp.any(jnp.array([report.failed for report in found]))


def _reports(node: object) -> bool:
    is_search = isinstance(node, OPTAX_SEARCH_STATES)
    return is_search or hasattr(getattr(node, "info", None), "evaluations")


def _report(new: Any, old: Any) -> Report:
    if isinstance(new, OPTAX_SEARCH_STATES):
        steps = jnp.asarray(new.info.num_linesearch_steps, jnp.int32)
        return Report(steps > 0, steps, rate=jnp.asarray(new.learning_rate))
    updated = new.count != old.count
    nonfinite = (new.info.status & int(StepStatus.NONFINITE)) != 0
    failure = (new.info.status & int(StepStatus.FAILURES)) != 0
    predicted = getattr(new.info, "predicted", None)
    return Report(
        nonfinite | (updated & failure),
        jnp.where(updated, new.info.evaluations, 0),
        None if predicted is None else jnp.where(updated, predicted, jnp.inf),
        new.info.rate if isinstance(new.info, LinesearchInfo) else None,
        nonfinite,
    )
