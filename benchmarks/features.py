"""The features suite: what a user may rely on, tried with the L-BFGS of every library,
and the methods each one has."""

import importlib
import importlib.metadata
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
from benchmarks.programs import rosenbrock


class Library(NamedTuple):
    """How a library's L-BFGS is used."""

    name: str
    # (value_fn, params, state or None) -> (params, state); None: no steps of one's own
    step: Callable[..., Any] | None
    # (value_fn, params, **data) -> params, for value_fn(params, **data)
    solve: Callable[..., Any]
    make: Callable[[], Any]


def _optax_step(make: Callable[[], Any]) -> Callable[..., Any]:
    def step(value_fn: Any, params: Any, state: Any) -> Any:
        tx = optax.with_extra_args_support(make())
        if state is None:
            return params, tx.init(params)
        value, grad = jax.value_and_grad(value_fn)(params)
        grad = jax.tree.map(jnp.conj, grad)  # optax's convention
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state

    return step


def _jaxopt_step(value_fn: Any, params: Any, state: Any) -> Any:
    import jaxopt

    solver = jaxopt.LBFGS(value_fn)
    return (
        (params, solver.init_state(params))
        if state is None
        else tuple(solver.update(params, state))
    )


def _jaxopt_solve(value_fn: Any, params: Any, **data: Any) -> Any:
    import jaxopt

    return jaxopt.LBFGS(value_fn, maxiter=200, tol=1e-8).run(params, **data).params


def _optimistix_solve(value_fn: Any, params: Any, **data: Any) -> Any:
    import optimistix

    solver = optimistix.LBFGS(rtol=1e-9, atol=1e-9)
    fun = lambda y, data: value_fn(y, **data)  # noqa: E731
    return optimistix.minimise(
        fun, solver, params, data, max_steps=1000, throw=False
    ).value


def _optax_solve(value_fn: Any, params: Any, **data: Any) -> Any:
    def fun(params: Any) -> Any:
        return value_fn(params, **data)

    step = _optax_step(optax.lbfgs)
    carry = step(fun, params, None)
    return jax.lax.scan(lambda carry, _: (step(fun, *carry), None), carry, length=30)[
        0
    ][0]


def _hessopt_solve(value_fn: Any, params: Any, **data: Any) -> Any:
    return hessopt.minimize(
        value_fn, params, hessopt.lbfgs(), data=data, max_steps=200, gtol=1e-9
    ).params


LIBRARIES = (
    Library("hessopt", _optax_step(hessopt.lbfgs), _hessopt_solve, hessopt.lbfgs),
    Library("optax", _optax_step(optax.lbfgs), _optax_solve, optax.lbfgs),
    Library(
        "jaxopt",
        _jaxopt_step,
        _jaxopt_solve,
        lambda: importlib.import_module("jaxopt").LBFGS(jnp.sum),
    ),
    Library(
        "optimistix",
        None,
        _optimistix_solve,
        lambda: importlib.import_module("optimistix").LBFGS(rtol=1e-6, atol=1e-6),
    ),
)


def transformation(library: Library) -> bool:
    """Is an `optax.GradientTransformation`."""
    return isinstance(library.make(), optax.GradientTransformation)


def compiles_once(library: Library) -> bool:
    """A jitted training step is traced once."""
    if library.step is None:
        return False
    step, traces = library.step, []

    @jax.jit
    def jitted(params: Any, state: Any) -> Any:
        traces.append(1)
        return step(rosenbrock, params, state)

    carry = step(rosenbrock, jnp.array([-1.2, 1.0]), None)
    for _ in range(5):
        carry = jitted(*carry)
    return len(traces) == 1


def stays_finite(library: Library) -> bool:
    """Parameters stay finite, and end at the minimum, where the objective is NaN beyond
    a wall."""
    found = library.solve(lambda x: jnp.sum(x - jnp.log(x)), jnp.array([20.0, 0.05]))
    return bool(jnp.max(jnp.abs(found - 1)) < 1e-3)


def differentiates(library: Library) -> bool:
    """The derivative of the solution in the data, in reverse mode."""

    def solution(a: Any) -> jax.Array:
        return library.solve(
            lambda x, a: jnp.sum(jnp.cosh(x - a) + x**2), jnp.zeros(2), a=a
        )[0]

    a = 0.7
    away = float(solution(a)) - a
    return bool(
        abs(float(jax.grad(solution)(a)) - np.cosh(away) / (np.cosh(away) + 2)) < 1e-4
    )


def lanes(library: Library) -> bool:
    """Under vmap, every lane ends at its minimum."""
    starts = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)))
    found = jax.vmap(
        lambda x: library.solve(lambda y: jnp.sum(jnp.cosh(y)) + y[0] * y[1] / 2, x)
    )(starts)
    return bool(jnp.max(jnp.abs(found)) < 1e-4)


