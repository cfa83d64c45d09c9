"""Draw error against seconds for every method at four sizes of a network: the figure of
"Choosing a method" (docs/pages/choosing.md).

Results on two cores, with twelve seconds for each method: up to a thousand parameters
self-scaled BFGS reaches an error of 4e-6, compared to 1e-3 to 3e-3 for Adam and L-BFGS.
With a hundred parameters the Levenberg-Marquardt method (`trust-region-gauss`) is
slower at first and reaches a lower error. With ten thousand parameters a matrix is too
expensive: conjugate-gradient methods reach the lowest errors, with a trust region the
lowest (1e-3), lower than L-BFGS by a factor of three. With a hundred thousand the cost
of gradients is decisive: L-BFGS and three of the four conjugate-gradient methods reach
5e-3, Adam 1.4e-2. The Hessian hardly pays off on this loss, which is far from convex:
the error of Newton's method is lower than Adam's at a hundred parameters and higher at
a thousand; with Gauss-Newton curvature it is lower by a factor of six to ten.

    python examples/which_method.py                                # about 18 minutes
    python examples/which_method.py --methods adam lbfgs ssbroyden --seconds 5

A tanh network 2-w-w-1 is fitted to `exp(x y) sin(3 x + 2 y)` on a square at 500 points,
in float64, full batch; its width determines the size n. Every method starts from the
same parameters and runs for the same time, not counting compilation and evaluations of
the error. Adam uses a cosine schedule over the number of steps that fit, with the best
of three initial rates. A method is omitted if its matrices take more than 4 GB, or if
one of its steps takes more than the whole time at 10^10 operations per second, by the
costs in docs/pages/choosing.md; the table lists these. On a busy machine, set
`OPENBLAS_NUM_THREADS=1`: the threads of LAPACK wait for each other.
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import optax
from flax import linen as nn
from tqdm import tqdm

import hessopt

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is set

WIDTHS = (8, 29, 98, 314)  # 105, 987, 10095 and 100167 parameters
POINTS, HELD_OUT = 500, 2000
# operations per second and bytes: limits above which methods are omitted
SPEED, MEMORY = 1e10, 4e9
RATES = (3e-3, 1e-2, 3e-2)  # initial rates of Adam
QUICK = ("adam", "lbfgs", "newton")


class MLP(nn.Module):
    """2-w-w-1 with tanh."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the outputs `(m,)` at points `(m, 2)`."""
        for _ in range(2):
            x = jnp.tanh(nn.Dense(self.width, param_dtype=jnp.float64)(x))
        return nn.Dense(1, param_dtype=jnp.float64)(x)[:, 0]


def target(x: jax.Array) -> jax.Array:
    """The function to learn, `exp(x y) sin(3 x + 2 y)`, at points `(m, 2)`."""
    x, y = x.T
    return jnp.exp(x * y) * jnp.sin(3 * x + 2 * y)


class Task(NamedTuple):
    """The regression at one size."""

    value_fn: Any  # half the mean squared residual, a composite
    error: Callable[[Any], jax.Array]  # relative, L2, on points held out
    params: Any
    layers: tuple[int, ...]  # number of parameters of each layer
    n: int  # number of all parameters


class Cost(NamedTuple):
    """The cost of a step, to leading order."""

    operations: float
    numbers: float  # numbers stored in matrices


class Method(NamedTuple):
    """An optimizer, the cost of its step, and its line style."""

    make: Callable[[], optax.GradientTransformation]
    cost: Callable[[Task], Cost]
    color: str
    line: str


class Run(NamedTuple):
    """The record of a run, with one entry per evaluation of the error."""

    steps: list[int]
    seconds: list[float]
    losses: list[float]
    errors: list[float]


def gradients(task: Task) -> Cost:
    """A few gradients of `6 m n` operations, which fit at every size."""
    return Cost(6.0 * POINTS * task.n, 0)


def products(task: Task) -> Cost:
    """Two products with a matrix."""
    return Cost(4.0 * task.n**2, task.n**2)


def factors(task: Task) -> Cost:
    """Products with the Hessian, of two gradients each, and a Cholesky factor."""
    return Cost(12.0 * POINTS * task.n**2 + 2 / 3 * task.n**3, 2 * task.n**2)


def factors_of_blocks(task: Task) -> Cost:
    """The same for blocks of the Hessian."""
    operations = sum(12.0 * POINTS * task.n * b + 2 / 3 * b**3 for b in task.layers)
    return Cost(operations, 2 * max(task.layers) ** 2)


def eigenvectors(task: Task) -> Cost:
    """Products with the Hessian, of two gradients each, and all eigenvectors."""
    return Cost(12.0 * POINTS * task.n**2 + 18.0 * task.n**3, 3 * task.n**2)


