"""The rates suite: learning rates from curvature beside the best constant rate of a grid,
a cosine schedule with the best peak, and peers that need no rate.

The tasks are split: rules are chosen on those of the developing half, and those of the
judging half only judge.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.typing import ArrayLike
from sklearn import datasets

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first

import hessopt
from benchmarks import training
from benchmarks.problems import real

GRID = 10.0 ** np.arange(-4, 1.01, 0.25)
"""Constant rates, and peaks of the cosine schedule."""
EPOCHS, SEEDS = (15, 60), 3
TINY = float(np.finfo(np.float32).tiny)
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "gelu": jax.nn.gelu}


class Task(NamedTuple):
    """A network, its data and the size of a batch; sizes above the data are all of it."""

    data: str
    activation: str
    hidden: tuple[int, ...]
    batch: int
    l2: float = 1e-4  # weight of half the squared norm of the kernels

    @property
    def name(self) -> str:
        """What tables call the task."""
        layers = "-".join(map(str, self.hidden))
        regular = "" if self.l2 else ", no L2"
        return f"{self.data}, {self.activation} {layers}, batch {self.batch}{regular}"


DEVELOPING = (
    Task("digits", "relu", (48, 48), 100),
    Task("digits", "gelu", (48, 48, 48), 100),
    Task("digits", "relu", (100,), 500),
    Task("regression", "tanh", (32,), 32),
    Task("regression", "relu", (48, 48), 100),
    Task("pixels", "tanh", (32,), 128, 0.0),
    Task("wine", "tanh", (16,), 32, 0.0),
    Task("digits", "relu", (48, 48), 100, 0.0),
    Task("digits", "tanh", (48, 48), 2000, 0.0),
    Task("regression", "gelu", (32, 32), 32, 0.0),
)
JUDGING = (
    Task("wine", "relu", (32,), 32),
    Task("wine", "gelu", (16, 16), 1000),
    Task("cancer", "tanh", (24, 24), 32),
    Task("diabetes", "relu", (32, 32), 100),
    Task("digits", "relu", (32, 32, 32, 32), 32),
    Task("digits", "tanh", (64,), 500),
    Task("cancer", "gelu", (32,), 100, 0.0),
    Task("pixels", "relu", (64,), 32, 0.0),
    Task("diabetes", "tanh", (16, 16, 16), 64, 0.0),
)
BASES: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "Nesterov": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adamw": optax.adamw,
}
OURS = {
    "generalized_newton": hessopt.generalized_newton,
    "grouped_newton": hessopt.grouped_newton,
}
PEERS: dict[str, dict[str, Callable[[], optax.GradientTransformation]]] = {
    "sgd": {"DoG": optax.contrib.dog},
    "momentum": {"COCOB": optax.contrib.cocob},
    "adam": {
        "Prodigy": optax.contrib.prodigy,
        "D-Adaptation": optax.contrib.dadapt_adamw,
    },
}
QUICK = ((Task("wine", "relu", (8,), 100),), ("adam",), (3,))


@functools.cache
def load(name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return standardized inputs, targets, and the number of classes, 0 for a
    regression. "pixels" is digits with inputs in [0, 1] instead."""
    if name == "regression":
        rng = np.random.default_rng(0)
        x, w = rng.normal(size=(2000, 10)), rng.normal(size=(10, 5))
        y = np.sin(x @ w).sum(1) + 0.1 * rng.normal(size=2000)
        return _single(x), _single(y), 0
    found = {
        "digits": datasets.load_digits,
        "pixels": datasets.load_digits,
        "wine": datasets.load_wine,
        "cancer": datasets.load_breast_cancer,
        "diabetes": datasets.load_diabetes,
    }[name]()
    x = _single(found.data)
    if name == "pixels":
        x = (found.data / 16).astype(np.float32)
    if name == "diabetes":
        return x, _single(found.target), 0
    return x, found.target, len(found.target_names)


def _single(x: np.ndarray) -> np.ndarray:
    return real.standardised(x).astype(np.float32)


