"""Imports run one way: typing, numerics, trees, objective, calculus, kinds, transforms,
then optimizers and driver."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "hessopt"
BASE = {"typing", "_checks"}
ROOMS = ("numerics", "trees", "objective", "calculus", "kinds", "transforms")
"""Each imports from itself and from those before it."""
BELOW = {room: BASE | set(ROOMS[: i + 1]) for i, room in enumerate(ROOMS)}
METHODS = BASE | set(ROOMS)
ALLOWED = {
    "typing": set(),
    "_checks": set(),
    **BELOW,
    # one method, one file: they never import each other
    "transforms": METHODS - {"transforms"},
    "optimizers": METHODS,
    "driver": METHODS - {"transforms"} | {"driver"},
    "linen": BELOW["objective"],
    "nnx": BELOW["objective"],
    "__init__": METHODS | {"optimizers", "driver"},
}
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.parent == ROOT or path.name != "__init__.py"
)


def layer(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> list[ast.stmt]:
    """The imports of a file; of `typing.py` without those that only type checkers see:
    it names what the layers above it define."""
    program = ast.parse(path.read_text())
    unseen = [
        statement
        for branch in program.body
        if path == ROOT / "typing.py"
        and isinstance(branch, ast.If)
        and ast.unparse(branch.test) == "TYPE_CHECKING"
        for statement in branch.body
    ]
    return [
        node
        for node in ast.walk(program)
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in unseen
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_the_layers_below_it_only(path: pathlib.Path):
    here = path.relative_to(ROOT)
    for node in imports(path):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or ""]
        else:
            assert isinstance(node, ast.Import)
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] == "hessopt":
                imported = tuple(name.split(".")[1:])
                assert layer(imported) in ALLOWED[layer(here.parts)], (
                    f"{here} imports {name}"
                )


def test_numerics_import_jax_only():
    for path in (ROOT / "numerics").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            assert {str(m).split(".")[0] for m in modules} <= {
                "jax",
                "hessopt",
                "typing",
                "collections",
                "math",
            }
