"""The Jacobian J of a model of samples, by rows and a chunk of samples at a time.

`Term` is a model of one sample at given data (`hessopt.rowwise`), or an ordinary model,
which counts as one sample with many outputs. The rows of a sample with k outputs are k
reverse passes of that sample, or n tangents if k is not below the number of parameters
n. Complex outputs count as real and imaginary parts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.calculus.batching import fill_rows
from hessopt.calculus.linearization import linearize
from hessopt.numerics.guards import matmul
from hessopt.numerics.platform import on_cpu
from hessopt.objective.rowwise import Rows, Several
from hessopt.trees.vectors import ravel, solve_dtype, unravel
from hessopt.typing import Data, Matrix, Params, Vector

TANGENTS = 4
"""Number of tangents of an ordinary model that are computed at once. There are usually
many outputs, and more tangents would not fit into the cache."""

ROW_BYTES, ACCELERATOR_ROW_BYTES = 2**21, 2**28
"""Largest size of the rows that are computed at once. On CPUs they fit into the cache
(3-D Poisson PINN, 1217 parameters: 0.08 s for 5800 rows, 0.12 s if all at once)."""

KERNEL_BYTES = 2**29
"""Largest size of the rows that are computed at once for a kernel; two such chunks are
in memory. A kernel of c chunks computes every row about c/2 times."""

Leaves = Sequence[jax.Array]
"""The real leaves of a tree like params."""


class Term(NamedTuple):
    """A model of one sample, with the data of all samples."""

    fn: Callable[[Leaves, Data], Vector]  # (params, data of a sample) -> outputs (k,)
    samples: Data  # with a leading axis of length m
    count: int  # m, number of samples
    width: int  # k, number of real outputs of a sample
    is_rowwise: bool  # else m = 1, and the data are not used
    restore: Callable[
        [jax.Array], Params
    ]  # (m, k) -> the outputs as the model has them
    flatten: Callable[[Params], jax.Array]  # the inverse

    @property
    def size(self) -> int:
        """The number of outputs of all samples."""
        return self.count * self.width

    def outputs(self, parts: Leaves) -> jax.Array:
        """Return the outputs of all samples, `(m, k)`."""
        return jax.vmap(self.fn, (None, 0))(parts, self.samples)


def terms_of(model_fn: Callable[..., Params], parts: Leaves) -> list[Term]:
    """Return the terms of a model of real leaves."""
    fns = model_fn.fns if isinstance(model_fn, Several) else (model_fn,)
    return [_term(fn, parts) for fn in fns]


def split_outputs(
    model_fn: Callable[..., Params], trees: Sequence[Params]
) -> list[tuple[Params, ...]]:
    """Return for each term of a model its part of trees like the outputs."""
    if isinstance(model_fn, Several):
        return list(zip(*trees, strict=True))
    return [tuple(trees)]


def join_outputs(model_fn: Callable[..., Params], found: list[Params]) -> Params:
    """Return the outputs of a model, given those of its terms."""
    return tuple(found) if isinstance(model_fn, Several) else found[0]


def _term(fn: Callable[..., Params], parts: Leaves) -> Term:
    dtype = solve_dtype(parts)

    def flat(tree: Params) -> Vector:
        return ravel(tree).astype(dtype)

    if isinstance(fn, Rows):
        sample = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
            jax.tree.map(jnp.asarray, fn.samples),
        )
        example = _zeros(jax.eval_shape(fn.fn, parts, sample))
        return Term(
            fn=lambda parts, sample: flat(fn.fn(parts, sample)),
            samples=fn.samples,
            count=len(jax.tree.leaves(fn.samples)[0]),
            width=ravel(example).size,
            is_rowwise=True,
            restore=jax.vmap(lambda y: unravel(y, example)),
            flatten=jax.vmap(flat),
        )
    example = _zeros(jax.eval_shape(fn, parts))
    return Term(
        fn=lambda parts, _: flat(fn(parts)),
        samples={"sample": jnp.zeros(1)},
        count=1,
        width=ravel(example).size,
        is_rowwise=False,
        restore=lambda y: unravel(y[0], example),
        flatten=lambda tree: flat(tree)[None],
    )


def _zeros(shapes: Params) -> Params:
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def rows_of(term: Term, parts: Leaves, samples: Data) -> list[jax.Array]:
    """Return the rows of a chunk of c samples, leaf by leaf `(c, k, *shape)`."""
    n = sum(part.size for part in parts)
    if not term.is_rowwise:
        return [leaf[None] for leaf in _by_tangents(term, parts)]

    def of_sample(sample: Data) -> Any:
        def fn(parts: Leaves) -> Vector:
            return term.fn(parts, sample)

        if term.width >= n:
            return jax.jacfwd(fn)(parts)
        _, pull = jax.vjp(fn, parts)
        units = jnp.eye(term.width, dtype=solve_dtype(parts))
        return jax.vmap(lambda unit: pull(unit)[0])(units)

    return list(jax.vmap(of_sample)(samples))


def _by_tangents(term: Term, parts: Leaves) -> list[jax.Array]:
    """Return the Jacobian of an ordinary model, leaf by leaf `(k, *shape)`. The
    tangents of a leaf are computed only for operations that depend on it."""
    found = []
    for i, part in enumerate(parts):
        rows = jnp.zeros((part.size, term.width), solve_dtype(parts))
        if part.size:
            along = linearize(
                lambda p, i=i: [term.fn([*parts[:i], p, *parts[i + 1 :]], {})], part
            )[1]
            rows = fill_rows(rows, along, part, 0, [0], TANGENTS)
        found.append(rows.T.reshape(term.width, *part.shape))
    return found


def row_bytes() -> int:
    """Return the largest size of the rows that are computed at once."""
    return ROW_BYTES if on_cpu() else ACCELERATOR_ROW_BYTES


class Piece(NamedTuple):
    """Samples of a term in chunks of one size, with the factors of their rows."""

    term: Term
    samples: Data  # (number of chunks, samples of a chunk, ...)
    factors: jax.Array  # the same axes, then (k,) or (k, k)
    mean: list[jax.Array] | None  # the mean of all rows of the term, to subtract

    def rows(self, parts: Leaves, samples: Data, factors: jax.Array) -> list[Matrix]:
        """Return the rows of one chunk times their factors, leaf by leaf `(c k, size)`."""
        rows = rows_of(self.term, parts, samples)
        if self.mean is not None:
            rows = [leaf - mean for leaf, mean in zip(rows, self.mean, strict=True)]
        weighted = [weigh(factors, leaf) for leaf in rows]
        return [
            leaf.reshape(math.prod(leaf.shape[:2]), part.size)
            for leaf, part in zip(weighted, parts, strict=True)
        ]


def weigh(factors: jax.Array, rows: jax.Array) -> jax.Array:
    """Multiply the outputs of samples, `(m, k, ...)`, by the factors of each sample:
    `(m, k)`, one number per output, or `(m, k, k)`, a matrix."""
    if factors.ndim == 2:
        return factors.reshape(*factors.shape, *[1] * (rows.ndim - 2)) * rows
    return jnp.einsum("mij,mj...->mi...", factors, rows, precision="highest")


def pieces_of(
    term: Term, parts: Leaves, factors: jax.Array, limit: int, *, centered: bool = False
) -> list[Piece]:
    """Split a term into chunks whose rows have at most `limit` bytes.

    The samples of a chunk are evenly spaced, so that a chunk of samples that are
    sharded over devices is sharded as well. Samples that are left over are one more
    piece.
    """
    mean = None
    if centered and term.is_rowwise:
        average = term._replace(
            fn=lambda parts, _: jnp.mean(term.outputs(parts), axis=0),
            samples={"sample": jnp.zeros(1)},
            count=1,
        )
        mean = [leaf[0] for leaf in rows_of(average, parts, average.samples)]
    chunks = chunk_count(term, parts, limit)
    split = split_samples((term.samples, factors), chunks)
    return [Piece(term, samples, each, mean) for samples, each in split]


def chunk_count(term: Term, parts: Leaves, limit: int) -> int:
    """Return the number of chunks of samples whose rows have at most `limit` bytes: one
    that divides the number of samples, if there is one below twice the least number."""
    size = sum(part.size for part in parts) * solve_dtype(parts).itemsize
    most = max(limit // max(size * term.width, 1), 1)
    least = max(math.ceil(term.count / most), 1)
    divisors = (c for c in range(least, 2 * least) if term.count % c == 0)
    return next(divisors, least)


def split_samples(tree: Params, chunks: int) -> list[Params]:
    """Split the first axis of all leaves into chunks of evenly spaced entries, `(chunks,
    c, ...)`; the entries that are left over are a second item, `(1, rest, ...)`."""
    if chunks == 1:
        return [jax.tree.map(lambda x: x[None], tree)]
    count = len(jax.tree.leaves(tree)[0])
    size = count // chunks
    main = jax.tree.map(
        lambda x: jnp.swapaxes(
            x[: size * chunks].reshape(size, chunks, *x.shape[1:]), 0, 1
        ),
        tree,
    )
    rest = jax.tree.map(lambda x: x[None, size * chunks :], tree)
    return [main, rest] if count % chunks else [main]


def in_pieces(outputs: jax.Array, pieces: list[Piece]) -> list[Vector]:
    """Return outputs `(m, k)` of a term as vectors in the order of its pieces' rows."""
    split = split_samples(outputs, len(pieces[0].factors))
    return [piece.reshape(-1) for piece in split]


