"""The inverse Hessian of the self-scaled Broyden class, at one matrix-vector product
per update.

With s the change of the parameters, y the change of the gradient and u = H y, every
member of the class is

    H+ = (H - u u'/(y'u) + phi v v') / tau + s s'/(s'y),    v = sqrt(y'u) (s/(s'y) - u/(y'u)),

which is H scaled plus two terms of rank one: with r = phi / (phi h + tau),

    H+ = H / tau + (s - r u) (s - r u)' phi / (r tau s'y) + u u' ((phi - 1) / (tau y'u)
    - phi r / (tau s'y)).

These terms are stored separately,

    H = a I + b base + sum_j t_j c_j c_j',

and folded into the base when their storage is full, so that most steps read the base
and do not write it. Terms of rank one keep the matrix exactly symmetric; an asymmetric
error would persist, and self-scaling would amplify it.

The members of the class differ in (tau, phi), which are functions of

    b = s'Bs / s'y,  B = H^-1,    h = y'u / s'y,    a = b h - 1 >= 0.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., section 6.3; Al-Baali,
"Numerical experience with a class of self-scaling quasi-Newton algorithms", 1998;
Urban, Stefanou and Pons, arXiv 2405.04230.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.numerics.cholesky import cholesky_solve
from hessopt.numerics.guards import matmul, or_one, select
from hessopt.typing import Matrix, Vector

Formula = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]
"""`(b, h, n) -> (tau, phi)` for n parameters; `tau > 0` and `phi > -1/a` keep H
positive definite."""


def bfgs(b: jax.Array, h: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Return the parameters of BFGS (Broyden, Fletcher, Goldfarb and Shanno), the
    smallest change of H."""
    return jnp.ones_like(b), jnp.ones_like(b)


