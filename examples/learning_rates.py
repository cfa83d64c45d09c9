"""Train with automatic learning rates, and compare with grids of constant rates and
cosine schedules.

The networks are trained on minibatches of scikit-learn's digits with cross-entropy. For
a small CNN, generalized Newton determines the rate of SGD and of AdamW. For an MLP
(64-32-10, tanh) and SGD with momentum, generalized Newton determines one rate, and
grouped Newton one rate for each tensor. All runs of a network use the same initial
parameters and the same batches. The table shows the final loss of each run and the time
of an epoch. The figure shows the training losses, the rates applied at every step, and
the interaction of the groups of the MLP. With plain SGD, the rate that is optimal for
one step is far below the best constant rate.

    python examples/learning_rates.py                                     # about 2 minutes
    python examples/learning_rates.py --epochs 100 --seed 1
"""

import argparse
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import hessopt
from hessopt.linen import TrainState

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is set
from matplotlib.axes import Axes

BATCH = 128
TRAIN = 11 * BATCH  # training images of the 1797; the others are test images


class CNN(nn.Module):
    """Two convolutions and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits `(batch, 10)` of images `(batch, 8, 8, 1)`."""
        x = nn.gelu(nn.Conv(8, (3, 3))(x))
        x = nn.gelu(nn.Conv(16, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class MLP(nn.Module):
    """64-32-10 with tanh."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits `(batch, 10)` of images `(batch, 8, 8, 1)`."""
        return nn.Dense(10)(jnp.tanh(nn.Dense(32)(x.reshape(len(x), -1))))


MODELS: dict[str, nn.Module] = {"CNN": CNN(), "MLP": MLP()}


def optimizers(steps: int) -> dict[str, dict[str, optax.GradientTransformation]]:
    """Return optimizers by network and name; cosine schedules last `steps` steps."""

    def cosine(peak: float) -> optax.Schedule:
        return optax.cosine_decay_schedule(peak, steps)

    return {
        "CNN": {
            **{f"sgd {rate:g}": optax.sgd(rate) for rate in (0.1, 0.3, 1.0, 2.0)},
            "sgd cosine 1": optax.sgd(cosine(1.0)),
            "sgd gen-newton": hessopt.generalized_newton(optax.sgd(1.0)),
            **{f"adamw {rate:g}": optax.adamw(rate) for rate in (0.01, 0.03, 0.1, 0.3)},
            "adamw cosine 0.1": optax.adamw(cosine(0.1)),
            "adamw gen-newton": hessopt.generalized_newton(optax.adamw(1.0)),
        },
        "MLP": {
            **{
                f"momentum {rate:g}": optax.sgd(rate, momentum=0.9)
                for rate in (0.1, 0.3, 1.0, 2.0)
            },
            "momentum cosine 1": optax.sgd(cosine(1.0), momentum=0.9),
            "momentum gen-newton": hessopt.generalized_newton(
                optax.sgd(1.0, momentum=0.9)
            ),
            "momentum grouped-newton": hessopt.grouped_newton(
                optax.sgd(1.0, momentum=0.9), groups="leaf"
            ),
        },
    }


class Run(NamedTuple):
    """One training run."""

    losses: list[float]  # on all training images: at the start, and after each epoch
    # (steps, groups), rates that were applied; None without automatic rates
    rates: np.ndarray | None
    accuracy: float  # on the test images
    seconds: float  # median of the epochs, compilation not counted
    params: Any
    opt_state: Any


def applied_rate(opt_state: Any) -> jax.Array | None:
    """Return the rates `(groups,)` of the last step, if the optimizer finds any: its
    state is `(base, rate)`."""
    return opt_state[1].info.rate if hasattr(opt_state[1], "info") else None


def train(
    model: nn.Module,
    tx: optax.GradientTransformation,
    data: tuple[Any, ...],
    epochs: int,
    seed: int,
) -> Run:
    """Train for some epochs, each one compiled scan over its batches."""
    x, y, x_test, y_test = data
    params_key, *epoch_keys = jax.random.split(jax.random.key(seed), epochs + 1)
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(params_key, x[:1])["params"], tx=tx
    )

    def logits(params: Any, x: jax.Array) -> Any:
        return model.apply({"params": params}, x)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, x), y
        ).mean()

    def step(
        state: TrainState, batch: jax.Array
    ) -> tuple[TrainState, jax.Array | None]:
        # the optimizer evaluates the loss on this batch
        state, *_ = state.step_with(loss_fn, x[batch], y[batch])
        return state, applied_rate(state.opt_state)

    @jax.jit
    def run_epoch(
        state: TrainState, key: jax.Array
    ) -> tuple[TrainState, jax.Array | None]:
        return jax.lax.scan(
            step, state, jax.random.permutation(key, len(x)).reshape(-1, BATCH)
        )

    evaluate = jax.jit(lambda state: loss_fn(state.params, x, y))
    jax.block_until_ready(run_epoch(state, epoch_keys[0]))  # to compile

    losses, rates, seconds = [float(evaluate(state))], [], []
    for key in epoch_keys:
        start = time.perf_counter()
        state, rate = jax.block_until_ready(run_epoch(state, key))
        seconds.append(time.perf_counter() - start)
        losses.append(float(evaluate(state)))
        rates.append(rate)
    found = None if rates[0] is None else np.concatenate(rates)
    accuracy = float(
        jnp.mean(jnp.argmax(logits(state.params, x_test), axis=1) == y_test)
    )
    return Run(
        losses,
        found,
        accuracy,
        statistics.median(seconds),
        state.params,
        state.opt_state,
    )


