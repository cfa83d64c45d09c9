"""`hessopt.typing` names what the modules above it define, and loads it on demand."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

import hessopt.typing

SOURCE = ast.parse(pathlib.Path(hessopt.typing.__file__).read_text())
DECLARED = {
    alias.name: node.module
    for node in ast.walk(SOURCE)
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hessopt")
    for alias in node.names
}
"""What type checkers see: names, and the modules that define them."""


@pytest.mark.parametrize("name", DECLARED)
def test_a_name_is_what_type_checkers_see(name: str):
    home = importlib.import_module(DECLARED[name] or "")
    assert getattr(hessopt.typing, name) is getattr(home, name)


def test_no_name_is_loaded_that_type_checkers_do_not_see():
    assert vars(hessopt.typing)["_HOMES"].keys() == DECLARED.keys()
    assert DECLARED.keys() <= set(dir(hessopt.typing))


def test_other_names_are_missing_as_in_any_module():
    with pytest.raises(AttributeError, match="has no attribute 'Missing'"):
        _ = hessopt.typing.Missing


def test_it_can_be_imported_first():
    program = "from hessopt.typing import Curvature, Mode, Params"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
