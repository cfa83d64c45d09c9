"""The rows of the Jacobian J of a model of samples, a chunk of samples at a time.

The rows of a sample with k outputs are k reverse passes of that sample, or n tangents if
k is not below the number of parameters n.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.calculus.batching import fill_rows
from hessopt.calculus.linearization import linearize
from hessopt.calculus.terms import Leaves, Term
from hessopt.numerics.platform import on_cpu
from hessopt.trees.sharding import gathered, merged
from hessopt.trees.vectors import solve_dtype
from hessopt.typing import Data, Matrix, Params, Vector

TANGENTS = 4
"""Number of tangents of an ordinary model that are computed at once. There are usually
many outputs, and more tangents would not fit into the cache."""

ROW_BYTES, ACCELERATOR_ROW_BYTES = 2**21, 2**28
"""Largest size of the rows that are computed at once. On CPUs they fit into the cache
(3-D Poisson PINN, 1217 parameters: 0.08 s for 5800 rows, 0.12 s if all at once)."""


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

    @property
    def size(self) -> int:
        """The number of rows."""
        return math.prod(self.factors.shape[:3])

    def rows(self, parts: Leaves, samples: Data, factors: jax.Array) -> list[Matrix]:
        """Return the rows of one chunk times their factors, leaf by leaf `(c k, size)`."""
        rows = rows_of(self.term, parts, samples)
        if self.mean is not None:
            rows = [leaf - mean for leaf, mean in zip(rows, self.mean, strict=True)]
        weighted = [weigh(factors, leaf) for leaf in rows]
        return [
            merged(leaf, (math.prod(leaf.shape[:2]), part.size))
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
    split = split_samples(gathered(outputs), len(pieces[0].factors))
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
