"""The method of CONTRIBUTING.md keeps the contract, the paths that the developers'
pages name exist, and tools have one version everywhere."""

import doctest
import functools
import inspect
import pathlib
import re

import pytest

from tests import contract
from tests.test_docstrings import SECTIONS, described, sections, taken
from tests.test_readme import source

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"


@functools.cache
def page():
    """What the `python` blocks define."""
    names = {"__name__": "contributing"}
    exec(compile(source(PAGE.read_text()), str(PAGE), "exec"), names)
    return names


def method():
    return page()["scale_by_barzilai_borwein"]


@pytest.mark.parametrize(
    "law",
    [
        pytest.param(
            law, marks=[pytest.mark.slow] if law in contract.COSTLY else [], id=name
        )
        for name, law in ((law.__name__, law) for law in contract.LAWS)
    ],
)
def test_the_method_keeps_the_law(law):
    law(page()["CASE"])


def test_the_method_is_documented_like_any_other():
    parts = sections(method())
    assert set(parts) == set(SECTIONS)
    assert described(parts["Args"]) == taken(method())
    text = inspect.getdoc(method()) or ""
    example = doctest.DocTestParser().get_doctest(text, page(), PAGE.name, None, 0)
    found = doctest.DocTestRunner().run(example)
    assert (found.failed, found.attempted > 0) == (0, True)


def paths(text):
    """The paths in code spans, in `bash` blocks and in links."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    words = " ".join([*blocks, *re.findall(r"`([^`]*)`", prose)]).split()
    made = (".venv/", "/tmp/")  # by the commands
    return {
        word
        for word in words
        if re.fullmatch(r"[\w.-]+(/[\w.-]*)+|[\w.-]+\.(md|py|toml|ya?ml)", word)
        and not word.startswith(made)
    }


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/design.md"])
def test_every_path_of_a_page_exists(name):
    text = (ROOT / name).read_text()
    links = {
        target.partition("#")[0]
        for target in re.findall(r"\]\(([^)]*)\)", text)
        if "://" not in target
    }
    assert len(paths(text)) > 10
    assert [path for path in paths(text) if not (ROOT / path).exists()] == []
    beside = (ROOT / name).parent
    assert [link for link in links if not (beside / link).exists()] == []


def test_paths_are_found_in_prose_and_commands_alike():
    text = (
        "`a/b.py`, `c.md` and `d` or [e](f.md), `python g/h.py`\n\n"
        "```bash\n.venv/bin/python i/\n```\n```python\nj/k\n```\n"
    )
    assert paths(text) == {"a/b.py", "c.md", "g/h.py", "i/"}


def test_tools_have_one_version_everywhere():
    extra, hooks = (
        set(re.findall(r"\b(ruff|pyright)(?:\[nodejs\])?==([\d.]+)", text))
        for text in (
            (ROOT / name).read_text()
            for name in ("pyproject.toml", ".pre-commit-config.yaml")
        )
    )
    assert {name for name, _ in extra} == {"ruff", "pyright"}
    assert extra == hooks
    assert '".[dev]"' in (ROOT / ".ci/run").read_text()
