"""Solvers side by side: one run at a time, in a process with a limit of time.

A hang or a crash is then a failure and not a hole.
"""

import importlib
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problems import Problem

TIME_LIMIT = 60.0
"""Seconds for one run with its compilation and its repetition."""


class Worker:
    """A process that does one thing at a time, in float64, and is replaced when it does
    not answer."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process: Any = None

    def ask(self, fun: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        """Return `fun(*args)`, or `{"error": what happened}`; fun is a function of a
        module."""
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve,
                args=(theirs, jax.config.read("jax_disable_most_optimizations")),
                daemon=True,
            )
            self._process.start()
            self._pipe.recv()  # it has imported everything
        self._pipe.send((fun, args))
        try:
            if self._pipe.poll(TIME_LIMIT):
                return self._pipe.recv()
        except EOFError:
            return {"error": "crash"}
        self.close()
        return {"error": "time limit"}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _serve(pipe: Any, quick_compiles: bool) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", quick_compiles)
    importlib.import_module("benchmarks.solvers")
    pipe.send("ready")
    while True:
        fun, args = pipe.recv()
        jax.clear_caches()  # programs pile up otherwise until memory cannot be mapped
        try:
            row = fun(*args)
        except Exception as error:
            row = {"error": traceback.format_exception_only(error)[-1].strip()[:200]}
        pipe.send(row)


def solve(family: str, name: str, solver: str) -> dict[str, Any]:
    """Run a solver on a problem of `benchmarks.problems.FAMILY`; return what it spent
    and where it ended."""
    return ran(
        importlib.import_module(f"benchmarks.problems.{family}").load(name), solver
    )[0]


def ran(problem: Problem, solver: str) -> tuple[dict[str, Any], Any]:
    """What a solver spent and where it ended, and the point itself."""
    from benchmarks.solvers import FOR_MODELS, SOLVERS

    outcome = (SOLVERS | FOR_MODELS)[solver](
        problem.value_fn, problem.start, problem.gradient
    )
    spent = {name: what for name, what in outcome._asdict().items() if name != "x"}
    return where(problem, outcome.x) | spent, outcome.x


def where(problem: Problem, x: Any) -> dict[str, Any]:
    """What is to be judged of a point, by which bounds."""
    x = jnp.asarray(x)
    value, grad = jax.value_and_grad(problem.value_fn)(x)
    row = {"n": x.size, "f_ref": problem.f_ref, "bound": problem.gradient}
    return row | {"f": float(value), "g": float(jnp.max(jnp.abs(grad)))}


def judge(rows: Sequence[dict[str, Any]]) -> None:
    """Add both criteria to the runs of one problem: (a) the gradient, (b) the value."""
    values = [row["f"] for row in rows if "f" in row and np.isfinite(row["f"])]
    for row in rows:
        row["a"] = row["b"] = False
        if "f" in row:
            row["best"] = min([row["f_ref"], *values])
            row["a"], row["b"] = flat(row), low(row, row["best"])


def flat(row: dict[str, Any]) -> bool:
    """Whether a run meets criterion (a)."""
    return bool(row["g"] <= row["bound"])


def low(row: dict[str, Any], best: float, key: str = "f") -> bool:
    """Whether a value meets criterion (b)."""
    return bool(row[key] - best <= 1e-6 * max(1.0, abs(best)))