def print_table(runs: dict[str, dict[str, Run]]) -> None:
    """Print one line per run."""
    titles = (
        "network",
        "method",
        "final training loss",
        "test accuracy",
        "seconds per epoch",
    )
    print(("{:>7} {:>23}" + " {:>19}" * 3).format(*titles))
    for network, of_network in runs.items():
        for name, run in of_network.items():
            print(
                f"{network:>7} {name:>23} {run.losses[-1]:19.6f} {run.accuracy:19.4f} {run.seconds:19.4f}"
            )


def normalized_hessian(run: Run) -> np.ndarray:
    """Return `H_st / sqrt(|H_ss H_tt|)` of a run of grouped Newton, with the averaged H
    of its state."""
    hessian = np.asarray(run.opt_state[1].memory.model.hessian)
    scale = np.sqrt(np.abs(np.diagonal(hessian)))
    return (
        hessian / np.where(scale > 0, scale, 1) / np.where(scale > 0, scale, 1)[:, None]
    )


def draw_losses(ax: Axes, network: str, of_network: dict[str, Run]) -> None:
    """Draw training losses, with a color for each base optimizer, from light to dark,
    and thick lines for automatic rates."""
    shades = {
        "sgd": plt.colormaps["Blues"],
        "adamw": plt.colormaps["Oranges"],
        "momentum": plt.colormaps["Greens"],
    }
    depth = dict.fromkeys(shades, 0.2)
    for name, run in of_network.items():
        base = name.split()[0]
        depth[base] += 0.11
        width, line = (
            (1.2 if run.rates is None else 2.5),
            ("--" if "cosine" in name else "-"),
        )
        ax.plot(
            run.losses,
            line,
            label=name,
            color=shades[base](depth[base]),
            linewidth=width,
        )
    ax.set(
        yscale="log",
        xlabel="epochs",
        ylabel="loss on all training images",
        title=f"{network}: training loss",
    )
    ax.set_ylim(top=10.0)  # some diverge
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def draw_matrix(ax: Axes, matrix: np.ndarray, names: tuple[str, ...]) -> None:
    """Draw a heat map of entries in [-1, 1], with the names of rows and columns."""
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    for (row, column), entry in np.ndenumerate(matrix):
        color = "white" if abs(entry) > 0.6 else "black"
        ax.text(column, row, f"{entry:.2f}", ha="center", va="center", color=color)
    plt.colorbar(image, ax=ax, shrink=0.5)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set_yticks(range(len(names)), names)


def draw(runs: dict[str, dict[str, Run]], path: pathlib.Path) -> None:
    """Draw the losses by network, the rates of generalized and grouped Newton, and the
    interaction of the groups."""
    figure, axes = plt.subplot_mosaic("ABE;CDE", figsize=(18, 9), layout="constrained")
    for key, (network, of_network) in zip("AC", runs.items(), strict=True):
        draw_losses(axes[key], network, of_network)
        for name, run in of_network.items():
            if run.rates is not None and "gen-newton" in name:
                rate, steps = run.rates[:, 0], np.arange(len(run.rates))
                (line,) = axes["B"].plot(
                    steps, rate, label=f"{network} {name.split()[0]}", linewidth=1
                )
                none, bottom = steps[rate == 0], axes["B"].get_xaxis_transform()
                axes["B"].plot(
                    none,
                    np.full(none.size, 0.02),
                    "|",
                    color=line.get_color(),
                    transform=bottom,
                )
    axes["B"].set_yscale("log", nonpositive="mask")
    axes["B"].set(
        xlabel="steps",
        ylabel="rate",
        title="rate of generalized Newton (ticks: no step)",
    )

    grouped = runs["MLP"]["momentum grouped-newton"]
    names = hessopt.group_labels(grouped.params, "leaf")[1]
    assert grouped.rates is not None
    for name, rate in zip(names, grouped.rates.T, strict=True):
        axes["D"].plot(np.arange(len(rate)), rate, label=name, linewidth=1)
    axes["D"].set_yscale("symlog", linthresh=0.1)
    axes["D"].set(xlabel="steps", ylabel="rate", title="MLP: rates of grouped Newton")
    for key in "ABCD":
        axes[key].grid(alpha=0.3)
    for key in "BD":
        axes[key].legend(fontsize="small")

    draw_matrix(axes["E"], normalized_hessian(grouped), names)
    axes["E"].set_title(r"MLP: $H_{st} / \sqrt{|H_{ss} H_{tt}|}$, at the end")
    figure.suptitle(f"Digits, minibatches of {BATCH}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=40, help="of every run")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the initial parameters and the batches"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("figures"),
        help="folder for the figure",
    )
    parser.add_argument(
        "--quick", action="store_true", help="two epochs only, to see that it runs"
    )
    args = parser.parse_args()
    epochs = min(args.epochs, 2) if args.quick else args.epochs

    x, y = load_digits(return_X_y=True)
    images = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    x, x_test, y, y_test = train_test_split(
        images, y, train_size=TRAIN, stratify=y, random_state=0
    )
    data = tuple(map(jnp.asarray, (x, y, x_test, y_test)))

    plan = optimizers(epochs * TRAIN // BATCH)
    runs: dict[str, dict[str, Run]] = {network: {} for network in plan}
    with tqdm(total=sum(map(len, plan.values()))) as bar:
        for network, methods in plan.items():
            for name, tx in methods.items():
                bar.set_description(f"{network} {name}")
                runs[network][name] = train(
                    MODELS[network], tx, data, epochs, args.seed
                )
                bar.update()

    print_table(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(runs, args.out / "learning_rates.png")
    print(f"figure: {args.out / 'learning_rates.png'}")


if __name__ == "__main__":
    main()
