"""Damped Gauss-Newton directions for least squares, in parameter or sample space.

With J the Jacobian of the outputs, l the gradient of the loss in the outputs and
L = S S' its Hessian there, K = S'J and S r = l, the direction is

    p = (K'K + lambda I)^-1 K' r = K' (K K' + lambda I)^-1 r,

a system of the size of the parameters, or of the outputs of all samples. Its momentum is
that of SPRING: with the last direction p_0 and a factor mu,

    p = mu p_0 + K' (K K' + lambda I)^-1 (r - mu K p_0)

minimizes `|K p - r|^2 + lambda |p - mu p_0|^2`. Neither K nor a matrix of the size of
the other space is formed as a whole.

Source: Martens, arXiv 1412.1193; Dangel, Mucsanyi, Weber and Eschenhagen, "Kronecker-
factored approximate curvature for physics-informed networks", 2024, and arXiv
2505.12149, for sample space; Goldshlager, Abrahamsen and Lin, arXiv 2401.10190, for the
momentum.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_range, check_word, choose, injectable
from hessopt.calculus.least_squares import sample_losses
from hessopt.calculus.row_products import KERNEL_BYTES
from hessopt.calculus.rows import row_bytes
from hessopt.calculus.terms import Leaves, terms_of
from hessopt.kinds.damped_least_squares import (
    Found,
    solve_by_products,
    solve_in_parameters,
    solve_in_samples,
    system_of,
)
from hessopt.kinds.protocol import Call, scheduled, transformation
from hessopt.numerics.guards import divide, select, zero_unless
from hessopt.objective.binding import Objective, precompose
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import (
    all_finite,
    inner,
    real_leaves,
    solve_dtype,
    tree_norm,
)
from hessopt.typing import Params, StepStatus, step_status

DampingRule = Callable[[jax.Array, jax.Array], jax.Array]
"""`(damping, value) -> lambda`, in units of f / params^2."""

DAMPING_RULES: dict[str, DampingRule] = {
    "value": lambda damping, value: damping * jnp.abs(value),
    "constant": lambda damping, value: damping,
}

SPACES = ("auto", "parameters", "samples")
SOLVERS = ("auto", "cholesky", "cg")

MAX_FACTORIZED = 4096
"""Largest number of equations that are factorized by default."""


class GaussNewtonInfo(NamedTuple):
    """Report of the last update."""

    status: jax.Array  # int32 scalar, StepStatus
    damping: jax.Array  # scalar, lambda, in units of f / params^2
    # scalar, decrease of the objective that the quadratic model predicts, g.p / 2, in
    # units of f
    predicted: jax.Array
    products: jax.Array  # int32 scalar, iterations of conjugate gradients; else 0
    # int32 scalar, evaluations of the value: 1 if it is needed and was not given
    evaluations: jax.Array


class GaussNewtonState(NamedTuple):
    """State of `scale_by_gauss_newton`."""

    count: jax.Array  # int32 scalar, updates so far
    direction: Params  # last direction, a tree like params; None without momentum
    info: GaussNewtonInfo


@injectable
def scale_by_gauss_newton(
    damping: optax.ScalarOrSchedule = 1e-5,
    *,
    damping_rule: str | DampingRule = "value",
    momentum: float = 0.0,
    space: str = "auto",
    solver: str = "auto",
    centered: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Compute the damped Gauss-Newton direction of a composite objective.

    `p = (J'LJ + lambda I)^-1 J'l`, with J the Jacobian of the outputs, and l and L the
    gradient and the Hessian of the loss in the outputs. The rows of J are computed by
    reverse passes of single samples for `hessopt.rowwise` models.

    Args:
      damping: a factor >= 0, or a schedule of it.
      damping_rule: `"value"` for lambda = damping times |value|, in the manner of
        Levenberg and Marquardt: steps become full Gauss-Newton steps as the loss tends
        to zero, and do not depend on the unit of the objective; `"constant"` for lambda
        = damping; or a callable `(damping, value) -> lambda`.
      momentum: mu in [0, 1), the factor of the last direction; see the source. It keeps
        what earlier batches determined, where the samples of one batch do not determine
        all parameters. Without a line search use a rate of at most about `1 - mu`, or
        `optax.clip_by_global_norm` after the sign change.
      space: `"parameters"` solves a system of n equations for n parameters, `"samples"`
        one of M equations for M outputs of all samples; `"auto"` chooses the smaller.
      solver: `"cholesky"`, or `"cg"` for conjugate gradients in the space of samples,
        preconditioned by a random sketch of 256 vectors, until the residual is 1e-5 of
        the right side; `"auto"` factorizes up to 4096 equations.
      centered: whether the mean over the samples of each `rowwise` model is subtracted
        from its rows. J'LJ is then the Fisher matrix of unnormalized log-likelihoods or
        of logarithms of wave functions, and the direction that of stochastic
        reconfiguration: with local energies e, the loss `mean(|log_psi -
        stop_gradient(log_psi) + e - mean(e)|**2) / 2` has half the energy's gradient.
        Its value is not an energy, so use damping_rule="constant".

    Returns:
      A transformation whose `update(grads, state, params, *, value_fn, **data)`
      requires `value_fn=hessopt.composite(model_fn, loss_fn)`. The direction is
      computed from value_fn; `grads` are only tested to be finite. Its status is
      `state.info.status`.

      A value, gradient, output or row that is not finite gives a direction of zero
      (NONFINITE); the state is then unchanged except count and info. If the system is
      singular, which requires damping = 0 or a damping below rounding, p is the
      solution of least length. If L is zero, p is the gradient divided by lambda, or
      with damping = 0 by its length (NO_CURVATURE).

    Raises:
      ValueError: for damping < 0, momentum outside of [0, 1), or an unknown word.
      TypeError: in `update`, if params, value_fn, or data that value_fn requires is
        missing; if value_fn is not a composite; in the space of samples, and with
        centered=True, if L is not recognized as one matrix for each sample, where an
        ordinary model counts as one sample; for centered=True without a `rowwise` model.

    Cost per update: the rows (see `rowwise`) and `M n min(M, n)` multiplications for
    their products, `min(M, n)^3 / 3` for the solution, and one product with each of J
    and J'. In sample space rows are kept for up to 2^29 bytes, else computed in c chunks
    of that size, c/2 times each. Memory: min(M, n)^2, and two chunks of rows. With
    `"cg"`: the rows twice and `4 M n k` multiplications for a sketch of k vectors, and
    one product with each of J and J' per iteration; memory `(M + n) k`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, hessopt
      >>> def residual(params, x, y):
      ...     return params["a"] * jnp.exp(params["b"] * x) - y
      >>> value_fn = hessopt.composite(
      ...     hessopt.rowwise(residual), lambda r: 0.5 * jnp.mean(r**2)
      ... )
      >>> tx = optax.chain(scale_by_gauss_newton(damping=1e-6), optax.scale(-1.0))
      >>> params, x = {"a": jnp.array(1.0), "b": jnp.array(0.0)}, jnp.linspace(0, 1, 20)
      >>> data, state = {"x": x, "y": 2.0 * jnp.exp(-x)}, tx.init(params)
      >>> for _ in range(8):
      ...     grads = jax.grad(value_fn)(params, **data)
      ...     updates, state = tx.update(grads, state, params, value_fn=value_fn, **data)
      ...     params = optax.apply_updates(params, updates)
      >>> {name: round(float(leaf), 3) for name, leaf in params.items()}
      {'a': 2.0, 'b': -1.0}

    Source: Martens, arXiv 1412.1193; Goldshlager, Abrahamsen and Lin, arXiv 2401.10190,
    and arXiv 2505.12149, for sample space and the momentum; Frangella, Tropp and Udell,
    "Randomized Nystrom preconditioning", 2021.
    """
    check_range("damping", damping, 0)
    check_range("momentum", momentum, 0, 1)
    check_word("space", space, SPACES)
    check_word("solver", solver, SOLVERS)
    if solver == "cg" and space == "parameters":
        raise ValueError('solver="cg" is for space="samples", got space="parameters"')
    options = _Options(
        damping,
        choose("damping_rule", damping_rule, DAMPING_RULES),
        None if isinstance(momentum, int | float) and momentum == 0 else momentum,
        space,
        solver,
        centered,
    )
    init, step = functools.partial(_init, options), functools.partial(_step, options)
    return transformation("scale_by_gauss_newton", init, step, needs=("value_fn",))


