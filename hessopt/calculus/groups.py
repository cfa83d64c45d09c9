"""The old name of `hessopt.trees.groups`, until 0.3."""

from collections.abc import Callable
from typing import Any

from hessopt._checks import renamed_attributes

__getattr__: Callable[[str], Any] = renamed_attributes(
    __name__,
    {
        "Groups": "hessopt.trees.groups.Groups",
    },
)
