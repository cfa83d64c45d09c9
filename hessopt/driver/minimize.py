"""The driver: minimizes an objective with any optax transformation, in one compiled
loop.

At a minimizer the gradient vanishes for all data, `g(params*(data), data) = 0`. By the
implicit function theorem, `H d(params*) = -dg/d(data) d(data)`. The solution is
differentiated by this linear solve at the solution, and not through the steps.

Source: Blondel et al., "Efficient and modular implicit differentiation", arXiv
2105.15183, for the derivatives.
"""

import functools
import time
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer, eval_jaxpr

from hessopt._checks import check_count, check_params, check_range, check_transformation
from hessopt.calculus.curvature import block_hessians, hessian_product
from hessopt.driver.loop import (
    Limits,
    Problem,
    Run,
    advance,
    begin,
    bound_objective,
    end,
    evaluate,
    objective_and_aux,
)
from hessopt.kinds.faces import box_in, has_box
from hessopt.numerics.equilibration import equilibration
from hessopt.numerics.guards import select
from hessopt.numerics.norms import norm
from hessopt.objective.binding import as_objective, precompose, require_taken
from hessopt.objective.closure import identified, open_closure
from hessopt.trees.boxes import count, free_part, is_outside, outward
from hessopt.trees.vectors import (
    largest,
    ravel,
    real_leaves,
    solve_dtype,
    strongly_typed,
    unravel,
)
from hessopt.typing import Aux, Data, Matrix, ObjectiveFn, Params, Termination

if TYPE_CHECKING:
    from tqdm.auto import tqdm

MAX_DENSE_SIZE = 512
"""Number of real parameters up to which derivatives are computed from the dense
Hessian. Conjugate gradients would need as many products."""
LOG_EVERY = 50
"""Number of steps between two reports of a run, by default."""
MAX_ENCLOSED_SIZE = 2**14
"""Total size of a solution up to which its run is enclosed in a loop."""


Names: TypeAlias = "str | list[Names]"
"""A string, or a list of one for each lane."""


class BoundsInfo(NamedTuple):
    """What bounds did to a solution, scalar arrays."""

    held: jax.Array  # int32, entries held at bounds
    # bool, whether the start was outside and was replaced by the nearest point within
    projected: jax.Array


class History(NamedTuple):
    """The course of a run. All fields are NumPy arrays of one length: an entry for the
    start, and one for every block of `log_every` steps so far."""

    steps: np.ndarray  # int, updates applied
    values: np.ndarray  # objective
    gradients: np.ndarray  # largest magnitude in the gradient, of what no bound holds
    step_sizes: np.ndarray  # largest magnitude in the last change of params; 0 first
    evaluations: np.ndarray  # int, evaluations so far; -1 if not counted
    seconds: np.ndarray  # wall-clock time since the call, including compilation


class Solution(NamedTuple):
    """The result of a minimization. All fields except `params`, `grad`, `aux`, `state`,
    `held` and `history` are scalar arrays."""

    # point of lowest value; for termination GRADIENT, the stationary point found
    params: Params
    value: jax.Array  # objective at params
    grad: Params  # gradient at params, complex leaves in optax's convention
    aux: Aux  # auxiliary output at params; None without has_aux
    state: optax.OptState  # state of tx after the last step, for a warm start
    steps: jax.Array  # int32, updates applied
    # int32, evaluations of the value, with or without gradient, outside of Hessians;
    # -1 if not counted
    evaluations: jax.Array
    termination: jax.Array  # int32, Termination
    # tree of bools like params: the entries held at a bound, where the gradient points
    # outward, and the fixed ones; None without bounds
    held: Params = None
    info: BoundsInfo | None = None  # None without bounds
    history: History | None = None  # None without progress, log_every or a callback

    @property
    def converged(self) -> jax.Array:
        """Whether the run ended by a tolerance: GRADIENT, VALUE or STEP. A bool array
        with one entry per lane."""
        return (self.termination >= Termination.GRADIENT) & (
            self.termination <= Termination.STEP
        )

    @property
    def reason(self) -> Names:
        """The name of the termination as a string, such as `"GRADIENT"`; a list of
        strings for several lanes. Not available under jit."""
        return _names(np.asarray(self.termination).tolist())


