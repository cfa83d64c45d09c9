"""Minimizers with bounds side by side: each is given a problem, and tells what it spent
and whether it claims convergence."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hessopt
from benchmarks.problems.bounded import Bounded, projected
from benchmarks.solvers import MAX_ITERATIONS, Outcome, timed

Solver = Callable[[Bounded], tuple[Outcome, bool]]
"""`problem -> (outcome, claim)`; to stop where the projected gradient is at most
`problem.gradient`, after 2000 iterations, or on giving up."""


def driven(make: Callable[..., optax.GradientTransformation], **options: Any) -> Solver:
    """Return the solver of a method of hessopt in `hessopt.minimize`."""

    def solve(problem: Bounded) -> tuple[Outcome, bool]:
        tx = make(bounds=(problem.lower, problem.upper), **options)
        largest = float(_free_size(problem))
        gtol = problem.gradient / largest if largest else 0.0

        @jax.jit
        def run(x: Any) -> Any:
            solution = hessopt.minimize(
                problem.value_fn, x, tx, max_steps=MAX_ITERATIONS, gtol=gtol
            )
            return (
                solution.params,
                solution.steps,
                solution.evaluations,
                solution.termination,
                solution.converged,
            )

        ended, cold, warm = timed(lambda: run(problem.start))
        x, steps, evaluations, termination, converged = ended
        said = hessopt.Termination(int(termination)).name
        outcome = Outcome(x, int(steps), int(evaluations), cold, warm, said)
        return outcome, bool(converged)

    return solve


def _free_size(problem: Bounded) -> Any:
    """Return the largest entry of the gradient at the start among those that no bound
    holds, to which `gtol` is relative."""
    x, grad = problem.start, jax.grad(problem.value_fn)(problem.start)
    held = ((x <= problem.lower) & (grad > 0)) | ((x >= problem.upper) & (grad < 0))
    return jnp.max(jnp.abs(jnp.where(held, 0.0, grad)))


def _size(problem: Bounded, x: Any) -> Any:
    """Return the largest entry of the projected gradient of a problem."""
    grad = jax.grad(problem.value_fn)(x)
    return projected(x, grad, problem.lower, problem.upper)


def jaxopt_lbfgsb(problem: Bounded) -> tuple[Outcome, bool]:
    """L-BFGS-B of jaxopt, stepped in one compiled loop."""
    import jaxopt

    bounds = problem.lower, problem.upper
    solver = jaxopt.LBFGSB(problem.value_fn, maxiter=MAX_ITERATIONS, tol=0.0)

    def is_flat(carry: Any) -> Any:
        x, state = carry
        return projected(x, state.grad, *bounds) <= problem.gradient

    @jax.jit
    def run(x: Any) -> Any:
        return jax.lax.while_loop(
            lambda carry: ~is_flat(carry) & (carry[1].iter_num < MAX_ITERATIONS),
            lambda carry: tuple(solver.update(*carry, bounds)),
            (x, solver.init_state(x, bounds)),
        )

    (x, state), cold, warm = timed(lambda: run(problem.start))
    said = "failed search" if bool(state.failed_linesearch) else ""
    outcome = Outcome(x, int(state.iter_num), int(state.num_fun_eval), cold, warm, said)
    return outcome, bool(is_flat((x, state)))


def jaxopt_projected_gradient(problem: Bounded) -> tuple[Outcome, bool]:
    """The accelerated projected gradient of jaxopt, stepped in one compiled loop.

    Its state has no count of evaluations: a step has two, and one more for each halving
    of the step size. The gradient for the criterion is not counted.
    """
    import jaxopt

    bounds = problem.lower, problem.upper
    solver = jaxopt.ProjectedGradient(
        problem.value_fn,
        jaxopt.projection.projection_box,
        maxiter=MAX_ITERATIONS,
        tol=0.0,
    )

    def goes_on(carry: Any) -> Any:
        x, state, _ = carry
        is_flat = _size(problem, x) <= problem.gradient
        return ~is_flat & (state.iter_num < MAX_ITERATIONS)

    def step(carry: Any) -> Any:
        x, state, evaluations = carry
        x, new = solver.update(x, state, bounds)
        # a step size that has become too small is replaced by 1
        is_reset = (new.stepsize == 1.0) & (state.stepsize < 0.5)
        last = jnp.where(is_reset, jnp.minimum(1e-6, state.stepsize), new.stepsize / 2)
        halvings = jnp.round(jnp.log2(state.stepsize / last)).astype(int)
        return x, new, evaluations + 2 + jnp.maximum(halvings, 0)

    @jax.jit
    def run(x: Any) -> Any:
        return jax.lax.while_loop(
            goes_on, step, (x, solver.init_state(x, bounds), jnp.asarray(0))
        )

    (x, state, evaluations), cold, warm = timed(lambda: run(problem.start))
    outcome = Outcome(x, int(state.iter_num), int(evaluations), cold, warm, "")
    return outcome, bool(_size(problem, x) <= problem.gradient)


class _EndError(Exception):
    """A run has to end at this point: `(x, why, whether it has converged)`."""


def scipy_minimize(method: str, problem: Bounded) -> tuple[Outcome, bool]:
    """Run a method of `scipy.optimize.minimize` over one compiled value and gradient,
    and a compiled Hessian where it takes one; a callback ends those without a criterion
    for the projected gradient."""
    import scipy.optimize

    lower, upper = np.asarray(problem.lower), np.asarray(problem.upper)
    options = {
        "L-BFGS-B": {
            "ftol": 0.0,
            "gtol": problem.gradient,
            "maxcor": 10,
            "maxiter": MAX_ITERATIONS,
            "maxfun": 100 * MAX_ITERATIONS,
        },
        "TNC": {"ftol": 0.0, "xtol": 0.0, "gtol": 0.0, "maxfun": 100 * MAX_ITERATIONS},
        "SLSQP": {"ftol": 1e-15, "maxiter": MAX_ITERATIONS},
        "trust-constr": {
            "gtol": 0.0,  # it would ignore the complementarity
            "xtol": 1e-12,
            "barrier_tol": 1e-12,
            "maxiter": MAX_ITERATIONS,
        },
    }[method]
    compiled = jax.jit(jax.value_and_grad(problem.value_fn))
    hessian = jax.jit(jax.hessian(problem.value_fn))
    counts = {"evaluations": 0, "iterations": 0}

    def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
        counts["evaluations"] += 1
        value, grad = compiled(x)
        return float(value), np.asarray(grad)

    def flat_enough(x: np.ndarray, *_: Any) -> None:
        counts["iterations"] += 1
        x = np.clip(x, lower, upper)
        size = np.max(np.abs(x - np.clip(x - compiled(x)[1], lower, upper)))
        if size <= problem.gradient:
            raise _EndError(x, "projected gradient", True)
        if counts["iterations"] >= MAX_ITERATIONS:
            raise _EndError(x, "limit of iterations", False)

    def run() -> Any:
        try:
            found = scipy.optimize.minimize(
                value_and_grad,
                np.asarray(problem.start),
                jac=True,
                hess=(lambda x: np.asarray(hessian(x))) if is_newton else None,
                method=method,
                bounds=np.column_stack((lower, upper)),
                callback=None if method == "L-BFGS-B" else flat_enough,
                options=options,
            )
        except _EndError as end:
            return end.args
        counts["iterations"] = int(found.nit)
        return found.x, str(found.message), bool(found.success)

    is_newton = method == "trust-constr"
    began = time.perf_counter()
    compiled(problem.start)[0].block_until_ready()
    if is_newton:
        hessian(problem.start).block_until_ready()
    cold = time.perf_counter() - began
    began = time.perf_counter()
    x, said, claim = run()
    warm = time.perf_counter() - began
    spent = counts["iterations"], counts["evaluations"]
    return Outcome(x, *spent, cold, warm, said), claim


def scipy_fit(method: str, problem: Bounded) -> tuple[Outcome, bool]:
    """Run a method of `scipy.optimize.least_squares` with compiled residuals and
    Jacobian."""
    import scipy.optimize

    if problem.residual_fn is None:
        raise ValueError(f"{problem.name} has no residuals")
    residuals = jax.jit(problem.residual_fn)
    jacobian = jax.jit(jax.jacfwd(problem.residual_fn))
    options: dict[str, Any] = {"jac": lambda z: np.asarray(jacobian(z))}
    options |= {"ftol": 1e-15, "xtol": 1e-15, "gtol": problem.gradient}
    began = time.perf_counter()
    jax.block_until_ready((residuals(problem.start), jacobian(problem.start)))
    cold = time.perf_counter() - began
    began = time.perf_counter()
    found = scipy.optimize.least_squares(
        lambda z: np.asarray(residuals(z)),
        np.asarray(problem.start),
        bounds=(np.asarray(problem.lower), np.asarray(problem.upper)),
        method=method,
        max_nfev=MAX_ITERATIONS,
        **options,
    )
    warm = time.perf_counter() - began
    spent = found.njev, found.nfev
    outcome = Outcome(found.x, *spent, cold, warm, f"status {found.status}")
    return outcome, bool(found.success)


def _gauss_newton(**options: Any) -> optax.GradientTransformation:
    return hessopt.trust_region_newton(curvature="gauss_newton", **options)


SOLVERS: dict[str, Solver] = {
    "hessopt lbfgs": driven(hessopt.lbfgs),
    "hessopt bfgs": driven(hessopt.bfgs),
    "hessopt newton": driven(hessopt.newton),
    "hessopt newton_cg": driven(hessopt.newton_cg),
    "hessopt trust_region_newton": driven(hessopt.trust_region_newton),
    "jaxopt LBFGSB": jaxopt_lbfgsb,
    "jaxopt ProjectedGradient": jaxopt_projected_gradient,
} | {
    f"SciPy {method}": functools.partial(scipy_minimize, method)
    for method in ("L-BFGS-B", "TNC", "SLSQP", "trust-constr")
}

FIT_SOLVERS: dict[str, Solver] = {
    "hessopt Gauss-Newton": driven(_gauss_newton),
    "SciPy trf": functools.partial(scipy_fit, "trf"),
    "SciPy dogbox": functools.partial(scipy_fit, "dogbox"),
}
"""What needs the residuals."""
