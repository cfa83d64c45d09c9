"""Range checks of hyperparameters."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


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
        bound = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bound}, got {value}")


def check_count(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a static int of at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        hint = (
            "; under optax.inject_hyperparams, list it in static_args"
            if isinstance(value, jax.Array)
            else ""
        )
        raise ValueError(f"{name} must be an int, at least 1, got {value!r}{hint}")


def check_word(name: str, value: Any, words: Any) -> None:
    """Raise `ValueError` unless `value` is one of `words`."""
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name} must be one of {sorted(words)}, got {value!r}")


def check_transformation(name: str, value: Any) -> None:
    """Raise `TypeError` unless `value` is an optax transformation."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(
            f"{name} must be an optax transformation, with init and update, got {value!r}"
        )


def choose(name: str, value: Any, table: Mapping[str, Any]) -> Any:
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
    return value
