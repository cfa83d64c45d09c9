"""The multistart suite: one small fit from many starts at once, in lanes of one
program.

    y = a exp(-b t) + c exp(-d t)   to 24 points with noise, in log(a), log(b), log(c), log(d), float64

A lane is solved when its value is the lowest that any lane of any method reached, or
above it by at most a millionth of it. Seconds are medians of further runs.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first

import hessopt

LANES = 256
QUICK = (
    "hessopt trust_region_newton, Gauss-Newton, in lanes",
    "hessopt bfgs, in lanes",
    "optimistix LevenbergMarquardt, in lanes",
    "optimistix BFGS, in lanes",
    "jaxopt LBFGS, in lanes",
    "SciPy least_squares, a loop",
    "SciPy BFGS, a loop",
)
"""Methods of a small run: one for each way of solving."""
MAX_STEPS = 200

TIMES = np.linspace(0.0, 6.0, 24)
NOISE = 0.02 * np.random.default_rng(0).normal(size=len(TIMES))
DATA = 2.0 * np.exp(-0.4 * TIMES) + 3.0 * np.exp(-2.5 * TIMES) + NOISE


def starts(lanes: int) -> jax.Array:
    """Starts `(lanes, 4)`, a factor of e around 1 and more."""
    return jnp.asarray(np.random.default_rng(1).normal(size=(lanes, 4)))


def residuals(params: Any) -> jax.Array:
    """What is left to fit, `(24,)`, of params `(4,)`."""
    a, b, c, d = jnp.exp(params)
    return a * jnp.exp(-b * TIMES) + c * jnp.exp(-d * TIMES) - DATA


value_fn = hessopt.composite(residuals, lambda r: 0.5 * jnp.sum(r**2))


class Method(NamedTuple):
    """How all lanes are solved: starts in, solutions out; `in_lanes` if by one program
    under vmap."""

    solve: Callable[[jax.Array], Any]
    in_lanes: bool


def _minimized(tx: optax.GradientTransformation) -> Callable[[jax.Array], jax.Array]:
    return lambda start: (
        hessopt.minimize(value_fn, start, tx, max_steps=MAX_STEPS, gtol=1e-10).params
    )


def in_lanes(one: Callable[[jax.Array], jax.Array]) -> Method:
    """All lanes in one program."""
    return Method(jax.jit(jax.vmap(one)), True)


def in_turn(one: Callable[[jax.Array], Any]) -> Method:
    """One lane after the other."""
    return Method(lambda x: jnp.stack([jnp.asarray(one(start)) for start in x]), False)


def _optimistix(name: str, least_squares: bool) -> Callable[[jax.Array], jax.Array]:
    import optimistix

    solver = getattr(optimistix, name)(rtol=1e-10, atol=1e-12)
    find, fun = (
        (optimistix.least_squares, residuals)
        if least_squares
        else (optimistix.minimise, value_fn)
    )
    # of the minimisers a step is an evaluation
    steps = MAX_STEPS if least_squares else 20 * MAX_STEPS
    return lambda start: (
        find(lambda y, _: fun(y), solver, start, max_steps=steps, throw=False).value
    )


def _jaxopt(name: str) -> Callable[[jax.Array], jax.Array]:
    import jaxopt

    solver = getattr(jaxopt, name)(value_fn, maxiter=MAX_STEPS, tol=1e-10)
    return lambda start: solver.run(start).params


def _scipy(fun: str, **options: Any) -> Callable[[jax.Array], np.ndarray]:
    import scipy.optimize

    optimize: Any = scipy.optimize
    both, r, J = (
        jax.jit(f)
        for f in (jax.value_and_grad(value_fn), residuals, jax.jacfwd(residuals))
    )
    if fun == "least_squares":
        return lambda start: (
            optimize.least_squares(
                lambda x: np.asarray(r(x)),
                np.asarray(start),
                lambda x: np.asarray(J(x)),
                xtol=1e-12,
                gtol=1e-12,
                **options,
            ).x
        )

    def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = both(x)
        return float(value), np.asarray(grad)

    return lambda start: (
        optimize.minimize(value_and_grad, np.asarray(start), jac=True, **options).x
    )


def methods() -> dict[str, Method]:
    """Everything that is compared."""
    ours = {
        "trust_region_newton": hessopt.trust_region_newton(),
        "trust_region_newton, Gauss-Newton": hessopt.trust_region_newton(
            curvature="gauss_newton"
        ),
        "newton": hessopt.newton(),
        "bfgs": hessopt.bfgs(),
        "lbfgs": hessopt.lbfgs(),
    }
    found = {
        f"hessopt {name}, in lanes": in_lanes(_minimized(tx))
        for name, tx in ours.items()
    }
    name = "trust_region_newton, Gauss-Newton"
    found[f"hessopt {name}, a loop"] = in_turn(jax.jit(_minimized(ours[name])))
    found["optimistix LevenbergMarquardt, in lanes"] = in_lanes(
        _optimistix("LevenbergMarquardt", True)
    )
    found["optimistix Dogleg, in lanes"] = in_lanes(_optimistix("Dogleg", True))
    found["optimistix BFGS, in lanes"] = in_lanes(_optimistix("BFGS", False))
    found["jaxopt LBFGS, in lanes"] = in_lanes(_jaxopt("LBFGS"))
    found["SciPy least_squares, a loop"] = in_turn(_scipy("least_squares"))
    found["SciPy BFGS, a loop"] = in_turn(
        _scipy("minimize", method="BFGS", options={"gtol": 1e-10})
    )
    return found


def measure(quick: bool) -> tuple[dict[str, Any], Any]:
    """Run the suite; return the record and the figure."""
    jax.config.update("jax_enable_x64", True)
    x = starts(8 if quick else LANES)
    values = jax.jit(jax.vmap(value_fn))
    rows = []
    for name, method in methods().items():
        if quick and name not in QUICK:
            continue
        seconds, found = [], x
        for _ in range(2 if quick else 4):
            began = time.perf_counter()
            found = jax.block_until_ready(method.solve(x))
            seconds.append(time.perf_counter() - began)
        row = {"method": name, "values": np.asarray(values(found)).tolist()}
        rows.append(row | {"first s": seconds[0], "s": float(np.median(seconds[1:]))})
        print(f"{name}: {seconds[0]:.2f} s, then {rows[-1]['s']:.2g} s", flush=True)
    lowest = float(np.nanmin([row["values"] for row in rows]))
    for row in rows:
        row["solved"] = sum(value - lowest <= 1e-6 * lowest for value in row["values"])
    return {"lanes": len(x), "lowest": lowest, "runs": rows}, _figure(rows, len(x))


def markdown(record: dict[str, Any]) -> list[str]:
    """The table of a record."""
    lines = [
        f"{record['lanes']} starts of a fit of two exponentials to 24 points (`benchmarks/multistart.py`).",
        "",
    ]
    lines += [
        "| | lanes solved | seconds | milliseconds per solved lane | seconds of the first run |"
    ]
    lines += ["|---" + "|---:" * 4 + "|"]
    for row in record["runs"]:
        each = f"{1e3 * row['s'] / row['solved']:.3g}" if row["solved"] else ""
        lines += [
            f"| {row['method']} | {row['solved']} | {row['s']:.2g} | {each} | {row['first s']:.2g} |"
        ]
    return lines


def _figure(rows: list[dict[str, Any]], lanes: int) -> Any:
    """Share of lanes solved, and time per solved lane."""
    names = [row["method"] for row in rows][::-1]
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 4.5), sharey=True, layout="constrained"
    )
    colors = ["#4878a8" if name.startswith("hessopt") else "#a0a0a0" for name in names]
    axes[0].barh(names, [row["solved"] / lanes for row in rows][::-1], color=colors)
    axes[1].barh(
        names,
        [1e3 * row["s"] / max(row["solved"], 1) for row in rows][::-1],
        color=colors,
    )
    axes[0].set(xlabel="share of lanes solved", xlim=(0, 1))
    axes[1].set(
        xlabel="milliseconds per solved lane, compilation not counted", xscale="log"
    )
    figure.suptitle(f"{lanes} starts of a fit of two exponentials")
    return figure
