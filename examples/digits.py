"""Train a digit classifier with second-order and first-order optimizers.

An MLP (64-32-10, tanh, softmax cross-entropy with a small L2 penalty) is trained on
1500 images of scikit-learn's digits, full batch, and tested on the other 297. Every
optimizer starts from the same parameters and runs for the same time, not counting
compilation. The table shows the final loss of each optimizer and the time to reach the
final loss of Adam; the line below the table names the best one. The figure shows the
difference between each loss and the lowest one, against steps and against seconds.

    python examples/digits.py                                  # ten optimizers, under two minutes on two cores
    python examples/digits.py --all                            # all of them, about three minutes
    python examples/digits.py --optimizers adam newton --seconds 10
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.isotonic import isotonic_regression
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import hessopt
from hessopt.linen import TrainState

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is set
from matplotlib.axes import Axes

L2 = 1e-4


class MLP(nn.Module):
    """64-32-10 with tanh."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits `(batch, 10)` of images `(batch, 64)`."""
        return nn.Dense(10)(jnp.tanh(nn.Dense(32)(x)))


MODEL = MLP()


def model_fn(params: Any, x: jax.Array) -> tuple[Any, Any]:
    """Return the logits, and the parameters, on which the penalty depends."""
    return MODEL.apply(params, x), params


def penalised_cross_entropy(outputs: tuple[jax.Array, Any], y: jax.Array) -> jax.Array:
    """Return the mean softmax cross-entropy plus `L2/2 |params|^2`, convex in logits
    and parameters."""
    logits, params = outputs
    data_term = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return data_term + 0.5 * L2 * sum(
        jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)
    )


loss_fn = hessopt.composite(model_fn, penalised_cross_entropy)

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.5),
    "adam": lambda: optax.adam(1e-2),
    "optax-lbfgs": lambda: optax.lbfgs(),
    "lbfgs": lambda: hessopt.lbfgs(),
    "bfgs": lambda: hessopt.bfgs(),
    "ssbroyden": lambda: hessopt.bfgs(formula="ssbroyden"),
    "newton": lambda: hessopt.newton(),
    "newton-layers": lambda: hessopt.newton(blocks="layer"),
    "newton-gauss": lambda: hessopt.newton(damping=1e-4, curvature="gauss_newton"),
    "newton-cg": lambda: hessopt.newton_cg(),
    "newton-cg-gauss": lambda: hessopt.newton_cg(curvature="gauss_newton"),
    "trust-region-cg": lambda: hessopt.trust_region_newton(subproblem="cg"),
    "newton-subsampled": lambda: optax.chain(
        hessopt.subsampled(hessopt.scale_by_newton(), probability=0.5),
        optax.scale(-1.0),
        hessopt.scale_by_wolfe_linesearch(),
    ),
    "gen-newton-sgd": lambda: hessopt.generalized_newton(optax.sgd(1.0)),
    "gen-newton-momentum": lambda: hessopt.generalized_newton(
        optax.sgd(1.0, momentum=0.9)
    ),
    "gen-newton-adam": lambda: hessopt.generalized_newton(optax.adam(1.0)),
    "grouped-newton-sgd": lambda: hessopt.grouped_newton(optax.sgd(1.0)),
    "grouped-newton-momentum": lambda: hessopt.grouped_newton(
        optax.sgd(1.0, momentum=0.9)
    ),
    "grouped-newton-adam": lambda: hessopt.grouped_newton(optax.adam(1.0)),
}

STORY = [
    "sgd",
    "adam",
    "optax-lbfgs",
    "lbfgs",
    "ssbroyden",
    "newton",
    "newton-cg",
    "trust-region-cg",
    "gen-newton-adam",
    "grouped-newton-adam",
]
"""Optimizers that run by default."""

FAMILIES = {
    "black": ("adam", "sgd"),
    "tab:blue": ("lbfgs", "ssbroyden", "optax-lbfgs", "bfgs"),
    "tab:red": ("newton", "newton-layers", "newton-gauss", "newton-subsampled"),
    "tab:green": ("newton-cg", "trust-region-cg", "newton-cg-gauss"),
    "darkorange": ("gen-newton-adam", "gen-newton-sgd", "gen-newton-momentum"),
    "tab:purple": (
        "grouped-newton-adam",
        "grouped-newton-sgd",
        "grouped-newton-momentum",
    ),
}
STYLES = ("-", "--", ":", "-.")
LOOKS = {
    name: {"color": color, "linestyle": style}
    for color, names in FAMILIES.items()
    for name, style in zip(names, STYLES, strict=False)
}
"""Lines of the figure: a color for each family, a style for each of its members."""

