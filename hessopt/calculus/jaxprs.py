"""Programs as JAX writes them down, taken one equation at a time."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal, jaxpr_as_fun

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
"""Equations that are calls of a program and no more, by the names that versions of JAX
give them, and where it is."""

REMATERIALIZED = {"checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr"}
"""The same, of what is to be evaluated again in a backward pass."""


def called(program: Any, equation: Any, calls: dict[str, str]) -> Any:
    """The program that an equation of a program calls, None if it is none of these
    calls."""
    if equation.primitive.name not in calls:
        return None
    inside = equation.params[calls[equation.primitive.name]]
    return (
        inside
        if hasattr(inside, "consts")
        else program.replace(jaxpr=inside, consts=())
    )


def single(
    program: Any, equation: Any
) -> tuple[list[Any], Callable[..., list[jax.Array]]]:
    """The variables that an equation reads, each once, and the equation as a function
    of them."""
    variables = list(
        dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal))
    )
    alone = program.jaxpr.replace(
        constvars=[], invars=variables, outvars=equation.outvars, eqns=[equation]
    )
    return variables, jaxpr_as_fun(program.replace(jaxpr=alone, consts=()))


def depends(program: Any) -> list[bool]:
    """Which outputs of a program depend on its inputs, and not only on its constants."""
    reached = set(program.jaxpr.invars)
    for equation in program.jaxpr.eqns:
        if any(v in reached for v in equation.invars if not isinstance(v, Literal)):
            reached |= set(equation.outvars)
    return [not isinstance(v, Literal) and v in reached for v in program.jaxpr.outvars]


def inner_programs(equation: Any) -> list[Any]:
    """All programs that an equation has among its parameters."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found
