"""Derive Newton's step symbolically, and show where its iterations converge: to minima,
to saddle points, or not at all.

SymPy derives the gradient, the Hessian, Newton's step and the BFGS update for a network
with three parameters. The steps of hessopt agree up to rounding, and the program prints
the differences. `newton_by_hand.png` shows paths. With a condition number of 50 instead
of 2, gradient descent takes 374 steps instead of 14, and Newton's method one in both
cases. Plain Newton converges to a saddle point that `newton()` and
`trust_region_newton()` leave. On log cosh it diverges for |x| > 1.0887, where
`newton()` converges. `newton_by_hand_basins.png` shows the limits of runs on
Himmelblau's function for 40 000 starting points. Plain Newton converges to a minimum
from 64% of them, all other methods from every one, but not always to the minimum that
is reached by descending continuously.

    python examples/newton_by_hand.py                                  # about 1 minute
    python examples/newton_by_hand.py --size 400                       # finer maps
"""

import argparse
import functools
import itertools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import sympy as sp

import hessopt
from hessopt.typing import ValueFn

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is set
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

INPUTS, TARGETS = (-2, -1, 0, 1, 2), (-3, -2, 1, 2, 3)
START = (0.8, 0.2, 3.0)  # w, b, a of the network a tanh(w x + b)

METHODS: dict[str, optax.GradientTransformation] = {
    "plain Newton": hessopt.newton(damping=0.0, on_indefinite="none", linesearch=None),
    "newton()": hessopt.newton(),
    "trust_region_newton()": hessopt.trust_region_newton(),
    "bfgs()": hessopt.bfgs(),
}
PLAIN, BFGS = METHODS["plain Newton"], METHODS["bfgs()"]


def network_loss(params: Any) -> jax.Array:
    """Half the mean squared error of `a tanh(w x + b)`."""
    w, b, a = params
    return 0.5 * jnp.mean(
        (a * jnp.tanh(w * jnp.array(INPUTS) + b) - jnp.array(TARGETS)) ** 2
    )


class ByHand(NamedTuple):
    """The results of SymPy, as functions of NumPy arrays."""

    gradient: Callable[..., Any]  # params -> (3, 1)
    hessian: Callable[..., Any]  # params -> (3, 3)
    bfgs: Callable[..., Any]  # H (3, 3), s (3, 1), y (3, 1) -> (3, 3)


def derive() -> ByHand:
    """Derive gradient, Hessian, Newton's step and the BFGS update, and print them."""
    w, b, a, x, y, r, t, d = sp.symbols("w b a x y r t d")
    params, tanh = sp.Matrix([w, b, a]), sp.tanh(w * x + b)
    loss = (a * tanh - y) ** 2 / 2  # for one example
    gradient, hessian = sp.Matrix([loss]).jacobian(params).T, sp.hessian(loss, params)

    def show(title: str, matrix: Any) -> None:
        short = (
            matrix.subs({1 - tanh**2: d, 2 * tanh**2 - 2: -2 * d})
            .subs(tanh, t)
            .subs(y, a * t - r)
        )
        print(title, sp.pretty(short.applyfunc(sp.factor)), sep="\n")

    show(
        "r = a t - y, t = tanh(w x + b), d = 1 - t^2. Gradient of r^2/2 in w, b and a:",
        gradient,
    )
    show("Hessian:", hessian)

    H: Any = sp.MatrixSymbol("H", 3, 3)
    columns: list[Any] = [sp.MatrixSymbol(name, 3, 1) for name in "gpsy"]
    g, p, s, z = columns  # z stands for y, which is in use
    slope = ((g.T * p).diff(p) + (p.T * H * p / 2).diff(p)).subs(H.T, H).doit()
    print(
        f"Newton: the gradient of g'p + p'Hp/2 is {slope}, which vanishes for p = -H^-1 g."
    )

    # H+ y = s, compared by the coefficients of s and u
    alpha, beta, sy, uy = sp.symbols("alpha beta s'y u'y")
    solved: Any = sp.solve([alpha * sy - beta * uy - 1, 1 - beta * sy], [alpha, beta])
    print(
        "BFGS: H+ = H + alpha s s' - beta (u s' + s u') with u = H y fulfils the secant equation H+ y = s for"
    )
    print(sp.pretty([sp.Eq(symbol, value) for symbol, value in solved.items()]))
    values = {sy: (s.T * z)[0, 0], uy: (z.T * H * z)[0, 0]}
    bfgs = (
        H
        + solved[alpha].subs(values) * s * s.T
        - solved[beta].subs(values) * (H * z * s.T + s * z.T * H)
    )
    rest = (bfgs * z - s).as_explicit().applyfunc(sp.cancel)
    print(f"H+ y - s, written out: {rest.T.tolist()}")

    def mean(matrix: Any) -> Callable[..., Any]:
        examples = [
            matrix.subs({x: i, y: o}) for i, o in zip(INPUTS, TARGETS, strict=True)
        ]
        return sp.lambdify(
            [params], sum(examples[1:], examples[0]) / len(examples), "numpy", cse=True
        )

    return ByHand(mean(gradient), mean(hessian), sp.lambdify([H, s, z], bfgs, "numpy"))


