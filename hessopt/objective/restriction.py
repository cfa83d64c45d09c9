"""The objective restricted to the span of a few updates, from which rates are computed.

`phi(eta) = f(params + sum_s eta_s u_s)`, with one rate eta_s for each group s of leaves
and u_s the updates of that group.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hessopt.trees.groups import Groups, group_labels
from hessopt.typing import Labels, Params, ValueFn


def restriction(
    value_fn: ValueFn, params: Params, updates: Params, *, groups: Groups | None = None
) -> Callable[[jax.Array], jax.Array]:
    """Return `phi(eta) = value_fn(params + sum_s eta_s updates_s)` as a plain JAX
    function.

    Args:
      value_fn: `value_fn(params)`, a real scalar.
      params: pytree of arrays; leaves that are not floating or complex stay as they
        are.
      updates: tree like `params`, same shapes.
      groups: as in `group_labels`; None for one group of all leaves.

    Returns:
      A function of eta, `(S,)` in the order of the names that `group_labels` returns.
      `jax.jacfwd` computes its derivatives of any order, `jax.vmap` its values at many
      points; `taylor` computes the first three derivatives at eta = 0 much faster.

    Raises:
      ValueError: if `updates` is not a tree like `params`, or for groups that do not
        fit.

    Cost: one value per call.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> phi = restriction(lambda x: jnp.sum(x**2), jnp.array([3.0, 4.0]), jnp.array([-3.0, -4.0]))
      >>> [float(phi(jnp.array([eta]))) for eta in (0.0, 1.0)]
      [25.0, 0.0]
    """
    labels, _, steps = grouped(params, updates, groups)

    def phi(eta: jax.Array) -> jax.Array:
        def moved(p: jax.Array, u: jax.Array, label: int) -> jax.Array:
            smooth = jnp.issubdtype(p.dtype, jnp.inexact)
            return p + jnp.asarray(eta[label], p.dtype) * u if smooth else p

        return value_fn(jax.tree.map(moved, as_arrays(params), steps, labels))

    return phi


def grouped(
    params: Params, updates: Params, groups: Groups | None
) -> tuple[Labels, tuple[str, ...], Params]:
    """Return the labels, the names of the groups, and the updates in the dtypes of
    params."""
    shapes, expected = (
        [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
        for tree in (updates, params)
    )
    if jax.tree.structure(updates) != jax.tree.structure(params) or shapes != expected:
        raise ValueError(
            f"updates must be a tree like params, with leaves of shapes {expected}, got {shapes}"
        )
    labels, names = group_labels(params, "all" if groups is None else groups)
    return (
        labels,
        names,
        jax.tree.map(lambda u, p: jnp.asarray(u, jnp.result_type(p)), updates, params),
    )


def as_arrays(params: Params) -> Params:
    """Convert the leaves of params to arrays."""
    return jax.tree.map(jnp.asarray, params)
