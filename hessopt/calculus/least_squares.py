"""The square root of a Gauss-Newton matrix, for losses that are sums of functions of
single outputs.

If the Hessian of the loss is diagonal, `L = diag(l)`, as for squared errors,

    J' L J = K' K  with  K = diag(sqrt(l)) J,    gradient = K' r  with  r = (loss gradient) / sqrt(l),

and R of `[K r] = Q R` contains both. The singular values of its part for K are the
square roots of the eigenvalues of `J' L J`, to full precision, whereas the product
loses all of those below sqrt(eps) of the largest one.

Source: Bjorck, "Numerical Methods for Least Squares Problems", 1996, section 9.2.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.calculus.linearization import linearize_gradient
from hessopt.calculus.row_products import jacobian
from hessopt.calculus.rows import in_pieces, pieces_of, row_bytes, weigh
from hessopt.calculus.separability import is_diagonal, is_samplewise
from hessopt.calculus.terms import (
    Leaves,
    Term,
    join_outputs,
    split_outputs,
    terms_of,
)
from hessopt.numerics.guards import divide
from hessopt.objective.binding import Objective, as_objective
from hessopt.trees.vectors import largest, ravel, solve_dtype
from hessopt.typing import Matrix, Vector


class Root(NamedTuple):
    """`K' K` is the Gauss-Newton matrix, `K' r + rest` the gradient; k = min(number of
    outputs, n)."""

    K: Matrix  # (k, n), triangular
    r: Vector  # (k,)
    # (n,), from outputs with a slope and nearly zero curvature, whose r would dominate
    # the others
    rest: Vector


class SampleLoss(NamedTuple):
    """Slopes and curvatures of a loss in the outputs of a term, in coordinates `V'y` of
    each sample in which its Hessian is diagonal."""

    slopes: jax.Array  # (m, k), `V'l` with the gradient l
    weights: jax.Array  # (m, k), at least 0; negative curvature is replaced by 0
    basis: jax.Array | None  # (m, k, k), V; None for the identity

    def factors(self, roots: jax.Array) -> jax.Array:
        """Return `diag(roots) V'`, which multiplies the rows of each sample."""
        if self.basis is None:
            return roots
        return roots[..., None] * jnp.swapaxes(self.basis, 1, 2)

    def of_outputs(self, coordinates: jax.Array) -> jax.Array:
        """Return `V coordinates`, like the outputs."""
        return coordinates if self.basis is None else weigh(self.basis, coordinates)


def sample_losses(
    objective: Objective, terms: Sequence[Term], parts: Leaves, *, dense: bool = False
) -> list[SampleLoss] | None:
    """Return the loss in the outputs of each term; None if its Hessian is not recognized
    as diagonal, or for `rowwise` models, with `dense` for all, as a matrix for each
    sample. An ordinary model counts as one sample.

    Cost: one gradient of the loss and one product with its Hessian; if that is not
    diagonal, k products, and an eigendecomposition per sample.
    """
    outputs = objective.model_fn(parts)
    if not any(map(jnp.iscomplexobj, jax.tree.leaves(outputs))):
        slopes, hessian = linearize_gradient(objective.loss_fn, outputs)
        if is_diagonal(hessian, outputs):
            weights = hessian(jax.tree.map(jnp.ones_like, outputs))
            each = split_outputs(objective.model_fn, (slopes, weights))
            flat = [
                [term.flatten(tree) for tree in pair]
                for term, pair in zip(terms, each, strict=True)
            ]
            return [SampleLoss(g, jnp.maximum(w, 0.0), None) for g, w in flat]
    if not (dense or all(term.is_rowwise for term in terms)):
        return None

    def loss_fn(outputs: Any) -> jax.Array:
        found = [term.restore(y) for term, y in zip(terms, outputs, strict=True)]
        return objective.loss_fn(join_outputs(objective.model_fn, found))

    outputs = [
        term.flatten(tree)
        for term, (tree,) in zip(
            terms, split_outputs(objective.model_fn, (outputs,)), strict=True
        )
    ]
    slopes, hessian = linearize_gradient(loss_fn, outputs)
    if not is_samplewise(hessian, outputs):
        return None
    columns = [
        hessian([jnp.zeros_like(y).at[:, j : j + 1].set(1.0) for y in outputs])
        for j in range(max(term.width for term in terms))
    ]
    found = []
    for i, (term, slope) in enumerate(zip(terms, slopes, strict=True)):
        L = jnp.stack([column[i] for column in columns[: term.width]], axis=2)
        w, V = jnp.linalg.eigh(L)
        turned = weigh(jnp.swapaxes(V, 1, 2), slope)
        found.append(SampleLoss(turned, jnp.maximum(w, 0.0), V))
    return found


def root(objective: Any, parts: Sequence[jax.Array]) -> Root | None:
    """Return the root of the Gauss-Newton matrix at real leaves, or None if the Hessian
    of the loss is not recognized as diagonal, or for `rowwise` models as a matrix for
    each sample.

    Negative curvature of the loss is replaced by zero. Values that are not finite make
    the result not finite.

    Cost: one reverse pass per output of `rowwise` models, else n tangents of the model,
    both in chunks; and `2 m n^2` multiplications for m outputs; memory `m n`.
    """
    objective = as_objective(objective)
    if not objective.is_composite:
        return None
    dtype = solve_dtype(parts)
    terms = terms_of(objective.model_fn, parts)
    losses = sample_losses(objective, terms, parts)
    if losses is None:
        return None
    heaviest = largest([loss.weights for loss in losses])
    K, r, rest = [], [], []
    for term, loss in zip(terms, losses, strict=True):
        roots = loss.weights**0.5
        curved = loss.weights > jnp.finfo(dtype).eps * heaviest
        factors = loss.factors(roots)
        pieces = pieces_of(term, parts, factors, row_bytes())
        K.append(jacobian(pieces, parts))
        r += in_pieces(divide(loss.slopes, roots, curved), pieces)
        rest.append(loss.of_outputs(jnp.where(curved, 0.0, loss.slopes)))
    stacked = jnp.concatenate([jnp.concatenate(K), jnp.concatenate(r)[:, None]], axis=1)
    R = jnp.linalg.qr(stacked, mode="r")
    m, n = len(stacked), stacked.shape[1] - 1
    _, pull = jax.vjp(lambda parts: [term.outputs(parts) for term in terms], parts)
    return Root(R[: min(m, n), :n], R[: min(m, n), n], ravel(pull(rest)[0]))
