"""Pages made of the repository's own files, and docstrings in the dialect of
mkdocstrings.

mkdocs calls the functions `on_...`; griffe, which reads the source of hessopt, calls
`Docstrings`.
"""

import ast
import inspect
import logging
import pathlib
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[!_]*.py"))
SUMMARY = ROOT / "benchmarks" / "RESULTS.md"
RESULTS = [SUMMARY, *sorted(SUMMARY.parent.glob("results/*/*.png"))]
PUBLIC = re.findall(
    r" as (\w+),?$", (ROOT / "hessopt" / "__init__.py").read_text(), re.MULTILINE
)
LINKED = {*PUBLIC, "linen.TrainState", "nnx.Optimizer"}

log = logging.getLogger("mkdocs.hooks")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Extend the navigation by the examples, the results, the developers' pages and the
    changelog."""
    examples = [
        {"Gallery": "examples/index.md"},
        *({path.stem: f"examples/{path.stem}.md"} for path in EXAMPLES),
    ]
    results = str(SUMMARY.relative_to(ROOT))
    config.nav = [
        *(config.nav or []),
        {"Examples": examples},
        {"Study": "study.md"},
        {"Results": results},
        {"Developers": [{"Design": "design.md"}, {"Contributing": "CONTRIBUTING.md"}]},
        {"Changelog": "CHANGELOG.md"},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README, changelog, examples and results, where their relative links lead to
    each other."""
    own = {
        "index.md": "README.md",
        "study.md": "docs/study.md",
        "CHANGELOG.md": "CHANGELOG.md",
    }
    developers = {"design.md": "docs/design.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
    pages = {uri: ROOT / name for uri, name in (own | developers).items()}
    for uri, path in (
        pages | {str(path.relative_to(ROOT)): path for path in RESULTS}
    ).items():
        # a page that has no others beside it
        wide = "---\nhide: [navigation]\n---\n\n" if uri in own else ""
        content = (
            wide + adapted(path.read_text())
            if path.suffix == ".md"
            else path.read_bytes()
        )
        files.append(File.generated(config, uri, content=content))
    figures = sorted(
        path.stem for path in pathlib.Path(config.docs_dir, "figures").glob("*.png")
    )
    files.append(File.generated(config, "examples/index.md", content=gallery(figures)))
    for path in EXAMPLES:
        page = example(path, figures)
        files.append(File.generated(config, f"examples/{path.stem}.md", content=page))

    text = "\n".join(file.content_string for file in files.documentation_pages())
    differing = set(PUBLIC) ^ set(
        re.findall(r"^::: hessopt\.(\w+)$", text, re.MULTILINE)
    )
    if differing:
        log.warning(
            f"the names on the pages and those that hessopt exports differ in {sorted(differing)}"
        )
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Adapt the pages of the guide, which link to the repository's files as it has
    them."""
    return (
        markdown if page.file.generated_by or ":::" in markdown else adapted(markdown)
    )


def gallery(figures: list[str]) -> str:
    """The page with a card for every example."""
    cards = []
    for path in EXAMPLES:
        name, (summary, *_) = path.stem, described(path)
        picture = (
            [f"[![](../figures/{name}.png)]({name}.md)"] if name in figures else []
        )
        cards.append(
            "-   "
            + "\n\n    ".join(
                [*picture, f"[{name}]({name}.md)", summary.replace("\n", " ")]
            )
            + "\n"
        )
    return "\n".join(
        [
            "# Examples\n",
            "[Tasks](../tasks/index.md) are shorter programs, one for each kind of problem.\n",
            '<div class="grid cards" markdown>\n',
            *cards,
            "</div>\n",
        ]
    )


def example(path: pathlib.Path, figures: list[str]) -> str:
    """The page of an example: what it says of itself, its figures, its source."""
    pictures = [
        f"![{name}](../figures/{name}.png)"
        for name in figures
        if name.startswith(path.stem)
    ]
    source = textwrap.indent(f"````python\n{path.read_text()}````", "    ")
    front = f"---\nhide: [toc]\n---\n\n# {path.stem}"
    return "\n\n".join(
        [
            front,
            *described(path),
            *pictures,
            f'??? quote "examples/{path.name}"\n\n{source}',
        ]
    )


def described(path: pathlib.Path) -> list[str]:
    """The paragraphs of a file's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return [linked(paragraph) for paragraph in docstring.split("\n\n")]


def adapted(text: str) -> str:
    """Markdown of the repository as a page: links that lead to pages, and names that
    lead to their reference."""
    text = (
        re.sub(r"(\]\((?:\.\./)*examples/\w+)\.py\)", r"\1.md)", text)
        .replace("](docs/", "](")
        .replace("](../../README.md", "](index.md")
        .replace("](../../", "](")
        .replace("../benchmarks/", "benchmarks/")
        .replace("](../CONTRIBUTING.md", "](CONTRIBUTING.md")
        .replace("](pages/", "](")
    )
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    prose, blocks = map(linked, parts[::2]), [*parts[1::2], ""]
    return "".join(part for pair in zip(prose, blocks, strict=True) for part in pair)


def linked(text: str, here: str = "") -> str:
    """Lead from every public name in backquotes to its documentation."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        return (
            f"[{match[0]}][hessopt.{name}]"
            if name in LINKED and name != here
            else match[0]
        )

    return re.sub(
        r"(?<![\[`])`(?:hessopt\.)?((?:\w+\.)?\w+)(?:\([^`]*\))?`(?![\]`])", link, text
    )


class Docstrings(griffe.Extension):
    """Read arguments that share a description, headings of their own, and comments on
    fields."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite the docstrings of all that a package defines."""
        for thing in list(members(pkg)):
            if isinstance(thing, griffe.Class):
                document_fields(thing)
            if thing.docstring and not thing.is_module:
                text = separated(rearranged(inspect.cleandoc(thing.docstring.value)))
                thing.docstring.value = linked(text, thing.name)


def members(thing: griffe.Object) -> Iterator[griffe.Object]:
    """All that is defined in an object, itself included."""
    yield thing
    for member in thing.members.values():
        if isinstance(member, griffe.Object):
            yield from members(member)


def document_fields(cls: griffe.Class) -> None:
    """Add a list of the fields, explained by comments or strings in the source, to the
    docstring of a class."""
    if "__init__" in cls.members:  # the class explains it
        cls.members["__init__"].docstring = None
    if not cls.docstring or not any(
        str(base).endswith(("NamedTuple", "IntEnum", "IntFlag")) for base in cls.bases
    ):
        return
    items = [
        f"  {name}: {' '.join(explanation(field).split())}"
        for name, field in cls.attributes.items()
    ]
    cls.docstring.value = "\n".join(
        [inspect.cleandoc(cls.docstring.value), "", "Attributes:", *items]
    )


def explanation(field: griffe.Attribute) -> str:
    """The docstring of a field, or the comment on its line or on the lines above it."""
    if field.docstring:
        return field.docstring.value
    comment = re.search(r"  # (.*)$", field.source)
    if comment:
        return comment[1]
    assert field.lineno is not None
    above: list[str] = []
    for line in reversed(field.lines_collection[field.filepath][: field.lineno - 1]):
        if not line.lstrip().startswith("# "):
            break
        above.insert(0, line.lstrip().removeprefix("# "))
    return " ".join(above) or "see above"


def rearranged(text: str) -> str:
    """Rename sections to the headings of Google style, and set other headings in
    bold."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(
        r"^((?:Cost|Source)\b[^:\n]*:) ", r"**\1** ", text, flags=re.MULTILINE
    )


def separated(text: str) -> str:
    """Give each of several arguments that share a description a copy of it."""

    def copies(match: re.Match[str]) -> str:
        return "\n".join(
            f"  {name}: {match[2]}" for name in re.split(r",\s*", match[1])
        )

    head, heading, rest = text.partition("Args:\n")
    args, blank, rest = rest.partition("\n\n")
    args = re.sub(
        r"^  (\w+(?:,\s*\w+)+): (.*(?:\n    .*)*)", copies, args, flags=re.MULTILINE
    )
    return head + heading + args + blank + rest