def check(name: str, mine: Any, by_hand: Any, scale: float, condition: float) -> str:
    """Return the difference relative to `scale` as text, or end the program if it is
    larger than rounding."""
    difference = np.max(np.abs(np.asarray(mine) - by_hand)) / scale
    if not difference <= 10 * np.finfo(float).eps * condition:
        sys.exit(f"{name} differs from the one by hand by {difference:.1e}")
    return f"{difference:.1e}"


class Run(NamedTuple):
    """The record of a run."""

    path: jax.Array  # (steps + 1, n)
    grads: jax.Array  # (steps, n), at all points of the path except the last
    states: Any  # after each step, stacked


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def iterate(
    value_fn: ValueFn, start: jax.Array, tx: optax.GradientTransformation, steps: int
) -> Run:
    """Take some steps with an optimizer, and record them."""
    transform = optax.with_extra_args_support(tx)

    def step(carry: tuple[jax.Array, Any], _: None) -> tuple[Any, Any]:
        params, state = carry
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = transform.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        carry = (jnp.asarray(optax.apply_updates(params, updates)), state)
        return carry, Run(carry[0], grad, state)

    _, run = jax.lax.scan(step, (start, transform.init(start)), length=steps)
    return run._replace(path=jnp.concatenate([start[None], run.path]))


def compare(by_hand: ByHand) -> None:
    """Take the steps of hessopt, and print their differences to the derived ones."""
    newton = iterate(network_loss, jnp.array(START), PLAIN, 7)
    hessians = jax.lax.map(
        lambda params: hessopt.hessian(network_loss, params), newton.path[:-1]
    )
    print(
        "\nPlain Newton: loss, gradient, and differences of Hessian and step, relative to Hessian and parameters"
    )
    for mine, (here, there) in zip(
        np.asarray(hessians), itertools.pairwise(np.asarray(newton.path)), strict=True
    ):
        g, H = by_hand.gradient(here)[:, 0], by_hand.hessian(here)
        hessian = check("the Hessian", mine, H, np.max(np.abs(H)), 1.0)
        step = check(
            "Newton's step",
            there,
            here - np.linalg.solve(H, g),
            np.max(np.abs(here)),
            np.linalg.cond(H),
        )
        print(
            f"{network_loss(here):20.16f} {np.linalg.norm(g):9.1e} {hessian:>9} {step:>9}"
        )

    bfgs = iterate(network_loss, jnp.array(START), BFGS, 11)
    matrices = np.asarray(jax.lax.map(hessopt.inverse_hessian, bfgs.states))
    rates = np.asarray(jax.vmap(hessopt.diagnostics)(bfgs.states)["linesearch.rate"])
    path, grads = np.asarray(bfgs.path), np.asarray(bfgs.grads)
    print(
        "\nBFGS: loss, gradient, and differences of H+ y, H+ and step, relative to s, H+ and parameters"
    )
    for k in range(1, len(matrices)):
        s, y = ((of[k] - of[k - 1])[:, None] for of in (path, grads))
        # initial H of hessopt for the first pair
        first = 10 * (s.T @ s) / (s.T @ y) * np.eye(3)
        H = by_hand.bfgs(matrices[k - 1] if k > 1 else first, s, y)
        condition, there = float(np.linalg.cond(H)), path[k] - rates[k] * (H @ grads[k])
        differences = (
            check("H+ y", matrices[k] @ y, s, np.max(np.abs(s)), condition),
            check("H+", matrices[k], H, np.max(np.abs(H)), condition),
            check(
                "the step of BFGS",
                path[k + 1],
                there,
                np.max(np.abs(path[k])),
                condition,
            ),
        )
        loss, slope = network_loss(path[k]), np.linalg.norm(grads[k])
        print(f"{loss:20.16f} {slope:9.1e}" + " {:>9} {:>9} {:>9}".format(*differences))
    rest = matrices[-1] @ by_hand.hessian(path[-1]) - np.eye(3)
    print(
        f"At the end H times the Hessian is the identity to {np.linalg.norm(rest):.1e}.\n"
    )


