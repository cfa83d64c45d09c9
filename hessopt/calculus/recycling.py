"""The old name of `hessopt.kinds.line_searches`, until 0.3."""

from collections.abc import Callable
from typing import Any

from hessopt._checks import renamed_attributes

__getattr__: Callable[[str], Any] = renamed_attributes(
    __name__,
    {
        "LinesearchInfo": "hessopt.kinds.line_searches.LinesearchInfo",
    },
)
