"""The small algebra of L-BFGS in compact form.

With the pairs as columns of S and Y, `R` the upper triangle of `S'Y`, `D` its diagonal and gamma the scale of the
initial matrix, the inverse BFGS matrix times g is (Byrd, Nocedal, Schnabel, theorem 2.2)

    H g = gamma g + S v - gamma Y u,    u = R^-1 S'g,    v = R^-T ((D + gamma Y'Y) u - gamma Y'g).

`R^-1` is kept, not R: a new pair appends a column, `-R^-1 S'y / s.y` above `1 / s.y`, and the oldest one drops out with
its row and column, so no system is ever solved. Pairs sit in slots, used in turn; the rows and columns of a free slot
are zero, and one slot is always free: the next pair is written there before it is judged.

Source: Byrd, Nocedal and Schnabel, "Representations of quasi-Newton matrices and their use in limited memory
methods", Mathematical Programming 63, 1994.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessopt.typing import Matrix, Vector


class Compact(NamedTuple):
    """The products among k slots."""

    slot: jax.Array  # int32 scalar, the free one that comes next
    R_inv: Matrix  # (k, k), zero where a slot is free
    YY: Matrix  # (k, k), Y'Y
    D: Vector  # (k,), s.y of each pair
    gamma: jax.Array  # scalar, s.y / y.y of the newest pair; 0 where none is known


def empty(slots: int, dtype: jax.typing.DTypeLike) -> Compact:
    """No pairs."""
    square = jnp.zeros((slots, slots), dtype)
    return Compact(jnp.zeros((), jnp.int32), square, square + 0, jnp.zeros(slots, dtype), jnp.zeros((), dtype))


def used(compact: Compact) -> jax.Array:
    """Which slots hold a pair, `(k,)` bools."""
    return jnp.diagonal(compact.R_inv) != 0


def append(compact: Compact, S_y: Vector, Y_y: Vector) -> Compact:
    """Take in the pair in the free slot, given its products `S'y` and `Y'y`, and free the next slot."""
    k, R_inv, YY, D, _ = compact
    new = jnp.arange(len(D)) == k
    sy, yy = S_y[k], Y_y[k]
    older = jnp.where(used(compact), S_y, 0.0)
    column = jnp.where(new, 1.0, -(R_inv * older).sum(1)) / sy
    next_slot = (k + 1) % len(D)
    free = jnp.arange(len(D)) == next_slot
    R_inv = jnp.where(new, column[:, None], R_inv)
    return Compact(
        slot=next_slot,
        R_inv=jnp.where(free | free[:, None], 0.0, R_inv),
        YY=jnp.where(new, Y_y[:, None], jnp.where(new[:, None], Y_y, YY)),
        D=jnp.where(new, sy, D),
        gamma=sy / yy,
    )


def coefficients(compact: Compact, S_g: Vector, Y_g: Vector, gamma: jax.Array) -> tuple[Vector, Vector]:
    """Return the coefficients of S and of Y in `H g`, given `S'g` and `Y'g`."""
    R_inv, YY, D = compact.R_inv, compact.YY, compact.D
    S_g, Y_g = (jnp.where(used(compact), x, 0.0) for x in (S_g, Y_g))
    u = (R_inv * S_g).sum(1)
    v = (R_inv.T * (D * u + gamma * ((YY * u).sum(1) - Y_g))).sum(1)
    return v, -gamma * u


def emptied(compact: Compact) -> Compact:
    """Drop all pairs; the scale stays, unless there was nothing else left to drop."""
    none = ~jnp.any(used(compact))
    return compact._replace(
        R_inv=jnp.zeros_like(compact.R_inv), gamma=jnp.where(none, jnp.zeros_like(compact.gamma), compact.gamma)
    )