def singular_vectors(task: Task) -> Cost:
    """Tangents of the model, and a decomposition of its Jacobian."""
    return Cost(8.0 * POINTS * task.n**2, POINTS * task.n)


GAUSS = "gauss_newton"
METHODS: dict[str, Method] = {
    "adam": Method(lambda: optax.adam(1e-2), gradients, "black", "-"),
    "gen-newton-adam": Method(lambda: hessopt.generalized_newton(optax.adam(1.0)), gradients, "gray", "-"),
    "grouped-newton-momentum": Method(
        lambda: hessopt.grouped_newton(optax.sgd(1.0, momentum=0.9)), gradients, "gray", "--"
    ),
    "optax-lbfgs": Method(lambda: optax.lbfgs(), gradients, "tab:cyan", "--"),
    "lbfgs": Method(lambda: hessopt.lbfgs(), gradients, "tab:cyan", "-"),
    "bfgs": Method(lambda: hessopt.bfgs(), products, "tab:blue", "--"),
    "ssbroyden": Method(lambda: hessopt.bfgs(formula="ssbroyden"), products, "tab:blue", "-"),
    "newton": Method(lambda: hessopt.newton(), factors, "tab:red", "-"),
    "newton-layers": Method(lambda: hessopt.newton(blocks="layer"), factors_of_blocks, "tab:red", ":"),
    "newton-gauss": Method(lambda: hessopt.newton(damping=1e-8, curvature=GAUSS), factors, "tab:red", "--"),
    "newton-cg": Method(lambda: hessopt.newton_cg(), gradients, "tab:orange", "-"),
    "newton-cg-gauss": Method(lambda: hessopt.newton_cg(curvature=GAUSS), gradients, "tab:orange", "--"),
    "trust-region": Method(lambda: hessopt.trust_region_newton(), eigenvectors, "tab:purple", "-"),
    "trust-region-gauss": Method(
        lambda: hessopt.trust_region_newton(curvature=GAUSS, geodesic_acceleration=True),
        singular_vectors, "tab:purple", "--",
    ),
    "trust-region-cg": Method(lambda: hessopt.trust_region_newton(subproblem="cg"), gradients, "tab:green", "-"),
    "trust-region-cg-gauss": Method(
        lambda: hessopt.trust_region_newton(subproblem="cg", curvature=GAUSS), gradients, "tab:green", "--"
    ),
}  # fmt: skip


def regression(width: int, seed: int) -> Task:
    """Learn the target with a network of this width."""
    model = MLP(width)
    keys = jax.random.split(jax.random.key(0))
    x, x_held_out = (
        jax.random.uniform(k, (m, 2), float, -1, 1)
        for k, m in zip(keys, (POINTS, HELD_OUT), strict=True)
    )
    y, y_held_out = target(x), target(x_held_out)
    params = model.init(jax.random.key(seed), x)

    def network(params: Any, x: jax.Array) -> Any:
        return model.apply(params, x)

    def error(params: Any) -> jax.Array:
        return jnp.linalg.norm(
            network(params, x_held_out) - y_held_out
        ) / jnp.linalg.norm(y_held_out)

    value_fn = hessopt.composite(
        lambda params: network(params, x) - y, lambda r: 0.5 * jnp.mean(r**2)
    )
    layers = tuple(
        sum(leaf.size for leaf in jax.tree.leaves(layer))
        for layer in params["params"].values()
    )
    return Task(value_fn, error, params, layers, sum(layers))


def train(tx: optax.GradientTransformation, task: Task, seconds: float) -> Run:
    """Train until the time is used up, and evaluate the error whenever the time spent
    has increased by a tenth."""
    value_and_grad = hessopt.value_and_grad_from_state(task.value_fn)
    tx = optax.with_extra_args_support(tx)

    def step(_: int, at: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = at
        value, grads = value_and_grad(params, state=state)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=task.value_fn
        )
        return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, donate_argnums=1)  # a matrix is not copied
    def advance(params: Any, state: Any, steps: int) -> tuple[Any, Any]:
        return jax.lax.fori_loop(0, steps, step, (params, state))

    evaluate = jax.jit(lambda params: (task.value_fn(params), task.error(params)))
    # copied for the donation, since states of optax share buffers
    params, state = task.params, jax.tree.map(jnp.copy, tx.init(task.params))
    for _ in range(2):  # to compile; some of optax's states change type once
        params, state = advance(params, state, 0)
    jax.block_until_ready((params, evaluate(params)))

    looks: list[tuple[int, float, float, float]] = []
    steps, taken, spent = 1, 0, 0.0
    while spent < seconds:
        start = time.perf_counter()
        params, state = jax.block_until_ready(advance(params, state, steps))
        took = time.perf_counter() - start
        taken, spent = taken + steps, spent + took
        if spent <= seconds or not looks:
            loss, error = evaluate(params)
            looks.append((taken, spent, float(loss), float(error)))
        steps = max(1, int(min(0.1 * spent, seconds - spent) / took * steps))
    at, when, losses, errors = (list(column) for column in zip(*looks, strict=True))
    return Run(at, when, losses, errors)


