"""CUTEst problems as `sif2jax` defines them, each loaded from its own module, since all
of sif2jax takes a minute to import."""

import functools
import importlib
import importlib.util
import pathlib
import re
import sys
import types
from typing import Any

KINDS = ("unconstrained_minimisation", "nonlinear_equations", "bounded_minimisation")


def problem(name: str, kind: str, **arguments: Any) -> Any:
    """Return the problem of this name and kind."""
    module = _modules(kind).get(name)
    if module is None:
        raise LookupError(f"sif2jax has no problem {name} of {kind}")
    return getattr(importlib.import_module(module), name)(**arguments)


def names(kind: str) -> list[str]:
    """Return the names of all problems of a kind."""
    return sorted(_modules(kind))


@functools.cache
def _modules(kind: str) -> dict[str, str]:
    """Return the module of each problem of a kind."""
    package = f"sif2jax.cutest._{kind}"
    found = {}
    for file in sorted(_folder(package).glob("*.py")):
        if not file.name.startswith("_"):
            for name in re.findall(r"^class (\w+)\b", file.read_text(), re.MULTILINE):
                found.setdefault(name, f"{package}.{file.stem}")
    return found


def _folder(package: str) -> pathlib.Path:
    """Return the folder of a package, and put empty modules in the place of the package
    and of those that contain it, so that importing its modules imports nothing else."""
    folder, path = _root(), "sif2jax"
    for part in ["", *package.split(".")[1:]]:
        path, folder = f"{path}.{part}".rstrip("."), folder / part
        stand_in = types.ModuleType(path)
        stand_in.__path__ = [str(folder)]
        sys.modules.setdefault(path, stand_in)
    return folder


@functools.cache
def _root() -> pathlib.Path:
    spec = importlib.util.find_spec("sif2jax")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the CUTEst problems come from sif2jax: pip install hessopt[bench]"
        )
    return pathlib.Path(spec.origin).parent