def log_cosh(x: jax.Array) -> jax.Array:
    """Convex, with a curvature that decays away from the minimum at 0."""
    return jnp.sum(jnp.logaddexp(x, -x) - jnp.log(2.0))


def himmelblau(p: Any) -> Any:
    """Himmelblau's function, with four minima, four saddle points and a maximum; also
    takes symbols of SymPy."""
    return (p[0] ** 2 + p[1] - 11) ** 2 + (p[0] + p[1] ** 2 - 7) ** 2


class Landscape(NamedTuple):
    """A function of the plane, and the runs to draw on it."""

    title: str
    value_fn: ValueFn
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    window: tuple[float, float, float, float]  # left, right, bottom, top
    rate: float  # of gradient descent
    steps: int  # maximum for gradient descent
    methods: tuple[str, ...]


def quadratic(kind: str, condition: float) -> Landscape:
    """Return a rotated quadratic with eigenvalues 1 and condition, and the best
    constant rate of gradient descent."""
    return Landscape(
        f"{kind} quadratic: condition number {condition:g}",
        lambda p: 0.5 * ((0.8 * p[0] - 0.6 * p[1]) ** 2 + condition * (0.6 * p[0] + 0.8 * p[1]) ** 2),
        (-2.0, 2.4), ((0, 0),), (-3.2, 3.2, -3.0, 3.4), 2 / (1 + condition), 500, ("plain Newton", "bfgs()"),
    )  # fmt: skip


LANDSCAPES = (
    quadratic("well-conditioned", 2.0),
    quadratic("ill-conditioned", 50.0),
    Landscape(
        "a saddle between minima",
        lambda p: 0.25 * (p[0] ** 2 - 1) ** 2 + 0.5 * p[1] ** 2,
        (0.3, 1.2), ((-1, 0), (1, 0)), (-1.6, 1.6, -0.6, 2.0), 0.3, 500,
        ("plain Newton", "newton()", "trust_region_newton()"),
    ),
    Landscape(
        "Rosenbrock",
        lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2,
        (-1.2, 1.0), ((1, 1),), (-1.7, 1.7, -3.6, 4.6), 1e-3, 20_000, tuple(METHODS),
    ),
)  # fmt: skip


def draw_landscape(ax: Axes, of: Landscape, quick: bool) -> None:
    """Draw contours, and the trajectory of each method with its number of steps."""
    left, right, bottom, top = of.window
    x, y = np.meshgrid(np.linspace(left, right, 201), np.linspace(bottom, top, 201))
    values = of.value_fn(np.stack([x, y]))
    levels = np.quantile(values, np.linspace(0.05, 1.0, 16) ** 1.5)
    ax.contour(x, y, values, levels=levels, colors="0.8", linewidths=0.8)
    runs = {f"gradient descent, rate {of.rate:.3g}": optax.sgd(of.rate)} | {
        name: METHODS[name] for name in of.methods
    }
    for index, (name, tx) in enumerate(runs.items()):
        steps = 40 if quick or name in METHODS else of.steps
        run = iterate(of.value_fn, jnp.array(of.start), tx, steps)
        path = np.asarray(run.path)
        there = (
            np.linalg.norm(path[:, None] - np.array(of.minima), axis=2).min(axis=1)
            < 1e-6
        )
        count, last = (
            (str(np.argmax(there)), np.argmax(there) + 1)
            if there.any()
            else (f"more than {steps}", None)
        )
        if not there.any() and np.linalg.norm(run.grads[-1]) < 1e-6:
            count = "never, ends in the saddle"
        print(f"{of.title}, {name}, steps: {count}")
        style, size = ("-" if steps > 500 else "o-"), 5 - 0.8 * index
        ax.plot(
            *path[:last].T,
            style,
            color=f"C{index}",
            markersize=size,
            linewidth=1.2,
            label=f"{name}: {count}",
        )
    ax.plot(*np.transpose(of.minima), "*", color="black", markersize=11)
    ax.set(xlim=(left, right), ylim=(bottom, top), title=of.title)
    ax.legend(
        fontsize="small",
        loc="upper right",
        title="steps until 1e-6 from a minimum",
        title_fontsize="small",
    )


