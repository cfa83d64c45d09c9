"""Fit the rate constants of a chemical reaction, with bounds, by Levenberg-Marquardt.

    A <-> B -> C,    A' = -k A + r B,    B' = k A - (r + q) B,    C' = q B

The three concentrations are measured at 33 times with noise (float64, fixed seed). The
constants are the rates k (forward), r (reverse) and q (onward), which are not negative,
and the purity, the share of A at the start, between 0 and 1. The data are made with
r = 0. For seed 1 the least sum of squares without bounds is at r = -0.018, which is not
a rate.

`hessopt.trust_region_newton(curvature="gauss_newton", bounds=...)` fits a
`hessopt.composite` of model and loss. It holds r at 0, moves along this bound, and ends
at the least sum of squares there. The same method without bounds, from the same start,
stalls at the edge of the region where the formula has no real value.
`scipy.optimize.least_squares` is given the same functions and bounds; its iterates are
inside of the bounds and approach them.

The figure shows the data with the fit, and the path in the plane of k and r. The
contours are those of the sum of squares, minimized over q and the purity: one fit per
point of a grid, with k and r fixed by equal bounds, in lanes of one `jax.vmap`. They
end where the formula has no real value.

    python -m examples.bounded_fit                               # about half a minute
    python -m examples.bounded_fit --seed 4
"""

import argparse
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy.optimize import OptimizeResult, least_squares

import hessopt

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is set
from matplotlib.axes import Axes

NOISE = 0.03  # standard deviation of a measurement
TRUE = {"forward": 0.9, "reverse": 0.0, "onward": 0.35, "purity": 0.95}
START = {"forward": 0.2, "reverse": 0.5, "onward": 1.0, "purity": 0.9}
LOWER = 0.0  # of all constants
UPPER = {"forward": None, "reverse": None, "onward": None, "purity": 1.0}

GAUSS_NEWTON = "gauss_newton"


def concentrations(constants: Any, t: jax.Array) -> jax.Array:
    """Return A, B and C at times `(m,)`, an array `(m, 3)`, by the exponential of the
    matrix of the equations of A and B."""
    k, r, q = (constants[name] for name in ("forward", "reverse", "onward"))
    first = jnp.stack([constants["purity"], 1 - constants["purity"]])
    matrix = jnp.stack([jnp.stack([-k, r]), jnp.stack([k, -r - q])])
    # the eigenvalues are middle +- half
    middle = -(k + r + q) / 2
    half = jnp.sqrt((k - r - q) ** 2 + 4 * k * r) / 2
    shifted = matrix @ first - middle * first
    even = jnp.outer(jnp.exp(middle * t) * jnp.cosh(half * t), first)
    odd = jnp.outer(jnp.exp(middle * t) * jnp.sinh(half * t) / half, shifted)
    return jnp.column_stack([even + odd, 1 - jnp.sum(even + odd, axis=1)])


def residuals(constants: Any, t: jax.Array, y: jax.Array) -> jax.Array:
    """Return the residuals in units of the noise."""
    return (concentrations(constants, t) - y) / NOISE


def half_squares(residuals: jax.Array) -> jax.Array:
    """Return half the sum of squares."""
    return 0.5 * jnp.sum(residuals**2)


value_fn = hessopt.composite(residuals, half_squares)


def measure(times: int, seed: int) -> dict[str, jax.Array]:
    """Return times and measured concentrations."""
    t = jnp.linspace(0.0, 8.0, times)
    noise = NOISE * jax.random.normal(jax.random.key(seed), (times, 3))
    return {"t": t, "y": concentrations(as_arrays(TRUE), t) + noise}


def as_arrays(constants: dict[str, float]) -> dict[str, jax.Array]:
    """Return the constants as arrays."""
    return {name: jnp.asarray(x) for name, x in constants.items()}


class Fit(NamedTuple):
    """A fit, and the constants before the first step and after every step."""

    solution: hessopt.Solution
    path: list[Any]


def fit(data: dict[str, jax.Array]) -> Fit:
    """Fit the constants within their bounds."""
    tx = hessopt.trust_region_newton(curvature=GAUSS_NEWTON, bounds=(LOWER, UPPER))
    path = [as_arrays(START)]
    solution = hessopt.minimize(
        value_fn,
        path[0],
        tx,
        data=data,
        log_every=1,
        callback=lambda now: path.append(now.params),
    )
    return Fit(solution, path)


def fit_without_bounds(data: dict[str, jax.Array], start: Any) -> hessopt.Solution:
    """Fit the constants without bounds."""
    tx = hessopt.trust_region_newton(curvature=GAUSS_NEWTON)
    return hessopt.minimize(value_fn, start, tx, data=data)


def fit_by_scipy(data: dict[str, jax.Array]) -> OptimizeResult:
    """Fit the constants within their bounds by SciPy, on arrays of NumPy."""
    names = list(START)

    def flat(x: jax.Array) -> jax.Array:
        return residuals(dict(zip(names, x, strict=True)), **data).ravel()

    outputs, jacobian = jax.jit(flat), jax.jit(jax.jacfwd(flat))
    upper = [np.inf if UPPER[name] is None else UPPER[name] for name in names]
    options: dict[str, Any] = {"jac": lambda x: np.asarray(jacobian(x))}
    return least_squares(
        lambda x: np.asarray(outputs(x)),
        np.array([START[name] for name in names]),
        bounds=(LOWER, upper),
        xtol=1e-12,
        gtol=1e-12,
        **options,
    )