class _Options(NamedTuple):
    """The arguments of `scale_by_gauss_newton`, checked and resolved."""

    damping: optax.ScalarOrSchedule
    damping_rule: DampingRule
    momentum: jax.typing.ArrayLike | None  # None for 0
    space: str
    solver: str
    centered: bool


def _init(options: _Options, params: Params) -> GaussNewtonState:
    dtype, count = solve_dtype(params), jnp.zeros((), jnp.int32)
    state = GaussNewtonState(
        count=count,
        direction=None
        if options.momentum is None
        else jax.tree.map(jnp.zeros_like, params),
        info=GaussNewtonInfo(
            status=jnp.zeros((), jnp.int32),
            damping=jnp.zeros((), dtype),
            predicted=jnp.zeros((), dtype),
            products=jnp.zeros((), jnp.int32),
            evaluations=jnp.zeros((), jnp.int32),
        ),
    )
    return beside(state, params)


def _step(
    options: _Options, call: Call, state: GaussNewtonState
) -> tuple[optax.Updates, GaussNewtonState]:
    parts, restore = real_leaves(call.params)
    dtype = solve_dtype(parts)
    if not sum(part.size for part in parts):
        return call.updates, state
    objective = precompose(call.objective, restore)
    if not objective.is_composite:
        raise TypeError(
            "scale_by_gauss_newton needs value_fn=hessopt.composite(model_fn, loss_fn)"
        )

    # lambda and mu p_0
    value = objective(parts) if call.value is None else call.value
    damping = jnp.asarray(scheduled(options.damping, state.count), dtype)
    lam = options.damping_rule(damping, jnp.asarray(value, dtype)).astype(dtype)
    last = None
    if options.momentum is not None:
        mu = jnp.asarray(options.momentum, dtype)
        last = [mu * leaf.astype(dtype) for leaf in real_leaves(state.direction)[0]]

    found = _solved(options, objective, parts, lam, last, state.count)

    # without curvature the direction is the gradient
    length = tree_norm(found.gradient) / found.unit
    divisor = jnp.where(lam > 0, lam, length) * found.unit
    descent = [divide(leaf, divisor, divisor > 0) for leaf in found.gradient]
    p = select(found.curved, found.p, descent)

    finite = call.finite & all_finite((call.updates, p, value, found.gradient))
    narrow = [x.astype(part.dtype) for x, part in zip(p, parts, strict=True)]
    direction = zero_unless(finite, restore(narrow))
    slope = inner(found.gradient, p) / found.unit
    status = {
        StepStatus.NONFINITE: ~finite,
        StepStatus.NO_CURVATURE: finite & ~found.curved & (length > 0),
    }
    memory = None
    if options.momentum is not None:
        kept = optax.tree.cast_like(direction, state.direction)
        memory = select(finite, kept, state.direction)
    return optax.tree.cast_like(direction, call.updates), GaussNewtonState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        direction=memory,
        info=GaussNewtonInfo(
            status=step_status(status),
            damping=jnp.where(finite, lam, 0.0),
            predicted=jnp.where(finite, jnp.maximum(slope / 2, 0.0), 0.0),
            products=jnp.asarray(found.products, jnp.int32),
            evaluations=jnp.int32(call.value is None),
        ),
    )


