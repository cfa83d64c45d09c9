"""Products of the rows of a Jacobian: as one matrix, with themselves, among each other,
and with matrices. Rows are computed chunk by chunk, in the order of the pieces.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hessopt.calculus.rows import Piece
from hessopt.calculus.terms import Leaves
from hessopt.numerics.guards import matmul
from hessopt.trees.sharding import contract
from hessopt.trees.vectors import solve_dtype
from hessopt.typing import Matrix

KERNEL_BYTES = 2**29
"""Largest size of the rows that are computed at once for a kernel; two such chunks are
in memory. A kernel of c chunks computes every row about c/2 times."""


def jacobian(pieces: list[Piece], parts: Leaves) -> jax.Array:
    """Return all rows times their factors, `(M, n)`."""
    n = sum(part.size for part in parts)
    found = [
        jax.lax.map(lambda chunk, piece=piece: _rows(piece, parts, chunk), _all(piece))
        for piece in pieces
    ]
    return jnp.concatenate([rows.reshape(-1, n) for rows in found])


def normal_matrix(pieces: list[Piece], parts: Leaves) -> Matrix:
    """Return the sum of the products of all rows with themselves, `(n, n)`."""
    n = sum(part.size for part in parts)
    total = jnp.zeros((n, n), solve_dtype(parts))
    for piece in pieces:

        def add(total: Matrix, chunk: Any, piece: Piece = piece) -> tuple[Matrix, None]:
            rows = _rows(piece, parts, chunk)
            return total + contract(rows.T, rows.T, 1), None

        total, _ = jax.lax.scan(add, total, _all(piece))
    return total


def rows_times(pieces: list[Piece], parts: Leaves, right: jax.Array) -> jax.Array:
    """Return all rows times a matrix `(n, k)`, `(M, k)`."""
    found = [
        jax.lax.map(
            lambda chunk, piece=piece: matmul(_rows(piece, parts, chunk), right),
            _all(piece),
        )
        for piece in pieces
    ]
    return jnp.concatenate([x.reshape(-1, right.shape[1]) for x in found])


def times_rows(pieces: list[Piece], parts: Leaves, left: jax.Array) -> jax.Array:
    """Return the transpose of all rows times a matrix `(M, k)`, `(n, k)`."""
    n, start = sum(part.size for part in parts), 0
    total = jnp.zeros((n, left.shape[1]), left.dtype)
    for piece in pieces:
        end = start + piece.size
        own = left[start:end].reshape(len(piece.factors), -1, left.shape[1])
        start = end

        def add(total: jax.Array, both: Any, piece: Piece = piece) -> Any:
            chunk, weights = both
            rows = _rows(piece, parts, chunk)
            return total + contract(rows.T, weights.T, 1), None

        total, _ = jax.lax.scan(add, total, (_all(piece), own))
    return total


def _all(piece: Piece) -> Any:
    """Return the data and the factors of all chunks."""
    return piece.samples, piece.factors


def _rows(piece: Piece, parts: Leaves, chunk: Any) -> jax.Array:
    """Return the rows of a chunk as one matrix."""
    return jnp.concatenate(piece.rows(parts, *chunk), axis=1)


def kernel(pieces: list[Piece], parts: Leaves) -> Matrix:
    """Return the inner products of all rows, `(M, M)`, in the order of the pieces.

    If there are several chunks of a piece, rows are computed anew for every pair of
    chunks, so that at most two chunks of them are in memory.
    """
    count = len(pieces)
    if all(len(piece.factors) == 1 for piece in pieces):
        rows = [piece.rows(parts, *_chunk(piece, 0)) for piece in pieces]
        blocks = [[_products(a, b) for b in rows[: i + 1]] for i, a in enumerate(rows)]
    else:
        blocks = [
            [_between(a, b, parts) for b in pieces[:i]] + [_within(a, parts)]
            for i, a in enumerate(pieces)
        ]
    return jnp.block(
        [
            [blocks[i][j] if j <= i else blocks[j][i].T for j in range(count)]
            for i in range(count)
        ]
    )


def _products(left: list[Matrix], right: list[Matrix]) -> Matrix:
    """Return the inner products of rows with rows."""
    zero = jnp.zeros((len(left[0]), len(right[0])), left[0].dtype)
    return sum((contract(a, b, 1) for a, b in zip(left, right, strict=True)), zero)


def _chunk(piece: Piece, i: int | jax.Array) -> Any:
    return jax.tree.map(lambda x: x[i], _all(piece))


def _between(a: Piece, b: Piece, parts: Leaves) -> Matrix:
    """Return the inner products of the rows of one piece with those of another."""

    def of_chunk(chunk: Any) -> jax.Array:
        left = a.rows(parts, *chunk)
        found = jax.lax.map(
            lambda other: _products(left, b.rows(parts, *other)), _all(b)
        )
        return jnp.swapaxes(found, 0, 1).reshape(found.shape[1], -1)

    found = jax.lax.map(of_chunk, _all(a))
    return found.reshape(-1, found.shape[-1])


def _within(piece: Piece, parts: Leaves) -> Matrix:
    """Return the inner products among the rows of a piece. The blocks above the
    diagonal are the transposes of those below."""
    chunks = len(piece.factors)

    def of_chunk(i: jax.Array) -> jax.Array:
        left = piece.rows(parts, *_chunk(piece, i))
        own = _products(left, left)

        def beside(j: jax.Array) -> jax.Array:
            return jax.lax.cond(
                j < i,
                lambda: _products(left, piece.rows(parts, *_chunk(piece, j))),
                lambda: jnp.where(j == i, own, 0.0),
            )

        found = jax.lax.map(beside, jnp.arange(chunks))
        return jnp.swapaxes(found, 0, 1).reshape(len(own), -1)

    lower = jax.lax.map(of_chunk, jnp.arange(chunks))
    lower = lower.reshape(-1, lower.shape[-1])
    block = jnp.arange(len(lower)) * chunks // len(lower)
    return jnp.where(block[:, None] >= block, lower, lower.T)
