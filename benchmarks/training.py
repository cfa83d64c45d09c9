"""The training suite: real data by what a user would pick, full batch to the minimum
and in mini-batches.

Full batch, every solver starts from the same parameters, in float64, and stops by the
same bound on the gradient. In mini-batches every optimizer sees the same batches; those
that need a rate get the best one of a grid, by their own final loss, and those of
hessopt get none.
"""

import functools
import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.preprocessing import MinMaxScaler

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first

import hessopt
from benchmarks import race
from benchmarks.problems import real

LARGE = 1000
"""Parameters above which solvers that take all eigenvectors, or the Hessian by
`jax.hessian`, are left out."""
CUBIC = (
    "hessopt trust_region_newton",
    "hessopt trust_region_newton, Gauss-Newton",
    "SciPy trust-exact",
    "SciPy trust-ncg",
    "SciPy Newton-CG",
)
LOGISTIC = ("lbfgs", "newton-cg", "newton-cholesky")
EPOCHS, BATCH = 15, 200
DOCUMENTED = {
    "SGD": (0.956, 0.2438),
    "momentum": (0.9928, 0.0413),
    "Nesterov's momentum": (0.9939, 0.0429),
}
"""Train score and loss of scikit-learn's MLPClassifier on digits, in its "Compare
stochastic learning strategies"."""


# Full batch


def full_batch(quick: bool) -> list[dict[str, Any]]:
    """One row for every solver on every problem."""
    from benchmarks.solvers import FOR_MODELS, SOLVERS

    tasks = ("breast cancer",) if quick else tuple(real.TASKS)
    solvers = ("hessopt lbfgs", "SciPy L-BFGS-B") if quick else (*SOLVERS, *FOR_MODELS)
    worker, rows = race.Worker(), []
    for task in tasks:
        n = len(real.load(task).start)
        own = [
            {"problem": task, "solver": solver}
            | worker.ask(race.solve, "real", task, solver)
            for solver in solvers
            if n <= LARGE or solver not in CUBIC
        ]
        if real.TASKS[task]().kind == "logistic":
            own += [
                {"problem": task, "solver": f"scikit-learn {solver}"}
                | worker.ask(scikit_learn, task, solver)
                for solver in LOGISTIC
            ]
        if importlib.util.find_spec("torch"):
            own.append(
                {"problem": task, "solver": "torch LBFGS"}
                | worker.ask(torch_lbfgs, task)
            )
        race.judge(own)
        rows += own
        print(task, len(own), "runs", flush=True)
    worker.close()
    return rows


def scikit_learn(name: str, solver: str) -> dict[str, Any]:
    """Logistic regression by a solver of scikit-learn; its objective is ours over l2."""
    from sklearn.linear_model import LogisticRegression

    task, problem = real.TASKS[name](), real.load(name)
    model = LogisticRegression(
        C=1 / (task.l2 * len(task.y)), solver=solver, tol=1e-8, max_iter=2000
    )
    with warnings.catch_warnings():
        # newton-cholesky falls back, and lbfgs may not reach this tolerance
        warnings.simplefilter("ignore")
        model.fit(task.x, task.y)
        began = time.perf_counter()
        model.fit(task.x, task.y)
        seconds = time.perf_counter() - began
    x = np.concatenate([model.coef_[0], model.intercept_])
    return race.where(problem, x) | {
        "warm_s": seconds,
        "iterations": int(model.n_iter_[0]),
    }


