"""Draw the loss along a training step, its models of second and third order, and the
steps of the rate methods.

An MLP (64-32-10, tanh) is trained on scikit-learn's digits, full batch, at a constant
rate. After 2, 20 and 200 steps a panel shows phi(t) = f(params + t u) for the update u
of SGD, momentum or Adam, with its parabola and its cubic model, and the points that the
Wolfe search, generalized Newton and grouped Newton reach in their first step.
Generalized Newton reaches the minimum of the parabola. Grouped Newton with one group
reaches the minimum of the cubic model, which uses the absolute value of the third
derivative and therefore gives a shorter step. With a rate for each tensor its step is
not along u; it is drawn at the distance of its length.

After two steps the direction limits the decrease: rates for each tensor reach a loss of
0.91 from SGD's update, where the loss along u is at least 1.60. After 20 steps the
minimum along the update of SGD is at t = 0.7, before the end of its step; for momentum
and Adam it is beyond, at t >= 2. After 200 steps the training moves slowly along a
valley of the loss: both models predict its minimum 140 to 360 steps ahead, which is too
far for momentum, and rates for each tensor do not reduce the loss further. The search
accepts the first of t = 1, 10, 100 at which the slope is small enough.

    python -m examples.loss_along_the_step                       # about 20 seconds
    python -m examples.loss_along_the_step --moments 5 50 1000
"""

import argparse
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import hessopt
from examples.digits import MODEL, loss_fn

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is set
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

BASES: dict[str, optax.GradientTransformation] = {
    "SGD, rate 1": optax.sgd(1.0),
    "momentum 0.9, rate 1": optax.sgd(1.0, momentum=0.9),
    "Adam, rate 0.03": optax.adam(0.03),
}

EACH = "grouped Newton, each tensor"
METHODS: dict[str, optax.GradientTransformation] = {
    "training's own step": optax.identity(),
    "Wolfe search": hessopt.scale_by_wolfe_linesearch(),
    "generalized Newton": hessopt.scale_by_generalized_newton(),
    "grouped Newton, one group": hessopt.scale_by_grouped_newton(groups="all"),
    EACH: hessopt.scale_by_grouped_newton(groups="leaf"),
}
"""Methods that scale an update `u`; the steps of all except the last are `t u`."""

LOOKS = {
    name: (f"C{i}", marker)
    for i, (name, marker) in enumerate(zip(METHODS, "oPsDv", strict=True))
}
"""Colors and markers."""


class Landing(NamedTuple):
    """A step of a method."""

    step: Any  # tree like the parameters
    length: jax.Array  # relative to the update
    value: jax.Array  # loss after the step


class Moment(NamedTuple):
    """The loss along an update, at a moment of training."""

    params: Any
    updates: Any
    terms: hessopt.Taylor  # derivatives of phi(t) = f(params + t updates)
    landings: dict[str, Landing]


@jax.jit
def look(params: Any, updates: Any, x: jax.Array, y: jax.Array) -> Moment:
    """Measure the loss along an update, and compute the first step of every method."""
    objective = loss_fn.close(x, y)
    value, grad = jax.value_and_grad(objective)(params)

    def land(method: optax.GradientTransformation) -> Landing:
        method = optax.with_extra_args_support(method)
        step, _ = method.update(
            updates,
            method.init(params),
            params,
            value=value,
            grad=grad,
            value_fn=objective,
        )
        length = optax.tree.norm(step) / optax.tree.norm(updates)
        return Landing(step, length, objective(optax.apply_updates(params, step)))

    landings = {name: land(method) for name, method in METHODS.items()}
    return Moment(params, updates, hessopt.taylor(objective, params, updates), landings)


@jax.jit
def along(
    params: Any, direction: Any, rates: jax.Array, x: jax.Array, y: jax.Array
) -> jax.Array:
    """Return `phi(t) = f(params + t direction)` at rates `(points,)`."""
    return jax.vmap(hessopt.restriction(loss_fn.close(x, y), params, direction))(
        rates[:, None]
    )


