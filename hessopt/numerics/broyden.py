"""The inverse Hessian of the Broyden class, self-scaled, at one product with a matrix per update.

With s the change of the parameters, y that of the gradient and u = H y, every member is

    H+ = (H - u u'/(y'u) + phi v v') / tau + s s'/(s'y),    v = sqrt(y'u) (s/(s'y) - u/(y'u)),

H scaled and a term of rank two in the columns s and u. These terms are kept aside,

    H = a I + b base + sum_j [s_j u_j] M_j [s_j u_j]',

and folded into the base once there are as many as there is room for, so that a step reads the base and does not write
it. The members differ in (tau, phi), functions of

    b = s'Bs / s'y,  B = H^-1,    h = y'u / s'y,    a = b h - 1 >= 0.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., section 6.3; Al-Baali, "Numerical experience with a class
of self-scaling quasi-Newton algorithms", 1998; Urban, Stefanou and Pons, arXiv 2405.04230.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.typing import Matrix, Vector

Formula = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]
"""`(b, h, n) -> (tau, phi)` for n parameters; `tau > 0` and `phi > -1/a` keep H positive definite."""


def bfgs(b: jax.Array, h: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Broyden, Fletcher, Goldfarb and Shanno: the least change of H."""
    return jnp.ones_like(b), jnp.ones_like(b)


