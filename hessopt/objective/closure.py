"""Prepares an objective for `jax.jit`: its identity as a static argument, and the
traced values that it closes over."""

import gc
import inspect
from collections.abc import Callable
from types import FunctionType, ModuleType

import jax
from jax.core import Tracer, eval_jaxpr

from hessopt.objective.binding import Objective, as_objective
from hessopt.objective.rowwise import Rowwise, Several
from hessopt.typing import Data, ObjectiveFn, Params

_NO_HOLDERS = (type, ModuleType, jax.Array, type(jax.tree_util.default_registry))
"""Types that the search for traced values does not enter, since they refer to objects
outside of the objective."""


class _Identified:
    """A callable that is equal only to itself."""

    def __init__(self, call: Callable[..., Params]):
        self.call = call
        self.__signature__ = inspect.signature(call)

    def __call__(self, *args: object, **kwargs: object) -> Params:
        return self.call(*args, **kwargs)

    def __hash__(self) -> int:
        return id(self.call)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identified) and other.call is self.call


def identified(value_fn: ObjectiveFn) -> Objective:
    """Return a hashable objective: a part without a hash, such as an object that holds
    arrays, is wrapped and compared by identity."""
    return Objective(tuple(map(_hashable, as_objective(value_fn).parts)))


def _hashable(part: Callable[..., Params]) -> Callable[..., Params]:
    if isinstance(part, Several):
        return Several(tuple(map(_hashable, part.fns)))
    if isinstance(part, Rowwise):
        return Rowwise(_hashable(part.fn), part.over)
    try:
        hash(part)
    except TypeError:
        return _Identified(part)
    return part


def open_closure(
    value_fn: Objective,
    bind_to: Callable[[Data], Objective],
    params: Params,
    data: Data,
) -> tuple[Objective, Data]:
    """Turn the traced values that the objective closes over into data; their
    derivatives would be lost otherwise.

    Args:
      value_fn: the objective.
      bind_to: `data -> value_fn as an objective of params alone`.
      params: pytree at which the objective can be evaluated.
      data: the argument of `bind_to`.

    Returns:
      `value_fn` and `data`; or an objective that also takes the traced values, and data
      that contain them.

    Cost: a traversal of the objects that the objective refers to; one abstract
    evaluation of the objective if a traced value is found.
    """
    if not _holds_tracers(value_fn):
        return value_fn, data
    parts, held, x = [], [], params
    for i in range(len(value_fn.parts)):
        part, of_part, x = _opened(
            lambda x, data, i=i: bind_to(data).parts[i](x), x, data
        )
        parts.append(lambda x, data, held, i=i, part=part: part(x, data, held[i]))
        held.append(of_part)
    if not jax.tree.leaves(held):  # all calls can share one program
        return value_fn, data
    return Objective(tuple(parts)), {"data": data, "held": held}


def _opened(
    fn: Callable[..., Params], x: Params, data: Data
) -> tuple[Callable[..., Params], list[Tracer], Params]:
    """Return `fn` as `opened(x, data, held)`, the traced values `held` that it closes
    over, and the shapes of its outputs."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(x, data)
    held = [const for const in closed.consts if isinstance(const, Tracer)]
    fixed = [None if isinstance(const, Tracer) else const for const in closed.consts]

    def opened(x: Params, data: Data, held: list[Tracer]) -> Params:
        rest = iter(held)
        consts = [next(rest) if const is None else const for const in fixed]
        outputs = eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves((x, data)))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return opened, held, shapes


def _holds_tracers(thing: object) -> bool:
    """Return whether a callable refers to a traced value, directly or through other
    objects; globals are not searched."""
    seen, reached = set(), [thing]
    while reached:
        thing = reached.pop()
        if isinstance(thing, Tracer):
            return True
        if (
            id(thing) in seen
            or not gc.is_tracked(thing)
            or isinstance(thing, _NO_HOLDERS)
        ):
            continue
        seen.add(id(thing))
        if isinstance(thing, FunctionType):
            reached += (
                thing.__closure__,
                thing.__defaults__,
                thing.__kwdefaults__,
                vars(thing),
            )
        else:
            reached += gc.get_referents(thing)
    return False
