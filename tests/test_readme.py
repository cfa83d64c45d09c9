"""The code of the README and of the guide runs as it stands."""

import pathlib
import re

import pytest

from tests.marks import slow_if

ROOT = pathlib.Path(__file__).parents[1]
GUIDE = (
    "bounds",
    "choosing",
    "guarantees",
    "migration",
    "training",
    "troubleshooting",
)
LONG = [f"docs/pages/{name}.md" for name in ("bounds", "migration", "training")]
"""Pages whose programs compile for long, left to the slow suite."""

PAGES = ("README.md", *(f"docs/pages/{name}.md" for name in GUIDE))


def source(text):
    """The `python` blocks, on the lines that they have in the page; `py` marks code of
    other libraries."""
    lines = [""] * text.count("\n")
    for match in re.finditer(
        r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL
    ):
        start = text.count("\n", 0, match.start(1))
        code = match[1].splitlines()
        lines[start : start + len(code)] = code
    return "\n".join(lines)


@pytest.mark.parametrize("page", slow_if(LONG.__contains__, PAGES))
def test_code_of_the_page_runs(page):
    code = source((ROOT / page).read_text())
    assert code.strip()
    exec(compile(code, str(ROOT / page), "exec"), {"__name__": "__main__"})


def test_blocks_keep_their_lines():
    text = "# Title\n\n```py\nother()\n```\n\n```python\nfirst()\n```\ntext\n```python\n\nraise KeyError\n```\n"
    assert source(text).split("\n")[5:13] == [
        "",
        "",
        "first()",
        "",
        "",
        "",
        "",
        "raise KeyError",
    ]
