"""The Taylor terms without the sweep, which is slower, with a chosen limit on the
memory."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hessopt.calculus.linearization import has_forward_derivative
from hessopt.calculus.taylor.tangents import gram
from hessopt.typing import Matrix, Params, Vector


def rows(
    objective: Callable[..., jax.Array],
    leaves: Sequence[jax.Array],
    updates: Sequence[jax.Array],
    labels: Sequence[int],
    count: int,
    order: int,
    dtype: DTypeLike,
    chunk_size: int,
) -> tuple[Matrix, Vector]:
    """Compute the Hessian of phi a few rows at a time, as derivatives of the gradient,
    and the third derivatives."""
    if not count:
        return jnp.zeros((0, 0), dtype), jnp.zeros(0, dtype)
    gradient = jax.grad(objective, argnums=tuple(range(len(leaves))))
    forward = has_forward_derivative(gradient, *leaves)

    def terms(group: jax.Array) -> tuple[Vector, jax.Array]:
        own = tuple(
            jnp.where(group == label, u, jnp.zeros_like(u))
            for u, label in zip(updates, labels, strict=True)
        )

        def along(fun: Callable[..., Params]) -> Callable[..., Params]:
            return lambda *x: jax.jvp(fun, x, own)[1]

        # H is symmetric: the reverse derivative of the gradient is its product too
        turned = (
            along(gradient)(*leaves) if forward else jax.vjp(gradient, *leaves)[1](own)
        )
        row = jnp.zeros(count, dtype)
        for part, u, label in zip(turned, updates, labels, strict=True):
            row = row.at[label].add(gram(part[None], u[None], dtype)[0, 0])
        third = along(along(along(objective)))(*leaves) if order == 3 else jnp.zeros(())
        return row, third.astype(dtype)

    return jax.lax.map(terms, jnp.arange(count), batch_size=chunk_size)