def _names(terminations: object) -> Names:
    """Return the names of terminations, nested like the numbers."""
    if isinstance(terminations, list):
        return [_names(each) for each in terminations]
    return Termination(terminations).name


def minimize(
    value_fn: ObjectiveFn,
    params: Params,
    tx: optax.GradientTransformation,
    *,
    data: Data | None = None,
    state: optax.OptState | None = None,
    max_steps: int = 1000,
    gtol: float = 1e-6,
    ftol: float = 0.0,
    xtol: float = 0.0,
    has_aux: bool = False,
    progress: bool = False,
    log_every: int | None = None,
    callback: Callable[[Solution], object] | None = None,
) -> Solution:
    """Minimize an objective with any optax transformation, in one compiled loop.

    Args:
      value_fn: `value_fn(params, **data)`, a real scalar; `(value, aux)` with has_aux.
        Compiled once per function object and transformation. As with `jax.jit`, values
        that the object holds are fixed when it is compiled: pass values that change as
        `data`.
      params: the starting point, a pytree of floating or complex arrays.
      tx: a hessopt or optax optimizer; it receives value, grad and value_fn.
      data: arrays, or pytrees of arrays, passed to value_fn by name. Bind other
        arguments beforehand with `functools.partial`.
      state: a state of `tx` for a warm start, as in `Solution.state`; by default a
        fresh one.
      max_steps: maximum number of updates, below 2^31.
      gtol: stop (GRADIENT) when max|g|, over the entries that no bound of tx holds, is
        at most gtol times its value at the start, and the decrease `g.p / 2` that the
        method predicts for its direction p at most `tol^2 |f|`, where
        `tol = max(gtol, eps^(3/8))`. If the value tends to zero, and the predicted
        decrease remains more than a hundredth of it, max|p| must instead be at most tol
        times max|params|, now or at the start. For a transformation without a model of
        the objective p is its update, and one of the last two bounds is sufficient.
      ftol: stop (VALUE) when a step changes the objective by at most ftol times its
        total change since the start.
      xtol: stop (STEP) when no entry moves by more than xtol times the largest entry.
      has_aux: whether value_fn returns `(value, aux)`; aux is evaluated once, at the
        solution.
      progress: whether to show a progress bar (requires tqdm), also in notebooks, with
        the value, the gradient, the size of the last step and the evaluations.
      log_every: steps per block, 50 by default. With progress, log_every or a callback
        the run is divided into compiled blocks; `solution.history` has an entry for
        each. Ctrl-C between two blocks returns the best point so far, as INTERRUPTED.
        Not available under jit, vmap or grad.
      callback: `callback(solution)`, called with the best point so far after every
        block; a true return value stops the run, as INTERRUPTED.

    Returns:
      A `Solution`. `solution.converged` tells whether a tolerance ended the run,
      `solution.reason` names the `Termination`. MAX_STEPS, STALLED_AT_NOISE, UNBOUNDED,
      NONFINITE and INTERRUPTED do not count as convergence, nor does a step of zero.

      Under `jax.vmap` every lane terminates separately and keeps its values from then
      on; the loop runs until the last lane ends. The derivatives of params, value, grad
      and aux with respect to `data`, and with respect to values that value_fn closes
      over, are those of the exact stationary point nearby. The derivatives with respect
      to the starting point, and those of the state and the counts, are zero.
      Derivatives are NaN where the Hessian is singular or conjugate gradients do not
      converge. With bounds, held entries move as their bounds do, and derivatives are
      NaN where the gradient of one of them vanishes. An objective without forward
      derivatives, such as one with a `jax.custom_vjp`, has derivatives of its solution
      in reverse mode.

    Raises:
      ValueError: for a negative tolerance, a max_steps that is negative or not a whole
        number, or log_every below 1.
      ValueError, TypeError: for bounds of tx that do not fit params, for complex params
        with bounds, and for params outside of the bounds, where they are known; where
        they are traced, the nearest point within is the start.
      TypeError: for data that value_fn requires but does not receive, data that
        value_fn does not take, or data that are not arrays; for params that are not
        floating or complex; for a tx that is not an optax transformation; for has_aux
        with a `composite`; for progress, log_every or a callback under a
        transformation of JAX.
      ImportError: for progress without tqdm.

    Cost: per step one update of `tx`, and one value and gradient unless its line search
    kept them; memory for a second set of params and gradient (the best). Derivatives:
    the dense Hessian and its factorization up to 512 real parameters, else one
    conjugate gradient solve each, of at most 10 000 products.

    Example:
      >>> import jax.numpy as jnp, hessopt
      >>> def loss(x, target):
      ...     return jnp.sum((x - target) ** 4)
      >>> solution = hessopt.minimize(loss, jnp.zeros(2), hessopt.newton(), data={"target": jnp.array([1.0, -2.0])})
      >>> solution.reason
      'GRADIENT'

    Source: Blondel et al., "Efficient and modular implicit differentiation", arXiv
    2105.15183, for the derivatives.
    """
    in_blocks = progress or callback is not None or log_every is not None
    log_every = LOG_EVERY if log_every is None else log_every
    check_count("log_every", log_every)
    check_range("max_steps", max_steps, 0, np.iinfo(np.int32).max)
    if not isinstance(max_steps, Tracer) and not float(max_steps).is_integer():
        raise ValueError(f"max_steps must be a whole number, got {max_steps}")
    for name, tolerance in (("gtol", gtol), ("ftol", ftol), ("xtol", xtol)):
        check_range(name, tolerance, 0)
    if has_aux and as_objective(value_fn).is_composite:
        raise TypeError(
            "has_aux needs value_fn to return (value, aux); a composite returns its loss alone"
        )
    check_transformation("tx", tx)
    if not callable(value_fn):
        raise TypeError(
            f"value_fn must be a function of params and data, got {value_fn!r}"
        )
    if not isinstance(data or {}, Mapping):
        raise TypeError(
            f"data must be a mapping from argument names of value_fn to arrays, got {type(data)}"
        )
    check_params(
        "minimize", params, otherwise="pass it to value_fn as data, or separate it"
    )
    data = dict(data or {})
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if isinstance(leaf, str | bytes) or not (
            isinstance(leaf, complex | float | int) or hasattr(leaf, "dtype")
        ):
            raise TypeError(
                f"data{jax.tree_util.keystr(path)} must be an array, got {leaf!r}: bind it to value_fn"
            )
    require_taken(value_fn, data, caller="minimize")

    params = strongly_typed(params)
    problem = Problem(identified(value_fn), tx, has_aux)
    opened, data = open_closure(
        problem.value_fn, functools.partial(bound_objective, problem), params, data
    )
    problem = problem._replace(value_fn=opened)
    # a fresh state is created inside the program, except one with bounds: these may be
    # traced values, and are compared with the start where both are known
    if state is None and _has_bounds(tx, params):
        state, outside = _init_within_jit(tx, params)
        if not isinstance(outside, Tracer) and outside:
            tx.init(params)  # raises an error that names the entry
    opt_state = None if state is None else strongly_typed(state)
    real = jax.dtypes.canonicalize_dtype(float)
    limits = Limits(
        _scalar(max_steps, np.int32),
        *(_scalar(tolerance, real) for tolerance in (gtol, ftol, xtol)),
    )
    if not in_blocks:
        return _solve_jit(problem, params, opt_state, data, limits)
    return _in_blocks(
        problem,
        params,
        opt_state,
        data,
        limits,
        log_every,
        _bar(max_steps) if progress else None,
        callback,
    )


