"""A scalar program as a list of operations, with the adjoint of all that depends on the
parameters.

Calls are entered, so that an operation is one primitive; loops, branches, and functions
with a derivative rule of their own stay whole.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from hessopt.calculus.jaxprs import (
    CALLS,
    REMATERIALIZED,
    called,
    depends,
    inner_programs,
    single,
)

CUSTOM = ("custom_vjp_call", "custom_vjp_call_jaxpr")


class Operation(NamedTuple):
    """`results = fun(*operands)`, of the inputs that depend on the parameters, and the
    outputs that do."""

    name: str  # of the primitive
    fun: Callable[..., tuple[jax.Array, ...]]
    operands: tuple[int, ...]  # variables, each once
    values: tuple[jax.Array, ...]  # of the operands
    results: tuple[int, ...]  # variables
    # a function with a reverse rule of its own (`jax.custom_vjp`) in it, "" if there is
    # none
    custom: str


class Tape(NamedTuple):
    """The program that was evaluated; parameters are the variables 0, 1, ..."""

    value: jax.Array  # scalar
    top: int | None  # its variable, None if it does not depend on the parameters
    operations: list[Operation]
    # of the results of each operation, None where value does not depend
    adjoints: list[tuple[jax.Array, ...] | None]
    gradient: list[jax.Array | None]  # adjoints of the parameters


def record(value_fn: Callable[..., jax.Array], leaves: Sequence[jax.Array]) -> Tape:
    """Evaluate `value_fn(*leaves)` and its derivatives in all intermediate results."""
    program = jax.make_jaxpr(value_fn)(*leaves)
    avals: list[Any] = list(program.out_avals)
    if (
        len(avals) != 1
        or avals[0].shape
        or not jnp.issubdtype(avals[0].dtype, jnp.floating)
    ):
        what = ", ".join(f"{aval.dtype}{list(aval.shape)}" for aval in avals)
        raise TypeError(f"value_fn must return a real scalar, got {what}")
    pulled: list[tuple[Operation, Any]] = []
    fresh = itertools.count()
    ((value, top),) = _evaluate(
        program, [(leaf, next(fresh)) for leaf in leaves], fresh, pulled
    )
    found: dict[int, jax.Array] = {} if top is None else {top: jnp.ones_like(value)}
    adjoints: list[tuple[jax.Array, ...] | None] = []
    for operation, (outputs, pull) in reversed(pulled):
        if not any(i in found for i in operation.results):
            adjoints.append(None)
            continue
        own = tuple(
            found.get(i, jnp.zeros_like(x))
            for i, x in zip(operation.results, outputs, strict=True)
        )
        adjoints.append(own)
        for i, part in zip(operation.operands, pull(own), strict=True):
            found[i] = found[i] + part if i in found else part
    operations = [operation for operation, _ in pulled]
    return Tape(
        value,
        top,
        operations,
        adjoints[::-1],
        [found.get(i) for i in range(len(leaves))],
    )


def _evaluate(
    program: Any, operands: Any, fresh: Iterator[int], pulled: Any
) -> list[tuple[Any, int | None]]:
    """Evaluate equation by equation; every value comes with its variable, None if it is
    a constant."""
    jaxpr = program.jaxpr
    known: dict[Any, Any] = {
        v: (c, None) for v, c in zip(jaxpr.constvars, program.consts, strict=True)
    }
    known |= zip(jaxpr.invars, operands, strict=True)

    def read(variable: Any) -> tuple[Any, int | None]:
        return (
            (variable.val, None) if isinstance(variable, Literal) else known[variable]
        )

    for equation in jaxpr.eqns:
        inside = called(program, equation, CALLS | REMATERIALIZED)
        if inside is not None:
            results = _evaluate(
                inside, [read(v) for v in equation.invars], fresh, pulled
            )
        else:
            results = _operate(program, equation, read, fresh, pulled)
        known |= zip(equation.outvars, results, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _operate(
    program: Any, equation: Any, read: Any, fresh: Iterator[int], pulled: Any
) -> list[tuple[Any, int | None]]:
    """Evaluate one equation, and put it down if it depends on the parameters."""
    variables, call = single(program, equation)
    entries = [read(v) for v in variables]
    active = {i: value for value, i in entries if i is not None}
    smooth = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.outvars]

    def fun(*values: jax.Array) -> tuple[tuple[jax.Array, ...], list[jax.Array]]:
        now = dict(zip(active, values, strict=True))
        outputs = call(*(value if i is None else now[i] for value, i in entries))
        split = [
            [x for x, s in zip(outputs, smooth, strict=True) if s is kind]
            for kind in (True, False)
        ]
        return tuple(split[0]), split[1]

    if (
        not active
        or not any(smooth)
        or _is_constant(equation.primitive.name, fun, tuple(active.values()))
    ):
        return [(value, None) for value in call(*(value for value, _ in entries))]
    outputs, pull, others = jax.vjp(fun, *active.values(), has_aux=True)
    results = tuple(next(fresh) for _ in outputs)
    values, name = tuple(active.values()), equation.primitive.name
    operation = Operation(
        name, lambda *x: fun(*x)[0], tuple(active), values, results, _custom(equation)
    )
    pulled.append((operation, (outputs, pull)))
    ours, rest = zip(outputs, results, strict=True), iter(others)
    return [next(ours) if s else (next(rest), None) for s in smooth]


def _is_constant(
    name: str, fun: Callable[..., Any], values: tuple[jax.Array, ...]
) -> bool:
    """Whether it stops all derivatives: by its name, or as a loop of which only the
    condition sees parameters."""
    if name != "while":
        return name == "stop_gradient"
    return not any(
        depends(
            jax.make_jaxpr(lambda *along: jax.jvp(fun, values, along, has_aux=True)[1])(
                *values
            )
        )
    )


def _custom(equation: Any) -> str:
    """The name of a `jax.custom_vjp` function that an equation calls, at any depth."""
    programs = inner_programs(equation)
    if equation.primitive.name in CUSTOM:
        info = programs[0].debug_info if programs else None
        return str(
            getattr(info, "func_name", None)
            or getattr(info, "func_src_info", None)
            or "a function"
        )
    names = (_custom(inner) for program in programs for inner in program.eqns)
    return next((name for name in names if name), "")
