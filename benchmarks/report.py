"""`RESULTS.md`: every record as tables, with its figure; and the measurements that the
README cites."""

import itertools
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import cutest, features, gauss_newton, pinn, scoreboard
from benchmarks.suites import SUITES

HEAD = """# Results

Written by `python -m benchmarks`, not by hand: the records in `results/`, by device, as tables and figures.
"""

HOME = "cpu-2-cores"
"""The device that the README cites."""

CITING = (
    "README.md",
    "docs/pages/comparison.md",
    "docs/pages/scoreboard.md",
    "docs/study.md",
)

Records = Mapping[str, dict[str, Any]]
"""What was measured, by suite."""


def page(results: pathlib.Path) -> str:
    """The page of all records in a folder `results/DEVICE/SUITE.json`."""
    parts = [HEAD]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        parts.append(f"# {folder.name}\n")
        for name, record in records(folder).items():
            facts = ", ".join(
                f"{key} {what}" for key, what in record["machine"].items()
            )
            lines = [
                re.sub("^##", "###", line) for line in SUITES[name].markdown(record)
            ]
            figure = f"![{name}]({results.name}/{folder.name}/{name}.png)"
            parts.append(
                "\n".join([f"## {name}", "", f"{facts}.", "", *lines, "", figure, ""])
            )
    return "\n".join(parts)


def records(folder: pathlib.Path) -> Records:
    """All records of a device."""
    files = {name: folder / f"{name}.json" for name in SUITES}
    return {
        name: json.loads(file.read_text())
        for name, file in files.items()
        if file.exists()
    }


def filled(text: str, home: Records) -> str:
    """The text with what stands between `<!-- results: NAME -->` and `<!-- end -->`
    made of the records.

    NAME is one of `BLOCKS`, or a suite and the number of one of its tables.
    """

    def block(match: re.Match[str]) -> str:
        name, number = match[2], match[3]
        lines = (
            _table(SUITES[name].markdown(home[name]), int(number))
            if number
            else BLOCKS[name](home)
        )
        return "\n".join([match[1], *lines, "<!-- end -->"])

    return re.sub(
        r"(<!-- results: (\w+) ?(\d*) -->)\n.*?<!-- end -->",
        block,
        text,
        flags=re.DOTALL,
    )


def _table(lines: list[str], number: int) -> list[str]:
    """The table of this number, from 1 on."""
    tables = [
        list(group)
        for is_row, group in itertools.groupby(lines, lambda line: line.startswith("|"))
        if is_row
    ]
    return tables[number - 1]


def write(results: pathlib.Path) -> None:
    """Write the page beside the folder, the figures of the scoreboard, and what cites
    the records if the folder is that of a checkout."""
    (results.parent / "RESULTS.md").write_text(page(results))
    for folder in (path for path in results.iterdir() if path.is_dir()):
        found = records(folder)
        if found.keys() >= scoreboard.LISTS.keys():
            scoreboard.figure(found).savefig(folder / "scoreboard.png", dpi=150)
    for file in (results.parent.parent / name for name in CITING):
        if file.exists():
            file.write_text(filled(file.read_text(), records(results / HOME)))


def summary(home: Records) -> list[str]:
    """The main figures, one line each."""
    lines = ["| on 2 CPU cores | hessopt | other libraries |", "|---|---|---|"]
    return lines + [
        "| " + " | ".join(line(home)) + " |"
        for line in (_cutest, _pinn, _training, _hessian, _taylor, _lanes)
    ]


def _cutest(home: Records) -> tuple[str, str, str]:
    rows = home["cutest"]["runs"]
    solved = {solver: both for solver, (_, _, both) in cutest.solved(rows).items()}
    best = sorted(solved, key=lambda solver: -solved[solver])
    ours, theirs = (
        [s for s in best if s.startswith("hessopt") is kind] for kind in (True, False)
    )
    named = ", ".join(
        f"{solver.removeprefix('hessopt ')} {solved[solver]}" for solver in ours
    )
    count = len({row["problem"] for row in rows})
    return (
        f"CUTEst problems solved, of {count}",
        named,
        ", ".join(f"{solver} {solved[solver]}" for solver in theirs[:4])
        + " (the best four)",
    )


