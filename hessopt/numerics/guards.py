"""Quotients without division by zero, and selection between trees.

`jnp.where(c, x / y, 0)` evaluates the quotient everywhere, and its derivative is NaN
where y is 0. The divisor has to be replaced before the division.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hessopt.typing import Params, Tree


def or_one(x: jax.Array) -> jax.Array:
    """Return `x` where it is positive, else 1: a divisor for quotients that are used
    only where `x > 0`."""
    return jnp.where(x > 0, x, 1.0)


def divide(
    x: ArrayLike, y: jax.Array, where: jax.Array, otherwise: ArrayLike = 0.0
) -> jax.Array:
    """Return `x / y` where the condition holds, else `otherwise`, for any y."""
    return jnp.where(where, x / jnp.where(where, y, 1.0), otherwise)


def select(condition: jax.Array, new: Tree, old: Params) -> Tree:
    """Return the tree `new` if the scalar condition holds, else the tree `old`."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def zero_unless(condition: jax.Array, tree: Tree) -> Tree:
    """Return the tree if the condition holds, else zeros. A condition that is not a
    scalar is broadcast to the leaves and applied entry by entry."""
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, 0), tree)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `a @ b` at highest precision: accelerators round the factors to bfloat16
    by default."""
    return jnp.matmul(a, b, precision="highest")
