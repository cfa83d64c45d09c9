"""The programs suite: the size of compiled programs, without timing and so without noise.

Each row is one step: of the loop that `minimize` compiles, for an objective of 10
variables, or of training a small network. Counted are the instructions that XLA executes,
with the larger branch of a condition, and one turn of a loop whose number of turns is
not known to the compiler, such as a line search that accepts its first trial.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import optax

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first

import hessopt
from benchmarks.problems import mlp
from hessopt.driver import loop
from hessopt.objective.binding import as_objective

SIZE = 10
"""Number of variables of the objective."""

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
"""Instructions that execute nothing."""

MINIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax.lbfgs": optax.lbfgs,
    "lbfgs": hessopt.lbfgs,
    "bfgs": hessopt.bfgs,
    "ssbroyden": functools.partial(hessopt.bfgs, formula="ssbroyden"),
    "newton": hessopt.newton,
    "newton_cg": hessopt.newton_cg,
    "trust_region_newton": hessopt.trust_region_newton,
}
RATES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax.sgd": lambda: optax.sgd(0.1),
    "generalized_newton": lambda: hessopt.generalized_newton(optax.sgd(1.0)),
    "generalized_newton, no safeguard": lambda: hessopt.generalized_newton(
        optax.sgd(1.0), safeguard=False
    ),
    "grouped_newton": lambda: hessopt.grouped_newton(optax.sgd(1.0), update_every=1),
}


class Instruction(NamedTuple):
    """One instruction of a compiled program."""

    kind: str
    line: str


class Program(NamedTuple):
    """A compiled program."""

    computations: dict[str, list[Instruction]]
    entry: str


class Size(NamedTuple):
    """What one execution of a computation consists of."""

    instructions: int = 0
    turns: int = 0  # of loops
    branches: int = 0  # conditions

    def plus(self, other: "Size", times: int = 1) -> "Size":
        """Add `times` executions of another computation."""
        return Size(*(x + times * y for x, y in zip(self, other, strict=True)))


def parsed(text: str) -> Program:
    """Parse the text of a compiled program."""
    computations: dict[str, list[Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        # the result of an instruction is an array, or a tuple of arrays and tuples
        part = re.match(
            r"\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", line
        )
        if head:
            name = head[2]
            entry = name if head[1] else entry
            computations[name] = []
        elif part and name:
            computations[name].append(Instruction(part[1], line))
    return Program(computations, entry)


def _called(line: str, *roles: str) -> list[str]:
    """The computations that an instruction calls in these roles."""
    found = re.findall(rf"(?:{'|'.join(roles)})=(?:\{{([^}}]*)\}}|%?([\w.-]+))", line)
    names = (name for pair in found for name in "".join(pair).split(","))
    return [name.strip().removeprefix("%") for name in names]


def size(program: Program, name: str) -> Size:
    """Count what one execution of a computation consists of."""
    total = Size()
    for kind, line in program.computations[name]:
        if kind in FREE:
            continue
        if kind == "call":
            (callee,) = _called(line, "to_apply")
            total = total.plus(size(program, callee))
            continue
        total = total.plus(Size(instructions=1))
        if kind == "while":
            known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            turns = int(known[1]) if known else 1
            (body,), (condition,) = _called(line, "body"), _called(line, "condition")
            once = Size(turns=1).plus(size(program, body))
            total = total.plus(once.plus(size(program, condition)), turns)
        if kind == "conditional":
            roles = "branch_computations", "true_computation", "false_computation"
            branches = [size(program, branch) for branch in _called(line, *roles)]
            total = total.plus(Size(branches=1)).plus(max(branches))
    return total


def _loops(program: Program, name: str) -> Iterator[str]:
    """The bodies of the loops of a computation that are not inside of another loop."""
    for kind, line in program.computations[name]:
        if kind == "while":
            yield from _called(line, "body")
        if kind == "call":
            (callee,) = _called(line, "to_apply")
            yield from _loops(program, callee)


def turn(program: Program) -> Size:
    """Count one turn of the largest loop."""
    return max(size(program, body) for body in _loops(program, program.entry))


def rosenbrock(x: jax.Array) -> jax.Array:
    """Rosenbrock's function of any number of variables."""
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def counted(value_fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[None]]:
    """Return the objective, and a list that grows when it is traced."""
    traces: list[None] = []

    def traced(*args: Any) -> Any:
        traces.append(None)
        return value_fn(*args)

    return traced, traces