def torch_lbfgs(name: str) -> dict[str, Any]:
    """L-BFGS of torch with its strong Wolfe search."""
    torch: Any = importlib.import_module("torch")
    task, problem = real.TASKS[name](), real.load(name)
    x = torch.tensor(task.x)
    y = torch.tensor(
        task.y, dtype=torch.float64 if task.kind != "softmax" else torch.int64
    )
    shapes = [
        shape
        for m, n in zip(task.sizes, task.sizes[1:], strict=False)
        for shape in ((m, n), (n,))
    ]

    def run() -> tuple[Any, int]:
        flat = torch.tensor(np.asarray(problem.start), requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [flat],
            max_iter=2000,
            max_eval=20_000,
            history_size=10,
            tolerance_grad=problem.gradient,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Any:
            optimizer.zero_grad()
            parts = [
                p.reshape(s)
                for p, s in zip(
                    flat.split([int(np.prod(s)) for s in shapes]), shapes, strict=True
                )
            ]
            h = x
            for i in range(0, len(parts), 2):
                h = torch.addmm(parts[i + 1], h, parts[i])
                h = torch.tanh(h) if i + 2 < len(parts) else h
            if task.kind == "softmax":
                data = torch.nn.functional.cross_entropy(h, y)
            elif task.kind == "logistic":
                data = torch.nn.functional.binary_cross_entropy_with_logits(h[:, 0], y)
            else:
                data = ((h[:, 0] - y) ** 2).mean()
            loss = data + 0.5 * task.l2 * sum(
                (kernel**2).sum() for kernel in parts[::2]
            )
            loss.backward()
            return loss

        optimizer.step(closure)
        return flat.detach().numpy(), int(optimizer.state[flat]["func_evals"])

    run()
    began = time.perf_counter()
    flat, evaluations = run()
    return race.where(problem, flat) | {
        "warm_s": time.perf_counter() - began,
        "evaluations": evaluations,
    }


# Mini-batches


class Network(NamedTuple):
    """A network on digits, of which `held` images are for testing."""

    title: str
    model: Any  # images (batch, 64) -> logits (batch, 10)
    l2: float  # times half the sum of squares of the kernels
    held: int
    lanes: int  # seeds


class MLP(nn.Module):
    """64-100-10 with ReLU, from the start that scikit-learn takes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits of images `(batch, 64)`."""

        def dense(width: int, before: int) -> nn.Dense:
            bound = (6 / (width + before)) ** 0.5

            def start(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
                return jax.random.uniform(key, shape, dtype, -bound, bound)

            return nn.Dense(width, kernel_init=start, bias_init=start)

        return dense(10, 100)(nn.relu(dense(100, 64)(x)))


class CNN(nn.Module):
    """Two convolutions of 8 and 16 channels with tanh, and a linear layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits of images `(batch, 64)`."""
        x = jnp.tanh(nn.Conv(8, (3, 3))(x.reshape(-1, 8, 8, 1)))
        x = jnp.tanh(nn.Conv(16, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


NETWORKS = (
    Network(
        "MLP 64-100-10 as scikit-learn's, all 1797 images", MLP(), 1e-4 / BATCH, 0, 5
    ),
    Network("CNN, 1500 images and 297 for testing", CNN(), 1e-4, 297, 3),
)

TUNED: dict[str, tuple[Callable[[Any], optax.GradientTransformation], float]] = {
    "optax sgd": (lambda rate: optax.sgd(rate), 2.0**-1),
    "optax sgd, momentum": (lambda rate: optax.sgd(rate, momentum=0.9), 2.0**-3),
    "optax sgd, Nesterov": (
        lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
        2.0**-3,
    ),
    "optax adam": (lambda rate: optax.adam(rate), 2.0**-7),
}
"""With the middle of the grid of their rates, by factors of two."""
GRID = tuple(2.0**k for k in (-3, -2, -1, 0, 1, 2, 3))

BASES = {
    "sgd": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
    "adam": optax.adam(1.0),
}
UNTUNED = {
    f"hessopt {method}, {name}": functools.partial(wrap, base)
    for method, wrap in (
        ("generalized_newton", hessopt.generalized_newton),
        ("grouped_newton", hessopt.grouped_newton),
    )
    for name, base in BASES.items()
}


def mini_batches(quick: bool, epochs: int) -> list[dict[str, Any]]:
    """One row for every optimizer on every network."""
    rows: list[dict[str, Any]] = []
    for network in NETWORKS:
        if quick:
            network = network._replace(lanes=1)
        tuned = dict(list(TUNED.items())[:1]) if quick else TUNED
        untuned = dict(list(UNTUNED.items())[:1]) if quick else UNTUNED
        for name, (make, middle) in tuned.items():
            runs = [
                _trained(network, make(middle * f), epochs) | {"rate": middle * f}
                for f in GRID[: 1 if quick else None]
            ]
            best = min(
                runs, key=lambda run: np.nan_to_num(np.median(run["loss"]), nan=np.inf)
            )
            rows.append({"task": network.title, "optimizer": name} | best)
        for name, make in untuned.items():
            rows.append(
                {"task": network.title, "optimizer": name, "rate": None}
                | _trained(network, make(), epochs)
            )
        print(network.title, flush=True)
    return rows


def stepper(
    tx: optax.GradientTransformationExtraArgs,
    loss_fn: Callable[..., jax.Array],
    x: jax.Array,
    y: jax.Array,
) -> Callable[[Any, jax.Array], tuple[Any, jax.Array]]:
    """Return the step `(params, state), rows -> (params, state), loss` on the rows of a
    batch."""

    def step(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        data = {"x": x[rows], "y": y[rows]}
        value, grads = jax.value_and_grad(loss_fn)(params, **data)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=loss_fn, **data
        )
        return (optax.apply_updates(params, updates), state), value

    return step


def _trained(
    network: Network, tx: optax.GradientTransformation, epochs: int
) -> dict[str, Any]:
    """The loss of the last epoch, and the accuracy after it, one entry for each seed."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    count = len(labels) - network.held
    x = jnp.asarray(MinMaxScaler().fit_transform(images)[order], jnp.float32)
    y = jnp.asarray(labels[order])
    tx = optax.with_extra_args_support(tx)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            network.model.apply(params, x), y
        )
        kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
        return losses.mean() + 0.5 * network.l2 * sum(
            jnp.sum(kernel**2) for kernel in kernels
        )

    step = stepper(tx, loss_fn, x, y)

    def epoch(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        shuffled = jax.random.permutation(key, count)
        whole = count // BATCH * BATCH
        carry, values = jax.lax.scan(step, carry, shuffled[:whole].reshape(-1, BATCH))
        carry, last = step(carry, shuffled[whole:])
        return carry, (BATCH * values.sum() + (count - whole) * last) / count

    def run(seed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        first, *keys = jax.random.split(jax.random.key(seed), epochs + 1)
        params = network.model.init(first, x[:1])
        (params, _), losses = jax.lax.scan(
            epoch, (params, tx.init(params)), jnp.stack(keys)
        )
        right = jnp.argmax(network.model.apply(params, x), 1) == y
        return losses[-1], right[:count].mean(), right[count:].mean()

    seeds = jnp.arange(network.lanes)
    program = jax.jit(jax.vmap(run)).lower(seeds).compile()
    began = time.perf_counter()
    loss, train, test = jax.block_until_ready(program(seeds))
    seconds = time.perf_counter() - began
    lists = {"loss": loss.tolist(), "train accuracy": train.tolist()}
    return lists | {
        "test accuracy": test.tolist() if network.held else None,
        "seconds": seconds,
    }


def strategies(epochs: int) -> list[dict[str, Any]]:
    """scikit-learn's MLPClassifier by its own strategies, beside what its documentation
    says."""
    from sklearn.neural_network import MLPClassifier

    images, labels = load_digits(return_X_y=True)
    x = MinMaxScaler().fit_transform(images)
    options = {
        "SGD": {"momentum": 0.0},
        "momentum": {"momentum": 0.9, "nesterovs_momentum": False},
        "Nesterov's momentum": {"momentum": 0.9, "nesterovs_momentum": True},
    }
    rows = []
    for name, more in options.items():
        model = MLPClassifier(
            solver="sgd",
            learning_rate_init=0.2,
            max_iter=epochs,
            random_state=0,
            **more,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 15 epochs are not convergence
            model.fit(x, labels)
        score, loss = DOCUMENTED[name]
        row = {
            "strategy": name,
            "score": float(model.score(x, labels)),
            "loss": float(model.loss_),
        }
        rows.append(row | {"documented score": score, "documented loss": loss})
    return rows


def measure(quick: bool) -> tuple[dict[str, Any], Any]:
    """Run the suite; return the record and the figure."""
    rows = full_batch(quick)
    epochs = 1 if quick else EPOCHS
    record = {
        "full batch": rows,
        "epochs": epochs,
        "mini-batches": mini_batches(quick, epochs),
    }
    record["scikit-learn"] = strategies(epochs)
    return record, _figure(record)


def markdown(record: dict[str, Any]) -> list[str]:
    """The tables of a record."""
    rows = record["full batch"]
    lines = ["## Full batch, float64", ""]
    lines += [
        "To 1e-6 of the gradient at the start; 2000 iterations and 60 s per run at most. Seconds are of a second run.",
    ]
    for task in dict.fromkeys(row["problem"] for row in rows):
        own = [row for row in rows if row["problem"] == task]
        n = next(row["n"] for row in own if "n" in row)
        lines += ["", f"### {task}, {n} parameters", ""]
        lines += [
            "| | gradient reached | above the lowest value | evaluations | seconds | compile s |"
        ]
        lines += ["|---|---|---:|---:|---:|---:|"]
        for row in own:
            if "f" not in row:
                lines += [f"| {row['solver']} | {row.get('error', '')} | | | | |"]
                continue
            cells = ["yes" if row["a"] else f"no, {row['g'] / row['bound']:.1e} times"]
            cells += [
                f"{row['f'] - row['best']:.1e}",
                str(row.get("evaluations", "")),
                f"{row['warm_s']:.2g}",
            ]
            lines += [
                f"| {row['solver']} | "
                + " | ".join([*cells, _number(row.get("compile_s"), ".2g")])
                + " |"
            ]
    for task in dict.fromkeys(row["task"] for row in record["mini-batches"]):
        own = [row for row in record["mini-batches"] if row["task"] == task]
        lines += ["", f"## Mini-batches: {task}", ""]
        lines += [
            f"{record['epochs']} epochs in batches of {BATCH}; {len(own[0]['loss'])} seeds: median (worst).",
            "",
        ]
        lines += [
            "| | rate, the best of a grid | loss in the last epoch | train accuracy | test accuracy | seconds |"
        ]
        lines += ["|---" + "|---:" * 5 + "|"]
        for row in own:
            cells = [
                _number(row["rate"], ".3g", "none"),
                _worst(row["loss"], max, ".4f"),
            ]
            cells += [
                _worst(row["train accuracy"], min, ".4f"),
                _worst(row["test accuracy"], min, ".4f"),
            ]
            lines += [
                f"| {row['optimizer']} | "
                + " | ".join([*cells, f"{row['seconds']:.1f}"])
                + " |"
            ]
    lines += [
        "",
        "## scikit-learn's MLPClassifier by its own strategies, the same network, epochs and batches",
        "",
    ]
    lines += [
        "| | train score | loss | documented score | documented loss |",
        "|---" + "|---:" * 4 + "|",
    ]
    for row in record["scikit-learn"]:
        cells = [
            f"{row['score']:.4f}",
            f"{row['loss']:.4f}",
            f"{row['documented score']}",
            f"{row['documented loss']}",
        ]
        lines += [f"| {row['strategy']} | " + " | ".join(cells) + " |"]
    return lines


def _number(x: float | None, form: str, none: str = "") -> str:
    return none if x is None else format(x, form)


def _worst(
    values: Sequence[float] | None, worst: Callable[..., float], form: str
) -> str:
    return (
        "" if values is None else f"{np.median(values):{form}} ({worst(values):{form}})"
    )


def _figure(record: dict[str, Any]) -> Any:
    """Seconds to the bound, by problem; final losses in mini-batches, by network."""
    rows, batches = record["full batch"], record["mini-batches"]
    tasks = list(dict.fromkeys(row["problem"] for row in rows))
    networks = list(dict.fromkeys(row["task"] for row in batches))
    figure, axes = plt.subplots(1, 2, figsize=(14, 7), layout="constrained")
    solvers = list(dict.fromkeys(row["solver"] for row in rows))[::-1]
    for i, task in enumerate(tasks):
        done = [
            (row["solver"], row["warm_s"])
            for row in rows
            if row["problem"] == task and row["a"]
        ]
        axes[0].scatter(
            [s for _, s in done],
            [solvers.index(name) for name, _ in done],
            marker="osD^"[i],
            label=task,
        )
    axes[0].set(yticks=range(len(solvers)), yticklabels=solvers, xscale="log")
    axes[0].set(
        xlabel="seconds to the bound on the gradient, compilation not counted",
        title="full batch, float64",
    )
    names = list(dict.fromkeys(row["optimizer"] for row in batches))[::-1]
    for i, task in enumerate(networks):
        own = [row for row in batches if row["task"] == task]
        for j, row in enumerate(own):
            losses, place = (
                np.array(row["loss"]),
                names.index(row["optimizer"]) + 0.15 * (2 * i - 1),
            )
            axes[1].plot(
                losses,
                [place] * len(losses),
                "os"[i],
                color=f"C{i}",
                alpha=0.6,
                label=None if j else task,
            )
    axes[1].set(yticks=range(len(names)), yticklabels=names, xscale="log")
    axes[1].set(
        xlabel="loss in the last epoch",
        title="mini-batches, rates of optax the best of a grid",
    )
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure
