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
from hessopt.calculus.curvature import block_hessians
from hessopt.calculus.least_squares import SampleLoss, sample_losses
from hessopt.calculus.linearization import linearize
from hessopt.calculus.rows import (
    KERNEL_BYTES,
    Leaves,
    Piece,
    Term,
    from_pieces,
    in_pieces,
    kernel,
    normal_matrix,
    pieces_of,
    row_bytes,
    rows_times,
    terms_of,
    times_rows,
    weigh,
)
from hessopt.kinds.protocol import Call, scheduled, transformation
from hessopt.numerics.cg import conjugate_gradients
from hessopt.numerics.equilibration import unit_power
from hessopt.numerics.guards import divide, select, zero_unless
from hessopt.numerics.norms import norm
from hessopt.numerics.nystrom import nystrom, preconditioner
from hessopt.numerics.semidefinite import solve_semidefinite
from hessopt.objective.binding import Objective, precompose
from hessopt.trees.sharding import beside
from hessopt.trees.vectors import (
    all_finite,
    inner,
    inner_products,
    ravel,
    real_leaves,
    solve_dtype,
    tree_norm,
    unravel,
)
from hessopt.typing import Matrix, Params, StepStatus, Vector, step_status

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

SKETCH_SIZE = 256
"""Number of vectors of the sketch that preconditions conjugate gradients, at most."""

CG_TOLERANCE, MAX_PRODUCTS = 1e-5, 200
"""Largest residual of conjugate gradients, relative to the right side; and their largest
number."""


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


class _Found(NamedTuple):
    """The solution of the damped system, with f multiplied by a power of two."""

    p: Leaves
    gradient: Leaves  # J'l
    unit: jax.Array  # scalar, the power of two
    curved: jax.Array  # bool scalar, whether L is not zero
    products: jax.Array | int = 0  # iterations of conjugate gradients


def _step(
    options: _Options, call: Call, state: GaussNewtonState
) -> tuple[optax.Updates, GaussNewtonState]:
    parts, restore = real_leaves(call.params)
    size, dtype = sum(part.size for part in parts), solve_dtype(parts)
    if not size:
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

    # the system of the smaller space
    terms = terms_of(objective.model_fn, parts)
    if options.centered and not any(term.is_rowwise for term in terms):
        raise TypeError(
            "centered=True needs the model of one sample: "
            "value_fn=hessopt.composite(hessopt.rowwise(fn), loss_fn)"
        )
    in_samples, iterates = _chosen(options, sum(term.size for term in terms), size)
    losses = sample_losses(objective, terms, parts, dense=in_samples)
    if losses is None and (in_samples or options.centered):
        raise TypeError(
            "scale_by_gauss_newton in the space of samples, or with centered=True, needs "
            "a loss whose Hessian in the outputs is recognized as one matrix per sample"
        )
    if losses is None:
        found = _by_products(objective, parts, lam, last)
    else:
        limit = KERNEL_BYTES if in_samples and not iterates else row_bytes()
        system = _system(options, terms, losses, parts, limit)
        if not in_samples:
            found = _in_parameters(system, lam, last)
        else:
            count = state.count if iterates else None
            found = _in_samples(system, lam, last, count)

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


def _chosen(options: _Options, outputs: int, size: int) -> tuple[bool, bool]:
    """Return whether to solve in the space of samples, and whether to iterate."""
    smaller = min(outputs, size)
    if options.space != "auto":
        smaller = outputs if options.space == "samples" else size
    factorizes = options.solver == "cholesky" or options.space == "parameters"
    iterates = not factorizes and (options.solver == "cg" or smaller > MAX_FACTORIZED)
    auto = options.space == "auto" and outputs < size
    return options.space == "samples" or auto or iterates, iterates


class _System(NamedTuple):
    """K, r and J'l at params; f is multiplied by a power of two near 1/|L|."""

    parts: Leaves  # params
    pieces: list[list[Piece]]  # of each term, with factors S'
    residuals: list[jax.Array]  # of each term, r (m, k)
    multiply: Callable[[Leaves], list[jax.Array]]  # p -> K p, like the residuals
    transposed: Callable[[list[jax.Array]], Leaves]  # its transpose
    gradient: Leaves  # J'l
    unit: jax.Array  # scalar, the power of two
    curved: jax.Array  # bool scalar, whether L is not zero