def observe(
    base: optax.GradientTransformation,
    moments: list[int],
    seed: int,
    x: jax.Array,
    y: jax.Array,
) -> list[Moment]:
    """Train at a constant rate, and measure the loss along the update after each of
    these numbers of steps."""

    @jax.jit
    def advance(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        return base.update(jax.grad(loss_fn)(params, x, y), state, params)

    params = MODEL.init(jax.random.key(seed), x[:1])
    state, seen = base.init(params), []
    for step in range(max(moments) + 1):
        updates, state = advance(params, state, x, y)
        if step in moments:
            seen.append(look(params, updates, x, y))
        params = optax.apply_updates(params, updates)
    return seen


def print_table(moments: dict[str, list[Moment]], after: list[int]) -> None:
    """Print the loss after the step of every method."""
    print(
        ("{:>21} {:>6} {:>9}" + " {:>27}" * len(METHODS)).format(
            "base", "steps", "loss", *METHODS
        )
    )
    for base, of_base in moments.items():
        for steps, moment in zip(after, of_base, strict=True):
            landings = (moment.landings[name] for name in METHODS)
            cells = (
                f"{landing.value:.4f} at {landing.length:8.2f}" for landing in landings
            )
            print(
                f"{base:>21} {steps:>6} {moment.terms.value:9.4f}"
                + "".join(f" {cell:>27}" for cell in cells)
            )


def draw_panel(ax: Axes, moment: Moment, x: jax.Array, y: jax.Array) -> None:
    """Draw phi, its models and the landings; the step of grouped Newton with many rates
    has a separate curve."""
    value, (slope,), ((bend,),), (third,) = (np.asarray(term) for term in moment.terms)
    lengths = {name: float(landing.length) for name, landing in moment.landings.items()}
    farthest = max(lengths.values())
    t = np.linspace(-0.1, 1.2, 261) * farthest
    parabola = value + slope * t + bend * t**2 / 2
    ax.plot(
        t, along(moment.params, moment.updates, jnp.asarray(t), x, y), color="black"
    )
    ax.plot(t, parabola, "--", color="C2", linewidth=1)
    ax.plot(t, parabola + abs(third * t**3) / 6, "-.", color="C3", linewidth=1)

    if lengths[EACH] > 0:
        direction = jax.tree.map(
            lambda leaf: leaf / lengths[EACH], moment.landings[EACH].step
        )
        own = t[(t >= 0) & (t <= 1.2 * lengths[EACH])]
        ax.plot(
            own,
            along(moment.params, direction, jnp.asarray(own), x, y),
            color=LOOKS[EACH][0],
            linewidth=1,
        )
    for name, (color, marker) in LOOKS.items():
        landing = moment.landings[name]
        ax.plot(
            lengths[name],
            landing.value,
            marker,
            color=color,
            markeredgecolor="black",
            label=f"{landing.value:.4f}",
        )
    lowest = min(float(landing.value) for landing in moment.landings.values())
    room = float(value) - lowest
    ax.set_ylim(lowest - 0.35 * room, float(value) + 0.35 * room)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", title=f"from {value:.4f} to")


def draw(
    moments: dict[str, list[Moment]],
    after: list[int],
    x: jax.Array,
    y: jax.Array,
    path: pathlib.Path,
) -> None:
    """Draw a panel for every base optimizer and moment, with a legend below."""
    shape = (len(after), len(moments))
    figure, axes = plt.subplots(
        *shape,
        figsize=(5.5 * shape[1], 4 * shape[0]),
        squeeze=False,
        layout="constrained",
    )
    for column, (base, of_base) in zip(axes.T, moments.items(), strict=True):
        for ax, steps, moment in zip(column, after, of_base, strict=True):
            draw_panel(ax, moment, x, y)
            ax.set_title(f"{base}, after {steps} steps")
    for ax in axes[-1]:
        ax.set_xlabel("t (1: the step of the training)")
    for ax in axes[:, 0]:
        ax.set_ylabel("loss")
    what = [
        Line2D([], [], color="black", label="loss along the update"),
        Line2D([], [], color="C2", linestyle="--", label="parabola"),
        Line2D(
            [],
            [],
            color="C3",
            linestyle="-.",
            label="cubic model, by |third derivative|",
        ),
        Line2D(
            [],
            [],
            color=LOOKS[EACH][0],
            label="loss along its step with a rate for each",
        ),
    ]
    for name, (color, marker) in LOOKS.items():
        what.append(
            Line2D(
                [],
                [],
                color=color,
                marker=marker,
                linestyle="",
                markeredgecolor="black",
                label=name,
            )
        )
    figure.legend(handles=what, loc="outside lower center", ncols=5)
    figure.suptitle(
        "Digits, MLP 64-32-10, full batch: f(params + t u) for the update u of the training"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train, look and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--moments",
        type=int,
        nargs="+",
        default=[2, 20, 200],
        help="steps before each look",
    )
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
    after = [1, 3] if args.quick else sorted(set(args.moments))

    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    moments = {
        name: observe(base, after, args.seed, x, y)
        for name, base in tqdm(BASES.items(), desc="training")
    }

    print_table(moments, after)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(moments, after, x, y, args.out / "loss_along_the_step.png")
    print(f"figure: {args.out / 'loss_along_the_step.png'}")


if __name__ == "__main__":
    main()
