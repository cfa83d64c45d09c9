"""Value, gradient, Hessian and the diagonal of the third derivative of the restricted
objective, in one sweep.

    phi(eta) = f(params + sum_s eta_s u_s)   at   eta = 0.

`jax.hessian(phi)` takes one product with the Hessian of f per group, each at the cost
of two or three gradients. Here an ordinary forward and backward pass gives the adjoints
of all intermediate results (`tape.py`), and one sweep of tangents contracts the
adjoints with the tangents of those groups on which a result depends (`sweep.py`).

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
    hessian: Matrix | None  # (S, S), if order >= 2
    third: Vector | None  # (S,), d^3 phi / d eta_s^3, if order = 3


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
      value_fn: objective `value_fn(params)`, which returns a real scalar.
      params: pytree of arrays.
      updates: tree like `params`, with the same shapes.
      groups: the S groups of leaves, as in `group_labels`; None for one group with all
        leaves.
      order: 1, 2 or 3, the order of the highest derivative.
      chunk_size: None for the sweep, which holds the tangents of all S groups at once:
        its memory is about 3 S (order 3: 5 S) times that of the largest intermediate
        result, in addition to that of a gradient. With a number, this many rows of the
        Hessian are computed at a time, as derivatives of the gradient: the memory is
        that of as many gradients (order 3: three times that), and the cost is S
        products of about two gradients each (order 3: four).

    Returns:
      A `Taylor`.

    Raises:
      ValueError: if `updates` is not a tree like `params`, for groups that do not match
        params, another order, or chunk_size < 1.
      TypeError: if value_fn does not return a real scalar; for order 3 also if it
        depends on params through a `jax.custom_vjp`, which the message names.

    Up to order 2 a `jax.custom_vjp` needs no forward derivatives: where they do not
    exist, the reverse derivatives of its rule are used.

    Outside of jit every call compiles again. If a derivative rule is not the derivative
    of its function (as in a straight-through estimator), `jax.hessian(phi)` is not
    symmetric, and this Hessian, which is symmetric, need not equal it. Leaves that are
    not floating or complex are constants.

    Cost: two gradients, and for every group one tangent of the operations that depend
    on it: for a network of L layers with one group for each of its S = 2 L tensors
    about S / 4 gradients, for order 3 twice that.

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

    @jax.jit  # one program, also if the caller does not use jit
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
                f"taylor(order=3) needs forward derivatives, but {custom} has a jax.custom_vjp; use order=2, "
                "or cubic_damping=0.0 with grouped_newton"
            )
        gradient = _gradient(tape, steps, own, count, dtype)
        if order == 1:
            return Taylor(tape.value, gradient, None, None)
        if chunk_size is None:
            slopes, hessian, third = sweep(tape, steps, own, count, order, dtype)
            # the slopes equal the gradient, and do not need the adjoints of the
            # parameters
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
    """Return the gradient of phi at 0, from the adjoints of the parameters."""
    slopes = [jnp.zeros((), dtype)] * count
    for adjoint, update, label in zip(tape.gradient, updates, labels, strict=True):
        if adjoint is not None:
            slopes[label] = (
                slopes[label] + gram(adjoint[None], update[None], dtype)[0, 0]
            )
    return jnp.stack([jnp.zeros((), dtype), *slopes])[1:]