def _pinn(home: Records) -> tuple[str, str, str]:
    rows = home["pinn"]["runs"]
    errors = {
        name: float(np.median([row["error"] for row in own]))
        for name, own in pinn.of_seeds(rows).items()
    }
    steps = rows[0]["steps"]
    named = ", ".join(
        f"{name} {errors[name]:.1e}" for name in ("ssbroyden", "bfgs", "lbfgs")
    )
    long = next(
        row for row in rows if re.fullmatch(r"ssbroyden, \d+ steps", row["run"])
    )
    named += f"; after {long['steps']} ssbroyden {long['error']:.1e}"
    named += f" ({1e-3 * long['steps'] * long['ms per step']:.0f} s)"
    whole = home["gauss-newton"]["whole"]
    named += f", after {whole['steps'][-1]} Gauss-Newton {whole['errors'][-1]:.1e}"
    named += f" ({whole['seconds'][-1]:.0f} s)"
    return (
        f"relative error of a PINN after {steps} steps",
        named,
        f"Adam {errors['adam']:.1e}",
    )


def _training(home: Records) -> tuple[str, str, str]:
    rows = [
        row for row in home["training"]["mini-batches"] if row["task"].startswith("MLP")
    ]
    loss = {row["optimizer"]: float(np.median(row["loss"])) for row in rows}
    named = ", ".join(
        f"{method} over {base} {loss[f'hessopt {method}, {base}']:.4f}"
        for method, base in (
            ("generalized_newton", "adam"),
            ("grouped_newton", "momentum"),
        )
    )
    best = ", ".join(
        f"{name.replace(',', ' with')} {loss[f'optax {name}']:.4f}"
        for name in ("adam", "sgd, momentum")
    )
    own = min(home["training"]["scikit-learn"], key=lambda row: row["loss"])
    epochs = home["training"]["epochs"]
    return (
        f"loss on digits after {epochs} epochs",
        f"{named}, without a learning rate",
        f"{best}, each at the best rate of a grid; scikit-learn {own['loss']:.4f}",
    )


def _ratio(
    home: Records, title: str, ours: str, theirs: str, fact: str | None = None
) -> float:
    """The median ratio of one contender of the kernels suite to another, of seconds or
    of a fact."""
    tables = home["kernels"]["tables"]
    rows = next(
        {row["name"]: row for row in timings}
        for name, timings in tables
        if re.search(title, name)
    )
    if fact is not None:
        return rows[ours]["facts"][fact] / rows[theirs]["facts"][fact]
    return float(
        np.median(np.array(rows[ours]["seconds"]) / np.array(rows[theirs]["seconds"]))
    )


def _hessian(home: Records) -> tuple[str, str, str]:
    of = "Hessian, 64-32-10", "hessopt.hessian", "jax.hessian"
    time, memory = _ratio(home, *of), _ratio(home, *of, "temporary MB")
    return (
        "Hessian of a 64-32-10 network",
        f"`hessian`: {time:.2f} of the time, {memory:.3f} of the memory",
        "`jax.hessian`: 1",
    )


def _taylor(home: Records) -> tuple[str, str, str]:
    title, base = r"Taylor terms.*784(-100){29}-10", "one value and gradient"
    ours, theirs = (
        _ratio(home, title, name, base)
        for name in ("hessopt.taylor, order 3", "jax.hessian of phi")
    )
    return (
        "derivatives along the updates of 60 tensors, cost in gradients",
        f"`taylor`, order 3: {ours:.0f}",
        f"`jax.hessian`, order 2: {theirs:.0f}",
    )


def _lanes(home: Records) -> tuple[str, str, str]:
    ratio = _ratio(
        home,
        "64 lanes of 10 steps",
        "hessopt.lbfgs in minimize",
        "optax.lbfgs in minimize",
    )
    return (
        "64 vmapped runs of 10 steps of L-BFGS, in `minimize`",
        f"`lbfgs`: {ratio:.2f} of the time",
        "`optax.lbfgs`: 1",
    )


BLOCKS: dict[str, Callable[[Records], list[str]]] = {
    "features": lambda home: features.markdown(home["features"]),
    "gaussnewton": lambda home: _table(gauss_newton.markdown(home["gauss-newton"]), 1),
    "scoreboard": scoreboard.markdown,
    "summary": summary,
}