def measure(name: str, task: Task, seconds: float) -> Run:
    """Train by a method; for Adam, use a cosine schedule over the number of steps that
    fit, with the best of several initial rates."""
    if name != "adam":
        return train(METHODS[name].make(), task, seconds)
    probe = train(METHODS["adam"].make(), task, seconds / 10)
    steps = int(0.9 * seconds / probe.seconds[-1] * probe.steps[-1]) + 1
    runs = [
        train(optax.adam(optax.cosine_decay_schedule(rate, steps)), task, seconds)
        for rate in RATES
    ]
    return min(runs, key=lambda run: run.losses[-1])


def obstacle(method: Method, task: Task, seconds: float) -> str | None:
    """Describe the cost that exceeds a limit at this size, if any."""
    operations, numbers = method.cost(task)
    if 8 * numbers > MEMORY:
        return f"{8e-9 * numbers:.0f} GB"
    return (
        f"{operations / SPEED:.0f} s a step" if operations / SPEED > seconds else None
    )


def print_table(runs: dict[int, dict[str, Run | str]]) -> None:
    """Print one line per method and one column per size: relative error and steps, or
    the reason why the method is omitted."""
    print(
        ("{:>23}" + " {:>20}" * len(runs)).format("method", *(f"n = {n}" for n in runs))
    )
    for name in next(iter(runs.values())):
        entries = [of_size[name] for of_size in runs.values()]
        cells = [
            f"- ({e})" if isinstance(e, str) else f"{e.errors[-1]:.1e} ({e.steps[-1]})"
            for e in entries
        ]
        print(("{:>23}" + " {:>20}" * len(runs)).format(name, *cells))
    print("Relative L2 error on points held out (steps taken), or what does not fit.")


def save(
    runs: dict[int, dict[str, Run | str]], seconds: float, path: pathlib.Path
) -> None:
    """Write the records as JSON, with times, losses and errors to four digits."""

    def record(run: Run | str) -> dict[str, Any]:
        if isinstance(run, str):
            return {"left out": run}
        columns = {
            name: [float(f"{x:.4g}") for x in column]
            for name, column in run._asdict().items()
        }
        return columns | {"steps": run.steps}

    sizes = {
        n: {name: record(run) for name, run in of_size.items()}
        for n, of_size in runs.items()
    }
    path.write_text(
        json.dumps({"seconds": seconds, "points": POINTS, "sizes": sizes}) + "\n"
    )


def draw(runs: dict[int, dict[str, Run | str]], path: pathlib.Path) -> None:
    """Draw error against seconds, with a panel for each size."""
    rows = (len(runs) + 1) // 2
    figure, axes = plt.subplots(
        rows,
        2,
        figsize=(14, 4.5 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, (n, of_size) in zip(axes.flat, runs.items(), strict=False):
        for name, run in of_size.items():
            method = METHODS[name]
            at = ([], []) if isinstance(run, str) else (run.seconds, run.errors)
            ax.plot(*at, method.line, color=method.color, label=name)
        ax.set(xscale="log", yscale="log", title=f"{n} parameters")
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylim(top=2.0)  # some overshoot at first
    figure.supxlabel("seconds, compilation not counted")
    figure.supylabel("relative L2 error on points held out")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(
        f"$e^{{xy}} \\sin(3x + 2y)$ by a tanh network 2-w-w-1, {POINTS} points, float64"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME"
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="of every run")
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("figures"),
        help="folder for figure and JSON",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few methods, to see that it runs"
    )
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    widths, methods, seconds = WIDTHS, args.methods, args.seconds
    if args.quick:
        widths, methods, seconds = (
            (2, 40),
            [name for name in methods if name in QUICK],
            min(seconds, 0.2),
        )

    runs: dict[int, dict[str, Run | str]] = {}
    with tqdm(total=len(widths) * len(methods)) as bar:
        for width in widths:
            task = regression(width, args.seed)
            runs[task.n] = {}
            for name in methods:
                bar.set_description(f"{task.n} {name}")
                left_out = obstacle(METHODS[name], task, seconds)
                runs[task.n][name] = left_out or measure(name, task, seconds)
                bar.update()

    print_table(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    save(runs, seconds, args.out / "which_method.json")
    draw(runs, args.out / "which_method.png")
    print(f"figure: {args.out / 'which_method.png'}")


if __name__ == "__main__":
    main()
