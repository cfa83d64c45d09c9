"""Scalar functions applied to every entry, whose derivatives need no more memory than
the entries.

For a function f applied to every entry v, and the adjoint lambda of its result, the
tangents x, x_ss become `f' x`, `f' x_ss + f'' x^2`, and

    H_st += sum lambda f'' x_s x_t,    phi_sss += sum lambda (f''' x_s^3 + 3 f'' x_s x_ss).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hessopt.calculus.taylor.tangents import (
    Contribution,
    Tangents,
    added,
    after,
    gram,
    rowwise,
    spread,
    stacked,
)
from hessopt.calculus.taylor.tape import Operation

POINTWISE_PRIMITIVES = frozenset(
    "abs acos acosh add add_any asin asinh atan atan2 atanh cbrt clamp cos cosh digamma div erf erf_inv erfc exp exp2 "  # noqa: SIM905
    "expm1 integer_pow lgamma log log1p logistic max min mul neg pow rsqrt sin sinh sqrt square sub tan tanh".split()
)
"""Primitives for which every entry of the result depends only on the same entry of the
operand."""


def is_pointwise(operation: Operation, adjoint: tuple[jax.Array, ...]) -> bool:
    """Return whether the operation is one of `POINTWISE_PRIMITIVES`, real, with one
    operand."""
    if (
        operation.name not in POINTWISE_PRIMITIVES
        or len(operation.values) != 1
        or len(adjoint) != 1
    ):
        return False
    (value,), (lam,) = operation.values, adjoint
    return (
        value.shape == lam.shape
        and not jnp.iscomplexobj(value)
        and not jnp.iscomplexobj(lam)
    )


def contract_pointwise(
    operation: Operation,
    adjoint: tuple[jax.Array, ...],
    x: Tangents,
    xx: Tangents | None,
    order: int,
    dtype: Any,
) -> Contribution:
    """Return the contribution of the operation to the sums, and the tangents of its
    result."""
    (lam,), (groups, s) = adjoint, x
    f1, f2, f3 = (*_slopes(operation, order), None)[:3]
    ss = None if xx is None else spread(xx, groups)
    hessian = None if f2 is None else gram((lam * f2) * s, s, dtype)
    inner = added(
        None if f3 is None else (lam * f3) * s * s,
        None if f2 is None or ss is None else (3 * lam * f2) * ss,
    )
    third = None if inner is None else rowwise(inner, s, dtype)
    f1, f2 = (None if f is None else after([hessian, third], f) for f in (f1, f2))
    second = added(
        None if f1 is None or ss is None else f1 * ss,
        None if f2 is None or order < 3 else f2 * s * s,
    )
    return Contribution(
        [] if hessian is None else [(groups, groups, hessian)],
        [] if third is None else [(groups, third)],
        {} if f1 is None else {0: Tangents(groups, f1 * s)},
        {} if second is None else {0: Tangents(groups, second)},
    )


def _slopes(operation: Operation, order: int) -> list[jax.Array | None]:
    """Return the derivatives f', f'', ... at every entry, or None for those that are
    zero by construction."""
    (value,) = operation.values
    one = jnp.ones_like(value)

    def derivative(
        fun: Callable[[jax.Array], jax.Array],
    ) -> Callable[[jax.Array], jax.Array]:
        return lambda v: jax.jvp(fun, (v,), (one,))[1]

    def slope(fun: Callable[[jax.Array], jax.Array]) -> jax.Array | None:
        (found,) = stacked(
            lambda tangent: (jax.jvp(fun, (value,), (tangent,))[1],), one[None]
        )
        return None if found is None else found[0]

    f = lambda v: operation.fun(v)[0]  # noqa: E731
    return [slope(fun) for fun in (f, derivative(f), derivative(derivative(f)))[:order]]
