"""Every public name says what it takes, gives, raises and costs and where it comes
from, and shows itself at work."""

import ast
import inspect
import re
from typing import Any

import pytest

import hessopt
import hessopt.linen
import hessopt.nnx
import hessopt.transforms

PUBLIC = {
    name: x
    for name, x in vars(hessopt).items()
    if not name.startswith("_") and not inspect.ismodule(x)
}
FUNCTIONS = {name: x for name, x in PUBLIC.items() if inspect.isfunction(x)}
CLASSES = {
    "linen.TrainState": hessopt.linen.TrainState,
    "nnx.Optimizer": hessopt.nnx.Optimizer,
}
METHODS = {
    f"{name}.{method}": x
    for name, cls in CLASSES.items()
    for method, x in vars(cls).items()
    if inspect.isfunction(x)
    and x.__module__ == cls.__module__
    and not method.startswith("_")
}
STATES = {
    name: x
    for module in vars(hessopt.transforms).values()
    if inspect.ismodule(module)
    for name, x in vars(module).items()
    if name.endswith(("State", "Info"))
}
RECORDS = {name: x for name, x in PUBLIC.items() if inspect.isclass(x)} | STATES

SECTIONS = ("Args", "Returns", "Raises", "Cost", "Example", "Source")
NONE = {
    "composite": {"Cost"},
    "diagnostics": {"Raises", "Cost", "Source"},
    "group_labels": {"Cost", "Source"},
    "masked": {"Source"},
    "microbatched": {"Source"},
    "restriction": {"Source"},
    "value_and_grad_from_state": {"Raises", "Source"},
}
"""What these do not have: helpers raise nothing, cost nothing, or implement no
published method."""


def sections(thing: Any) -> dict[str, str]:
    """The parts of a docstring by the first word of their headings, such as `Cost per
    update:`."""
    _, *parts = re.split(
        rf"^({'|'.join(SECTIONS)})\b[^:\n]*:",
        inspect.getdoc(thing) or "",
        flags=re.MULTILINE,
    )
    return dict(zip(parts[::2], parts[1::2], strict=True))


def described(args: str) -> set[str]:
    """The names before the colons of a section of arguments, where several may share a
    description."""
    items = re.split(r"\n(?!\s)", inspect.cleandoc(args).strip())
    return {
        name.strip(" *\n")
        for item in items
        for name in item.partition(":")[0].split(",")
    }


def taken(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_all_arguments_are_described_and_no_others(name: str):
    function = (FUNCTIONS | METHODS)[name]
    assert described(sections(function).get("Args", "")) == taken(function)


def test_all_arguments_of_a_constructor_are_described_with_its_class():
    assert described(sections(hessopt.nnx.Optimizer)["Args"]) == taken(
        hessopt.nnx.Optimizer.__init__
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_every_section(name: str):
    assert set(SECTIONS) - set(sections(FUNCTIONS[name])) == NONE.get(name, set())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_every_section_that_its_class_has_not(name: str):
    gives = (
        {"Returns"}
        if inspect.signature(METHODS[name]).return_annotation is not None
        else set()
    )
    assert set(sections(METHODS[name])) == {"Args", "Raises", "Cost"} | gives


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_an_example_is_given(name: str):
    assert ">>>" in sections((FUNCTIONS | CLASSES)[name]).get("Example", "")


@pytest.mark.parametrize(
    "name", [name for name in FUNCTIONS if "Source" not in NONE.get(name, ())]
)
def test_a_source_is_found_where_it_is_said_to_be(name: str):
    source = sections(FUNCTIONS[name])["Source"]
    if "see `" in source:
        for other in re.findall(r"`(\w+)`", source):
            assert "Source" in sections(FUNCTIONS[other])
    else:
        assert re.search(r"\b(19|20)\d\d\b|arXiv", source)


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_is_explained(name: str):
    source = inspect.getsource(RECORDS[name])
    (cls,), lines = ast.parse(source).body, source.splitlines()
    assert isinstance(cls, ast.ClassDef)
    assert ast.get_docstring(cls)
    for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            above, own = lines[node.lineno - 2 : node.lineno]
            explained = (
                isinstance(after, ast.Expr)
                or "#" in own
                or above.lstrip().startswith("#")
            )
            # which has fields of its own
            assert explained or ast.unparse(node).endswith("Info"), ast.unparse(node)