def initial(key: jax.Array, sizes: Sequence[int]) -> list[dict[str, jax.Array]]:
    """Return the parameters of a network, initialized as He et al. do."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(key, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def loss_of(task: Task) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """Return the loss of a batch."""
    *_, classes = load(task.data)
    activation = ACTIVATIONS[task.activation]

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = activation(x @ layer["w"] + layer["b"])
        z = x @ params[-1]["w"] + params[-1]["b"]
        if classes:
            loss = optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
        else:
            loss = 0.5 * jnp.mean((z[:, 0] - y) ** 2)
        return loss + 0.5 * task.l2 * sum(jnp.sum(layer["w"] ** 2) for layer in params)

    return loss_fn


def trained(
    task: Task,
    make: Callable[[Any], optax.GradientTransformation],
    epochs: int,
    rates: ArrayLike = 1.0,
) -> np.ndarray:
    """Return the losses of `make(rate)`, `(rates, SEEDS, 1 + epochs)`: that of all data
    at the start, and the mean of every epoch."""
    x, y, classes = load(task.data)
    batch = min(task.batch, len(x))
    sizes = (x.shape[1], *task.hidden, max(classes, 1))
    count, loss_fn = len(x) // batch, loss_of(task)
    x, y = jnp.asarray(x), jnp.asarray(y)

    def run(rate: jax.Array, seed: jax.Array) -> jax.Array:
        tx = optax.with_extra_args_support(make(rate))
        key, order = jax.random.split(jax.random.key(seed))
        params = initial(key, sizes)

        step = training.stepper(tx, loss_fn, x, y)

        def epoch(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            rows = jax.random.permutation(key, len(x))[: count * batch]
            carry, values = jax.lax.scan(step, carry, rows.reshape(count, batch))
            return carry, jnp.mean(values)

        start = loss_fn(params, x, y)
        keys = jax.random.split(order, epochs)
        _, losses = jax.lax.scan(epoch, (params, tx.init(params)), keys)
        return jnp.concatenate([start[None], losses])

    over_seeds = jax.vmap(run, (None, 0))
    over_rates = jax.jit(jax.vmap(over_seeds, (0, None)))
    grid = jnp.atleast_1d(jnp.asarray(rates, jnp.float32))
    return np.asarray(over_rates(grid, jnp.arange(SEEDS)))


def compare(task: Task, base: str, epochs: int, half: str) -> list[dict[str, Any]]:
    """Return one row for every method over a base."""
    common = {"task": task.name, "half": half, "base": base, "epochs": epochs}
    make = BASES[base]
    steps = epochs * max(1, len(load(task.data)[0]) // task.batch)
    constant = _best(trained(task, make, epochs, GRID))
    cosine = _best(
        trained(
            task,
            lambda rate: make(optax.cosine_decay_schedule(rate, steps)),
            epochs,
            GRID,
        )
    )
    found = {"best constant rate": constant, "cosine, best peak": cosine}
    alone = {name: _over(method, make) for name, method in OURS.items()}
    for name, method in (alone | PEERS.get(base, {})).items():
        found[name] = trained(task, _without_rate(method), epochs)[0]
    best = max(np.median(constant[:, -1]), TINY)
    return [common | {"method": name} | _row(x, best) for name, x in found.items()]


def _over(method: Any, make: Any) -> Callable[[], optax.GradientTransformation]:
    return lambda: method(make(1.0))


def _without_rate(
    make: Callable[[], optax.GradientTransformation],
) -> Callable[[Any], optax.GradientTransformation]:
    return lambda _: make()


def _best(losses: np.ndarray) -> np.ndarray:
    """Return the losses of the rate with the lowest median at the end."""
    ends = np.where(np.isfinite(losses[:, :, -1]), losses[:, :, -1], np.inf)
    return losses[np.argmin(np.median(ends, axis=1))]


def _row(losses: np.ndarray, best: float) -> dict[str, Any]:
    losses = np.where(np.isfinite(losses), losses, np.inf)
    # in interpolation a loss can be zero in float32
    lowest = np.maximum(np.minimum.accumulate(losses, axis=1), TINY)
    ends = losses[:, -1]
    return {
        "ratio": float(np.median(ends) / best),
        "worst": float(np.max(ends) / best),
        "rise": float(np.max(losses / lowest)),
        "start": float(np.median(losses[:, 0])),
        "end": float(np.median(ends)),
    }


def measure(quick: bool) -> tuple[dict[str, Any], Any]:
    """Run the suite; return the record and the figure."""
    halves = {"developing": DEVELOPING, "judging": JUDGING}
    bases, lengths = tuple(BASES), EPOCHS
    if quick:
        halves["developing"], halves["judging"] = QUICK[0], ()
        _, bases, lengths = QUICK
    rows: list[dict[str, Any]] = []
    for half, tasks in halves.items():
        for task in tasks:
            for base in bases:
                for epochs in lengths:
                    own = compare(task, base, epochs, half)
                    rows += own
                    told = (f"{row['method']} {row['ratio']:.2f}" for row in own)
                    print(task.name, base, epochs, *told, sep="  ", flush=True)
    return {"runs": rows}, _figure(rows)


def markdown(record: dict[str, Any]) -> list[str]:
    """The tables of a record."""
    lines = [
        "Mean loss of the last epoch over that of the best constant rate of a grid (21 "
        f"rates from 1e-4 to 10), median of {SEEDS} seeds: the median and the largest "
        "over tasks and lengths of 15 and 60 epochs; and the largest loss of an epoch "
        "over the lowest before it.",
    ]
    rows = record["runs"]
    for half in dict.fromkeys(row["half"] for row in rows):
        lines += ["", f"## {half.capitalize()} half", ""]
        lines += ["| over | method | median | largest | one seed | rise |"]
        lines += ["|---|---" + "|---:" * 4 + "|"]
        for (base, method), own in _by_method(rows, half).items():
            median = np.median([row["ratio"] for row in own])
            figures = [max(row[key] for row in own) for key in ("ratio", "worst")]
            rise = max(row["rise"] for row in own)
            cells = " | ".join(f"{x:.2f}" for x in (median, *figures, rise))
            lines += [f"| {base} | {method} | {cells} |"]
    lines += ["", "## Runs", "", "| task | over | epochs | method | ratio | end |"]
    lines += ["|---|---|---:|---|---:|---:|"]
    lines += [
        f"| {row['task']} | {row['base']} | {row['epochs']} | {row['method']} "
        f"| {row['ratio']:.2f} | {row['end']:.4g} |"
        for row in rows
    ]
    return lines


def _by_method(
    rows: Sequence[dict[str, Any]], half: str
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["half"] == half:
            found.setdefault((row["base"], row["method"]), []).append(row)
    return found


def _figure(rows: Sequence[dict[str, Any]]) -> Any:
    """The ratios of every task, over each base."""
    bases = list(dict.fromkeys(row["base"] for row in rows))
    methods = [
        name
        for name in dict.fromkeys(row["method"] for row in rows)
        if name != "best constant rate"
    ]
    figure, axes = plt.subplots(
        1, len(bases), figsize=(3 * len(bases), 4), sharey=True, layout="constrained"
    )
    for axis, base in zip(np.atleast_1d(axes), bases, strict=True):
        for place, method in enumerate(methods):
            own = [r for r in rows if r["base"] == base and r["method"] == method]
            for half, marker in (("developing", "o"), ("judging", "x")):
                ratios = [r["ratio"] for r in own if r["half"] == half]
                axis.plot([place] * len(ratios), ratios, marker, color=f"C{place}")
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set_xticks(range(len(methods)), methods, rotation=60, ha="right")
        axis.set(title=f"over {base}", yscale="log")
    np.atleast_1d(axes)[0].set_ylabel("loss over that of the best constant rate")
    return figure