# lower limit of the figure: the lowest loss is at zero, outside of a logarithmic axis
FLOOR = 1e-7


class Run(NamedTuple):
    """One training run; `losses` and `seconds` have one entry per step and one for the
    final parameters."""

    losses: list[float]
    seconds: list[float]
    gradients: int
    accuracy: float


def gradients_of_step(opt_state: Any) -> int:
    """Return the number of gradients that the last step evaluated: one per trial of a
    line search (the last one is reused), or one without a line search.

    A Hessian-vector product counts as two.
    """
    found = hessopt.diagnostics(opt_state)
    products = found.get("newton_cg.products", found.get("trust_region.products", 0))
    return int(
        found.get(
            "linesearch.trials", found.get("zoom_linesearch.num_linesearch_steps", 1)
        )
    ) + 2 * int(products)


def train(
    name: str,
    data: tuple[jax.Array, ...],
    seed: int,
    max_steps: int,
    max_seconds: float,
    bar: tqdm,
) -> Run:
    """Train with one optimizer until its time or its steps are used up."""
    x, y, x_test, y_test = data
    state = TrainState.create(
        apply_fn=MODEL.apply,
        params=MODEL.init(jax.random.key(seed), x[:1]),
        tx=OPTIMIZERS[name](),
    )
    objective = loss_fn.close(x, y)
    value_and_grad = hessopt.value_and_grad_from_state(objective)

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        # full batch: value and gradient of the last search are still valid
        value, grads = value_and_grad(state.params, state=state.opt_state)
        return state.apply_gradients(
            grads=grads, value=value, value_fn=objective
        ), value

    evaluate = jax.jit(objective)
    bar.set_postfix_str("compiles")
    # two steps for compilation, since some states of optax change type once
    jax.block_until_ready((step(step(state)[0]), evaluate(state.params)))

    losses, seconds, gradients, before = [], [], 1, bar.n
    start = time.perf_counter()
    while (
        len(losses) < max_steps
        and (elapsed := time.perf_counter() - start) < max_seconds
    ):
        state, loss = step(state)
        losses.append(float(loss))
        seconds.append(elapsed)
        gradients += gradients_of_step(state.opt_state)
        bar.set_postfix_str(f"step {len(losses)}, loss {losses[-1]:.6f}", refresh=False)
        bar.update(before + int(1000 * elapsed) - bar.n)
    seconds.append(time.perf_counter() - start)
    bar.update(before + round(1000 * max_seconds) - bar.n)
    losses.append(float(evaluate(state.params)))
    logits, _ = model_fn(state.params, x_test)
    predicted = jnp.argmax(logits, axis=1)
    return Run(losses, seconds, gradients, float(jnp.mean(predicted == y_test)))


def train_all(
    names: list[str],
    data: tuple[jax.Array, ...],
    seed: int,
    max_steps: int,
    max_seconds: float,
) -> dict[str, Run]:
    """Train with one optimizer after the other and print a line for each; a terminal
    also shows a progress bar."""
    runs, shape = {}, "{desc} {percentage:3.0f}%|{bar}|{postfix}"
    # milliseconds, since whole numbers add up without rounding
    total = len(names) * round(1000 * max_seconds)
    with tqdm(total=total, bar_format=shape, disable=None, leave=False) as bar:
        for number, name in enumerate(names, start=1):
            start = time.perf_counter()
            bar.set_description_str(f"{number}/{len(names)} {name}", refresh=False)
            run = runs[name] = train(name, data, seed, max_steps, max_seconds, bar)
            compiling = time.perf_counter() - start - run.seconds[-1]
            tqdm.write(
                f"{number:2d}/{len(names)} {name:23} {len(run.losses) - 1:6d} steps in {run.seconds[-1]:4.1f} s, "
                f"after {compiling:4.1f} s of compilation: loss {run.losses[-1]:.6f}"
            )
            sys.stdout.flush()  # a pipe would buffer the lines until the end
    return runs


def print_table(runs: dict[str, Run]) -> None:
    """Print one line per optimizer."""
    target = runs["adam"].losses[-1] if "adam" in runs else None
    titles = (
        "optimizer",
        "final loss",
        "test accuracy",
        "steps",
        "gradients",
        "seconds",
        "s to Adam's loss",
    )
    print(("{:>23}" + " {:>13}" * 5 + " {:>17}").format(*titles))
    for name, run in runs.items():
        reached = [
            s
            for s, loss in zip(run.seconds, run.losses, strict=True)
            if target is not None and loss <= target
        ]
        print(
            f"{name:>23} {run.losses[-1]:13.6f} {run.accuracy:13.4f} {len(run.losses) - 1:13d} {run.gradients:13d} "
            f"{run.seconds[-1]:13.1f} {f'{reached[0]:.1f}' if reached else '-':>17}"
        )
    print(winner(runs))
    print(
        "A Newton step also forms the Hessian (about as much work as 2 gradients per parameter, done in chunks)."
    )
    print(
        "A step that measures a rate also costs about one further gradient (gen-newton) or more (grouped-newton)."
    )


def winner(runs: dict[str, Run]) -> str:
    """Describe the optimizer with the lowest training loss and those with the highest
    test accuracy."""
    first = min(runs, key=lambda name: np.nan_to_num(runs[name].losses[-1], nan=np.inf))
    highest = max(run.accuracy for run in runs.values())
    best = " and ".join(name for name, run in runs.items() if run.accuracy == highest)
    return (
        f"Winner: {first}, with the lowest training loss, {runs[first].losses[-1]:.6f}, and a test accuracy of "
        f"{runs[first].accuracy:.4f}; the highest test accuracy is {highest:.4f}, by {best}."
    )


def draw(runs: dict[str, Run], path: pathlib.Path) -> None:
    """Draw the difference to the lowest loss of all runs, against steps and seconds."""
    lowest = np.nanmin(np.concatenate([run.losses for run in runs.values()]))
    figure, axes = plt.subplots(
        1, 2, figsize=(14, 5.5), sharey=True, layout="constrained"
    )
    for name, run in runs.items():
        excess = np.maximum(np.array(run.losses) - lowest, FLOOR)
        axes[0].plot(np.arange(1, len(excess) + 1), excess, label=name, **LOOKS[name])
        axes[1].plot(run.seconds, excess, label=name, **LOOKS[name])
    axes[0].set(
        xscale="log",
        yscale="log",
        xlabel="steps",
        ylabel=f"loss above the lowest one reached, or {FLOOR:g}",
    )
    axes[1].set(xlabel="seconds, compilation not counted")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.margins(x=0.01)
        label_ends(ax)
    figure.suptitle("Digits, MLP 64-32-10, full batch")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def label_ends(ax: Axes) -> None:
    """Write the name of each line to the right of the axes, as near to the height of
    its end as possible without overlap."""
    ax.autoscale_view()  # fixes the limits: positions are in fractions of the axes
    lines = list(ax.lines)  # without the leader lines that are added below
    points = [np.transpose(line.get_data())[-1] for line in lines]
    ends = np.nan_to_num(
        ax.transAxes.inverted().transform(ax.transData.transform(points)), nan=1.0
    )
    order = np.argsort(ends[:, 1], kind="stable")
    gaps = np.arange(len(order)) * min(0.05, 1 / len(order))
    # nearest heights with these gaps: after subtracting the gaps, they must increase
    heights = gaps + isotonic_regression(
        ends[order, 1] - gaps, y_min=0.0, y_max=1.0 - gaps[-1]
    )
    for index, height in zip(order, heights, strict=True):
        line, (x, y) = lines[index], ends[index]
        look = {"color": line.get_color(), "transform": ax.transAxes, "clip_on": False}
        ax.plot([x, 1.0, 1.05], [y, y, height], linewidth=0.6, alpha=0.6, **look)
        ax.plot([1.05, 1.12], [height, height], linestyle=line.get_linestyle(), **look)
        ax.text(1.13, height, line.get_label(), va="center", **look)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=STORY, metavar="NAME"
    )
    which.add_argument(
        "--all", action="store_true", help=f"all {len(OPTIMIZERS)} optimizers"
    )
    parser.add_argument(
        "--steps", type=int, default=100_000, help="most steps per optimizer"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time per optimizer")
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("figures"),
        help="folder for the figure",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps only, to see that it runs"
    )
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seconds = min(args.steps, 3), min(args.seconds, 5.0)

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        (x / 16).astype(np.float32), y, train_size=1500, stratify=y, random_state=0
    )
    data = tuple(map(jnp.asarray, (x, y, x_test, y_test)))
    names = list(OPTIMIZERS) if args.all else list(dict.fromkeys(args.optimizers))
    runs = train_all(names, data, args.seed, args.steps, args.seconds)

    print_table(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(runs, args.out / "digits.png")
    print(f"figure: {args.out / 'digits.png'}")


if __name__ == "__main__":
    main()