def _scalar(x: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> Any:
    """Return a strongly typed scalar; a Python number becomes a NumPy array, without
    a program."""
    return x.astype(dtype) if isinstance(x, jax.Array) else np.asarray(x, dtype)


def _solution(problem: Problem, run: Run, data: Data) -> Solution:
    stationary = run.termination == Termination.GRADIENT
    end = select(stationary, run.here, run.best)
    aux = objective_and_aux(problem, data)[1](end.params)
    box, held, info = box_in(run.state, end.params), None, None
    if box is not None:
        held = outward(box, end.params, end.grad)
        info = BoundsInfo(count(held), run.projected)
    return Solution(
        end.params,
        end.value,
        end.grad,
        aux,
        run.state,
        run.steps,
        run.evaluations,
        run.termination,
        held,
        info,
    )


_BOUNDED: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, bool]]
_BOUNDED = weakref.WeakKeyDictionary()
"""Whether a transformation has bounds, by its `init` and the shapes of params."""


def _init_within(
    tx: optax.GradientTransformation, params: Params
) -> tuple[optax.OptState, jax.Array]:
    """Return a fresh state, and whether params are outside of its bounds."""
    state = tx.init(params)
    box: Any = box_in(state, params)
    return state, is_outside(box, params)


def _has_bounds(tx: optax.GradientTransformation, params: Params) -> bool:
    """Return whether a transformation keeps params of these shapes within bounds."""
    leaves, treedef = jax.tree.flatten(params)
    key = treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    known = _BOUNDED.setdefault(tx.init, {})
    if key not in known:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        known[key] = has_box(jax.eval_shape(tx.init, shapes))
    return known[key]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(
    problem: Problem,
    params: Params,
    state: optax.OptState | None,
    data: Data,
    limits: Limits,
) -> Solution:
    def whole(params: Params) -> Solution:
        run = begin(problem, params, state, data, limits)
        run = advance(problem, run, data, limits, limits.max_steps)
        return _solution(problem, end(run, Termination.MAX_STEPS), data)

    return _in_one_turn(whole, params, limits.max_steps < 0)


