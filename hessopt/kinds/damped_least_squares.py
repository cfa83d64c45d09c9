"""Damped least squares in two spaces.

With J the Jacobian of the outputs, l the gradient of the loss in the outputs and
L = S S' its Hessian there, K = S'J and S r = l, both systems

    (K'K + lambda I) p = K' r + lambda p_0,
    p = p_0 + K' v  with  (K K' + lambda I) v = r - K p_0

have the minimizer of `|K p - r|^2 + lambda |p - p_0|^2` for their solution. They are of
the size of the parameters and of the outputs of all samples. Neither K nor a matrix of the
size of the other space is formed as a whole.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessopt.calculus.curvature import block_hessians
from hessopt.calculus.least_squares import SampleLoss
from hessopt.calculus.linearization import linearize
from hessopt.calculus.row_products import (
    kernel,
    normal_matrix,
    rows_times,
    times_rows,
)
from hessopt.calculus.rows import Piece, from_pieces, in_pieces, pieces_of, weigh
from hessopt.calculus.terms import Leaves, Term
from hessopt.numerics.cg import conjugate_gradients
from hessopt.numerics.equilibration import unit_power
from hessopt.numerics.guards import divide
from hessopt.numerics.norms import norm
from hessopt.numerics.nystrom import nystrom, preconditioner
from hessopt.numerics.semidefinite import solve_semidefinite
from hessopt.objective.binding import Objective
from hessopt.trees.vectors import (
    inner_products,
    largest,
    ravel,
    solve_dtype,
    unravel,
)
from hessopt.typing import Matrix, Vector

SKETCH_SIZE = 256
"""Number of vectors of the sketch that preconditions conjugate gradients, at most."""

CG_TOLERANCE, MAX_PRODUCTS = 1e-5, 200
"""Largest residual of conjugate gradients, relative to the right side; and their largest
number."""


class Found(NamedTuple):
    """The solution of the damped system, with f multiplied by a power of two."""

    p: Leaves
    gradient: Leaves  # J'l
    unit: jax.Array  # scalar, the power of two
    curved: jax.Array  # bool scalar, whether L is not zero
    products: jax.Array | int = 0  # iterations of conjugate gradients


class System(NamedTuple):
    """K, r and J'l at params; f is multiplied by a power of two near 1/|L|."""

    parts: Leaves  # params
    pieces: list[list[Piece]]  # of each term, with factors S'
    residuals: list[jax.Array]  # of each term, r (m, k)
    multiply: Callable[[Leaves], list[jax.Array]]  # p -> K p, like the residuals
    transposed: Callable[[list[jax.Array]], Leaves]  # its transpose
    gradient: Leaves  # J'l
    unit: jax.Array  # scalar, the power of two
    curved: jax.Array  # bool scalar, whether L is not zero


def system_of(
    terms: list[Term],
    losses: list[SampleLoss],
    parts: Leaves,
    limit: int,
    *,
    centered: bool,
) -> System:
    """Linearize the model, and scale the outputs by the roots of the curvature."""
    dtype = solve_dtype(parts)

    def outputs(parts: Leaves) -> list[jax.Array]:
        found = [term.outputs(parts) for term in terms]
        if not centered:
            return found
        return [
            y - jnp.mean(y, axis=0) if term.is_rowwise else y
            for y, term in zip(found, terms, strict=True)
        ]

    # f is multiplied by a power of two, so that squares neither overflow nor underflow;
    # outputs with a slope and no curvature get the least one that rounding can tell
    # from zero
    heaviest = largest([loss.weights for loss in losses])
    unit = unit_power(heaviest).astype(dtype)
    least = jnp.finfo(dtype).eps * heaviest * unit
    roots = [jnp.sqrt(jnp.maximum(loss.weights * unit, least)) for loss in losses]
    slopes = [loss.slopes * unit for loss in losses]
    both = list(zip(losses, roots, strict=True))
    factors = [loss.factors(root) for loss, root in both]

    _, pull = jax.vjp(outputs, list(parts))

    def back(coordinates: list[jax.Array]) -> Leaves:
        each = zip(losses, coordinates, strict=True)
        cotangents = [loss.of_outputs(x) for loss, x in each]
        return [leaf.astype(dtype) for leaf in pull(cotangents)[0]]

    def transposed(c: list[jax.Array]) -> Leaves:
        return back([root * x for root, x in zip(roots, c, strict=True)])

    def multiply(p: Leaves) -> list[jax.Array]:
        narrow = [x.astype(part.dtype) for x, part in zip(p, parts, strict=True)]
        along = linearize(outputs, list(parts))[1](narrow)
        return [weigh(f, y) for f, y in zip(factors, along, strict=True)]

    pieces = [
        pieces_of(term, parts, f, limit, centered=centered)
        for term, f in zip(terms, factors, strict=True)
    ]
    residuals = [divide(g, r, r > 0) for g, r in zip(slopes, roots, strict=True)]
    gradient = back(slopes)
    return System(
        list(parts),
        pieces,
        residuals,
        multiply,
        transposed,
        gradient,
        unit,
        heaviest > 0,
    )