def from_pieces(vectors: list[Vector], pieces: list[Piece]) -> jax.Array:
    """Return the outputs `(m, k)` for vectors in the order of the pieces' rows."""
    shapes = [piece.factors.shape[:3] for piece in pieces]
    whole = zip(vectors, shapes, strict=True)
    return joined_samples([vector.reshape(shape) for vector, shape in whole])


def joined_samples(pieces: list[jax.Array]) -> jax.Array:
    """Return an array whose first axis `split_samples` has split."""
    whole = [
        jnp.swapaxes(piece, 0, 1).reshape(-1, *piece.shape[2:]) for piece in pieces
    ]
    return jnp.concatenate(whole)


def jacobian(pieces: list[Piece], parts: Leaves) -> jax.Array:
    """Return all rows times their factors, `(M, n)`."""

    def of_chunk(piece: Piece, chunk: tuple[Data, jax.Array]) -> jax.Array:
        return jnp.concatenate(piece.rows(parts, *chunk), axis=1)

    n = sum(part.size for part in parts)
    return jnp.concatenate(
        [
            jax.lax.map(
                lambda chunk, piece=piece: of_chunk(piece, chunk),
                (piece.samples, piece.factors),
            ).reshape(-1, n)
            for piece in pieces
        ]
    )


def normal_matrix(pieces: list[Piece], parts: Leaves) -> Matrix:
    """Return the sum of the products of all rows with themselves, `(n, n)`."""
    n = sum(part.size for part in parts)
    total = jnp.zeros((n, n), solve_dtype(parts))
    for piece in pieces:

        def add(total: Matrix, chunk: Any, piece: Piece = piece) -> tuple[Matrix, None]:
            rows = jnp.concatenate(piece.rows(parts, *chunk), axis=1)
            return total + matmul(rows.T, rows), None

        total, _ = jax.lax.scan(add, total, (piece.samples, piece.factors))
    return total


