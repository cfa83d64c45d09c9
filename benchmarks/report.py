"""`RESULTS.md`: every record as tables, with its figure; and the measurements that the
README cites."""

import collections
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import features, gauss_newton, pinn, scoreboard
from benchmarks.problems import poisson
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
    lists = scoreboard.measured(home)
    counted = [_solved(title, lists[name]) for name, title in SOLVED.items()]
    others = (_pinn, _training, _hessian, _taylor, _lanes)
    lines = ["| on 2 CPU cores | hessopt | other libraries |", "|---|---|---|"]
    return lines + [
        "| " + " | ".join(cells) + " |"
        for cells in (*counted, *(line(home) for line in others))
    ]


SOLVED = {
    "cutest": "CUTEst problems solved, of {count} with up to {size} variables",
    "validation": "the same, of {count} not used in development",
    "nist": "NIST fits with six right digits, of {count}",
    "bounded": "CUTEst problems with bounds solved, of {count}",
}
"""What the lines on lists of problems are called."""


def _solved(title: str, runs: Sequence[scoreboard.Run]) -> tuple[str, str, str]:
    solved = collections.Counter({run.solver: 0 for run in runs})
    solved.update(run.solver for run in runs if run.solved)
    sides = ([], [])
    for solver, count in solved.most_common():
        is_peer = not solver.startswith(scoreboard.OURS)
        sides[is_peer].append(f"{solver.removeprefix(scoreboard.OURS)} {count}")
    named = title.format(
        count=len({run.problem for run in runs}), size=max(run.size for run in runs)
    )
    best = " (the best four)" if len(sides[1]) > 4 else ""
    return named, ", ".join(sides[0]), ", ".join(sides[1][:4]) + best


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
    size = sum((m + 1) * n for m, n in itertools.pairwise(poisson.SIZES))
    return (
        f"relative error of a PINN of the 3-D Poisson equation, n = {size}, after {steps} steps",
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
        f"loss of a 64-100-10 network on digits after {epochs} epochs in batches of 200",
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
        "Hessian of a 64-32-10 network, 1500 images",
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
        "derivatives along the updates of 60 tensors, 512 images, cost in gradients",
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
        "64 vmapped runs of 10 steps of L-BFGS in `minimize`, 64-16-10 network",
        f"`lbfgs`: {ratio:.2f} of the time",
        "`optax.lbfgs`: 1",
    )


BLOCKS: dict[str, Callable[[Records], list[str]]] = {
    "features": lambda home: features.markdown(home["features"]),
    "gaussnewton": lambda home: _table(gauss_newton.markdown(home["gauss-newton"]), 1),
    "scoreboard": scoreboard.markdown,
    "summary": summary,
}
