"""Minimizers side by side: each is given an objective, a start and a bound on the
gradient, and tells what it spent."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hessopt

MAX_ITERATIONS = 2000


class Outcome(NamedTuple):
    """Where a run ended, and what it spent."""

    x: Any  # (n,)
    iterations: int
    evaluations: int  # of the value, with or without gradient
    compile_s: float  # seconds of the first run beyond those of the second
    warm_s: float  # seconds of the second run
    said: str  # the solver's own verdict


Solver = Callable[[Any, Any, float], Outcome]
"""`(value_fn, start, bound) -> Outcome`; to stop at `max|g| <= bound`, after 2000
iterations, or on giving up."""


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, the seconds of the first run beyond those of the second, and those of
    the second."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    middle = time.perf_counter()
    result = jax.block_until_ready(run())
    warm = time.perf_counter() - middle
    return result, max(middle - start - warm, 0.0), warm


def driven(make: Callable[[], optax.GradientTransformation]) -> Solver:
    """An optax transformation in `hessopt.minimize`."""

    def solve(value_fn: Any, start: Any, bound: float) -> Outcome:
        tx = make()
        largest = float(jnp.max(jnp.abs(jax.grad(value_fn)(start))))
        gtol = bound / largest if largest else 0.0

        @jax.jit
        def run(x: Any) -> Any:
            solution = hessopt.minimize(
                value_fn, x, tx, max_steps=MAX_ITERATIONS, gtol=gtol
            )
            return (
                solution.params,
                solution.steps,
                solution.evaluations,
                solution.termination,
            )

        (x, steps, evaluations, termination), cold, warm = timed(lambda: run(start))
        return Outcome(
            x,
            int(steps),
            int(evaluations),
            cold,
            warm,
            hessopt.Termination(int(termination)).name,
        )

    return solve


def jaxopt_solver(name: str) -> Solver:
    """A solver of jaxopt, stepped in one compiled loop."""

    def solve(value_fn: Any, start: Any, bound: float) -> Outcome:
        import jaxopt

        solver = getattr(jaxopt, name)(value_fn, maxiter=MAX_ITERATIONS, tol=0.0)

        @jax.jit
        def run(x: Any) -> Any:
            def goes_on(carry: Any) -> Any:
                state = carry[1]
                return (jnp.max(jnp.abs(state.grad)) > bound) & (
                    state.iter_num < MAX_ITERATIONS
                )

            return jax.lax.while_loop(
                goes_on,
                lambda carry: tuple(solver.update(*carry)),
                (x, solver.init_state(x)),
            )

        (x, state), cold, warm = timed(lambda: run(start))
        said = (
            "failed search" if bool(getattr(state, "failed_linesearch", False)) else ""
        )
        return Outcome(
            x, int(state.iter_num), int(state.num_fun_eval), cold, warm, said
        )

    return solve


def optimistix_solver(name: str) -> Solver:
    """A solver of optimistix, with the bound on the gradient for its criterion. It
    evaluates once per step."""

    def solve(value_fn: Any, start: Any, bound: float) -> Outcome:
        import optimistix

        class Bounded(getattr(optimistix, name)):
            def terminate(
                self, fn: Any, y: Any, args: Any, options: Any, state: Any, tags: Any
            ) -> Any:
                flat = jnp.max(jnp.abs(state.f_info.grad)) <= bound
                return flat & ~state.first_step, optimistix.RESULTS.successful

        solver = Bounded(rtol=0.0, atol=0.0)

        @jax.jit
        def run(x: Any) -> Any:
            solution = optimistix.minimise(
                lambda y, _: value_fn(y),
                solver,
                x,
                max_steps=20 * MAX_ITERATIONS,
                throw=False,
            )
            return solution.value, solution.stats["num_steps"]

        (x, steps), cold, warm = timed(lambda: run(start))
        count = int(steps)
        return Outcome(x, count, count, cold, warm, "")

    return solve


def jax_scipy(value_fn: Any, start: Any, bound: float) -> Outcome:
    """BFGS of `jax.scipy.optimize`."""
    import jax.scipy.optimize

    run = jax.jit(
        lambda x: jax.scipy.optimize.minimize(
            value_fn,
            x,
            method="BFGS",
            options={"gtol": bound, "maxiter": MAX_ITERATIONS},
        )
    )
    result, cold, warm = timed(lambda: run(start))
    return Outcome(
        result.x,
        int(result.nit),
        int(result.nfev),
        cold,
        warm,
        f"status {int(result.status)}",
    )


def scipy_solver(method: str) -> Solver:
    """A solver of SciPy over one compiled value and gradient, and a compiled Hessian
    where it takes one."""
    options = {
        "L-BFGS-B": {"ftol": 0.0, "maxcor": 10, "maxfun": 100 * MAX_ITERATIONS},
        "Newton-CG": {"xtol": 0.0},
    }
    second_order = method not in ("BFGS", "L-BFGS-B")

    def solve(value_fn: Any, start: Any, bound: float) -> Outcome:
        import scipy.optimize

        compiled = jax.jit(jax.value_and_grad(value_fn))

        def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, grad = compiled(x)
            return float(value), np.asarray(grad)

        # a Hessian changes hands as NumPy's array, and Newton-CG knows no bound on the
        # gradient
        hessian = jax.jit(jax.hessian(value_fn))
        stop = {} if method == "Newton-CG" else {"gtol": bound}

        def flat_enough(intermediate_result: Any) -> None:
            if np.max(np.abs(value_and_grad(intermediate_result.x)[1])) <= bound:
                raise StopIteration

        def run() -> Any:
            return scipy.optimize.minimize(
                value_and_grad,
                np.asarray(start),
                jac=True,
                hess=(lambda x: np.asarray(hessian(x))) if second_order else None,
                method=method,
                callback=flat_enough if second_order else None,
                options={"maxiter": MAX_ITERATIONS} | stop | options.get(method, {}),
            )

        began = time.perf_counter()
        compiled(start)[0].block_until_ready()
        if second_order:
            hessian(start).block_until_ready()
        cold = time.perf_counter() - began
        began = time.perf_counter()
        result = run()
        return Outcome(
            result.x,
            result.nit,
            result.nfev,
            cold,
            time.perf_counter() - began,
            str(result.message),
        )

    return solve


SOLVERS: dict[str, Solver] = {
    "hessopt lbfgs": driven(hessopt.lbfgs),
    "hessopt bfgs": driven(hessopt.bfgs),
    "hessopt ssbroyden": driven(lambda: hessopt.bfgs(formula="ssbroyden")),
    "hessopt newton": driven(hessopt.newton),
    "hessopt trust_region_newton": driven(hessopt.trust_region_newton),
    "hessopt newton_cg": driven(hessopt.newton_cg),
    "optax lbfgs": driven(optax.lbfgs),
    "jaxopt LBFGS": jaxopt_solver("LBFGS"),
    "jaxopt BFGS": jaxopt_solver("BFGS"),
    "optimistix LBFGS": optimistix_solver("LBFGS"),
    "optimistix BFGS": optimistix_solver("BFGS"),
    "jax.scipy BFGS": jax_scipy,
    "SciPy BFGS": scipy_solver("BFGS"),
    "SciPy L-BFGS-B": scipy_solver("L-BFGS-B"),
    "SciPy trust-exact": scipy_solver("trust-exact"),
    "SciPy trust-ncg": scipy_solver("trust-ncg"),
    "SciPy Newton-CG": scipy_solver("Newton-CG"),
}

FOR_MODELS: dict[str, Solver] = {
    "hessopt newton, Gauss-Newton": driven(
        lambda: hessopt.newton(curvature="gauss_newton")
    ),
    "hessopt trust_region_newton, Gauss-Newton": driven(
        lambda: hessopt.trust_region_newton(curvature="gauss_newton")
    ),
    "optax adam": driven(lambda: optax.adam(1e-2)),
}
"""What needs a `hessopt.composite`, or is no choice for a small hard problem."""
