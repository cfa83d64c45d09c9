"""Old names of types of `hessopt.kinds.rates`, until 0.3."""

from collections.abc import Callable
from typing import Any

from hessopt._checks import renamed_attributes

__getattr__: Callable[[str], Any] = renamed_attributes(
    __name__,
    {
        "Restricted": "hessopt.kinds.rates.RateProblem",
        "Measured": "hessopt.kinds.rates.Measurement",
        "Solved": "hessopt.kinds.rates.RateSolution",
        "RateInfo": "hessopt.kinds.rates.RateInfo",
    },
)