def print_table(
    fitted: Fit, free: hessopt.Solution, best: hessopt.Solution, scipy: OptimizeResult
) -> None:
    """Print a line per constant, and the values and evaluations of all fits."""
    solution = fitted.solution
    assert solution.info is not None
    print(
        f"{'':>12} {'true':>9} {'with bounds':>12} {'held':>5} {'SciPy':>12} "
        f"{'no bounds':>10} {'lowest':>9}"
    )
    for name, by_scipy in zip(START, scipy.x, strict=True):
        held = "yes" if solution.held[name] else "no"
        print(
            f"{name:>12} {TRUE[name]:9.3f} {solution.params[name]:12.3g} {held:>5} "
            f"{by_scipy:12.3g} {free.params[name]:10.3f} {best.params[name]:9.3f}"
        )
    print(
        f"{'squares / 2':>12} {'':>9} {solution.value:12.6f} {'':>5} {scipy.cost:12.6f} "
        f"{free.value:10.3f} {best.value:9.3f}"
    )
    print(
        f"{'evaluations':>12} {'':>9} {solution.evaluations:12d} {'':>5} "
        f"{scipy.nfev:12d} {free.evaluations:10d}"
    )
    print(
        f"ended by: {solution.reason} with {solution.info.held} held, without bounds "
        f"{free.reason}"
    )


@jax.jit
def profile(
    forward: jax.Array, reverse: jax.Array, near: Any, data: dict[str, jax.Array]
) -> jax.Array:
    """Return the least value for these rates, arrays of any shape; the other constants
    are minimized over, from those of `near`."""

    def lane(k: jax.Array, r: jax.Array) -> jax.Array:
        fixed = {"forward": k, "reverse": r}
        bounds = (
            {"onward": 0.0, "purity": 0.0} | fixed,
            {"onward": None, "purity": 1.0} | fixed,
        )
        tx = hessopt.trust_region_newton(curvature=GAUSS_NEWTON, bounds=bounds)
        start = near | fixed
        return hessopt.minimize(value_fn, start, tx, data=data, max_steps=50).value

    values = jax.vmap(lane)(forward.ravel(), reverse.ravel())
    return values.reshape(forward.shape)


def draw_data(ax: Axes, fitted: Fit, data: dict[str, jax.Array]) -> None:
    """Draw the measurements, the fit and the solution for the constants at the start."""
    t = jnp.linspace(0.0, data["t"][-1], 200)
    curves = concentrations(fitted.solution.params, t)
    first = concentrations(fitted.path[0], t)
    for i, name in enumerate("ABC"):
        ax.plot(data["t"], data["y"][:, i], ".", color=f"C{i}")
        ax.plot(t, curves[:, i], color=f"C{i}", label=name)
        ax.plot(t, first[:, i], ":", color=f"C{i}", linewidth=1)
    ax.set(xlabel="time", ylabel="concentration", title="data, fit, and start (dotted)")
    ax.grid(alpha=0.3)
    ax.legend()


def draw_path(
    ax: Axes,
    fitted: Fit,
    best: hessopt.Solution,
    data: dict[str, jax.Array],
    size: int,
) -> None:
    """Draw the path over the contours of the profile."""
    path = np.array([[p["forward"], p["reverse"]] for p in fitted.path])
    k, r = jnp.meshgrid(jnp.linspace(0.12, 1.25, size), jnp.linspace(-0.12, 0.6, size))
    values = np.asarray(profile(k, r, fitted.solution.params, data))
    rise = np.ma.masked_invalid(values - float(best.value))
    levels = 0.5 * np.array([1, 2, 4, 8, 16, 32, 64]) ** 2
    ax.contour(k, r, rise, levels=levels, colors="0.6", linewidths=0.8)
    ax.axhspan(-0.12, 0.0, color="0.9", zorder=0)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.plot(*path.T, "o-", color="C3", markersize=4, label="with bounds", clip_on=False)
    ends = [
        ("*", fitted.solution.params, "C3", "least squares within the bounds"),
        ("X", best.params, "C4", "least squares without bounds"),
    ]
    for marker, at, color, label in ends:
        ax.plot(
            at["forward"],
            at["reverse"],
            marker,
            color=color,
            markersize=9,
            markeredgecolor="black",
            linestyle="",
            label=label,
        )
    ax.set(
        xlabel="k, forward",
        ylabel="r, reverse",
        xlim=(0.12, 1.25),
        ylim=(-0.12, 0.6),
        title="contours at 1, 2, 4, ... standard deviations",
    )
    ax.legend(loc="upper right")


def main() -> None:
    """Fit, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of the noise")
    parser.add_argument(
        "--size", type=int, default=60, help="of the grid of the contours, per side"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("figures"),
        help="folder for the figure",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a coarse grid, to see that it runs"
    )
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    data = measure(33, args.seed)
    fitted = fit(data)
    free = fit_without_bounds(data, as_arrays(START))
    best = fit_without_bounds(data, fitted.solution.params)
    print_table(fitted, free, best, fit_by_scipy(data))

    args.out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    draw_data(axes[0], fitted, data)
    draw_path(axes[1], fitted, best, data, 8 if args.quick else args.size)
    figure.suptitle("Reaction A <-> B -> C: the reverse rate is held at 0")
    figure.savefig(args.out / "bounded_fit.png", dpi=150)
    plt.close(figure)
    print(f"figure: {args.out / 'bounded_fit.png'}")


if __name__ == "__main__":
    main()
