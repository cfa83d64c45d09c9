"""An interpreter of the programs that JAX traces (jaxprs).

`interpret` processes a program equation by equation. Values are of any type that the
caller chooses, such as arrays with a flag, the names of inputs, or bools. A rule maps
the values of an equation's operands to the values of its results. The interpreter looks
values up, enters the calls of inner programs, and converts literals and constants.
Plain evaluation is the rule `lambda equation, values: equation.fun(*values)`.

Source: "Writing custom Jaxpr interpreters in JAX", in the documentation of JAX.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
from jax.extend.core import JaxprEqn, Literal, Var, jaxpr_as_fun

Program: TypeAlias = Any
"""A program with the values of its constants, as returned by `jax.make_jaxpr`. Not all
supported versions of JAX export its type."""

Value = TypeVar("Value")

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
"""Primitives that only call a program, by their names in all supported versions of JAX,
with the parameter that holds the program."""

REMATERIALIZED = {"checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr"}
"""The same for calls that are rematerialized in a backward pass."""


class Equation(NamedTuple):
    """One equation, as a function of the variables that it reads."""

    name: str  # of the primitive
    params: dict[str, Any]  # of the primitive
    operands: tuple[Any, ...]  # shape and dtype of every variable it reads, each once
    results: tuple[Any, ...]  # shape and dtype of every result
    # arrays of the operands -> list of arrays; literals are part of the function
    fun: Callable[..., list[jax.Array]]


Rule = Callable[[Equation, list[Value]], Sequence[Value]]
"""`(equation, values of its operands) -> values of its results`."""


def interpret(
    program: Program,
    inputs: Sequence[Value],
    rule: Rule[Value],
    *,
    constant: Callable[[Any], Value],
    enter: Mapping[str, str] = CALLS,
) -> list[Value]:
    """Return the values of a program's outputs.

    Args:
      program: a program as returned by `jax.make_jaxpr`.
      inputs: a value for every input of the program.
      rule: `(equation, values) -> values`, called once for every equation that is not
        entered, in program order.
      constant: `array -> value`, for literals and for constants of the program.
      enter: primitives whose inner program is interpreted with the same rule, with the
        parameter that holds it; their operands are the inputs of that program. All
        others, such as loops, branches and functions with a derivative rule, are
        treated as one equation.

    Raises:
      ValueError: if the number of inputs, or of results of the rule, differs from that
        of the program or the equation.

    Cost: that of the rule, and tens of microseconds per equation.
    """
    jaxpr = program.jaxpr
    # an equation reads the results of earlier ones: one dictionary holds all values
    known = dict(zip(jaxpr.constvars, map(constant, program.consts), strict=True))
    known |= zip(jaxpr.invars, inputs, strict=True)

    def read(atom: Any) -> Value:
        return constant(atom.val) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        inside = _inside(program, equation, enter)
        if inside is None:
            # a variable that is read twice is one operand: `x * x` is a function of x
            variables = list(dict.fromkeys(_variables(equation.invars)))
            values = [known[variable] for variable in variables]
            results = rule(_alone(program, equation, variables), values)
        else:
            # the inner program has an input for every argument, literals included
            arguments = [read(atom) for atom in equation.invars]
            results = interpret(inside, arguments, rule, constant=constant, enter=enter)
        known |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def depends(program: Program) -> list[bool]:
    """Return, for each output of a program, whether it depends on the inputs, and not
    only on constants."""
    # this does not use the interpreter: the Taylor sweep calls it for hundreds of
    # programs, and the preparation of equations for evaluation would slow tracing down
    reached = set(program.jaxpr.invars)
    for equation in program.jaxpr.eqns:
        if not reached.isdisjoint(_variables(equation.invars)):
            reached.update(equation.outvars)
    return [not isinstance(v, Literal) and v in reached for v in program.jaxpr.outvars]


def selected(
    program: Program, wanted: Sequence[bool]
) -> Callable[..., list[jax.Array]]:
    """Return a program as a function that returns only the wanted outputs."""
    outputs = program.jaxpr.outvars
    some = [v for v, is_wanted in zip(outputs, wanted, strict=True) if is_wanted]
    return jaxpr_as_fun(program.replace(jaxpr=program.jaxpr.replace(outvars=some)))


def inner_programs(params: dict[str, Any]) -> list[Any]:
    """Return all programs among the parameters of an equation."""
    found = []
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found.append(part)
    return found


def primitives(jaxpr: Any) -> set[str]:
    """Return the names of all primitives of a jaxpr and of the programs inside it."""
    names = {equation.primitive.name for equation in jaxpr.eqns}
    programs = (inner_programs(equation.params) for equation in jaxpr.eqns)
    return names.union(*(primitives(inner) for some in programs for inner in some))


def _variables(atoms: Sequence[Any]) -> list[Var]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _inside(
    program: Program, equation: JaxprEqn, enter: Mapping[str, str]
) -> Program | None:
    """Return the program to enter, or None if the equation is treated as a whole."""
    parameter = enter.get(equation.primitive.name)
    if parameter is None:
        return None
    inside = equation.params[parameter]
    # in older versions of JAX a rematerialized program has no field for constants
    return inside if hasattr(inside, "consts") else _closed(program, inside)


def _alone(program: Program, equation: JaxprEqn, variables: list[Var]) -> Equation:
    # the equation is evaluated as a separate program, so that JAX restores the context
    # in which it was traced
    alone = program.jaxpr.replace(
        constvars=[], invars=variables, outvars=equation.outvars, eqns=[equation]
    )
    return Equation(
        equation.primitive.name,
        equation.params,
        tuple(variable.aval for variable in variables),
        tuple(variable.aval for variable in equation.outvars),
        jaxpr_as_fun(_closed(program, alone)),
    )


def _closed(program: Program, jaxpr: Any) -> Program:
    """Return a program without constants, made as a copy of another one, since the type
    is not exported."""
    return program.replace(jaxpr=jaxpr, consts=())