def rows_times(pieces: list[Piece], parts: Leaves, right: jax.Array) -> jax.Array:
    """Return all rows times a matrix `(n, k)`, in the order of the pieces, `(M, k)`."""

    def of_chunk(piece: Piece, chunk: Any) -> jax.Array:
        return matmul(jnp.concatenate(piece.rows(parts, *chunk), axis=1), right)

    found = [
        jax.lax.map(
            lambda chunk, piece=piece: of_chunk(piece, chunk),
            (piece.samples, piece.factors),
        )
        for piece in pieces
    ]
    return jnp.concatenate([x.reshape(-1, right.shape[1]) for x in found])


def times_rows(pieces: list[Piece], parts: Leaves, left: jax.Array) -> jax.Array:
    """Return the transpose of all rows times a matrix `(M, k)`, `(n, k)`."""
    n, start = sum(part.size for part in parts), 0
    total = jnp.zeros((n, left.shape[1]), left.dtype)
    for piece in pieces:
        chunks, count, width = piece.factors.shape[:3]
        size = chunks * count * width
        own = left[start : start + size].reshape(chunks, count * width, -1)
        start += size

        def add(total: jax.Array, chunk: Any, piece: Piece = piece) -> Any:
            rows = jnp.concatenate(piece.rows(parts, *chunk[0]), axis=1)
            return total + matmul(rows.T, chunk[1]), None

        total, _ = jax.lax.scan(add, total, ((piece.samples, piece.factors), own))
    return total


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
    return sum((matmul(a, b.T) for a, b in zip(left, right, strict=True)), zero)


def _chunk(piece: Piece, i: int | jax.Array) -> Any:
    return jax.tree.map(lambda x: x[i], (piece.samples, piece.factors))


def _between(a: Piece, b: Piece, parts: Leaves) -> Matrix:
    """Return the inner products of the rows of one piece with those of another."""

    def of_chunk(chunk: Any) -> jax.Array:
        left = a.rows(parts, *chunk)
        found = jax.lax.map(
            lambda other: _products(left, b.rows(parts, *other)), (b.samples, b.factors)
        )
        return jnp.swapaxes(found, 0, 1).reshape(found.shape[1], -1)

    found = jax.lax.map(of_chunk, (a.samples, a.factors))
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