def draw_divergence(models: Axes, distances: Axes) -> None:
    """Draw the models of log cosh that plain Newton minimizes, and the distances to the
    minimum."""
    u = sp.Symbol("u")
    # u where Newton's step leads to -u: u - tanh(u) cosh(u)^2 = -u
    limit: Any = sp.nsolve(sp.sinh(2 * u) - 4 * u, u, 1.0)
    print(f"log cosh: plain Newton diverges from |x| > {limit:.6f}")
    runs = {}
    for name, starts in (
        ("plain Newton", (1.0, 1.08, 1.15, 1.3)),
        ("newton()", (1.3, 10.0)),
    ):
        lanes = jax.vmap(
            lambda start, tx=METHODS[name]: iterate(log_cosh, start, tx, 7).path
        )
        runs[name] = dict(
            zip(
                starts,
                np.asarray(lanes(jnp.array(starts)[:, None]))[..., 0],
                strict=True,
            )
        )
        for start, path in runs[name].items():
            out = np.abs(path) > 20  # the curvature rounds to zero there
            drawn, style = (
                path[: np.argmax(out) + 1] if out.any() else path,
                "o-" if name == "plain Newton" else "s--",
            )
            distances.plot(
                np.abs(drawn), style, markersize=4, label=f"{name} from {start:g}"
            )

    line = np.linspace(-3.2, 3.2, 400)
    models.plot(line, np.log(np.cosh(line)), color="black", label="log cosh x")
    for k, (here, there) in enumerate(
        itertools.pairwise(runs["plain Newton"][1.15][:4])
    ):
        model = np.polynomial.Polynomial(
            [np.log(np.cosh(here)), np.tanh(here), 0.5 / np.cosh(here) ** 2]
        )
        label = (
            f"its model at $x_{k}$ = {here:.2f}, of minimum $x_{k + 1}$ = {there:.2f}"
        )
        models.plot(
            line, model(line - here), "--", color=f"C{k}", linewidth=1, label=label
        )
        models.plot(here, model(0), "o", color=f"C{k}")
        models.plot(there, model(there - here), "v", color=f"C{k}")
    models.set(
        xlim=(-3.2, 3.2),
        ylim=(-1.5, 4.5),
        xlabel="x",
        title="log cosh: plain Newton from 1.15",
    )
    models.legend(fontsize="small", loc="upper center")
    distances.axhline(limit, color="0.7", linewidth=0.8)
    title = f"log cosh: plain Newton diverges from |x| > {limit:.4f}"
    distances.set(
        yscale="log",
        ylim=(1e-8, 1e16),
        xlim=(-0.2, 7.2),
        xlabel="steps",
        ylabel="|x|",
        title=title,
    )
    distances.legend(fontsize="small", loc="upper right")


@jax.jit
def curvatures(points: jax.Array) -> jax.Array:
    """Return the eigenvalues `(number, 2)` of the Hessian of Himmelblau's function at
    points `(number, 2)`."""
    return jnp.linalg.eigvalsh(jax.vmap(jax.hessian(himmelblau))(points))


def stationary_points() -> np.ndarray:
    """Return the stationary points `(9, 2)` of Himmelblau's function: four minima, four
    saddle points and the maximum."""
    x, y = sp.symbols("x y")
    f = himmelblau((x, y))
    # the basis consists of c y + q(x) and a polynomial in x
    of_y, of_x = sp.groebner([f.diff(x), f.diff(y)], y, x, order="lex").exprs
    roots = [root for root in sp.Poly(of_x, x).nroots(n=30) if root.is_real]
    points = np.array(
        [(root, sp.solve(of_y.subs(x, root), y)[0]) for root in roots], float
    )
    return points[np.argsort(np.sum(curvatures(points) < 0, axis=1), kind="stable")]


