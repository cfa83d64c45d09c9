"""A linear map applied to a stack of vectors, with the stack's axis at the same
position in all intermediate results.

`jax.vmap` puts the mapped axis wherever an operation's batching rule finds it cheapest:
after the data axis for `x @ dW`, before it for a broadcast. Conversions between the two
are transposes as large as the activations, which cost more than the matrix products of
a small network. Here every intermediate result has the axis at position 1, after the
data axis, and the fixed factor of a product that contracts the data axis comes first,
so that neither factor is transposed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.calculus.jaxprs import Equation, Program, interpret, primitives
from hessopt.trees.sharding import gathered
from hessopt.typing import Matrix


class _Operand(NamedTuple):
    """A value in the mapped program."""

    value: Any
    is_mapped: bool  # whether it has the stack's axis


def stacked(
    fun: Callable[[jax.Array], list[jax.Array]], example: jax.Array
) -> Callable[[jax.Array], list[jax.Array]]:
    """Return `jax.vmap(fun)` for functions of one array like `example`, with the mapped
    axis kept at position 1.

    The values equal those of `jax.vmap` up to rounding. `fun` is traced once; a
    compiled program has no overhead.
    """
    return _mapped(jax.make_jaxpr(fun)(example), example)


def _mapped(
    program: Program, example: jax.Array
) -> Callable[[jax.Array], list[jax.Array]]:
    """Return `stacked` of a function that is traced already."""

    def mapped(batch: jax.Array) -> list[jax.Array]:
        size = batch.shape[0]
        operand = jnp.moveaxis(batch, 0, _axis(example))
        outputs = interpret(
            program,
            [_Operand(operand, True)],
            _apply,
            constant=lambda array: _Operand(array, False),
        )
        return [
            jnp.moveaxis(value, _axis(aval), 0)
            if is_mapped
            else jnp.broadcast_to(value, (size, *value.shape))
            for aval, (value, is_mapped) in zip(program.out_avals, outputs, strict=True)
        ]

    return mapped


def fill_rows(
    matrix: Matrix,
    linear: Any,
    leaf: jax.Array,
    row: int,
    columns: list[int],
    chunk_size: int,
) -> Matrix:
    """Write the images of all unit vectors of `leaf` under `linear` into the leaf's
    rows of `matrix`, a chunk at a time."""
    program = jax.make_jaxpr(linear)(leaf)
    products = _mapped(program, leaf)
    chunk, end = min(chunk_size, leaf.size), leaf.size
    if "fft" in primitives(program.jaxpr):
        # XLA removes a loop of one pass; the layout that a factorization of the matrix
        # requires then reaches the Fourier transform, which fails with it on CPUs
        chunk = min(chunk, -(-leaf.size // 2))
        end = max(end, chunk + 1)

    def fill(matrix: Matrix, start: jax.Array) -> tuple[Matrix, None]:
        units = jax.nn.one_hot(start + jnp.arange(chunk), leaf.size, dtype=leaf.dtype)
        images = products(units.reshape(chunk, *leaf.shape))
        for column, image in zip(columns, images, strict=True):
            image = gathered(image).reshape(chunk, -1).astype(matrix.dtype)
            matrix = jax.lax.dynamic_update_slice(
                matrix, image, (row + start, jnp.asarray(column, start.dtype))
            )
        return matrix, None

    # the last chunk starts early enough to be full, so that one body is compiled; a few
    # rows are written twice
    starts = jnp.minimum(jnp.arange(0, end, chunk, dtype=jnp.int32), leaf.size - chunk)
    return jax.lax.scan(fill, matrix, starts)[0]


def _axis(array: Any) -> int:
    """Return the position of the stack's axis in an array of this (unmapped) shape:
    after the first axis, if there is one."""
    return min(1, len(array.shape))


def _apply(equation: Equation, operands: list[_Operand]) -> list[_Operand]:
    """Map one equation by its own batching rule, and move the stack's axis to its
    position."""
    values = [operand.value for operand in operands]
    mapped = [operand.is_mapped for operand in operands]
    if not any(mapped):
        return [_Operand(value, False) for value in equation.fun(*values)]
    contracts_data = _contracts_data(equation, mapped)
    fun = _fixed_factor_first(equation.params) if contracts_data else equation.fun
    in_axes = tuple(
        _axis(aval) if m else None
        for aval, m in zip(equation.operands, mapped, strict=True)
    )
    out_axes = [_axis(aval) for aval in equation.results]
    images = jax.vmap(fun, in_axes, out_axes)(*values)
    return [_Operand(image, True) for image in images]


def _contracts_data(equation: Equation, mapped: list[bool]) -> bool:
    """Return whether the equation is a matrix product without batch axes that contracts
    the first axis of a mapped left factor with a fixed right factor."""
    if equation.name != "dot_general" or mapped != [True, False]:
        return False
    params = equation.params
    (left_axes, _), kept_in_step = params["dimension_numbers"]
    # the precision is the same for both factors
    symmetric = params["precision"] in (None, *((p, p) for p in jax.lax.Precision))
    return (
        0 in left_axes
        and kept_in_step == ((), ())
        and symmetric
        and params.get("out_sharding") is None
    )


def _fixed_factor_first(
    params: dict[str, Any],
) -> Callable[[jax.Array, jax.Array], list[jax.Array]]:
    """Return the product with its factors exchanged and the axes of the result in the
    original order."""
    (left_axes, right_axes), _ = params["dimension_numbers"]
    keep = {name: params[name] for name in ("precision", "preferred_element_type")}

    def dot(left: jax.Array, right: jax.Array) -> list[jax.Array]:
        product = jax.lax.dot_general(
            right, left, ((right_axes, left_axes), ((), ())), **keep
        )
        free = right.ndim - len(right_axes)
        return [
            jnp.moveaxis(product, range(free), range(product.ndim - free, product.ndim))
        ]

    return dot
