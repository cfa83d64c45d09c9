"""Value, gradient, Hessian and the diagonal of the third derivative of the restricted
objective, in one sweep.

    phi(eta) = f(params + sum_s eta_s u_s)   at   eta = 0.

`jax.hessian(phi)` takes a product with the Hessian of f for every group, each of two or
three gradients. Here an ordinary forward and backward pass gives the adjoints of all
intermediate results (`tape.py`), and one sweep of tangents, of the groups that have
reached a result, contracts them as it goes (`sweep.py`).

Source: the sums are the chain rule for second and third derivatives, see Griewank and
Walther, "Evaluating Derivatives", 2nd ed., 2008, chapter 13; the use of these terms is
that of arXiv 2312.03885.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt._checks import check_count
from hessopt.calculus.taylor.rows import rows
from hessopt.calculus.taylor.sweep import sweep
from hessopt.calculus.taylor.tangents import gram
from hessopt.calculus.taylor.tape import Tape, record
from hessopt.objective.restriction import as_arrays, grouped
from hessopt.trees.groups import Groups
from hessopt.trees.vectors import solve_dtype
from hessopt.typing import Matrix, Params, ValueFn, Vector


class Taylor(NamedTuple):
    """Derivatives of phi at 0, in at least float32; groups in the order of
    `group_labels`."""

    value: jax.Array  # scalar, in the dtype of value_fn
    gradient: Vector  # (S,)
    hessian: Matrix | None  # (S, S), from order 2 on
    third: Vector | None  # (S,), d^3 phi / d eta_s^3, signed, for order 3


def taylor(
    value_fn: ValueFn,
    params: Params,
    updates: Params,
    *,
    groups: Groups | None = None,
    order: int = 3,
    chunk_size: int | None = None,
) -> Taylor:
    """Return the Taylor terms of `phi(eta) = value_fn(params + sum_s eta_s updates_s)`
    at eta = 0.

    Args:
      value_fn: `value_fn(params)`, a real scalar.
      params: pytree of arrays.
      updates: tree like `params`, same shapes.
      groups: the S groups of leaves, as in `group_labels`; None for one group of all.
      order: 1, 2 or 3, the highest derivative.
      chunk_size: None for the sweep, which holds the tangents of all S groups at once:
        about 3 S (order 3: 5 S) times the largest intermediate result, besides what a
        gradient holds. With a number, this many rows of the Hessian are taken at a
        time, as derivatives of the gradient: as many gradients' intermediates (order 3:
        three times that), and S products of about two gradients each (order 3: four).

    Returns:
      A `Taylor`.

    Raises:
      ValueError: when `updates` is not a tree like `params`, for groups that do not
        fit, another order, or a chunk_size < 1.
      TypeError: when value_fn does not return a real scalar; for order 3 where it
        depends on params through a `jax.custom_vjp`, which the message names.

    Outside of jit every call compiles anew. Where a derivative rule is not that of its
    function (a straight-through estimator), `jax.hessian(phi)` is not symmetric, and
    this Hessian, which is, need not equal it. Leaves that are not floating or complex
    are constants.

    Cost: two gradients, and for every group one tangent of what lies behind it: for a
    network of L layers with a group for each of its S = 2 L tensors about S / 4
    gradients, of order 3 twice that.

    Example:
      >>> import jax.numpy as jnp
      >>> params, updates = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}, {"a": jnp.ones(2), "b": jnp.array(2.0)}
      >>> terms = taylor(lambda p: jnp.sum(p["a"] ** 3) * p["b"], params, updates, groups="leaf")
      >>> terms.gradient.tolist(), terms.hessian.tolist(), terms.third.tolist()
      ([45.0, 18.0], [[54.0, 30.0], [30.0, 0.0]], [36.0, 0.0])

    Source: the sums are the chain rule for second and third derivatives, see Griewank
    and Walther, "Evaluating Derivatives", 2nd ed., 2008, chapter 13; the use of these
    terms is that of arXiv 2312.03885.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    labels, names, updates = grouped(params, updates, groups)
    count, labels = len(names), jax.tree.leaves(labels)

    @jax.jit  # one program, also where the caller does not jit
    def compute(params: Params, updates: Params) -> Taylor:
        every, treedef = jax.tree.flatten(as_arrays(params))
        moving = [
            i for i, leaf in enumerate(every) if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        leaves, steps, own = (
            [some[i] for i in moving]
            for some in (every, jax.tree.leaves(updates), labels)
        )
        dtype = solve_dtype(leaves)

        def objective(*parts: jax.Array) -> jax.Array:
            now = dict(zip(moving, parts, strict=True))
            return value_fn(
                jax.tree.unflatten(
                    treedef, [now.get(i, leaf) for i, leaf in enumerate(every)]
                )
            )

        tape = record(objective, leaves)
        used = (
            o
            for o, adjoint in zip(tape.operations, tape.adjoints, strict=True)
            if adjoint is not None
        )
        custom = next((operation.custom for operation in used if operation.custom), "")
        if order == 3 and custom:
            raise TypeError(
                f"taylor(order=3) needs forward derivatives, but {custom} has a jax.custom_vjp; use order=2"
            )
        gradient = _gradient(tape, steps, own, count, dtype)
        if order == 1:
            return Taylor(tape.value, gradient, None, None)
        if chunk_size is None:
            slopes, hessian, third = sweep(tape, steps, own, count, order, dtype)
            # the same, without the adjoints of the parameters
            gradient = gradient if custom else slopes
        else:
            hessian, third = rows(
                objective, leaves, steps, own, count, order, dtype, chunk_size
            )
        return Taylor(tape.value, gradient, hessian, third if order == 3 else None)

    return compute(params, updates)


def _gradient(
    tape: Tape,
    updates: Sequence[jax.Array],
    labels: Sequence[int],
    count: int,
    dtype: Any,
) -> Vector:
    """Return the gradient of phi at 0, by the adjoints of the parameters."""
    slopes = [jnp.zeros((), dtype)] * count
    for adjoint, update, label in zip(tape.gradient, updates, labels, strict=True):
        if adjoint is not None:
            slopes[label] = (
                slopes[label] + gram(adjoint[None], update[None], dtype)[0, 0]
            )
    return jnp.stack([jnp.zeros((), dtype), *slopes])[1:]
