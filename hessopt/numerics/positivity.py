"""The old name of `hessopt.numerics.indefiniteness`, until 0.3."""

from collections.abc import Callable
from typing import Any

from hessopt._checks import renamed_attributes

_NEW = "hessopt.numerics.indefiniteness"

__getattr__: Callable[[str], Any] = renamed_attributes(
    __name__,
    {
        "Factorization": f"{_NEW}.Factorization",
        "Positivity": f"{_NEW}.IndefiniteTreatment",
        "SHIFT": f"{_NEW}.SHIFT",
        "ABSOLUTE": f"{_NEW}.ABSOLUTE",
        "NONE": f"{_NEW}.NONE",
        "POSITIVITIES": f"{_NEW}.INDEFINITE_TREATMENTS",
    },
)
