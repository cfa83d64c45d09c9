"""Range checks of hyperparameters."""

import math
from typing import Any

from jax.core import Tracer


def check_range(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raise `ValueError` unless `low <= value <= high`; schedules and traced values pass."""
    if callable(value) or isinstance(value, Tracer):
        return
    if not low <= value <= high:
        bound = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bound}, got {value}")


def check_word(name: str, value: Any, words: Any) -> None:
    """Raise `ValueError` for a string that is none of `words`."""
    if isinstance(value, str) and value not in words:
        raise ValueError(f"{name} must be one of {sorted(words)}, got {value!r}")