def minimized(make: Callable[[], optax.GradientTransformation]) -> dict[str, Any]:
    """The row of an optimizer in the loop of `minimize`."""
    value_fn, traces = counted(rosenbrock)
    problem = loop.Problem(as_objective(value_fn), make(), has_aux=False)
    limits = loop.Limits(jnp.int32(100), *[jnp.asarray(1e-8)] * 3)
    params = jnp.full(SIZE, -1.2)
    run = jax.eval_shape(lambda x: loop.begin(problem, x, None, {}, limits), params)
    traces.clear()
    return _row(
        lambda run: loop.advance(problem, run, {}, limits, jnp.int32(100)), run, traces
    )


def peer() -> dict[str, Any]:
    """The row of optimistix's BFGS."""
    import optimistix

    value_fn, traces = counted(rosenbrock)
    solver = optimistix.BFGS(rtol=1e-8, atol=1e-8)
    return _row(
        lambda x: (
            optimistix.minimise(lambda y, _: value_fn(y), solver, x, throw=False).value
        ),
        jnp.full(SIZE, -1.2),
        traces,
    )


def trained(make: Callable[[], optax.GradientTransformation]) -> dict[str, Any]:
    """The row of a training step on a network of two hidden layers."""
    problem = mlp.noise((8, 8, 8, 2), 16)
    value_fn, traces = counted(problem.value_fn)
    tx = make()
    step = mlp.stepper(tx, value_fn)

    def epoch(count: jax.Array, carry: Any) -> Any:
        return jax.lax.fori_loop(0, count, lambda _, carry: step(carry), carry)

    carry = problem.params, tx.init(problem.params)
    return _row(functools.partial(epoch, jnp.int32(10)), carry, traces)


def _row(
    fun: Callable[[Any], Any], argument: Any, traces: list[None]
) -> dict[str, Any]:
    text = jax.jit(fun).lower(argument).compile().as_text()
    assert text is not None, "the backend does not show its programs"
    program = parsed(text)
    return turn(program)._asdict() | {
        "traces": len(traces),
        "kilobytes": round(len(text) / 1000),
        "one function": is_one_function(program),
    }


def is_one_function(program: Program) -> bool:
    """Return whether XLA compiles the loop of a program to a single function, by the
    mark that it has on CPUs."""
    entry = program.computations[program.entry]
    return any("xla_cpu_small_call" in line for _, line in entry)


def measure(quick: bool) -> tuple[dict[str, Any], Any]:
    """Compile all programs; return the record and the figure."""
    rows = {}
    with jax.enable_x64(True):
        for name, make in list(MINIMIZERS.items())[: 2 if quick else None]:
            rows[f"minimize, {name}"] = minimized(make)
        rows["optimistix BFGS"] = peer()
    for name, make in list(RATES.items())[: 2 if quick else None]:
        rows[f"training, {name}"] = trained(make)
    return {"rows": rows}, _figure(rows)


def markdown(record: dict[str, Any]) -> list[str]:
    """The table of a record."""
    rows = record["rows"]
    columns = list(next(iter(rows.values())))
    lines = [
        f"One step: of the loop of `minimize` for {SIZE} variables, float64, or of "
        "training a network of 8-8-8-2, float32. Loops with an unknown number of turns "
        "count one turn, conditions their larger branch.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for name, row in rows.items():
        cells = (row[column] for column in columns)
        shown = (
            ("yes" if cell else "no") if isinstance(cell, bool) else str(cell)
            for cell in cells
        )
        lines += [f"| {name} | " + " | ".join(shown) + " |"]
    return lines


def _figure(rows: dict[str, dict[str, Any]]) -> Any:
    figure, axis = plt.subplots(
        figsize=(8, 0.35 * len(rows) + 0.8), layout="constrained"
    )
    names = list(rows)[::-1]
    axis.barh(names, [rows[name]["instructions"] for name in names])
    axis.set_xlabel("instructions of a step")
    return figure