def _in_one_turn(
    whole: Callable[[Params], Solution], params: Params, never: jax.Array
) -> Solution:
    """Return `whole(params)`, computed in a loop of one turn if all arrays are small.

    On CPUs XLA compiles a loop over small arrays to a single function. It runs the rest
    of a program kernel by kernel on several threads, which would take longer than such
    a run itself. `never` is False when the program runs; the turn depends on variables
    of the loop, so that XLA can neither remove the loop nor move the turn out of it.
    """
    program, shapes = jax.make_jaxpr(whole, return_shape=True)(params)
    leaves, treedef = jax.tree.flatten(shapes)

    def run(params: Params) -> Solution:
        found = eval_jaxpr(program.jaxpr, program.consts, *jax.tree.leaves(params))
        return jax.tree.unflatten(treedef, found)

    # keys have no zero, and the types of arrays on a mesh also name their sharding
    is_plain = not any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in leaves)
    is_plain &= jax.sharding.get_abstract_mesh().empty
    if sum(leaf.size for leaf in leaves) > MAX_ENCLOSED_SIZE or not is_plain:
        return run(params)

    def turn(carry: tuple[jax.Array, Solution]) -> tuple[jax.Array, Solution]:
        return never, run(carry[1].params)

    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    start = jnp.ones((), bool), blank._replace(params=params)
    return jax.lax.while_loop(lambda carry: carry[0], turn, start)[1]


@_solve.defjvp
def _solve_jvp(
    problem: Problem, primals: tuple[Params, ...], tangents: tuple[Params, ...]
) -> tuple[Solution, Solution]:
    solution = _solve(problem, *primals)
    data, d_data = primals[2], tangents[2]
    parts, restore = real_leaves(solution.params)

    def gradient(parts: list[jax.Array], data: Data) -> list[jax.Array]:
        return jax.grad(precompose(objective_and_aux(problem, data)[0], restore))(parts)

    _, shift = jax.jvp(lambda data: gradient(parts, data), (data,), (d_data,))
    against = jax.tree.map(jnp.negative, shift)
    restored = precompose(objective_and_aux(problem, data)[0], restore)
    is_dense, held = sum(part.size for part in parts) <= MAX_DENSE_SIZE, None
    hessian: Any = None
    if not is_dense or solution.held is not None:
        hessian = hessian_product(restored, lambda parts: parts, parts)
    if solution.held is not None:
        # held entries move with their bounds, and the others by H_FF d_F = rhs - H_FA d_A
        held = jax.tree.leaves(solution.held)
        d_held = _moved_by_bounds(solution, primals[1], tangents[1])
        still = jax.tree.map(jnp.logical_not, held)
        moved = hessian(free_part(still, d_held))
        against = jax.tree.map(jnp.subtract, against, moved)
        against = jax.tree.map(jnp.where, held, d_held, against)
        against = _strictly(solution, hessian, against)
    if is_dense:
        (H,) = block_hessians(restored, parts, [0] * len(parts), 1)
        d_parts = _solve_dense(H if held is None else _without(held, H), against)
    else:
        product = hessian if held is None else _identity_on(held, hessian)
        d_parts = jax.lax.custom_linear_solve(
            product, against, _conjugate_gradients, symmetric=True
        )

    def outputs(parts: list[jax.Array], data: Data) -> tuple[Params, ...]:
        objective, aux = objective_and_aux(problem, data)
        point = evaluate(objective, restore(parts))
        return point.params, point.value, point.grad, aux(point.params)

    _, (d_params, d_value, d_grad, d_aux) = jax.jvp(
        outputs, (parts, data), (d_parts, d_data)
    )
    rest = jax.tree.map(_no_tangent, solution[4:])
    return solution, Solution(d_params, d_value, d_grad, d_aux, *rest)


