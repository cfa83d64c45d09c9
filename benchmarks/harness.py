"""Side by side in one process: contenders take turns, and what is compared is the ratio
within a round."""

import datetime
import json
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np

import hessopt

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first


class Contender(NamedTuple):
    """Something to time: `run()` returns arrays, and is timed until they are there."""

    name: str
    run: Callable[[], Any]
    facts: dict[str, float]  # what compilation tells, e.g. temporary MB


class Timing(NamedTuple):
    """Seconds of one contender, and its ratio to the baseline of the same round."""

    name: str
    seconds: list[float]
    ratios: list[float]
    facts: dict[str, float]


class Table(NamedTuple):
    """All contenders on one problem; ratios are to the first."""

    title: str
    timings: list[Timing]


def compiled(name: str, fun: Callable[..., Any], *args: Any) -> Contender:
    """Compile `fun` for `args`; its facts are compile seconds and, where the backend
    knows it, temporary MB."""
    start = time.perf_counter()
    program = jax.jit(fun).lower(*args).compile()
    facts = {"compile s": time.perf_counter() - start}
    memory = program.memory_analysis()
    if memory is not None:
        facts["temporary MB"] = memory.temp_size_in_bytes / 1e6
    return Contender(name, lambda: program(*args), facts)


def compare(
    title: str, contenders: Sequence[Contender], rounds: int, settle: float
) -> Table:
    """Time all contenders in every round, in rotating order, after a round to warm up.

    Args:
      title: of the table.
      contenders: the first is the baseline.
      rounds: number of rounds that count.
      settle: seconds of rest before each run. Memory that one contender has mapped is
        given back while the next one runs, and would be billed to it: 0.2 s for the 2
        GB of a `jax.hessian`.
    """
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for turn in range(rounds + 1):
        start = turn % len(contenders)
        for contender in (*contenders[start:], *contenders[:start]):
            time.sleep(settle if turn else 0.0)
            began = time.perf_counter()
            jax.block_until_ready(contender.run())
            if turn:
                seconds[contender.name].append(time.perf_counter() - began)
    base = np.array(seconds[contenders[0].name])
    return Table(
        title,
        [
            Timing(
                c.name,
                seconds[c.name],
                (np.array(seconds[c.name]) / base).tolist(),
                c.facts,
            )
            for c in contenders
        ],
    )


def machine() -> dict[str, str]:
    """The device, the versions and the day."""
    device = jax.devices()[0]
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count()
    )
    return {
        "device": f"{cores} CPU cores, {_cpu()}"
        if device.platform == "cpu"
        else f"{device.device_kind}, {cores} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "optax", "numpy")},
        "hessopt": hessopt.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    found = (
        re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    )
    return found[1] if found else platform.machine()


def folder(out: pathlib.Path) -> pathlib.Path:
    """Where the results of this kind of device belong."""
    device = jax.devices()[0]
    name = (
        f"cpu {machine()['device'].split()[0]} cores"
        if device.platform == "cpu"
        else device.device_kind
    )
    return out / re.sub(r"[^a-z0-9]+", "-", name.lower())


def save(
    out: pathlib.Path, suite: str, record: dict[str, Any], figure: Any
) -> dict[str, Any]:
    """Write the record as JSON and the figure; return the record as it will be read,
    with the machine."""
    place = folder(out)
    place.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine()} | record, indent=1)
    (place / f"{suite}.json").write_text(text + "\n")
    figure.savefig(place / f"{suite}.png", dpi=150)
    return json.loads(text)


def record(tables: Sequence[Table]) -> tuple[dict[str, Any], Any]:
    """What contenders took, for JSON, and a figure of their ratios."""
    return {
        "tables": [[t.title, [x._asdict() for x in t.timings]] for t in tables]
    }, _figure(tables)


def markdown(record: dict[str, Any]) -> list[str]:
    """The tables of such a record."""
    return _lines(
        [
            Table(title, [Timing(**timing) for timing in timings])
            for title, timings in record["tables"]
        ]
    )


def _lines(tables: Sequence[Table]) -> list[str]:
    lines = [
        "Medians, with quartiles in brackets; ratios are taken within a round.",
        "",
    ]
    for table in tables:
        columns = list(
            dict.fromkeys(name for timing in table.timings for name in timing.facts)
        )
        lines += [
            f"## {table.title}",
            "",
            "| | " + " | ".join(["milliseconds", "ratio", *columns]) + " |",
        ]
        lines += ["|---" + "|---:" * (2 + len(columns)) + "|"]
        for timing in table.timings:
            cells = [
                _spread(1e3 * np.array(timing.seconds)),
                _spread(np.array(timing.ratios)),
            ]
            cells += [
                f"{timing.facts[c]:.3g}" if c in timing.facts else "" for c in columns
            ]
            lines += [f"| {timing.name} | " + " | ".join(cells) + " |"]
        lines += [""]
    return lines[:-1]


def _spread(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _figure(tables: Sequence[Table]) -> Any:
    heights = [len(table.timings) for table in tables]
    figure, axes = plt.subplots(
        len(tables),
        1,
        figsize=(8, 0.8 * len(tables) + 0.35 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
    )
    for axis, table in zip(axes[:, 0], tables, strict=True):
        names = [timing.name for timing in table.timings][::-1]
        low, middle, high = np.array(
            [np.percentile(t.ratios, [25, 50, 75]) for t in table.timings][::-1]
        ).T
        axis.barh(
            names,
            middle,
            xerr=(middle - low, high - middle),
            color="#4878a8",
            ecolor="#303030",
        )
        axis.axvline(1.0, color="#a0a0a0", linewidth=0.8)
        axis.set_title(
            f"{table.title}: time over that of {table.timings[0].name}",
            fontsize=9,
            loc="left",
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    return figure
