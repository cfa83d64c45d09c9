"""The programs of the pages on tasks run in an empty folder, print what the page shows,
and draw its picture."""

import math
import re

import pytest

from docs import tasks

NUMBER = re.compile(r"[-+]?\d+(?:\.(\d*))?(?:e([-+]\d+))?", re.IGNORECASE)


def same(shown, printed):
    """Whether a number is within three units of the last digit that the page shows; a
    single digit with an exponent is an order of magnitude."""
    match = NUMBER.fullmatch(shown)
    assert match
    digits, exponent = match.groups()
    a, b = float(shown), float(printed)
    if exponent and not digits and a * b > 0:
        return abs(math.log10(b / a)) <= 0.7
    return abs(a - b) <= 3.001 * 10.0 ** (int(exponent or 0) - len(digits or ""))


def differences(shown, printed):
    """The pairs of numbers that differ, or of texts if these do."""
    texts = [NUMBER.sub("#", text).split() for text in (shown, printed)]
    if texts[0] != texts[1]:
        return [(shown, printed)]
    pairs = zip(
        *([match[0] for match in NUMBER.finditer(text)] for text in (shown, printed)),
        strict=True,
    )
    return [pair for pair in pairs if not same(*pair)]


@pytest.mark.parametrize("name", sorted(tasks.PAGES))
def test_the_program_prints_what_the_page_shows_and_draws_its_picture(name, tmp_path):
    printed = tasks.run(name, tmp_path)
    assert differences(tasks.output(name), printed) == []
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]


@pytest.mark.parametrize("name", sorted(tasks.PAGES))
def test_the_page_has_one_short_program_a_picture_and_advice(name):
    lines = tasks.program(name).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 88
    text = tasks.PAGES[name].read_text()
    assert f"](../figures/task_{name}.png)" in text
    assert (tasks.FIGURES / f"task_{name}.png").exists()
    advice = text.partition("## What to look at when it fails\n")[2]
    assert 3 <= advice.count("\n- ") <= 5
    assert "](../troubleshooting.md)" in advice


def test_every_page_is_in_the_navigation_and_on_the_index_by_its_title():
    titles = {
        name: path.read_text().partition("\n")[0].removeprefix("# ")
        for name, path in tasks.PAGES.items()
    }
    config = (tasks.ROOT / "docs" / "mkdocs.yml").read_text()
    index = (tasks.TASKS / "index.md").read_text()
    in_config = re.findall(r"- (.*): tasks/(?!index)(\w+)\.md$", config, re.MULTILINE)
    on_index = re.findall(r"^    \[(.*)\]\((\w+)\.md\)$", index, re.MULTILINE)
    assert in_config == on_index
    assert {name: title for title, name in on_index} == titles
    figures = re.findall(r"!\[\]\(\.\./figures/task_(\w+)\.png\)", index)
    assert figures == [name for _, name in on_index]


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("loss 0.0123", "loss 0.0126", True),
        ("loss 0.0123", "loss 0.0127", False),
        ("error 3e-06", "error 1e-06", True),
        ("error 3e-06", "error 3e-07", False),
        ("1.2e-05", "1.5e-05", True),
        ("a [1. 2.]", "a [1.   2.]", True),
        ("GRADIENT 1", "MAX_STEPS 1", False),
        ("-0.5", "0.5", False),
    ],
)
def test_outputs_are_compared_to_a_few_units_of_the_last_digit(shown, printed, equal):
    assert (differences(shown, printed) == []) == equal