def solve_in_parameters(system: System, lam: jax.Array, last: Leaves | None) -> Found:
    """Solve `(K'K + lambda I) p = J'l + lambda p_0`."""
    flat = [piece for pieces in system.pieces for piece in pieces]
    G = normal_matrix(flat, system.parts)
    return _solved(G, system.gradient, system.unit, system.curved, lam, last)


def solve_by_products(
    objective: Objective, parts: Leaves, lam: jax.Array, last: Leaves | None
) -> Found:
    """Solve the same system for any loss: `J'LJ` is formed of products with all unit
    vectors."""
    labels = [0] * len(parts)
    (G,) = block_hessians(objective, parts, labels, 1, curvature="gauss_newton")
    size = largest(G)
    unit = unit_power(size)
    gradient = [leaf * unit for leaf in jax.grad(objective)(list(parts))]
    return _solved(G * unit, gradient, unit, size > 0, lam, last)


def _solved(
    G: Matrix,
    gradient: Leaves,
    unit: jax.Array,
    curved: jax.Array,
    lam: jax.Array,
    last: Leaves | None,
) -> Found:
    lam, rhs = lam * unit, ravel(gradient)
    if last is not None:
        rhs += lam * ravel(last)
    p = unravel(solve_semidefinite(G, rhs, lam), gradient)
    return Found(p, gradient, unit, curved)


def solve_in_samples(
    system: System, lam: jax.Array, last: Leaves | None, count: jax.Array | None
) -> Found:
    """Return `p_0 + K' v` with `(K K' + lambda I) v = r - K p_0`; by conjugate gradients
    if the number of the update is given."""
    rhs = system.residuals
    if last is not None:
        rhs = [r - y for r, y in zip(rhs, system.multiply(last), strict=True)]
    flat = [piece for pieces in system.pieces for piece in pieces]
    b, lam = _in_order(rhs, system.pieces), lam * system.unit
    products: jax.Array | int = 0
    if count is None:
        v = solve_semidefinite(kernel(flat, system.parts), b, lam)
    else:
        v, products = _iterated(system, flat, b, lam, count)
    p = system.transposed(_of_terms(v, system.pieces))
    if last is not None:
        p = [x + y for x, y in zip(last, p, strict=True)]
    return Found(p, system.gradient, system.unit, system.curved, products)


def _iterated(
    system: System, flat: list[Piece], b: Vector, lam: jax.Array, count: jax.Array
) -> tuple[Vector, jax.Array]:
    """Solve `(K K' + lambda I) v = b` by preconditioned conjugate gradients."""

    def multiply(v: Vector) -> Vector:
        image = system.multiply(system.transposed(_of_terms(v, system.pieces)))
        return _in_order(image, system.pieces) + lam * v

    # Y = K (K' W), by rows
    key = jax.random.fold_in(jax.random.key(0), count)
    shape = len(b), min(SKETCH_SIZE, len(b))
    W = jnp.linalg.qr(jax.random.normal(key, shape, b.dtype))[0]
    image = rows_times(flat, system.parts, times_rows(flat, system.parts, W))
    found = conjugate_gradients(
        multiply,
        b,
        None,
        gram=inner_products,
        precondition=preconditioner(nystrom(W, image), lam),
        tolerance=CG_TOLERANCE * norm(b),
        max_iterations=MAX_PRODUCTS,
    )
    return found.x, found.products


def _in_order(outputs: list[jax.Array], pieces: list[list[Piece]]) -> Vector:
    """Return outputs of the terms, `(m, k)`, as a vector in the order of all rows."""
    each = zip(outputs, pieces, strict=True)
    return jnp.concatenate([x for y, own in each for x in in_pieces(y, own)])


def _of_terms(v: Vector, pieces: list[list[Piece]]) -> list[jax.Array]:
    """Return a vector in the order of all rows as outputs of the terms, `(m, k)`."""
    found, start = [], 0
    for of_term in pieces:
        vectors = []
        for piece in of_term:
            vectors.append(v[start : start + piece.size])
            start += piece.size
        found.append(from_pieces(vectors, of_term))
    return found
