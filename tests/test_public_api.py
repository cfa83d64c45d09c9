"""What is public, as a text: every name, signature and field. A change of it is seen in
review.

The text is made of the source, in which a default has a name: printed values differ
between versions of Python and of what hessopt stands on.
"""

import ast
import functools
import importlib
import inspect
import pathlib
from collections.abc import Iterator

import pytest

TEXT = pathlib.Path(__file__).with_name("public_api.txt")
MODULES = ("hessopt", "hessopt.typing", "hessopt.linen", "hessopt.nnx")
ROOT = pathlib.Path(__file__).parents[1]

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@functools.cache
def program(module: str) -> list[ast.stmt]:
    """The statements of a module, with those that type checkers alone see."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: list[ast.stmt] = []
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.If):
            found += statement.body
        else:
            found.append(statement)
    return found


def defined(statement: ast.stmt) -> str | None:
    """The name that a statement defines, if it defines one."""
    match statement:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name
        case ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return None


def exported(module: str) -> Iterator[str]:
    """The public names of a module: what it defines, and what it imports as itself."""
    for statement in program(module):
        if isinstance(statement, ast.ImportFrom):
            yield from (x.name for x in statement.names if x.name == x.asname)
        name = defined(statement)
        if name is not None and not name.startswith("_"):
            yield name


def definition(module: str, name: str) -> Definition:
    """The statement that defines a name, in whatever module."""
    for statement in program(module):
        if defined(statement) == name:
            assert isinstance(statement, Definition)
            return statement
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if name in (alias.asname, alias.name):
                    return definition(statement.module or "", alias.name)
    raise LookupError(f"{module}.{name}")


def described(name: str, node: ast.stmt) -> list[str]:
    """The lines that describe what a statement defines."""
    match node:
        case ast.FunctionDef():
            return _function(name, node)
        case ast.ClassDef():
            return _class(name, node)
        case ast.Assign():
            return [f"{name} = {ast.unparse(node.value)}"]
        case ast.AnnAssign(value=None):
            return [f"{name}: {ast.unparse(node.annotation)}"]
        case ast.AnnAssign():
            kind, value = ast.unparse(node.annotation), ast.unparse(node.value)
            return [f"{name} = {value}" if kind == "TypeAlias" else f"{name}: {kind}"]
    return []


def _function(name: str, node: ast.FunctionDef) -> list[str]:
    """One line for each argument."""
    returned = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    parameters = list(_parameters(node.args))
    if not parameters:
        return [f"{name}(){returned}"]
    return [f"{name}(", *(f"    {x}," for x in parameters), f"){returned}"]


def _parameters(args: ast.arguments) -> Iterator[str]:
    """The arguments in the order of a signature."""
    positional = args.posonlyargs + args.args
    required = len(positional) - len(args.defaults)
    for place, arg in enumerate(positional):
        default = args.defaults[place - required] if place >= required else None
        yield _parameter(arg, default)
        if place + 1 == len(args.posonlyargs):
            yield "/"
    if args.vararg is not None:
        yield f"*{_parameter(args.vararg)}"
    elif args.kwonlyargs:
        yield "*"
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield _parameter(arg, default)
    if args.kwarg is not None:
        yield f"**{_parameter(args.kwarg)}"


def _parameter(arg: ast.arg, default: ast.expr | None = None) -> str:
    kind = "" if arg.annotation is None else f": {ast.unparse(arg.annotation)}"
    return f"{arg.arg}{kind}" + (
        "" if default is None else f" = {ast.unparse(default)}"
    )


def _class(name: str, node: ast.ClassDef) -> list[str]:
    """Its bases, fields, members, properties and methods."""
    lines = [f"{name}({', '.join(map(ast.unparse, node.bases))})"]
    for part in node.body:
        own = defined(part)
        if own is None or (own.startswith("_") and own != "__init__"):
            continue
        if isinstance(part, ast.FunctionDef) and part.decorator_list:
            returned = "" if part.returns is None else ast.unparse(part.returns)
            found = [f"{own}: {returned}  (property)"]
        else:
            found = described(own, part)
        if isinstance(part, ast.AnnAssign) and part.value is not None:
            found = [f"{found[0]} = {ast.unparse(part.value)}"]
        lines += [f"    {line}" for line in found]
    return lines


def text() -> str:
    """Everything public, a paragraph for each name."""
    paragraphs = [
        "\n".join(described(f"{module}.{name}", definition(module, name)))
        for module in MODULES
        for name in sorted(exported(module))
    ]
    return "\n\n".join(paragraphs) + "\n"


def test_what_is_public_is_what_was_agreed_on():
    assert text() == TEXT.read_text(), (
        "what is public has changed: if that is meant, write it down with "
        "`python -m tests.test_public_api`, and in the changelog"
    )


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_the_names_that_its_source_exports(module: str):
    loaded = importlib.import_module(module)
    for name in exported(module):
        node, thing = definition(module, name), getattr(loaded, name)
        if isinstance(node, ast.FunctionDef):
            written = [
                parameter.arg
                for parameter in ast.walk(node.args)
                if isinstance(parameter, ast.arg)
            ]
            assert set(inspect.signature(thing).parameters) == set(written)
        if isinstance(node, ast.ClassDef):
            assert inspect.isclass(thing)
            fields = [defined(x) for x in node.body if isinstance(x, ast.AnnAssign)]
            assert list(getattr(thing, "_fields", fields)) == fields


def test_hessopt_has_no_other_public_names():
    hessopt = importlib.import_module("hessopt")
    found = {
        name
        for name, thing in vars(hessopt).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }
    assert found == set(exported("hessopt"))


if __name__ == "__main__":
    TEXT.write_text(text())
