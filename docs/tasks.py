"""Run the programs of the pages in `docs/pages/tasks`, and write what they print into
the pages, and their pictures into `docs/pages/figures`.

    python docs/tasks.py            # all pages
    python docs/tasks.py curve ode  # some
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
TASKS = ROOT / "docs" / "pages" / "tasks"
FIGURES = ROOT / "docs" / "pages" / "figures"
PAGES = {path.stem: path for path in TASKS.glob("*.md") if path.stem != "index"}

PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(
    r"^<!-- output -->\n```text\n(.*?)^```\n<!-- end -->$", re.MULTILINE | re.DOTALL
)


def program(name: str) -> str:
    """Return the one program of a page."""
    (code,) = PROGRAM.findall(PAGES[name].read_text())
    return code


def output(name: str) -> str:
    """Return what the program prints, as the page has it."""
    (text,) = OUTPUT.findall(PAGES[name].read_text())
    return text


def run(name: str, folder: pathlib.Path) -> str:
    """Run the program of a page in a folder, where its picture will be, and return what
    it prints."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", program(name)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def write(name: str) -> None:
    """Write the output and the picture of a page."""
    with tempfile.TemporaryDirectory() as folder:
        printed = run(name, pathlib.Path(folder))
        picture = pathlib.Path(folder, f"{name}.png")
        shutil.copyfile(picture, FIGURES / f"task_{name}.png")
    block = f"<!-- output -->\n```text\n{printed}```\n<!-- end -->"
    text = PAGES[name].read_text()
    PAGES[name].write_text(OUTPUT.sub(lambda _: block, text))


def main() -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of pages; default all"
    )
    for name in parser.parse_args().names or sorted(PAGES):
        start = time.perf_counter()
        write(name)
        print(f"{name}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
