"""Quotients without a division by zero, and choices between whole trees: a guard stands
before what it guards.

`jnp.where(c, x / y, 0)` evaluates the quotient everywhere, and its derivative is NaN
where y is 0: the divisor has to be replaced as well.
"""

from typing import Any

import jax
import jax.numpy as jnp


def or_one(x: jax.Array) -> jax.Array:
    """Return `x` where it is positive, else 1: a divisor for quotients that count only
    where `x > 0`."""
    return jnp.where(x > 0, x, 1.0)


def divide(x: Any, y: jax.Array, where: jax.Array, otherwise: Any = 0.0) -> jax.Array:
    """Return `x / y` where the condition holds, else `otherwise`; y is not looked at
    there."""
    return jnp.where(where, x / jnp.where(where, y, 1.0), otherwise)


def select(condition: jax.Array, new: Any, old: Any) -> Any:
    """Return the tree `new` where the scalar condition holds, else the tree `old`, leaf
    by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `a @ b` at highest precision: accelerators round the factors to bfloat16
    by default."""
    return jnp.matmul(a, b, precision="highest")