def dfp(b: jax.Array, h: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Davidon, Fletcher and Powell: the least change of B."""
    return jnp.ones_like(b), jnp.zeros_like(b)


def ssbfgs(b: jax.Array, h: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """BFGS of H enlarged to the curvature along s, where that is lower than B's (Al-Baali)."""
    return 1.0 / jnp.maximum(b, 1.0), jnp.ones_like(b)


def ssbroyden(b: jax.Array, h: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The self-scaled member nearest to one that keeps the determinant (Al-Baali and Khalfan)."""
    a = jnp.maximum(b * h - 1.0, 0.0)
    c = jnp.sqrt(a / (1.0 + a))
    over = jnp.maximum(b, 1.0)
    # min(1, h (1 - c)) of the source for b > 1, freed of cancellation by 1 - c^2 = 1/(1 + a) and 1 + a = b h
    rho = 1.0 / (over * (1.0 + c))
    low = (rho - 1.0) / jnp.where(a > 0, a, 1.0)
    plain = (1.0 - b) / jnp.where(b > 0, b, 1.0)
    theta = jnp.where(b > 1.0, jnp.maximum(low, plain), jnp.minimum(plain, 1.0))
    sigma = jnp.where(b > 1.0, jnp.maximum(rho, 1.0 + a * plain), 1.0 + a * theta)
    root = sigma ** (-1.0 / max(n - 1, 1))
    tau = jnp.where(b > 1.0, jnp.minimum(root / over, sigma), root)
    return tau, (1.0 - theta) / sigma


FORMULAS: dict[str, Formula] = {"bfgs": bfgs, "dfp": dfp, "ssbfgs": ssbfgs, "ssbroyden": ssbroyden}


class InverseHessian(NamedTuple):
    """`a I + b base + sum_j columns_j' terms_j columns_j`, with room for k terms of rank two."""

    weights: jax.Array  # (2,), a and b
    base: Matrix  # (n, n)
    columns: jax.Array  # (k, 2, n), s and u of each term
    terms: jax.Array  # (k, 2, 2), zero where there is no term


def shapes(n: int, room: int, dtype: jax.typing.DTypeLike) -> InverseHessian:
    """Shapes and dtypes; all zeros, it is the zero matrix."""
    like: list[Any] = [jax.ShapeDtypeStruct(size, dtype) for size in ((2,), (n, n), (room, 2, n), (room, 2, 2))]
    return InverseHessian(*like)


def product(H: InverseHessian, g: Vector) -> Vector:
    """`H g`, in one reading of the base."""
    (a, b), inner = H.weights, jnp.tensordot(H.columns, g, 1, precision="highest")
    weights = (H.terms * inner[:, None, :]).sum(-1)
    far = jnp.matmul(H.base, g, precision="highest")
    return a * g + jnp.where(b == 0, 0.0, b * far) + jnp.tensordot(weights, H.columns, 2, precision="highest")


def term(sy: jax.Array, yu: jax.Array, tau: jax.Array, phi: jax.Array) -> Matrix:
    """The `(2, 2)` matrix K of `H+ = H / tau + [s u] K [s u]'`."""
    across = -phi / (tau * sy)
    return jnp.stack([(phi * (yu / sy) / tau + 1.0) / sy, across, across, (phi - 1.0) / (tau * yu)]).reshape(2, 2)


def updated(
    H: InverseHessian, slot: jax.Array, s: Vector, u: Vector, tau: jax.Array, K: Matrix, good: jax.Array
) -> InverseHessian:
    """`H / tau + [s u] K [s u]'`, its new term in this slot, where good; else H."""

    def put(rows: jax.Array, new: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_index_in_dim(rows, slot, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(rows, jnp.where(good, new, old), slot, 0)

    tau = jnp.where(good, tau, 1.0)
    return InverseHessian(H.weights / tau, H.base, put(H.columns, jnp.stack([s, u])), put(H.terms / tau, K))


def restarted(H: InverseHessian, condition: jax.Array, scale: jax.Array) -> InverseHessian:
    """`scale I` where the condition holds, else H; nothing n by n is written, and a base of weight 0 may hold NaN."""
    weights = jnp.where(condition, jnp.stack([scale, jnp.zeros_like(scale)]), H.weights)
    return H._replace(weights=weights, terms=jnp.where(condition, 0.0, H.terms))


def folded(H: InverseHessian) -> InverseHessian:
    """H with the identity and all terms in the base, which is written in place, some rows at a time.

    What lies below the diagonal is the mirror image of what lies above: an error of rounding that is not symmetric
    would stay for good, and self-scaling would let it grow.
    """
    (a, b), (room, _, n) = H.weights, H.columns.shape
    height = min(n, ROWS)
    left = H.columns.reshape(2 * room, n).T  # once: products with a transpose are slow
    first, second = (H.terms[:, :, i, None] * H.columns[:, None, i] for i in range(2))
    right = (first + second).reshape(2 * room, n)
    columns, within = jnp.arange(n), jnp.arange(height)

    def begin(i: jax.Array) -> jax.Array:
        return jnp.minimum(i * height, n - height)  # the last rows may overlap those before

    def fold_rows(i: jax.Array, carry: tuple[Matrix, jax.Array]) -> tuple[Matrix, jax.Array]:
        base, mirrored = carry
        start = begin(i)
        rows = start + within[:, None]
        old = jax.lax.dynamic_slice_in_dim(base, start, height)
        new = jnp.matmul(jax.lax.dynamic_slice_in_dim(left, start, height), right, precision="highest")
        new = jnp.where(b == 0, 0.0, b * old) + new + jnp.where(rows == columns, a, 0.0)
        square = jax.lax.dynamic_slice_in_dim(new, start, height, 1)
        square = jnp.where(within[:, None] <= within, square, square.T)
        new = jax.lax.dynamic_update_slice_in_dim(new, square, start, 1)
        new = jnp.where(columns < i * height, mirrored, new)
        base = jax.lax.dynamic_update_slice_in_dim(base, jnp.where(rows < i * height, old, new), start, 0)
        # carried, since XLA copies a base that it reads elsewhere than it writes
        return base, jax.lax.dynamic_slice_in_dim(base, begin(i + 1), height, 1).T

    carry = H.base, jnp.zeros((height, n), H.base.dtype)
    base, _ = jax.lax.fori_loop(0, -(-n // height), fold_rows, carry) if n else carry
    return H._replace(weights=jnp.array([0.0, 1.0], H.weights.dtype), base=base, terms=jnp.zeros_like(H.terms))


ROWS = 256
"""Rows that are folded at a time."""


def dense(H: InverseHessian) -> Matrix:
    """The matrix `(n, n)`, exactly symmetric."""
    return folded(H).base
