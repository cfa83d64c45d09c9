"""Functions of one number, applied to every entry: their derivatives need no more room than the entries.

With f at every entry v, and lambda its adjoint, the tangents x, x_ss become `f' x`, `f' x_ss + f'' x^2`, and

    H_st += sum lambda f'' x_s x_t,    phi_sss += sum lambda (f''' x_s^3 + 3 f'' x_s x_ss).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hessopt.calculus.taylor.tangents import Contribution, Tangents, after, gram, rowwise, spread, stacked
from hessopt.calculus.taylor.tape import Operation

NAMES = frozenset(
    "abs acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt clamp copy cos cosh digamma div erf erf_inv "
    "erfc exp exp2 expm1 integer_pow lgamma log log1p logistic max min mul neg pow rsqrt sign sin sinh sqrt square sub "
    "add add_any tan tanh".split()
)
"""Primitives of which every entry of the result depends on the same entry of the operand only."""


def is_pointwise(operation: Operation) -> bool:
    """Whether the operation is one of these, real, in one operand."""
    if operation.name not in NAMES or len(operation.values) != 1 or len(operation.results) != 1:
        return False
    (value,) = operation.values
    (result,) = jax.eval_shape(operation.fun, value)
    return value.shape == result.shape and not any(jnp.iscomplexobj(a) for a in (value, result))


def contract(
    operation: Operation, adjoint: tuple[jax.Array, ...], x: Tangents, xx: Tangents | None, order: int, dtype: Any
) -> Contribution:
    """What the operation adds, and the tangents of its result."""
    (lam,), (groups, s) = adjoint, x
    f1, f2, f3 = (*_slopes(operation, order), None)[:3]
    ss = None if xx is None else spread(xx, groups)
    H = [] if f2 is None else [gram((lam * f2) * s, s, dtype)]
    terms = [] if f3 is None else [(lam * f3) * s * s]
    terms += [] if f2 is None or ss is None else [(3 * lam * f2) * ss]
    third = [rowwise(sum(terms), s, dtype)] if terms else []
    f1, f2 = (None if f is None else after([*H, *third], f) for f in (f1, f2))
    first = [] if f1 is None else [f1 * s]
    terms = [] if f2 is None or order < 3 else [f2 * s * s]
    terms += [] if f1 is None or ss is None else [f1 * ss]
    second = [sum(terms)] if terms else []
    return Contribution(
        [(groups, groups, matrix) for matrix in H],
        [(groups, vector) for vector in third],
        {0: Tangents(groups, stack) for stack in first},
        {0: Tangents(groups, stack) for stack in second},
    )


def _slopes(operation: Operation, order: int) -> list[jax.Array | None]:
    """The derivatives f', f'', ... at every entry; None where one is zero by construction."""
    (value,), found = operation.values, []
    fun = lambda v: operation.fun(v)[0]
    for _ in range(order):
        found.append(stacked(_along(fun, value), jnp.ones_like(value)[None])[0])
        fun = _derivative(fun)
    return [None if stack is None else stack[0] for stack in found]


def _along(fun: Callable[[jax.Array], jax.Array], value: jax.Array) -> Callable[[jax.Array], tuple[jax.Array]]:
    return lambda tangent: (jax.jvp(fun, (value,), (tangent,))[1],)


def _derivative(fun: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda v: jax.jvp(fun, (v,), (jnp.ones_like(v),))[1]
