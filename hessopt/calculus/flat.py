"""A pytree of parameters as one real vector; a complex leaf counts as its real and imaginary parts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hessopt.typing import Params, Vector


def real_leaves(tree: Params) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], Params]]:
    """Return the leaves as real arrays and the function that makes the tree of them again.

    A complex leaf of shape `s` becomes one of shape `(2, *s)`: real parts, then imaginary parts. In these
    coordinates the gradient is that of optax's convention, `df/dx + i df/dy`, the conjugate of what
    `jax.grad` returns.
    """
    leaves, treedef = jax.tree.flatten(tree)
    is_complex = [jnp.iscomplexobj(leaf) for leaf in leaves]

    def restore(parts: Sequence[jax.Array]) -> Params:
        return jax.tree.unflatten(
            treedef, [jax.lax.complex(p[0], p[1]) if c else p for p, c in zip(parts, is_complex, strict=True)]
        )

    parts = [
        jnp.stack([jnp.real(leaf), jnp.imag(leaf)]) if c else jnp.asarray(leaf)
        for leaf, c in zip(leaves, is_complex, strict=True)
    ]
    return parts, restore


def solve_dtype(tree: Params) -> Any:
    """The real dtype of inner products and solves over `tree`: that of its leaves, at least float32."""
    dtypes = [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(tree)]  # a weakly typed leaf counts like any other
    return jnp.finfo(jnp.result_type(jnp.float32, *dtypes)).dtype


def ravel(tree: Params) -> Vector:
    """Concatenate the real leaves of `tree` into one vector `(n,)` of `solve_dtype`."""
    parts, _ = real_leaves(tree)
    dtype = solve_dtype(tree)
    return jnp.concatenate([jnp.zeros(0, dtype)] + [part.ravel().astype(dtype) for part in parts])


def unravel(vector: Vector, like: Params) -> Params:
    """The inverse of `ravel`: `vector` with the structure, shapes and dtypes of `like`."""
    parts, restore = real_leaves(like)
    pieces, start = [], 0
    for part in parts:
        pieces.append(vector[start : start + part.size].reshape(part.shape).astype(part.dtype))
        start += part.size
    return restore(pieces)


def strongly_typed(tree: Any) -> Any:
    """Return `tree` with arrays for leaves, whose dtypes no longer yield to those of what they meet."""

    def strong(leaf: Any) -> jax.Array:
        array = jnp.asarray(leaf)
        weak = getattr(array, "weak_type", False)  # arrays of random keys do not have the attribute
        return jax.lax.convert_element_type(array, array.dtype) if weak else array

    return jax.tree.map(strong, tree)