def _system(
    options: _Options,
    terms: list[Term],
    losses: list[SampleLoss],
    parts: Leaves,
    limit: int,
) -> _System:
    """Linearize the model, and scale the outputs by the roots of the curvature."""
    dtype = solve_dtype(parts)

    def outputs(parts: Leaves) -> list[jax.Array]:
        found = [term.outputs(parts) for term in terms]
        if not options.centered:
            return found
        return [
            y - jnp.mean(y, axis=0) if term.is_rowwise else y
            for y, term in zip(found, terms, strict=True)
        ]

    # f is multiplied by a power of two, so that squares neither overflow nor underflow;
    # outputs with a slope and no curvature get the least one that rounding can tell
    # from zero
    sizes = [jnp.max(loss.weights, initial=0.0) for loss in losses]
    largest = functools.reduce(jnp.maximum, sizes)
    unit = unit_power(largest).astype(dtype)
    least = jnp.finfo(dtype).eps * largest * unit
    roots = [jnp.sqrt(jnp.maximum(loss.weights * unit, least)) for loss in losses]
    slopes = [loss.slopes * unit for loss in losses]
    both = list(zip(losses, roots, strict=True))
    factors = [loss.factors(root) for loss, root in both]

    _, pull = jax.vjp(outputs, list(parts))

    def back(coordinates: list[jax.Array]) -> Leaves:
        each = zip(losses, coordinates, strict=True)
        cotangents = [loss.of_outputs(x) for loss, x in each]
        return [leaf.astype(dtype) for leaf in pull(cotangents)[0]]

    def transposed(c: list[jax.Array]) -> Leaves:
        return back([root * x for root, x in zip(roots, c, strict=True)])

    def multiply(p: Leaves) -> list[jax.Array]:
        narrow = [x.astype(part.dtype) for x, part in zip(p, parts, strict=True)]
        along = linearize(outputs, list(parts))[1](narrow)
        return [weigh(f, y) for f, y in zip(factors, along, strict=True)]

    pieces = [
        pieces_of(term, parts, f, limit, centered=options.centered)
        for term, f in zip(terms, factors, strict=True)
    ]
    residuals = [divide(g, r, r > 0) for g, r in zip(slopes, roots, strict=True)]
    gradient = back(slopes)
    return _System(
        list(parts),
        pieces,
        residuals,
        multiply,
        transposed,
        gradient,
        unit,
        largest > 0,
    )


def _in_parameters(system: _System, lam: jax.Array, last: Leaves | None) -> _Found:
    """Solve `(K'K + lambda I) p = J'l + lambda p_0`."""
    flat = [piece for pieces in system.pieces for piece in pieces]
    G = normal_matrix(flat, system.parts)
    return _solved(G, system.gradient, system.unit, system.curved, lam, last)


def _by_products(
    objective: Objective, parts: Leaves, lam: jax.Array, last: Leaves | None
) -> _Found:
    """Solve the same system for any loss: `J'LJ` is formed of products with all unit
    vectors."""
    labels = [0] * len(parts)
    (G,) = block_hessians(objective, parts, labels, 1, curvature="gauss_newton")
    largest = jnp.max(jnp.abs(G))
    unit = unit_power(largest)
    gradient = [leaf * unit for leaf in jax.grad(objective)(list(parts))]
    return _solved(G * unit, gradient, unit, largest > 0, lam, last)


def _solved(
    G: Matrix,
    gradient: Leaves,
    unit: jax.Array,
    curved: jax.Array,
    lam: jax.Array,
    last: Leaves | None,
) -> _Found:
    lam, rhs = lam * unit, ravel(gradient)
    if last is not None:
        rhs += lam * ravel(last)
    p = unravel(solve_semidefinite(G, rhs, lam), gradient)
    return _Found(p, gradient, unit, curved)


def _in_samples(
    system: _System, lam: jax.Array, last: Leaves | None, count: jax.Array | None
) -> _Found:
    """Return `p_0 + K' v` with `(K K' + lambda I) v = r - K p_0`; by conjugate gradients
    if the number of the update is given."""
    rhs = system.residuals
    if last is not None:
        rhs = [r - y for r, y in zip(rhs, system.multiply(last), strict=True)]
    flat = [piece for pieces in system.pieces for piece in pieces]
    b, lam = _in_order(rhs, system.pieces), lam * system.unit
    products: jax.Array | int = 0
    if count is None:
        v = solve_semidefinite(kernel(flat, system.parts), b, lam)
    else:
        v, products = _iterated(system, flat, b, lam, count)
    p = system.transposed(_of_terms(v, system.pieces))
    if last is not None:
        p = [x + y for x, y in zip(last, p, strict=True)]
    return _Found(p, system.gradient, system.unit, system.curved, products)


def _iterated(
    system: _System, flat: list[Piece], b: Vector, lam: jax.Array, count: jax.Array
) -> tuple[Vector, jax.Array]:
    """Solve `(K K' + lambda I) v = b` by preconditioned conjugate gradients."""

    def multiply(v: Vector) -> Vector:
        image = system.multiply(system.transposed(_of_terms(v, system.pieces)))
        return _in_order(image, system.pieces) + lam * v

    # Y = K (K' W), by rows
    key = jax.random.fold_in(jax.random.key(0), count)
    shape = len(b), min(SKETCH_SIZE, len(b))
    W = jnp.linalg.qr(jax.random.normal(key, shape, b.dtype))[0]
    image = rows_times(flat, system.parts, times_rows(flat, system.parts, W))
    found = conjugate_gradients(
        multiply,
        b,
        None,
        gram=inner_products,
        precondition=preconditioner(nystrom(W, image), lam),
        tolerance=CG_TOLERANCE * norm(b),
        max_iterations=MAX_PRODUCTS,
    )
    return found.x, found.products


def _in_order(outputs: list[jax.Array], pieces: list[list[Piece]]) -> Vector:
    """Return outputs of the terms, `(m, k)`, as a vector in the order of all rows."""
    each = zip(outputs, pieces, strict=True)
    return jnp.concatenate([x for y, own in each for x in in_pieces(y, own)])


def _of_terms(v: Vector, pieces: list[list[Piece]]) -> list[jax.Array]:
    """Return a vector in the order of all rows as outputs of the terms, `(m, k)`."""
    found, start = [], 0
    for of_term in pieces:
        vectors = []
        for piece in of_term:
            chunks, count, width = piece.factors.shape[:3]
            size = chunks * count * width
            vectors.append(v[start : start + size])
            start += size
        found.append(from_pieces(vectors, of_term))
    return found
