"""A scalar program as a list of operations, with the adjoints of all results that
depend on the parameters.

Calls are entered, so that an operation is one primitive; loops, branches, and functions
with their own derivative rule remain single operations.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessopt.calculus.jaxprs import (
    CALLS,
    REMATERIALIZED,
    Equation,
    Program,
    depends,
    inner_programs,
    interpret,
)
from hessopt.calculus.linearization import has_forward_derivative

CUSTOM = ("custom_vjp_call", "custom_vjp_call_jaxpr")


class Operation(NamedTuple):
    """`results = fun(*operands)`, where operands and results are those that depend on
    the parameters."""

    name: str  # of the primitive
    fun: Callable[..., tuple[jax.Array, ...]]
    operands: tuple[int, ...]  # variables, each once
    values: tuple[jax.Array, ...]  # of the operands
    results: tuple[int, ...]  # variables
    # name of a function with its own reverse rule (`jax.custom_vjp`) in it, "" if there
    # is none
    custom: str
    reverse_only: bool  # whether that function has no forward derivatives at all


class Tape(NamedTuple):
    """The program that was evaluated; parameters are the variables 0, 1, ..."""

    value: jax.Array  # scalar
    top: int | None  # its variable, None if independent of the parameters
    operations: list[Operation]
    # of the results of each operation, None if value does not depend on them
    adjoints: list[tuple[jax.Array, ...] | None]
    gradient: list[jax.Array | None]  # adjoints of the parameters


class _Entry(NamedTuple):
    """A value of the program."""

    value: Any
    variable: int | None  # None for a constant


class _Record(NamedTuple):
    """An operation that was evaluated."""

    operation: Operation
    outputs: tuple[jax.Array, ...]
    pull: Callable[..., tuple[jax.Array, ...]]  # adjoints of outputs -> of operands


def record(value_fn: Callable[..., jax.Array], leaves: Sequence[jax.Array]) -> Tape:
    """Evaluate `value_fn(*leaves)` and its derivatives with respect to all intermediate
    results."""
    program = jax.make_jaxpr(value_fn)(*leaves)
    _check_scalar(program)
    records: list[_Record] = []
    fresh = itertools.count()

    def evaluate(equation: Equation, entries: list[_Entry]) -> list[_Entry]:
        return _operate(equation, entries, fresh, records)

    # rematerialized calls are entered too, since the sweep reads every operand in any
    # case
    ((value, top),) = interpret(
        program,
        [_Entry(leaf, next(fresh)) for leaf in leaves],
        evaluate,
        # a derivative rule may index a constant by a tracer, which NumPy cannot
        constant=lambda array: _Entry(jnp.asarray(array), None),
        enter=CALLS | REMATERIALIZED,
    )
    found = {} if top is None else {top: jnp.ones_like(value)}
    adjoints = _reverse(records, found)
    operations = [record.operation for record in records]
    gradient = [found.get(i) for i in range(len(leaves))]
    return Tape(value, top, operations, adjoints, gradient)


def _check_scalar(program: Program) -> None:
    avals: list[Any] = list(program.out_avals)
    is_scalar = len(avals) == 1 and not avals[0].shape
    if not is_scalar or not jnp.issubdtype(avals[0].dtype, jnp.floating):
        what = ", ".join(f"{aval.dtype}{list(aval.shape)}" for aval in avals)
        raise TypeError(f"value_fn must return a real scalar, got {what}")


def _reverse(
    records: Sequence[_Record], found: dict[int, jax.Array]
) -> list[tuple[jax.Array, ...] | None]:
    """Return the adjoints of the results of every operation, None if there are none,
    and write the adjoints of all variables into `found`."""
    adjoints: list[tuple[jax.Array, ...] | None] = []
    for operation, outputs, pull in reversed(records):
        own = None
        if any(i in found for i in operation.results):
            own = tuple(
                found.get(i, jnp.zeros_like(x))
                for i, x in zip(operation.results, outputs, strict=True)
            )
            for i, part in zip(operation.operands, pull(own), strict=True):
                found[i] = found[i] + part if i in found else part
        adjoints.append(own)
    return adjoints[::-1]


def _operate(
    equation: Equation,
    entries: list[_Entry],
    fresh: Iterator[int],
    records: list[_Record],
) -> list[_Entry]:
    """Evaluate one equation, and record it if it depends on the parameters."""
    active = {i: value for value, i in entries if i is not None}
    smooth = [jnp.issubdtype(aval.dtype, jnp.inexact) for aval in equation.results]

    # the equation as a function of the operands that depend on the parameters; integers
    # and bools have no derivatives and are returned second
    def fun(*values: jax.Array) -> tuple[tuple[jax.Array, ...], list[jax.Array]]:
        now = dict(zip(active, values, strict=True))
        outputs = equation.fun(
            *(value if i is None else now[i] for value, i in entries)
        )
        split = [
            [x for x, s in zip(outputs, smooth, strict=True) if s is kind]
            for kind in (True, False)
        ]
        return tuple(split[0]), split[1]

    values = tuple(active.values())
    if not active or not any(smooth) or _is_constant(equation.name, fun, values):
        outputs = equation.fun(*(value for value, _ in entries))
        return [_Entry(value, None) for value in outputs]

    # the reverse pass is evaluated when the adjoints of the outputs are known
    outputs, pull, others = jax.vjp(fun, *values, has_aux=True)
    results = tuple(next(fresh) for _ in outputs)
    custom = _custom(equation.name, equation.params)

    # both passes of the function, which its derivatives of second order differentiate
    def passes(*values: jax.Array) -> Any:
        outputs, pull = jax.vjp(lambda *x: fun(*x)[0], *values)
        return outputs, pull(tuple(map(jnp.zeros_like, outputs)))

    operation = Operation(
        equation.name,
        lambda *x: fun(*x)[0],
        tuple(active),
        values,
        results,
        custom,
        bool(custom) and not has_forward_derivative(passes, *values),
    )
    records.append(_Record(operation, outputs, pull))
    ours = map(_Entry, outputs, results)
    rest = (_Entry(value, None) for value in others)
    return [next(ours) if s else next(rest) for s in smooth]


def _is_constant(
    name: str, fun: Callable[..., Any], values: tuple[jax.Array, ...]
) -> bool:
    """Return whether the equation has no derivatives: it is a `stop_gradient`, or a
    loop in which only the condition depends on the parameters."""
    if name != "while":
        return name == "stop_gradient"

    def along(*tangents: jax.Array) -> tuple[jax.Array, ...]:
        return jax.jvp(fun, values, tangents, has_aux=True)[1]

    return not any(depends(jax.make_jaxpr(along)(*values)))


def _custom(name: str, params: dict[str, Any]) -> str:
    """Return the name of a `jax.custom_vjp` function that an equation calls, at any
    depth."""
    programs = inner_programs(params)
    if name in CUSTOM:
        info = programs[0].debug_info if programs else None
        found = getattr(info, "func_name", None) or getattr(info, "func_src_info", None)
        return str(found or "a function")
    inner = (equation for program in programs for equation in program.eqns)
    names = (_custom(equation.primitive.name, equation.params) for equation in inner)
    return next(filter(None, names), "")
