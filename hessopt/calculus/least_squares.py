"""The square root of a Gauss-Newton matrix, for losses that look at every output by
itself.

Where the Hessian of the loss is diagonal, `L = diag(l)`, as for squared errors,

    J' L J = K' K  with  K = diag(sqrt(l)) J,    gradient = K' r  with  r = (loss gradient) / sqrt(l),

and R of `[K r] = Q R` holds both: its singular values are the roots of the eigenvalues
of `J' L J`, to full precision, where the product has lost all below sqrt(eps) of the
largest.

Source: Bjorck, "Numerical Methods for Least Squares Problems", 1996, section 9.2.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.calculus.batching import fill_rows
from hessopt.calculus.jaxprs import Equation, interpret
from hessopt.numerics.guards import divide, matmul
from hessopt.objective.binding import as_objective
from hessopt.trees.vectors import ravel, solve_dtype
from hessopt.typing import Matrix, Vector

CHUNK_SIZE = 4
"""Tangents at once. There are many outputs where this is used, and more tangents of
them leave the cache."""

MIXED = -1
"""In place of an input: several, or not entry by entry."""

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
    # (n,), of outputs with a slope and next to no curvature, whose r would drown the
    # others
    rest: Vector


def root(objective: Any, parts: Sequence[jax.Array]) -> Root | None:
    """Return the root of the Gauss-Newton matrix at real leaves; None where the loss is
    not seen to be diagonal.

    Negative curvature of the loss counts as none; what is not finite makes the result
    so.

    Cost: n tangents of the model, in chunks, and `2 m n^2` multiplications for m
    outputs; memory `m n`.
    """
    objective = as_objective(objective)
    if not objective.is_composite:
        return None
    outputs = objective.model_fn(parts)
    slopes, loss_hessian = jax.linearize(jax.grad(objective.loss_fn), outputs)
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
    """Return J', a row for every parameter; the tangents of a leaf skip what does not
    depend on it."""
    sizes = [leaf.size for leaf in jax.tree.leaves(outputs)]
    columns = [sum(sizes[:i]) for i in range(len(sizes))]
    rows = jnp.zeros((sum(part.size for part in parts), sum(sizes)), dtype)
    offset = 0
    for i, part in enumerate(parts):
        if part.size:
            along = jax.linearize(
                lambda p, i=i: jax.tree.leaves(
                    model_fn([*parts[:i], p, *parts[i + 1 :]])
                ),
                part,
            )[1]
            rows = fill_rows(rows, along, part, offset, columns, CHUNK_SIZE)
        offset += part.size
    return rows


def is_diagonal(linear: Callable[[Any], Any], example: Any) -> bool:
    """Return whether each entry of a linear function's result is seen to depend on the
    same entry of its argument only."""
    leaves, treedef = jax.tree.flatten(example)
    program = jax.make_jaxpr(
        lambda leaves: jax.tree.leaves(linear(jax.tree.unflatten(treedef, leaves)))
    )(leaves)
    sources = interpret(program, range(len(leaves)), _source, constant=lambda _: None)
    return all(source in (None, i) for i, source in enumerate(sources))


def _source(equation: Equation, sources: list[int | None]) -> list[int | None]:
    """Return the one input on which the results depend entry by entry, None if on none,
    MIXED if otherwise."""
    inputs = {source for source in sources if source is not None}
    # what depends on an input must have the shape of the result: a broadcast is not
    # entry by entry
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
