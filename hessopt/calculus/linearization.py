"""Derivatives as linear maps, also of functions without forward derivatives.

`jax.linearize` computes `v -> J v` in forward mode. A function with a `jax.custom_vjp`
has no forward derivative: an example is `jax.experimental.ode.odeint`, which solves an
adjoint equation. Its reverse derivative `c -> J'c` is linear in c, so the reverse
derivative of that map is `v -> J v`. A Hessian is symmetric, so the reverse derivative
of the gradient is `v -> H v`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hessopt.calculus.jaxprs import primitives
from hessopt.typing import Params

NO_FORWARD_DERIVATIVE = "custom_lin"
"""The primitive that stands for the missing forward derivative in a traced program. JAX
raises its error when the program is evaluated or compiled."""


def linearize(
    fun: Callable[[Params], Params], point: Params
) -> tuple[Params, Callable[[Params], Params]]:
    """Return `fun(point)` and `v -> J v`, with J the Jacobian at the point.

    Cost: that of `jax.linearize`; without forward derivatives that of two nested
    reverse passes, one per product.
    """
    outputs, linear = jax.linearize(fun, point)
    if is_evaluable(linear, point):
        return outputs, linear
    _, pull = jax.vjp(fun, point)
    # J'c is linear in c, so any c will do
    none = jax.tree.map(jnp.zeros_like, outputs)
    _, push = jax.vjp(lambda c: pull(c)[0], none)
    return outputs, lambda v: push(v)[0]


def linearize_gradient(
    value_fn: Callable[[Params], jax.Array],
    point: Params,
    embed: Callable[[Params], Params] = lambda part: part,
) -> tuple[Params, Callable[[Params], Params]]:
    """Return the gradient of `value_fn` at `embed(point)`, and `v -> H E v`, with H the
    Hessian there and E the derivative of `embed`.

    Cost: that of `jax.linearize`; without forward derivatives that of reverse passes of
    the gradient.
    """
    gradient = jax.grad(value_fn)
    slopes, linear = jax.linearize(lambda part: gradient(embed(part)), point)
    if is_evaluable(linear, point):
        return slopes, linear
    _, embedded = jax.linearize(embed, point)
    slopes, turned = jax.vjp(gradient, embed(point))
    return slopes, lambda v: turned(embedded(v))[0]


def has_forward_derivative(fun: Callable[..., Any], *point: Params) -> bool:
    """Return whether `jax.jvp` can differentiate `fun` at a point."""
    return is_evaluable(lambda *along: jax.jvp(fun, point, along)[1], *point)


def is_evaluable(derivative: Callable[..., Any], *along: Params) -> bool:
    """Return whether a derivative in forward mode can be evaluated, by the primitives
    of its program."""
    program = jax.make_jaxpr(derivative)(*along)
    return NO_FORWARD_DERIVATIVE not in primitives(program.jaxpr)