def _moved_by_bounds(
    solution: Solution, state: optax.OptState, d_state: optax.OptState
) -> list[jax.Array]:
    """Return the tangents of held entries, which are those of their bounds."""

    def bound(state: optax.OptState) -> Params:
        box: Any = box_in(state, solution.params)
        return jax.tree.map(
            lambda x, low, up: jnp.where(x <= low, low, up), solution.params, *box
        )

    return jax.tree.leaves(jax.jvp(bound, (state,), (d_state,))[1])


def _identity_on(
    held: list[jax.Array], hessian: Callable[[list[jax.Array]], list[jax.Array]]
) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """Return the product with H, the rows and columns of held entries replaced by those
    of the identity."""
    return lambda v: jax.tree.map(jnp.where, held, v, hessian(free_part(held, v)))


def _without(held: list[jax.Array], H: Matrix) -> Matrix:
    """Return H with the rows and columns of held entries replaced by those of the
    identity."""
    free = jnp.concatenate([jnp.zeros(0, bool)] + [~h.ravel() for h in held])
    return jnp.where(free & free[:, None], H, jnp.diag((~free).astype(H.dtype)))


def _strictly(
    solution: Solution,
    hessian: Callable[[list[jax.Array]], list[jax.Array]],
    rhs: list[jax.Array],
) -> list[jax.Array]:
    """Return rhs, or NaN if the gradient of an entry at its bound is zero beside H x, up
    to half of the digits: any change of the data could then release it."""
    x, g = (
        jax.tree.leaves(jax.lax.stop_gradient(tree))
        for tree in (solution.params, solution.grad)
    )
    box: Any = jax.lax.stop_gradient(box_in(solution.state, solution.params))
    sides = zip(x, g, *map(jax.tree.leaves, box), strict=True)
    size = largest(jax.lax.stop_gradient(hessian(x)))
    weak = [
        jnp.any(
            ((x <= low) | (x >= up))
            & (low < up)
            & (jnp.abs(g) <= float(jnp.finfo(g.dtype).eps) ** 0.5 * size)
        )
        for x, g, low, up in sides
    ]
    factor = jnp.where(functools.reduce(jnp.logical_or, weak), jnp.nan, 1.0)
    return [leaf * factor.astype(leaf.dtype) for leaf in rhs]


def _solve_dense(H: Matrix, rhs: Params) -> Params:
    """Return `H^-1 rhs`; NaN where H, scaled so that its rows have size 1, is singular
    to working precision."""
    t = equilibration(jax.lax.stop_gradient(H))
    scaled = t[:, None] * H * t
    eigenvalues = jnp.abs(jnp.linalg.eigvalsh(jax.lax.stop_gradient(scaled)))
    regular = jnp.min(eigenvalues) > len(H) * jnp.finfo(H.dtype).eps * jnp.max(
        eigenvalues
    )
    # NaN enters as a factor, so that the solve stays linear and can be transposed
    linear = jnp.where(regular, t, jnp.nan) * ravel(rhs)
    return unravel(t * jnp.linalg.solve(scaled, linear), rhs)