def dfp(b: jax.Array, h: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Return the parameters of DFP (Davidon, Fletcher and Powell), the smallest change
    of B."""
    return jnp.ones_like(b), jnp.zeros_like(b)


def ssbfgs(b: jax.Array, h: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Return the parameters of self-scaled BFGS (Al-Baali): H is enlarged to match the
    curvature along s where B overestimates it."""
    return 1.0 / jnp.maximum(b, 1.0), jnp.ones_like(b)


def ssbroyden(b: jax.Array, h: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Return the parameters of the self-scaled member nearest to one that preserves the
    determinant (Al-Baali and Khalfan)."""
    a = jnp.maximum(b * h - 1.0, 0.0)
    c = jnp.sqrt(a / (1.0 + a))
    over = jnp.maximum(b, 1.0)
    # min(1, h (1 - c)) of the source for b > 1, rewritten without cancellation by
    # 1 - c^2 = 1/(1 + a) and 1 + a = b h
    rho = 1.0 / (over * (1.0 + c))
    low = (rho - 1.0) / or_one(a)
    plain = (1.0 - b) / or_one(b)
    theta = jnp.where(b > 1.0, jnp.maximum(low, plain), jnp.minimum(plain, 1.0))
    sigma = jnp.where(b > 1.0, jnp.maximum(rho, 1.0 + a * plain), 1.0 + a * theta)
    root = sigma ** (-1.0 / max(n - 1, 1))
    tau = jnp.where(b > 1.0, jnp.minimum(root / over, sigma), root)
    return tau, (1.0 - theta) / sigma


FORMULAS: dict[str, Formula] = {
    "bfgs": bfgs,
    "dfp": dfp,
    "ssbfgs": ssbfgs,
    "ssbroyden": ssbroyden,
}


CACHE_STRIDE, PADDING = 2**10, 24
"""Distance in bytes, and its multiples, at which rows that are read together compete for
the same few lines of a cache; and the number of entries by which it is enlarged then."""


class InverseHessian(NamedTuple):
    """`a I + b base + sum_j t_j c_j c_j'`, with storage for 2k such terms; with k = 0
    every update writes the base."""

    weights: jax.Array  # (2,), a and b
    base: Matrix  # (n, n), ignored where b is 0
    columns: Any  # (2 k, n), c_j; None for k = 0
    terms: Any  # (2 k,), t_j, zero in unused slots; None for k = 0


def shapes(n: int, room: int, dtype: jax.typing.DTypeLike) -> InverseHessian:
    """Return shapes and dtypes, with storage for the terms of `room` updates; arrays of
    zeros represent the zero matrix."""
    shape: Any = jax.ShapeDtypeStruct
    whole = InverseHessian(shape((2,), dtype), shape((n, n), dtype), None, None)
    if not room:
        return whole
    return whole._replace(
        columns=shape((2 * room, n), dtype), terms=shape((2 * room,), dtype)
    )


def room(H: InverseHessian) -> int:
    """Return the number of updates for which terms can be stored."""
    return 0 if H.terms is None else len(H.terms) // 2


def product(H: InverseHessian, g: Vector) -> Vector:
    """Compute `H g`; the base is read once."""
    a, b = H.weights
    total = a * g + jnp.where(b == 0, 0.0, b * matmul(H.base, g))
    if not room(H):
        return total
    return total + matmul(H.terms * matmul(H.columns, g), H.columns)


def term(
    sy: jax.Array, yu: jax.Array, tau: jax.Array, phi: jax.Array
) -> tuple[jax.Array, Vector]:
    """Return r and the `(2,)` factors t of
    `H+ = H / tau + t_0 (s - r u) (s - r u)' + t_1 u u'`."""
    whole = phi * (yu / sy) + tau
    r = phi / whole
    return r, jnp.stack(
        [whole / (tau * sy), (phi - 1.0) / (tau * yu) - phi * r / (tau * sy)]
    )


def updated(
    H: InverseHessian,
    slot: jax.Array,
    columns: jax.Array,
    terms: Vector,
    tau: jax.Array,
    good: jax.Array,
) -> InverseHessian:
    """Return `H / tau` plus two terms with columns `(2, n)` and factors `(2,)`, or H if
    `good` is false. The terms are stored in this slot, or in the base if there is no
    storage for terms."""
    # tau = 1 and terms of zero leave H unchanged
    terms, start = jnp.where(good, terms, 0.0), 2 * slot
    weights = H.weights / jnp.where(good, tau, 1.0)
    if not room(H):
        columns = jnp.where(good, columns, 0.0)
        whole = folded(InverseHessian(weights, H.base, columns, terms))
        return whole._replace(columns=None, terms=None)
    # the slot is written in both cases, since XLA would copy all columns otherwise
    old = jax.lax.dynamic_slice_in_dim(H.columns, start, 2)
    put = jax.lax.dynamic_update_slice_in_dim
    return InverseHessian(
        weights=weights,
        base=H.base,
        columns=put(H.columns, select(good, columns, old), start, 0),
        terms=put(H.terms / jnp.where(good, tau, 1.0), terms, start, 0),
    )


def restarted(
    H: InverseHessian, condition: jax.Array, scale: jax.Array
) -> InverseHessian:
    """Return `scale I` if the condition holds, else H; the base is not written."""
    identity = jnp.stack([scale, jnp.zeros_like(scale)])
    H = H._replace(weights=select(condition, identity, H.weights))
    if not room(H):
        return H
    return H._replace(terms=select(condition, 0.0, H.terms))


def folded(H: InverseHessian) -> InverseHessian:
    """Fold the identity and all terms into the base, in place and in one pass."""
    (a, b), base = H.weights, H.base
    base = jnp.where(b == 0, 0.0, b * base) + jnp.where(
        jnp.eye(len(base), dtype=bool), a, 0.0
    )
    return H._replace(
        weights=jnp.array([0.0, 1.0], H.weights.dtype),
        base=base if H.terms is None else _with_terms(base, H, a),
        terms=None if H.terms is None else jnp.zeros_like(H.terms),
    )


def _with_terms(base: Matrix, H: InverseHessian, a: jax.Array) -> Matrix:
    """Add the terms of H to a matrix; `a` is any finite scalar.

    The sum is one of outer products: XLA's matrix product is slower on CPUs and not
    exactly symmetric. With the added zero all entries round their products alike, even
    if the compiler fuses some products with the sum.
    """
    zero = (a > jnp.inf).astype(base.dtype)
    n, terms = len(base), H.terms
    columns = jnp.sqrt(jnp.abs(terms))[:, None] * H.columns
    if n * base.dtype.itemsize % CACHE_STRIDE == 0:
        padded = jnp.pad(columns, ((0, 0), (0, PADDING)))
        # XLA would read the columns where they were
        columns = jax.lax.optimization_barrier(padded)
    for sign, column in zip(jnp.sign(terms), columns[:, :n], strict=True):
        base = base + ((sign * column)[:, None] * column + zero)
    return base


def dense(H: InverseHessian) -> Matrix:
    """Return the matrix `(n, n)`, exactly symmetric."""
    return folded(H).base


def reduced_product(H: InverseHessian, g: Vector, free: Vector) -> Vector:
    """Return the product of g with the inverse of the free block of `B = H^-1`; zero in
    the other entries, as g is.

    Multipliers m of the held entries A make `H (g + m)` zero there, `H_AA m = -(H g)_A`.
    If rounding leaves no positive definite H_AA, m is zero; `g'H g` is positive still.

    Args:
      H: the inverse Hessian.
      g: `(n,)`, zero in held entries.
      free: `(n,)` bools.

    Cost: one Cholesky factorization, `n^3/3` multiplications.
    """
    matrix, held = dense(H), ~free
    p = matmul(matrix, g)
    t = jax.lax.rsqrt(or_one(jnp.diagonal(matrix)))
    block = jnp.where(held & held[:, None], matrix * t * t[:, None], 0.0)
    factor = jax.lax.linalg.cholesky(
        block + jnp.diag(free.astype(p.dtype)), symmetrize_input=False
    )
    m = -t * cholesky_solve(factor, jnp.where(held, t * p, 0.0))
    solved = jnp.all(jnp.isfinite(m))
    return jnp.where(free, p + jnp.where(solved, matmul(matrix, m), 0.0), 0.0)