def explicit_mesh(library: Library) -> bool:
    """Trains parameters that are split over an explicit mesh."""
    kind = jax.sharding.AxisType.Explicit
    with jax.set_mesh(jax.make_mesh((4,), ("model",), axis_types=(kind,))):
        x = jax.device_put(jnp.ones(64), jax.P("model"))
        found = library.solve(lambda x: jnp.sum(jnp.cosh(x - 0.5)), x)
        return (
            bool(jnp.max(jnp.abs(found - 0.5)) < 1e-4)
            and found.sharding.spec == x.sharding.spec
        )


def complex_parameters(library: Library) -> bool:
    """Minimizes over complex parameters, by gradients in optax's convention or by its
    own."""
    target = jnp.array([1.0 + 2.0j, -0.5j])
    value_fn = lambda z: jnp.sum(jnp.abs(z - target) ** 2 * jnp.array([1.0, 30.0]))  # noqa: E731
    found = library.solve(value_fn, jnp.zeros(2, complex))
    return bool(jnp.max(jnp.abs(found - target)) < 1e-3)


CHECKS = (
    transformation,
    compiles_once,
    stays_finite,
    differentiates,
    lanes,
    explicit_mesh,
    complex_parameters,
)

METHODS: dict[str, dict[str, str]] = {
    "Newton's method on the whole Hessian": {"hessopt": "newton"},
    "trust region, exact": {"hessopt": "trust_region_newton"},
    "Newton-CG": {"hessopt": "newton_cg"},
    "Levenberg and Marquardt": {
        "hessopt": "trust_region_newton",
        "jaxopt": "LevenbergMarquardt",
        "optimistix": "LevenbergMarquardt",
    },
    "BFGS": {"hessopt": "bfgs", "jaxopt": "BFGS", "optimistix": "BFGS"},
    "L-BFGS": {
        "hessopt": "lbfgs",
        "optax": "lbfgs",
        "jaxopt": "LBFGS",
        "optimistix": "LBFGS",
    },
    "self-scaled Broyden": {"hessopt": "bfgs"},
    "rates from curvature": {"hessopt": "generalized_newton"},
    "nonlinear conjugate gradients": {
        "jaxopt": "NonlinearCG",
        "optimistix": "NonlinearCG",
    },
    "bounds": {"hessopt": "lbfgs", "jaxopt": "LBFGSB"},
    "other constraints": {"jaxopt": "ProjectedGradient"},
    "roots and fixed points": {"jaxopt": "Broyden", "optimistix": "root_find"},
}
"""By the names that stand for them."""


def measure(quick: bool) -> tuple[dict[str, Any], Any]:
    """Try everything; return the record and a figure of it."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 4)
    rows = []
    for check in CHECKS[:2] if quick else CHECKS:
        row: dict[str, Any] = {
            "check": " ".join((check.__doc__ or "").split()).rstrip(".")
        }
        for library in LIBRARIES:
            try:
                row[library.name] = "yes" if check(library) else "no"
            except Exception as error:
                row[library.name] = f"no: {type(error).__name__}"
            jax.clear_caches()
        rows.append(row)
        print(row, flush=True)
    for method, names in METHODS.items():
        for library, name in names.items():
            getattr(importlib.import_module(library), name)
        rows.append(
            {"check": method}
            | {
                library.name: "yes" if library.name in names else "no"
                for library in LIBRARIES
            }
        )
    versions = {
        library.name: importlib.metadata.version(library.name) for library in LIBRARIES
    }
    return {"versions": versions, "rows": rows}, _figure(rows)


def markdown(record: dict[str, Any]) -> list[str]:
    """The table of a record."""
    names = [library.name for library in LIBRARIES]
    lines = [
        "| | "
        + " | ".join(f"{name} {record['versions'][name]}" for name in names)
        + " |",
        "|---" * 5 + "|",
    ]
    return lines + [
        f"| {row['check']} | " + " | ".join(row[name] for name in names) + " |"
        for row in record["rows"]
    ]


def _figure(rows: list[dict[str, Any]]) -> Any:
    names = [library.name for library in LIBRARIES]
    figure, axis = plt.subplots(
        figsize=(8, 0.35 * len(rows) + 0.8), layout="constrained"
    )
    axis.imshow(
        [[row[name] == "yes" for name in names] for row in rows],
        cmap="Blues",
        vmin=-0.5,
        vmax=2,
        aspect="auto",
    )
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(rows)), [row["check"] for row in rows])
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            axis.text(
                j, i, row[name].split(":")[0], ha="center", va="center", fontsize=8
            )
    return figure
