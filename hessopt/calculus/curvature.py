"""Curvature of the objective: products, dense matrices and diagonal blocks.

Products are linearized once, matrices are filled in chunks of rows, and every block is
computed separately.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hessopt._checks import check_count, choose
from hessopt.calculus.batching import fill_rows
from hessopt.calculus.least_squares import Root, root
from hessopt.calculus.linearization import linearize, linearize_gradient
from hessopt.numerics.platform import on_cpu
from hessopt.objective.binding import Objective, as_objective, precompose
from hessopt.trees.groups import Groups, combine, group_labels, take
from hessopt.trees.vectors import real_leaves, solve_dtype
from hessopt.typing import Labels, Matrix, Params, ValueFn

CurvatureFn: TypeAlias = Callable[
    [ValueFn, Callable[[Params], Params], Params], Callable[[Params], Params]
]
"""`(value_fn, embed, part) -> product`: the curvature of value_fn at `embed(part)` as a
linear map from changes of `part` to gradients like `embed(part)`."""

CHUNK_SIZE, ACCELERATOR_CHUNK_SIZE = 16, 64
"""Number of unit vectors per product. On CPUs matrix products are inefficient below
about 8, and exceed the cache above 32. On accelerators larger ones save launches."""


def hessian_product(
    value_fn: ValueFn, embed: Callable[[Params], Params], part: Params
) -> Callable[[Params], Params]:
    """The map `v -> H v`, with the gradient linearized once: forward over reverse, or
    reverse over reverse for a function without forward derivatives."""
    return linearize_gradient(value_fn, part, embed)[1]


def gauss_newton_product(
    value_fn: ValueFn, embed: Callable[[Params], Params], part: Params
) -> Callable[[Params], Params]:
    """The map `v -> J' L J v`, with J the Jacobian of the model and L the Hessian of
    the loss with respect to the outputs."""
    objective = as_objective(value_fn)
    if not objective.is_composite:
        raise TypeError(
            'curvature="gauss_newton" needs value_fn=hessopt.composite(model_fn, loss_fn)'
        )
    outputs, jacobian = linearize(lambda p: objective.model_fn(embed(p)), part)
    _, loss_hessian = linearize_gradient(objective.loss_fn, outputs)
    _, transposed = jax.vjp(objective.model_fn, embed(part))
    return lambda v: transposed(loss_hessian(jacobian(v)))[0]


RootFn: TypeAlias = Callable[[Objective, Sequence[jax.Array]], Root | None]
"""`(objective, leaves) -> Root`, or None if the objective has no such root."""


class Curvature(NamedTuple):
    """A curvature matrix, given by its products and optionally its root."""

    linearize: CurvatureFn
    root: RootFn | None = None
    """For `J' L J`, its square root at real leaves; see `least_squares.root`."""


CURVATURES = {
    "hessian": Curvature(hessian_product),
    "gauss_newton": Curvature(gauss_newton_product, root),
}


def resolve(curvature: str | CurvatureFn | Curvature) -> Curvature:
    """Return the `Curvature` of a word or a function.

    The function of a known word has the same root as the word.
    """
    found = choose("curvature", curvature, CURVATURES)
    if isinstance(found, Curvature):
        return found
    known = (known for known in CURVATURES.values() if known.linearize is found)
    return next(known, Curvature(found))


def curvature_product(
    value_fn: ValueFn,
    params: Params,
    curvature: str | CurvatureFn | Curvature = "hessian",
) -> Callable[[Params], Params]:
    """Return the map `v -> H v` on trees like `params`, linearized once for many
    applications.

    Cost: one gradient for the linearization, about two per application; the
    linearization keeps the gradient's intermediates.
    """
    leaves, restore = real_leaves(params)
    linear = resolve(curvature).linearize(
        precompose(value_fn, restore), lambda parts: parts, leaves
    )
    return lambda vector: restore(linear(real_leaves(vector)[0]))


def hvp(value_fn: ValueFn, params: Params, vector: Params) -> Params:
    """Multiply the Hessian of `value_fn` at `params` by `vector`.

    Args:
      value_fn: `value_fn(params)`, a real scalar.
      params: pytree of arrays.
      vector: tree like `params`, same shapes and dtypes.

    Returns:
      `H v`, a tree like `params`: the derivative of the gradient along `vector`.
      Complex leaves follow optax's convention for gradients (`df/dx + i df/dy`). For a
      `value_fn` without forward derivatives, such as one with a `jax.custom_vjp`, it is
      the reverse derivative of the gradient, which is the same for a symmetric H.

    Raises:
      ValueError: if `vector` is not a tree like `params`.

    Cost: at most three gradients, and the memory of a gradient and its tangent. For
    many vectors at one point, use `jax.vmap` over `vector`, or `hessian`.

    Example:
      >>> import jax.numpy as jnp
      >>> hvp(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])).tolist()
      [6.0, 12.0]

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994.
    """
    shapes, expected = jax.tree.map(jnp.shape, vector), jax.tree.map(jnp.shape, params)
    if jax.tree.structure(vector) != jax.tree.structure(params) or shapes != expected:
        raise ValueError(
            f"vector must have the shapes of params, {expected}, got {shapes}"
        )
    return curvature_product(value_fn, params)(
        jax.tree.map(lambda v, p: jnp.asarray(v, jnp.result_type(p)), vector, params)
    )


def hessian(
    value_fn: ValueFn,
    params: Params,
    *,
    curvature: str | CurvatureFn | Curvature = "hessian",
    blocks: Groups = "all",
    chunk_size: int | None = None,
) -> Matrix | dict[str, Matrix]:
    """Form the Hessian or Gauss-Newton matrix of `value_fn` at `params`.

    Args:
      value_fn: `value_fn(params)`, a real scalar; a `composite` for
        `curvature="gauss_newton"`.
      params: pytree of arrays with n real entries (a complex leaf counts twice: real
        parts, then imaginary).
      curvature: `"hessian"` or `"gauss_newton"`.
      blocks: `"all"` for the whole matrix; else groups as in `group_labels`, for
        diagonal blocks. Each block is computed separately with the other parameters
        held fixed; no n by n matrix is formed.
      chunk_size: number of unit vectors multiplied at once; by default 16 on CPUs and 64
        on accelerators.

    Returns:
      The symmetric `(n, n)` matrix in the order of `jax.flatten_util.ravel_pytree`, in
      the dtype of `params` and at least float32; with blocks, `{label: (n_b, n_b)}`.
      A `value_fn` without forward derivatives, such as one with a `jax.custom_vjp`, is
      differentiated twice in reverse mode.

    Raises:
      ValueError: for an unknown word, chunk_size < 1, or blocks that do not match
        `params`.
      TypeError: for Gauss-Newton without a `composite`.

    Cost: n products of about two gradients each; the off-diagonal block of two leaves
    is computed once, from the smaller one. Memory: the result and `chunk_size` times a
    gradient's intermediates.

    Example:
      >>> import jax.numpy as jnp
      >>> hessian(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 3.0])).tolist()
      [[6.0, 2.0], [2.0, 0.0]]

    Source: see `hvp` for the products, `composite` for Gauss-Newton.
    """
    labels, names = group_labels(params, blocks)

    @jax.jit  # one program, even if the caller does not jit
    def compute(params: Params) -> list[Matrix]:
        return block_hessians(
            value_fn,
            params,
            labels,
            len(names),
            curvature=curvature,
            chunk_size=chunk_size,
        )

    matrices = compute(params)
    if isinstance(blocks, str) and blocks == "all":
        return matrices[0] if matrices else jnp.zeros((0, 0), solve_dtype(params))
    return dict(zip(names, matrices, strict=True))


def block_hessians(
    value_fn: ValueFn,
    params: Params,
    labels: Labels,
    count: int,
    *,
    curvature: str | CurvatureFn | Curvature = "hessian",
    chunk_size: int | None = None,
) -> list[Matrix]:
    """Compute the diagonal blocks of `hessian`, one `(n_b, n_b)` matrix for each label
    0, ..., count - 1."""
    if chunk_size is None:
        chunk_size = CHUNK_SIZE if on_cpu() else ACCELERATOR_CHUNK_SIZE
    check_count("chunk_size", chunk_size)
    linearize = resolve(curvature).linearize

    def block(group: int) -> Matrix:
        leaves, restore = real_leaves(take(params, labels, group))
        objective = precompose(value_fn, lambda parts: combine(restore(parts), params))
        return _dense(linearize, objective, leaves, chunk_size)

    return [block(group) for group in range(count)]


def _dense(
    linearize: CurvatureFn,
    objective: Objective,
    leaves: list[jax.Array],
    chunk_size: int,
) -> Matrix:
    """Fill the matrix strip by strip, smallest leaf first: the strip of a leaf has its
    rows, and the columns of the leaf and of all larger ones."""
    sizes = [leaf.size for leaf in leaves]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    matrix = jnp.zeros((sum(sizes), sum(sizes)), solve_dtype(leaves))
    order = sorted((i for i, size in enumerate(sizes) if size), key=sizes.__getitem__)

    for rank, i in enumerate(order):
        strip = order[rank:]
        linear = _strip_product(linearize, objective, leaves, strip)
        matrix = fill_rows(
            matrix,
            linear,
            leaves[i],
            offsets[i],
            [offsets[j] for j in strip],
            chunk_size,
        )
        for j in strip:
            rows, columns = (
                slice(offsets[i], offsets[i] + sizes[i]),
                slice(offsets[j], offsets[j] + sizes[j]),
            )
            block = matrix[rows, columns]
            matrix = matrix.at[columns, rows].set(
                block.T if i != j else (block + block.T) / 2
            )
    return matrix


def _strip_product(
    linearize: CurvatureFn,
    objective: Objective,
    leaves: Sequence[jax.Array],
    strip: list[int],
) -> Callable[[jax.Array], list[jax.Array]]:
    """Return the map from changes of leaf `strip[0]` to gradients in the leaves of
    `strip`; all other leaves are constant."""

    def place(parts: Sequence[jax.Array]) -> list[jax.Array]:
        moved = dict(zip(strip, parts, strict=True))
        return [moved.get(j, leaf) for j, leaf in enumerate(leaves)]

    def embed(part: jax.Array) -> list[jax.Array]:
        return [part, *(leaves[j] for j in strip[1:])]

    return linearize(precompose(objective, place), embed, leaves[strip[0]])
