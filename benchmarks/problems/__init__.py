"""What is measured on."""

from typing import Any, NamedTuple


class Problem(NamedTuple):
    """An objective of one vector, its start, and what counts as solved."""

    name: str
    value_fn: Any  # (n,) -> ()
    start: Any  # (n,), float64
    gradient: float  # bound on the largest entry of the gradient
    f_ref: float  # lowest value that is known
