"""The objective over a whole batch, evaluated one part at a time to save memory."""

import functools
import inspect
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hessopt._checks import check_count
from hessopt.objective.binding import as_objective
from hessopt.typing import Params, ValueFn


def microbatched(
    value_fn: ValueFn, count: int, *, over: Sequence[str] | None = None
) -> ValueFn:
    """Average an objective over equal parts of its data, in a loop that keeps the
    intermediates of one part only.

    The value, the gradient and all evaluations by an optimizer are those of the whole
    batch. `optax.MultiSteps` does not provide this: it averages gradients, while a line
    search or a rate uses the last microbatch only.

    Args:
      value_fn: `value_fn(params, ...)`, a mean over the examples in its data, plus
        terms that do not depend on them.
      count: number of parts; all have the same number of examples.
      over: names of the data that are split along their first axis; by default all.
        Other data are passed whole to every part.

    Returns:
      A function with the arguments of value_fn.

    Raises:
      ValueError: for count < 1 or a name in `over` that value_fn does not have; when
        called, for data of a length that count does not divide.
      TypeError: for a `composite`, since its outputs would be those of one part.

    Cost: a gradient evaluates each part twice (`jax.checkpoint`). Hessian-vector
    products that are linearized once keep the intermediates of all parts;
    `newton_cg(rematerialize=True)` does not.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(w, x, y):
      ...     return jnp.mean((x @ w - y) ** 2)
      >>> x, y = jnp.arange(8.0).reshape(4, 2), jnp.ones(4)
      >>> float(microbatched(loss, 2)(jnp.ones(2), x, y)) == float(loss(jnp.ones(2), x, y))
      True
    """
    check_count("count", count)
    if as_objective(value_fn).is_composite:
        raise TypeError(
            "microbatched cannot keep the parts of a composite apart: give it a plain function"
        )
    signature = inspect.signature(value_fn)
    unknown = sorted(set(over or ()) - set(signature.parameters))
    if unknown:
        raise ValueError(
            f"over must name arguments of value_fn, {list(signature.parameters)}, got {unknown}"
        )

    @functools.wraps(value_fn)
    def whole(*args: Params, **kwargs: Params) -> jax.Array:
        call = signature.bind(*args, **kwargs)
        (first, params), *data = call.arguments.items()
        split = {name: part for name, part in data if over is None or name in over}
        parts = jax.tree.map(functools.partial(_parts, count), split)

        @jax.checkpoint
        def one(params: Params, part: dict[str, Params]) -> jax.Array:
            call.arguments.update({first: params} | part)
            return value_fn(*call.args, **call.kwargs)

        total = jax.eval_shape(one, params, jax.tree.map(lambda part: part[0], parts))
        zero = jnp.zeros(total.shape, total.dtype)
        return (
            jax.lax.scan(
                lambda total, part: (total + one(params, part), None), zero, parts
            )[0]
            / count
        )

    return whole


def _parts(count: int, leaf: jax.typing.ArrayLike) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if leaf.ndim == 0 or len(leaf) % count:
        raise ValueError(
            f"count must divide the length of the data to split (name those in `over`), got {count} and {leaf.shape}"
        )
    return leaf.reshape(count, -1, *leaf.shape[1:])
