"""The small matrices of L-BFGS in compact form.

Let the pairs be the columns of S and Y, `R` the upper triangle of `S'Y`, `D` its
diagonal and gamma the scale of the initial matrix. The inverse BFGS matrix times g is
(Byrd, Nocedal, Schnabel, theorem 2.2)

    H g = gamma g + S v - gamma Y u,    u = R^-1 S'g,
    v = R^-T ((D + gamma Y'Y) u - gamma Y'g).

The state holds `R^-1` instead of R. A new pair appends a column, `-R^-1 S'y / s.y`
above `1 / s.y`, and the oldest pair is removed with its row and column, so no linear
system is solved. Pairs are stored in slots, which are used in turn; entries of the
matrices for slots without a pair are ignored.

Source: Byrd, Nocedal and Schnabel, "Representations of quasi-Newton matrices and their
use in limited memory methods", Mathematical Programming 63, 1994.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.numerics.guards import divide, matmul, or_one
from hessopt.typing import Matrix, Vector


class Compact(NamedTuple):
    """The products among k slots."""

    # int32 scalar, slot of the next pair; it holds the oldest pair if all are used
    slot: jax.Array
    used: jax.Array  # (k,) bools, which slots hold a pair
    R_inv: Matrix  # (k, k)
    YY: Matrix  # (k, k), Y'Y
    gamma: jax.Array  # scalar, s.y / y.y of the newest pair; 0 before the first one


def shapes(slots: int, dtype: jax.typing.DTypeLike) -> Compact:
    """Return shapes and dtypes; arrays of zeros represent a memory without pairs."""
    shape: Any = jax.ShapeDtypeStruct
    square = shape((slots, slots), dtype)
    return Compact(
        shape((), jnp.int32), shape((slots,), bool), square, square, shape((), dtype)
    )


def append(compact: Compact, S_y: Vector, Y_y: Vector) -> Compact:
    """Append a pair, given its products `S'y` and `Y'y` with all pairs in their slots,
    including the new pair."""
    k, used, R_inv = compact.slot, compact.used, compact.R_inv
    new = jnp.arange(len(used)) == k
    sy, yy = S_y[k], Y_y[k]
    # the last column of R^-1 is -R^-1 S'y / s'y above 1 / s'y, the last row zero to its
    # left; both take the place of the oldest pair's
    inverse = divide(1.0, sy, sy > 0)
    above = -matmul(R_inv, jnp.where(used & ~new, S_y, 0.0))
    column = jnp.where(new, 1.0, above) * inverse
    return Compact(
        slot=jnp.where(k + 1 == len(used), 0, k + 1),
        used=used | new,
        R_inv=_replaced(new, R_inv, 0.0, column),
        YY=_replaced(new, compact.YY, Y_y, Y_y),
        gamma=divide(sy, yy, yy > 0),
    )


def _replaced(
    new: Vector, matrix: Matrix, row: Vector | float, column: Vector
) -> Matrix:
    """The matrix with a row, then a column, in the place where `new` holds."""
    return jnp.where(new, column[:, None], jnp.where(new[:, None], row, matrix))


def coefficients(
    compact: Compact, S_g: Vector, Y_g: Vector, gamma: jax.Array
) -> tuple[Vector, Vector]:
    """Compute v and w of `H g = gamma g + S v + Y w`, given `S'g` and `Y'g`."""
    used, R_inv, YY = compact.used, compact.R_inv, compact.YY
    u = jnp.where(used, matmul(R_inv, jnp.where(used, S_g, 0.0)), 0.0)
    D = divide(1.0, jnp.diagonal(R_inv), used)
    inner = jnp.where(used, D * u + gamma * (matmul(YY, u) - Y_g), 0.0)
    return jnp.where(used, matmul(inner, R_inv), 0.0), -gamma * u


def reduced_coefficients(
    compact: Compact, S_g: Vector, Y_g: Vector, gamma: jax.Array, gram: Matrix
) -> tuple[Vector, Vector]:
    """Compute v and w of `gamma g + S v + Y w`, the product of g with the inverse of
    the free block of the BFGS matrix, for a g that is zero in held entries.

    With `Z = (S, Y)`, `H = gamma I + Z K Z'` and G = Z_A' Z_A, where A are the held
    entries, multipliers of the held entries that make the product zero there yield

        (I + K G / gamma) c = K Z'g,    c = (v, w).

    Args:
      compact: products among the k slots.
      S_g, Y_g: `(k,)`, products of g with the pairs.
      gamma: scalar, scale of the initial matrix.
      gram: `(2 k, 2 k)`, G, ordered as c.
    """

    def K(column: Vector) -> Vector:
        of_S, of_Y = jnp.split(column, 2)
        return jnp.concatenate(coefficients(compact, of_S, of_Y, gamma))

    used = jnp.tile(compact.used, 2)
    gram = jnp.where(used & used[:, None], gram, 0.0)
    # s and y have different units
    size = jnp.sqrt(or_one(jnp.diagonal(gram)))
    K_G = jax.vmap(K, in_axes=1, out_axes=1)(gram)
    matrix = jnp.eye(len(gram), dtype=gram.dtype) + size[:, None] * K_G / (gamma * size)
    c = jnp.linalg.solve(matrix, size * K(jnp.concatenate([S_g, Y_g]))) / size
    v, w = jnp.split(c, 2)
    return v, w


def emptied(compact: Compact) -> Compact:
    """Remove all pairs; keep the scale."""
    return compact._replace(used=jnp.zeros_like(compact.used))