def _conjugate_gradients(matvec: Callable[[Params], Params], rhs: Params) -> Params:
    """Return the solution of `matvec(x) = rhs`; NaN if the iteration does not
    converge."""
    eps = float(jnp.finfo(solve_dtype(rhs)).eps)
    x = jax.scipy.sparse.linalg.cg(matvec, rhs, tol=eps, maxiter=10_000)[0]
    residual = norm(ravel(rhs) - ravel(matvec(x)))
    solved = residual <= eps**0.5 * norm(ravel(rhs))
    return jax.tree.map(lambda leaf: jnp.where(solved, leaf, jnp.nan), x)


def _no_tangent(x: jax.Array) -> jax.Array | np.ndarray:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


_solve_jit = jax.jit(_solve, static_argnums=0)
_init_within_jit = jax.jit(_init_within, static_argnums=0)
_begin_jit = jax.jit(begin, static_argnums=0)
_advance_jit = jax.jit(advance, static_argnums=0)
_solution_jit = jax.jit(_solution, static_argnums=0)


def _bar(total: int) -> "tqdm[NoReturn]":
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True requires tqdm: pip install hessopt[progress]"
        ) from error
    return tqdm(total=total, unit="step")


def _in_blocks(
    problem: Problem,
    params: Params,
    state: optax.OptState | None,
    data: Data,
    limits: Limits,
    log_every: int,
    bar: "tqdm[NoReturn] | None",
    callback: Callable[[Solution], object] | None,
) -> Solution:
    """Run in blocks of `log_every` steps, with a report after each block."""
    began = time.perf_counter()
    run = _begin_jit(problem, params, state, data, limits)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(run)):
        raise TypeError(
            "minimize supports progress, log_every and callback only in a plain call, not under jit, vmap or grad"
        )
    run = run._replace(move=jnp.zeros_like(run.extent))
    course = _Course(_row(run, began))
    reason = Termination.MAX_STEPS
    try:
        while run.termination == Termination.RUNNING and run.steps < limits.max_steps:
            run = _advance_jit(problem, run, data, limits, run.steps + log_every)
            # `run` is assigned before the wait, so an interruption loses no steps
            course.add(_row(run, began))
            if bar is not None:
                _show(bar, course.history())
            if callback is not None:
                seen = _solution_jit(problem, run, data)
                if callback(seen._replace(history=course.history())):
                    reason = Termination.INTERRUPTED
                    break
    except KeyboardInterrupt:
        reason = Termination.INTERRUPTED
    finally:
        if bar is not None:
            bar.close()
    solution = _solution_jit(problem, end(run, reason), data)
    return solution._replace(history=course.history())


class _Course:
    """The entries of a history. The table has room for more, so that the cost of a
    history does not grow with the run."""

    def __init__(self, row: tuple[float, ...]) -> None:
        self.table = np.array([row], float)
        self.size = 1

    def add(self, row: tuple[float, ...]) -> None:
        if self.size == len(self.table):
            self.table = np.concatenate([self.table, np.empty_like(self.table)])
        self.table[self.size] = row
        self.size += 1

    def history(self) -> History:
        found = History(*self.table[: self.size].T)
        return found._replace(
            steps=found.steps.astype(int), evaluations=found.evaluations.astype(int)
        )


def _row(run: Run, began: float) -> tuple[float, ...]:
    """Return an entry of the history, after waiting for the run."""
    here = run.here
    numbers = run.steps, here.value, here.size, run.move, run.evaluations
    found = [x.item() for x in jax.device_get(numbers)]
    return *found, time.perf_counter() - began


def _show(bar: "tqdm[NoReturn]", history: History) -> None:
    """Show the newest entry of the history at the bar."""
    bar.update(int(history.steps[-1]) - bar.n)
    shown = {
        "value": f"{history.values[-1]:.6g}",
        "gradient": f"{history.gradients[-1]:.1e}",
        "step": f"{history.step_sizes[-1]:.1e}",
    }
    if history.evaluations[-1] >= 0:
        shown["evaluations"] = f"{history.evaluations[-1]}"
    bar.set_postfix(shown)
