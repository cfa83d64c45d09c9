"""What an objective holds: its identity as a static argument of `jax.jit`, and the traced values it closes over."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from hessopt._loop import Problem, bound
from hessopt.calculus.objective import Composite
from hessopt.typing import Params


class _Identified:
    """A callable that is equal to itself alone."""

    def __init__(self, call: Callable[..., Any]):
        self.call = call
        self.__signature__ = inspect.signature(call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __hash__(self) -> int:
        return id(self.call)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identified) and other.call is self.call


def identified(value_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return value_fn, or a stand-in with its identity where it has no hash, as objects that hold arrays."""
    if isinstance(value_fn, Composite):
        return Composite(identified(value_fn.model_fn), identified(value_fn.loss_fn))
    try:
        hash(value_fn)
    except TypeError:
        return _Identified(value_fn)
    return value_fn


def open_closure(problem: Problem, params: Params, data: dict[str, Any]) -> tuple[Problem, dict[str, Any]]:
    """Turn the traced values that the objective closes over into data; else their derivatives would be lost."""
    value_fn = problem.value_fn
    if not _holds_tracers(value_fn):
        return problem, data
    if not isinstance(value_fn, Composite):
        opened, held = jax.closure_convert(lambda p, data: bound(problem, data)(p), params, data)
        return problem._replace(value_fn=lambda p, data, held: opened(p, data, *held)), {"data": data, "held": held}

    model, of_model = jax.closure_convert(lambda p, data: bound(problem, data).model_fn(p), params, data)
    outputs = jax.eval_shape(model, params, data, *of_model)
    loss, of_loss = jax.closure_convert(lambda x, data: bound(problem, data).loss_fn(x), outputs, data)
    parts = Composite(
        lambda p, data, of_model: model(p, data, *of_model), lambda x, data, of_loss: loss(x, data, *of_loss)
    )
    return problem._replace(value_fn=parts), {"data": data, "of_model": of_model, "of_loss": of_loss}


def _holds_tracers(thing: Any, depth: int = 5) -> bool:
    """Whether a callable holds a traced value, itself or in the callables that it holds."""
    if depth == 0 or not callable(thing):
        return isinstance(thing, Tracer)
    held = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
    held += [getattr(thing, name, None) for name in ("__self__", "__wrapped__")]
    if isinstance(thing, functools.partial):
        held += [thing.func, thing.args, thing.keywords]
    elif not inspect.isroutine(thing):
        held += [getattr(thing, "__dict__", None)]
    return any(_holds_tracers(leaf, depth - 1) for leaf in jax.tree.leaves(held))
