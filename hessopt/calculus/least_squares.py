"""The square root of a Gauss-Newton matrix, for losses that are sums of functions of
single outputs.

If the Hessian of the loss is diagonal, `L = diag(l)`, as for squared errors,

    J' L J = K' K  with  K = diag(sqrt(l)) J,    gradient = K' r  with  r = (loss gradient) / sqrt(l),

and R of `[K r] = Q R` contains both. The singular values of its part for K are the
square roots of the eigenvalues of `J' L J`, to full precision, whereas the product
loses all of those below sqrt(eps) of the largest one.

Source: Bjorck, "Numerical Methods for Least Squares Problems", 1996, section 9.2.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.calculus.batching import fill_rows
from hessopt.calculus.jaxprs import Equation, interpret
from hessopt.calculus.linearization import linearize, linearize_gradient
from hessopt.numerics.guards import divide, matmul
from hessopt.objective.binding import as_objective
from hessopt.trees.vectors import ravel, solve_dtype
from hessopt.typing import Matrix, Vector

CHUNK_SIZE = 4
"""Number of tangents that are computed at once. There are usually many outputs, and
more tangents would not fit into the cache."""

MIXED = -1
"""Source of a result that depends on several inputs, or not entry by entry."""

_ENTRYWISE = frozenset(
    [
        "neg",
        "convert_element_type",
        "copy",
        "mul",
        "div",
        "add_any",
        "add",
        "sub",
        "select_n",
    ]
)


class Root(NamedTuple):
    """`K' K` is the Gauss-Newton matrix, `K' r + rest` the gradient; k = min(number of
    outputs, n)."""

    K: Matrix  # (k, n), triangular
    r: Vector  # (k,)
    # (n,), from outputs with a slope and nearly zero curvature, whose r would dominate
    # the others
    rest: Vector


def root(objective: Any, parts: Sequence[jax.Array]) -> Root | None:
    """Return the root of the Gauss-Newton matrix at real leaves, or None if the Hessian
    of the loss is not recognized as diagonal.

    Negative curvature of the loss is replaced by zero. Values that are not finite make
    the result not finite.

    Cost: n tangents of the model, in chunks, and `2 m n^2` multiplications for m
    outputs; memory `m n`.
    """
    objective = as_objective(objective)
    if not objective.is_composite:
        return None
    outputs = objective.model_fn(parts)
    slopes, loss_hessian = linearize_gradient(objective.loss_fn, outputs)
    if not is_diagonal(loss_hessian, outputs):
        return None
    dtype = solve_dtype(parts)
    weights = ravel(loss_hessian(jax.tree.map(jnp.ones_like, outputs))).astype(dtype)
    slopes = ravel(slopes).astype(dtype)
    roots = jnp.maximum(weights, 0.0) ** 0.5
    curved = weights > jnp.finfo(dtype).eps * jnp.max(weights, initial=0.0)
    r = divide(slopes, roots, curved)

    # J', (n, m)
    transposed = _transposed_jacobian(objective.model_fn, parts, outputs, dtype)
    K = transposed * roots
    R = jnp.linalg.qr(jnp.concatenate([K, r[None]]).T, mode="r")
    n, m = K.shape
    rest = matmul(transposed, jnp.where(curved, 0.0, slopes))
    return Root(R[: min(m, n), :n], R[: min(m, n), n], rest)


def _transposed_jacobian(
    model_fn: Any, parts: Sequence[jax.Array], outputs: Any, dtype: Any
) -> jax.Array:
    """Return J', with a row for every parameter. The tangents of a leaf are computed
    only for operations that depend on it."""
    sizes = [leaf.size for leaf in jax.tree.leaves(outputs)]
    columns = [sum(sizes[:i]) for i in range(len(sizes))]
    rows = jnp.zeros((sum(part.size for part in parts), sum(sizes)), dtype)
    offset = 0
    for i, part in enumerate(parts):
        if part.size:
            along = linearize(
                lambda p, i=i: jax.tree.leaves(
                    model_fn([*parts[:i], p, *parts[i + 1 :]])
                ),
                part,
            )[1]
            rows = fill_rows(rows, along, part, offset, columns, CHUNK_SIZE)
        offset += part.size
    return rows


def is_diagonal(linear: Callable[[Any], Any], example: Any) -> bool:
    """Return whether each entry of a linear function's result is recognized to depend
    only on the same entry of its argument."""
    leaves, treedef = jax.tree.flatten(example)
    program = jax.make_jaxpr(
        lambda leaves: jax.tree.leaves(linear(jax.tree.unflatten(treedef, leaves)))
    )(leaves)
    sources = interpret(program, range(len(leaves)), _source, constant=lambda _: None)
    return all(source in (None, i) for i, source in enumerate(sources))


def _source(equation: Equation, sources: list[int | None]) -> list[int | None]:
    """Return the one input on which the results depend entry by entry, None if there is
    no such input, else MIXED."""
    inputs = {source for source in sources if source is not None}
    # operands that depend on an input must have the shape of the result: a broadcast is
    # not entry by entry
    shapes = {
        aval.shape
        for aval, source in zip(equation.operands, sources, strict=True)
        if source is not None
    }
    entrywise = equation.name in _ENTRYWISE and shapes == {equation.results[0].shape}
    found = None
    if inputs:
        found = inputs.pop() if len(inputs) == 1 and entrywise else MIXED
    return [found] * len(equation.results)
