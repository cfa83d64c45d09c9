"""The small matrices of L-BFGS in compact form.

Let the pairs be the columns of S and Y, `R` the upper triangle of `S'Y`, `D` its
diagonal and gamma the scale of the initial matrix. The inverse BFGS matrix times g is
(Byrd, Nocedal, Schnabel, theorem 2.2)

    H g = gamma g + S v - gamma Y u,    u = R^-1 S'g,    v = R^-T ((D + gamma Y'Y) u - gamma Y'g).

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
    k, used, R_inv, YY, _ = compact
    new = jnp.arange(len(used)) == k
    inverse = 1.0 / S_y[k]
    above = -(R_inv * jnp.where(used & ~new, S_y, 0.0)).sum(1)
    column = jnp.where(new, 1.0, above) * inverse
    return Compact(
        slot=jnp.where(k + 1 == len(used), 0, k + 1),
        used=used | new,
        R_inv=jnp.where(new, column[:, None], jnp.where(new[:, None], 0.0, R_inv)),
        YY=jnp.where(new, Y_y[:, None], jnp.where(new[:, None], Y_y, YY)),
        gamma=S_y[k] / Y_y[k],
    )


def coefficients(
    compact: Compact, S_g: Vector, Y_g: Vector, gamma: jax.Array
) -> tuple[Vector, Vector]:
    """Compute v and w of `H g = gamma g + S v + Y w`, given `S'g` and `Y'g`."""
    _, used, R_inv, YY, _ = compact
    u = jnp.where(used, (R_inv * jnp.where(used, S_g, 0.0)).sum(1), 0.0)
    D = 1.0 / jnp.where(used, jnp.diagonal(R_inv), 1.0)
    inner = jnp.where(used, D * u + gamma * ((YY * u).sum(1) - Y_g), 0.0)
    return jnp.where(used, (R_inv * inner[:, None]).sum(0), 0.0), -gamma * u


def emptied(compact: Compact) -> Compact:
    """Remove all pairs; keep the scale."""
    return compact._replace(used=jnp.zeros_like(compact.used))