def ends(
    starts: jax.Array, tx: optax.GradientTransformation, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Minimize from all starting points at once; return the index of the stationary
    point that each run finds, and its number of steps.

    The index is `len(points)` if a run does not find one.
    """
    solve = jax.jit(
        jax.vmap(lambda start: hessopt.minimize(himmelblau, start, tx, max_steps=3000))
    )
    solution = solve(starts)
    distance = np.linalg.norm(np.asarray(solution.params)[:, None] - points, axis=2)
    found = np.min(distance, axis=1) < 1e-3
    return np.where(found, np.argmin(distance, axis=1), len(points)), np.asarray(
        solution.steps
    )


def draw_basins(path: pathlib.Path, size: int) -> None:
    """Draw the limit of each method from a grid of starting points, on Himmelblau's
    function."""
    points = stationary_points()
    line = jnp.linspace(-6.0, 6.0, size)
    starts = jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)
    rate = 1 / float(jnp.max(curvatures(starts)))
    methods = {
        f"gradient descent, rate 1/L = {rate:.4f}": optax.sgd(rate),
        "gradient descent, rate 0.014": optax.sgd(0.014),
        **METHODS,
    }
    color = np.array(
        [
            to_rgb(name)
            for name in ("C0", "C1", "C2", "C4", *["0.3"] * 4, "red", "white")
        ]
    )
    figure, axes = plt.subplots(2, 3, figsize=(15, 12), layout="constrained")
    valley = None
    for ax, (name, tx) in zip(axes.flat, methods.items(), strict=True):
        index, steps = ends(starts, tx, points)
        # gradient descent with small steps does not leave the valley of its start
        valley = index if valley is None else valley
        minimum, own = np.mean(index < 4), np.mean((index < 4) & (index == valley))
        title = f"{name}\n{100 * minimum:.3g}% end in a minimum, {100 * own:.3g}% in their own valley's"
        title += f"\nsteps: median {np.median(steps):.0f}, most {np.max(steps)}"
        print(title.replace("\n", "; "))
        pale = 0.7 * np.clip(steps / np.quantile(steps, 0.95), 0, 1)[:, None]
        image = color[index] * (1 - pale) + pale
        ax.imshow(
            image.reshape(size, size, 3),
            origin="lower",
            extent=(-6, 6, -6, 6),
            interpolation="nearest",
        )
        for point, marker in zip(points, "****xxxx^", strict=True):
            ax.plot(*point, marker, color="black", markersize=9)
        ax.set_title(title, fontsize="medium")
    figure.legend(
        [Patch(color=c) for c in (*color[:4], color[4], color[8])],
        [
            *(f"minimum at ({p[0]:.2f}, {p[1]:.2f})" for p in points[:4]),
            "a saddle (crosses)",
            "the maximum (triangle)",
        ],
        loc="outside lower center",
        ncols=6,
    )
    figure.suptitle(
        "Himmelblau's function: where runs end, by start; paler: more steps; own valley: as in the first panel"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Check the steps, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=int, default=200, help="starts along each side of the basin maps"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("figures"),
        help="folder for the figures",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few starts and steps only, to see that it runs",
    )
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    args.out.mkdir(parents=True, exist_ok=True)

    compare(derive())
    figure, axes = plt.subplots(2, 3, figsize=(17, 10), layout="constrained")
    for ax, of in zip(axes.flat, LANDSCAPES, strict=False):
        draw_landscape(ax, of, args.quick)
    draw_divergence(*axes[1, 1:])
    figure.savefig(args.out / "newton_by_hand.png", dpi=150)
    plt.close(figure)
    draw_basins(
        args.out / "newton_by_hand_basins.png",
        min(args.size, 30) if args.quick else args.size,
    )
    print(
        f"figures: {args.out / 'newton_by_hand.png'}, {args.out / 'newton_by_hand_basins.png'}"
    )


if __name__ == "__main__":
    main()
