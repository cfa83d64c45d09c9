"""Marks shared by parametrized tests."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import pytest

needs_explicit = pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="this version of JAX has no explicit sharding"
)


def slow_if(is_slow: Callable[[str], bool], names: Iterable[str]) -> list[Any]:
    """All names as parameters; those that are slow run in the slow suite."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if is_slow(name) else [])
        for name in names
    ]