def _solved(
    options: _Options,
    objective: Objective,
    parts: Leaves,
    lam: jax.Array,
    last: Leaves | None,
    count: jax.Array,
) -> Found:
    """Solve the damped system in the space that the options choose."""
    terms = terms_of(objective.model_fn, parts)
    if options.centered and not any(term.is_rowwise for term in terms):
        raise TypeError(
            "centered=True needs the model of one sample: "
            "value_fn=hessopt.composite(hessopt.rowwise(fn), loss_fn)"
        )
    size = sum(part.size for part in parts)
    in_samples, iterates = _chosen(options, sum(term.size for term in terms), size)
    losses = sample_losses(objective, terms, parts, dense=in_samples)
    if losses is None and (in_samples or options.centered):
        raise TypeError(
            "scale_by_gauss_newton in the space of samples, or with centered=True, needs "
            "a loss whose Hessian in the outputs is recognized as one matrix per sample"
        )
    if losses is None:
        return solve_by_products(objective, parts, lam, last)
    limit = KERNEL_BYTES if in_samples else row_bytes()
    system = system_of(terms, losses, parts, limit, centered=options.centered)
    if not in_samples:
        return solve_in_parameters(system, lam, last)
    return solve_in_samples(system, lam, last, count if iterates else None)


def _chosen(options: _Options, outputs: int, size: int) -> tuple[bool, bool]:
    """Return whether to solve in the space of samples, and whether to iterate."""
    smaller = min(outputs, size)
    if options.space != "auto":
        smaller = outputs if options.space == "samples" else size
    factorizes = options.solver == "cholesky" or options.space == "parameters"
    iterates = not factorizes and (options.solver == "cg" or smaller > MAX_FACTORIZED)
    auto = options.space == "auto" and outputs < size
    return options.space == "samples" or auto or iterates, iterates
