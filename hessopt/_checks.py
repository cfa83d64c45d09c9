"""Checks of arguments, and old names of renamed arguments and types."""

import functools
import importlib
import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Kind = TypeVar("_Kind")

REMOVED_IN = "0.3"
"""The version from which on old names are missing."""


def check_range(name: str, value: Any, low: Any, high: Any = math.inf) -> None:
    """Raise `ValueError` unless `low <= value <= high`. Schedules and traced values
    pass."""
    if callable(value) or any(isinstance(x, Tracer) for x in (value, low, high)):
        return
    try:
        low, value, high = (
            np.asarray(x) if isinstance(x, jax.Array) else x for x in (low, value, high)
        )
        # NumPy compares these: JAX would trace the comparison inside a program
        inside = low <= value <= high
    except TypeError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not inside:
        allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_count(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a static int of at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        hint = (
            f'; it shapes the program: pass static_args=("{name}",) to optax.inject_hyperparams'
            if isinstance(value, jax.Array)
            else ""
        )
        raise ValueError(f"{name} must be an int, at least 1, got {value!r}{hint}")


def check_word(name: str, value: object, words: Collection[str]) -> None:
    """Raise `ValueError` unless `value` is one of `words`."""
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name} must be one of {sorted(words)}, got {value!r}")


def check_transformation(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` is an optax transformation."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"{name} must be an optax transformation, with init and update, got {value!r}"
        )


def check_params(
    caller: str,
    params: Any,
    *,
    dtypes: Any = jnp.inexact,
    otherwise: str = "hold it fixed with hessopt.masked, or separate it",
) -> None:
    """Raise `TypeError` unless all leaves of params are numbers or arrays of the allowed
    dtypes; the message names the first leaf that is not, and what to do.

    Args:
      caller: name of the public function, for the message.
      params: pytree of anything.
      dtypes: `jnp.inexact`, floating and complex, or `np.generic`, any dtype.
      otherwise: what to do with an array of another dtype.
    """
    allowed = "floating or complex" if dtypes is jnp.inexact else "numeric"
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = _dtype(leaf)
        if dtype is not None and jnp.issubdtype(dtype, dtypes):
            continue
        if dtype is None:
            kind, way = f"is {_shortened(leaf)}", "separate the arrays from the rest"
        else:
            kind, way = f"is {dtype}", otherwise
        raise TypeError(
            f"{caller} needs {allowed} params, but params{jax.tree_util.keystr(path)} {kind}: {way}, "
            "as in `params, static = eqx.partition(model, eqx.is_inexact_array)`"
        )


def _shortened(leaf: object) -> str:
    """Return the text of a leaf, at most 80 characters."""
    text = " ".join(repr(leaf).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _dtype(leaf: object) -> Any:
    """Return the dtype of an array or a Python number, and None for anything else."""
    if isinstance(leaf, bool | int | float | complex):
        return np.dtype(type(leaf))
    dtype = getattr(leaf, "dtype", None)
    if isinstance(dtype, np.dtype):
        return None if dtype.kind in "OSU" else dtype  # objects and strings
    return dtype if isinstance(leaf, jax.Array) else None  # of random keys


def choose(name: str, value: str | _Kind, table: Mapping[str, _Kind]) -> _Kind:
    """Return the entry of `table` for a word, or `value` itself if it has the type of
    the entries; else raise `ValueError`."""
    if isinstance(value, str) and value in table:
        return table[value]
    if not callable(value) and not isinstance(value, tuple(map(type, table.values()))):
        kind = (
            "a callable"
            if any(map(callable, table.values()))
            else f"a {type(next(iter(table.values()))).__name__}"
        )
        raise ValueError(
            f"{name} must be one of {sorted(table)}, or {kind} that does the same, got {value!r}"
        )
    return cast("_Kind", value)  # other words were refused above


class StaticDefault(NamedTuple):
    """The default of an argument that shapes the program, in a signature. It is shown
    as the int that it stands for."""

    value: int

    def __repr__(self) -> str:
        return repr(self.value)


def injectable(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function so that `optax.inject_hyperparams` takes its arguments for
    what they are.

    That takes every number for a hyperparameter, defaults as well, and passes an array
    in its place. Defaults that are floats can be arrays. Those that are ints (numbers
    of steps, sizes of memories, seeds) cannot: they are no numbers in the signature,
    but a `StaticDefault`, for which the function receives the int. Complex parameters
    make hyperparameters complex; the function receives their real parts.
    """

    def plain(x: Any) -> Any:
        if isinstance(x, StaticDefault):
            return x.value
        return x.real if isinstance(x, jax.Array) and x.dtype.kind == "c" else x

    @functools.wraps(function)
    def injected(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        named = {name: plain(x) for name, x in kwargs.items()}
        return cast(Callable[..., _R], function)(*map(plain, args), **named)

    def declared(parameter: inspect.Parameter) -> inspect.Parameter:
        default = parameter.default
        if not isinstance(default, int) or isinstance(default, bool):
            return parameter
        return parameter.replace(default=StaticDefault(default))

    signature = inspect.signature(function)
    parameters = list(map(declared, signature.parameters.values()))
    vars(injected)["__signature__"] = signature.replace(parameters=parameters)
    return injected


def renamed_arguments(
    names: Mapping[str, str],
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator by which a function takes arguments by their old names too,
    with a `DeprecationWarning`.

    The signature has the new names alone. It binds the old ones, since
    `optax.inject_hyperparams` binds the arguments before it calls the function.

    Args:
      names: old name -> new name, of arguments that are given by keyword.

    Raises:
      TypeError: in the function, when both names of an argument are given.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def renamed(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            named = _by_new_names(names, kwargs)
            return cast(Callable[..., _R], function)(*args, **named)

        signature = inspect.signature(function)
        binding = _Renaming(
            list(signature.parameters.values()),
            return_annotation=signature.return_annotation,
        )
        binding.names = names
        vars(renamed)["__signature__"] = binding
        return renamed

    return decorate


class _Renaming(inspect.Signature):
    """A signature that binds arguments by their old names too."""

    names: Mapping[str, str] = MappingProxyType({})  # old -> new

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        return super().bind(*args, **_by_new_names(self.names, kwargs))

    def bind_partial(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        return super().bind_partial(*args, **_by_new_names(self.names, kwargs))


def warn_renamed(old: str, new: str, depth: int = 3) -> None:
    """Warn that a name is old; `depth` is that of the user's code above this
    function."""
    warnings.warn(
        f"{old} is named {new}; the old name works until {REMOVED_IN}",
        DeprecationWarning,
        stacklevel=depth,
    )


def _by_new_names(
    names: Mapping[str, str], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments by their new names, with a warning at the caller's caller for each
    old one."""
    found = dict(arguments)
    for old, new in names.items():
        if old not in arguments:
            continue
        if new in arguments:
            raise TypeError(
                f"{old} is the old name of {new}: give {new} alone, not both"
            )
        warn_renamed(old, new, depth=4)
        found[new] = found.pop(old)
    return found


def renamed_attributes(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module with renamed types: it finds them by their
    old names, with a `DeprecationWarning`.

    Args:
      module: its `__name__`.
      names: old name -> new name, after the name of the module that has it if that is
        another one.
    """

    def attribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name])
        home, _, new = names[name].rpartition(".")
        return getattr(importlib.import_module(home or module), new)

    return attribute
