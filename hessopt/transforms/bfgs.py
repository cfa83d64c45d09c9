"""BFGS and other methods of the Broyden class, with and without self-scaling: H
approximates the inverse Hessian, p = H g.

The pairs `s = params - params_old`, `y = grad - grad_old` update H
(`numerics/broyden.py`). The update of H requires `H y = H grad - H grad_old`. The
second term is stored at the last step, so a step costs one product with H.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., 2006, chapter 6;
Al-Baali, 1998; Urban, Stefanou and Pons, arXiv 2405.04230; Powell, "Algorithms for
nonlinear constraints that use Lagrangian functions", 1978, for the damping.
"""

import functools
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_word, choose, injectable
from hessopt.kinds.protocol import Call, in_own_unit, transformation
from hessopt.numerics import broyden
from hessopt.numerics.broyden import FORMULAS, Formula
from hessopt.numerics.guards import divide, or_one, select, zero_unless
from hessopt.numerics.secant import accepts, first_scale
from hessopt.trees.boxes import Bounds, Box, box_of, check_bounds, count, face
from hessopt.trees.sharding import zeros
from hessopt.trees.vectors import (
    eps,
    inner,
    inner_products,
    ravel,
    ravel_mask,
    unravel,
)
from hessopt.typing import Matrix, Params, StepStatus, Vector, step_status

FOLD_PERIOD = 16
"""Number of updates for which terms are stored separately before they are folded into
the matrix."""
MAX_DIRECT_SIZE = 128
"""Number of parameters up to which every update is written to the matrix directly."""
MAX_BEND = 1e-3
"""Squared sine of the angle between s and the last direction up to which s is treated
as a multiple of the direction."""
MAX_EXACT_BEND = 100
"""The same limit for damping, in units of machine epsilon: s is then a multiple of the
direction up to rounding."""
FIRST_LENGTH = 10.0
"""Scale of the first H, in units of the inverse curvature along the first step. BFGS
quickly corrects an H that is too large, and slowly one that is too small. (A PINN, 2000
steps: an error of 1e-3 with this scale, and 5e-3 with `s.y / y.y`.)"""
DAMPED_SHARE = 0.2
"""Smallest ratio of s'y to s'B s after damping."""


class BfgsInfo(NamedTuple):
    """Diagnostics of the last update."""

    status: jax.Array  # int32 scalar, StepStatus
    pairs: jax.Array  # int32 scalar, updates of H since its last reset
    # int32 scalar, pairs with s != 0 since the start that were not used
    pairs_skipped: jax.Array
    resets: jax.Array  # int32 scalar, resets since the start
    # scalar, decrease of the objective that the quadratic model predicts, v'H v / 2 with
    # v the updates, in units of f
    predicted: jax.Array
    evaluations: jax.Array  # int32 scalar, of the objective; always 0
    # int32 scalar, entries held at bounds; None without bounds
    held: Any


class BfgsState(NamedTuple):
    """State of `scale_by_bfgs`; vectors have the n real entries of params, in the order
    of `jax.tree.leaves`."""

    count: jax.Array  # int32 scalar, updates at finite iterates
    # scalar, power of two by which gradients are multiplied; 0 before the first update
    factor: jax.Array
    # (3, n), last iterate: params x, scaled gradient g, and H g (0 if H was not used)
    last: jax.Array
    # scalar, s.y / y.y of the newest accepted pair; 0 before the first
    gamma: jax.Array
    # H for scaled gradients; if info.pairs is 0, the next pair restarts it
    inverse: broyden.InverseHessian
    box: Any  # Box, the bounds; None without bounds
    info: BfgsInfo


@injectable
def scale_by_bfgs(
    formula: str | Formula = "bfgs",
    *,
    on_bad_curvature: str = "skip",
    bounds: Bounds | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiply the gradient by a dense quasi-Newton approximation H of the inverse
    Hessian.

    Args:
      formula: the member of the Broyden class: `"bfgs"`, `"dfp"`, or `"ssbfgs"` and
        `"ssbroyden"`, which can also scale H at an update; or a callable `(b, h, n) -> (tau,
        phi)`, see `numerics/broyden.py`.
      on_bad_curvature: treatment of a pair (s, y) that fails the curvature test:
        `"skip"` does not use the pair; `"powell"` replaces y by a combination of y and
        B s for which `s.y = 0.2 s.Bs`, with B the inverse of H, if s.Bs is known and
        s.y is smaller.
      bounds: `(lower, upper)`, each a number, a tree like params or None; see
        `hessopt.typing.Bounds`. Entries that a short gradient step leads to a bound are
        held: their direction ends there, and the other entries have the direction of
        the problem in which these are constants. The chain needs a
        `scale_by_wolfe_linesearch` with the same bounds.

    Returns:
      A transformation of the gradient into `+H g`. `update(grads, state, params, *,
      grad)` forms the pairs from `grad` if it is given, else from `grads`. Its status
      is `state.info.status`.

      A pair is used if `s.y > 1e-8 |s.g_old|` and `s.y > 10 eps |s| (|g| + |g_old|)`;
      otherwise it is skipped and counted (PAIR_SKIPPED), unless it is damped. The first
      pair is applied to `H = 10 (s.s / s.y) I`. Without pairs the direction is t times
      the gradient, with t = 1/|g|, or t = s.y / y.y of an earlier pair if that is
      smaller. The next pair restarts H (MEMORY_RESET) if the parameters have not
      changed since the last update, which indicates a failed search, if u.Hu <= 0 for
      the updates u, or if H is no longer positive definite or finite. A value or a
      squared gradient that is not finite gives an update of zero (NONFINITE); the state
      is then unchanged except info.

      Self-scaling and damping require s.Bs, which is known if s is a multiple of the
      last direction `H g_old`. If clipping, masking or momentum changed the direction
      of the step, the formula receives b = 1, with which the self-scaled formulas
      update as BFGS does, and a pair is skipped instead of damped.

    Raises:
      ValueError: for an unknown formula or on_bad_curvature.
      TypeError: in `update`, for missing params.
      ValueError, TypeError: in `init`, for bounds that do not fit params, for complex
        params with bounds, and for params outside of the bounds, where they are known.

    Cost per update: one product with an n by n matrix, or two if `grads` is not `grad`;
    while bounds hold entries, a Cholesky factorization, `n^3/3` multiplications.
    Every 16 updates one pass writes the matrix, with `32 n^2` multiplications; under
    vmap this happens in every update, and up to 128 parameters every update writes it
    with `2 n^2`. No gradient. Memory: `n^2 + 35 n`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> curvature = jnp.array([1.0, 100.0])
      >>> value_fn = lambda x: 0.5 * jnp.sum(curvature * x**2)
      >>> tx = optax.chain(scale_by_bfgs(), optax.scale(-1.0))
      >>> x = jnp.array([1.0, 1.0])
      >>> state = tx.init(x)
      >>> for _ in range(15):
      ...     updates, state = tx.update(jax.grad(value_fn)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(value_fn(x) < 1e-6)
      True

    Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., 2006, chapter 6, and
    procedure 18.2 for the damping; Al-Baali, "Numerical experience with a class of
    self-scaling quasi-Newton algorithms", 1998; Urban, Stefanou and Pons, arXiv
    2405.04230, for `"ssbroyden"`.
    """
    check_word("on_bad_curvature", on_bad_curvature, ("skip", "powell"))
    options = _Options(
        formula=choose("formula", formula, FORMULAS),
        damps=on_bad_curvature == "powell",
        bounds=check_bounds(bounds),
    )
    init, step = functools.partial(_init, options), functools.partial(_step, options)
    return transformation("scale_by_bfgs", init, step)


_T = TypeVar("_T")


class _Options(NamedTuple):
    """The arguments of `scale_by_bfgs`, checked and resolved."""

    formula: Formula
    damps: bool
    bounds: Bounds | None


def _init(options: _Options, params: Params) -> BfgsState:
    vector = jax.eval_shape(ravel, params)
    room = 0 if vector.size <= MAX_DIRECT_SIZE else FOLD_PERIOD
    shape: Any = jax.ShapeDtypeStruct
    count, scalar = shape((), jnp.int32), shape((), vector.dtype)
    state = BfgsState(
        count=count,
        factor=scalar,
        last=shape((3, vector.size), vector.dtype),
        gamma=scalar,
        inverse=broyden.shapes(vector.size, room, vector.dtype),
        box=None,
        info=BfgsInfo(
            *(count, count, count, count, scalar, count),
            None if options.bounds is None else count,
        ),
    )
    box = box_of(options.bounds, params, caller="scale_by_bfgs")
    return zeros(state, params)._replace(box=box)


class _PerVector(NamedTuple, Generic[_T]):
    """One item for each vector of an update that enters inner products."""

    s: _T  # x - x_old
    y: _T  # g - g_old
    g: _T
    g_old: _T
    p_old: _T  # H g_old
    u: _T  # H y


class _Measured(NamedTuple):
    """The step since the last update and its products with the H of the state."""

    x: Vector
    v: Vector  # the updates, to which H is applied
    p: Vector  # H g
    vectors: _PerVector[Vector]
    dot: _PerVector[_PerVector[jax.Array]]  # dot.s.y is the scalar s'y
    vv: jax.Array  # scalar, v'v
    finite: jax.Array  # bool scalar, value and inner products without H are finite
    image_finite: jax.Array  # bool scalar, inner products with H are finite


class _Facts(NamedTuple):
    """Scalars that tell whether the pair and H can be used."""

    finite: jax.Array  # bool, whether the iterate is finite
    stuck: jax.Array  # bool, whether params are unchanged since the last update
    moved: jax.Array  # bool, whether there is a pair with s != 0
    accepted: jax.Array  # bool, whether the pair passes the curvature test
    spoilt: jax.Array  # bool, whether H is unusable because of rounding
    # bool, whether H has no pairs: the next is applied to a multiple of the identity
    fresh: jax.Array
    pairs: jax.Array  # int32, pairs in H; 0 if it is spoilt
    gamma: jax.Array  # s'y / y'y of the newest accepted pair


class _Pair(NamedTuple):
    """The quantities of a pair in the update of H, where y enters only through u = H y
    and inner products."""

    s: Vector
    u: Vector  # H y
    p: Vector  # H g
    sy: jax.Array  # scalar, s'y
    sg: jax.Array  # scalar, s'g
    yu: jax.Array  # scalar, y'H y
    gu: jax.Array  # scalar, g'H y
    sBs: jax.Array  # scalar, s'B s with B = H^-1; valid if s is along H g_old
    bend: jax.Array  # scalar, squared sine of the angle between s and H g_old
    usable: jax.Array  # bool scalar, whether it passes the test or is damped


class _Memory(NamedTuple):
    """H after the update by the pair."""

    inverse: broyden.InverseHessian
    p: Vector  # H g
    pairs: jax.Array  # int32 scalar
    taken: jax.Array  # bool scalar, whether the pair was used


class _Direction(NamedTuple):
    """The direction, H v or a multiple of v."""

    p: Vector
    plain: jax.Array  # bool scalar, whether it is a multiple of v
    lost: jax.Array  # bool scalar, whether v'H v is not positive
    slope: jax.Array  # scalar, v.p; 0 if the iterate is not finite


def _step(
    options: _Options, call: Call, state: BfgsState
) -> tuple[optax.Updates, BfgsState]:
    call, factor = in_own_unit(call, state.factor)

    # s, y, p = H g and u = H y, and whether they can be used
    found = _measure(call, state)
    facts = _judge(call, state, found)

    # H+ of the Broyden class (6.17 for BFGS), which requires s'y > 0
    scale, pair = _begin(found, facts)
    if options.damps:
        pair = _damp(facts, pair)
    memory = _absorb(options, state, facts, scale, pair)

    # H+ v, then H+ in the form that the next step uses
    direction = _direct(call, found, facts, memory)
    held = None
    if state.box is not None:
        direction, held = _on_face(call, state.box, found, facts, memory, direction)
    inverse = _settle(facts, memory, direction)

    # H g is not needed if the next pair restarts H
    p = jnp.where(direction.plain, 0.0, memory.p)
    last = jnp.stack([found.x, found.vectors.g, p])
    updates = unravel(zero_unless(facts.finite, direction.p), call.updates)
    return updates, BfgsState(
        count=state.count + facts.finite.astype(jnp.int32),
        factor=jnp.where(facts.finite & (found.dot.g.g > 0), factor, state.factor),
        last=select(facts.finite, last, state.last),
        gamma=facts.gamma,
        inverse=inverse,
        box=state.box,
        info=_report(state.info, facts, memory, direction, factor)._replace(held=held),
    )


def _measure(call: Call, state: BfgsState) -> _Measured:
    """Form the pair and its products with H. `H y = H g - H g_old` costs no product
    besides H g: the second term is stored."""
    dtype = state.gamma.dtype
    trees = call.params, call.gradient, call.updates
    x, g, v = (ravel(tree).astype(dtype) for tree in trees)
    x_old, g_old, p_old = state.last
    p = broyden.product(state.inverse, g)
    vectors = _PerVector(x - x_old, g - g_old, g, g_old, p_old, p - p_old)
    products = inner_products(*vectors)
    dot = _PerVector(*(_PerVector(*row) for row in products))
    vv = dot.g.g if call.is_gradient else inner(v, v)
    return _Measured(
        x=x,
        v=v,
        p=p,
        vectors=vectors,
        dot=dot,
        vv=vv,
        # products of two vectors are finite if their squares are; the first four vectors
        # are formed without H
        finite=call.finite
        & jnp.isfinite(vv + dot.s.s + dot.y.y + dot.g.g + dot.g_old.g_old),
        image_finite=jnp.isfinite(dot.p_old.p_old + dot.u.u),
    )


def _judge(call: Call, state: BfgsState, found: _Measured) -> _Facts:
    """Test the curvature of the pair, and whether H is still positive definite."""
    dot, finite = found.dot, found.finite
    ss, sy, yy = dot.s.s, dot.s.y, dot.y.y
    # a pair requires the iterate of an earlier update
    known = finite & (state.count > 0)
    passes = accepts(ss, sy, dot.s.g_old, dot.g.g, dot.g_old.g_old, eps(call.gradient))
    accepted = known & passes & (yy > 0)
    # y'H y > 0 in exact arithmetic
    sound = found.image_finite & (~accepted | (dot.y.u > 0))
    spoilt = finite & (state.info.pairs > 0) & ~sound
    pairs = jnp.where(spoilt, 0, state.info.pairs)
    return _Facts(
        finite=finite,
        stuck=known & (ss == 0),
        moved=known & (ss > 0),
        accepted=accepted,
        spoilt=spoilt,
        fresh=pairs == 0,
        pairs=pairs,
        gamma=jnp.where(accepted, sy / or_one(yy), state.gamma),
    )


def _begin(found: _Measured, facts: _Facts) -> tuple[jax.Array, _Pair]:
    """Return the scale of the first `H = scale I`, and the pair and its products, taken
    with this H if there are no pairs yet, else with the H of the state."""
    (s, y, g, _, _, u), dot = found.vectors, found.dot
    ss, pp_old, sp_old = dot.s.s, dot.p_old.p_old, dot.s.p_old
    # the first H is 10 (s's / s'y) I, larger than (s'y / y'y) I of equation (6.20); for
    # a damped first pair it has the scale of the step that was taken
    otherwise = first_scale(facts.gamma, dot.g_old.g_old)
    scale = divide(FIRST_LENGTH * ss, dot.s.y, facts.accepted, otherwise)
    # s = -alpha H g_old gives B s = -alpha g_old, hence s'B s, with alpha = -s'p_old /
    # p_old'p_old; the squared cosine is a product of two quotients, since |s|^2
    # |p_old|^2 may underflow
    to_s, to_p = (sp_old / jnp.where(xx > 0, xx, jnp.inf) for xx in (ss, pp_old))
    remembered = _Pair(
        s=s,
        u=u,
        p=found.p,
        sy=dot.s.y,
        sg=dot.s.g,
        yu=dot.y.u,
        gu=dot.g.u,
        sBs=sp_old * dot.s.g_old / or_one(pp_old),
        bend=1 - to_s * to_p,
        usable=facts.accepted,
    )
    begun = remembered._replace(
        u=scale * y,
        p=scale * g,
        yu=scale * dot.y.y,
        gu=scale * dot.y.g,
        sBs=ss / scale,
        bend=0.0,
    )
    return scale, select(facts.fresh, begun, remembered)


def _damp(facts: _Facts, pair: _Pair) -> _Pair:
    """Powell's damping (procedure 18.2), here only of pairs that fail the curvature
    test: if `s'y < 0.2 s'B s`, y is replaced by

        y_d = theta y + (1 - theta) B s,    theta = 0.8 s'B s / (s'B s - s'y),

    so that `s'y_d = 0.2 s'B s > 0`. Since `H B s = s`, the products of y_d with H are
    combinations of known ones.
    """
    # an inexact s'B s could make H indefinite
    exact = pair.bend <= MAX_EXACT_BEND * jnp.finfo(pair.s.dtype).eps
    exact &= pair.sBs > 0
    bad = facts.moved & ~pair.usable & (pair.sy < DAMPED_SHARE * pair.sBs)
    damped = exact & bad
    # theta = 1 leaves the pair unchanged
    theta = divide((1 - DAMPED_SHARE) * pair.sBs, pair.sBs - pair.sy, damped, 1.0)
    rest = 1 - theta
    return pair._replace(
        u=theta * pair.u + rest * pair.s,
        sy=theta * pair.sy + rest * pair.sBs,
        yu=theta**2 * pair.yu + 2 * theta * rest * pair.sy + rest**2 * pair.sBs,
        gu=theta * pair.gu + rest * pair.sg,
        usable=pair.usable | damped,
    )


def _absorb(
    options: _Options,
    state: BfgsState,
    facts: _Facts,
    scale: jax.Array,
    pair: _Pair,
) -> _Memory:
    """Update H by the pair, `H+ = H / tau + t_0 c c' + t_1 u u'` with `c = s - r u`
    (`numerics/broyden.py`), and update p = H g by the same terms."""
    # s'y and y'H y are divisors; only rounding can make y'H y <= 0
    usable = pair.usable & (pair.yu > 0)
    sy, yu = select(usable, (pair.sy, pair.yu), (1.0, 1.0))
    # b = s'B s / s'y determines the scaling; b = 1 if s'B s is not known, as in BFGS
    # without scaling
    straight = (pair.bend <= MAX_BEND) & (pair.sBs > 0)
    b, n = divide(pair.sBs, sy, usable & straight, 1.0), pair.s.size
    tau, phi = (jnp.asarray(x, b.dtype) for x in options.formula(b, yu / sy, n))
    r, terms = broyden.term(sy, yu, tau, phi)
    taken = usable & (tau > 0) & jnp.isfinite(tau) & jnp.all(jnp.isfinite(terms))

    c, u = pair.s - r * pair.u, pair.u
    H = broyden.restarted(state.inverse, facts.spoilt | (facts.fresh & taken), scale)
    slot = facts.pairs % max(broyden.room(H), 1)
    H = broyden.updated(H, slot, jnp.stack([c, u]), terms, tau, taken)
    cg, ug = pair.sg - r * pair.gu, pair.gu
    p = pair.p / tau + terms[0] * cg * c + terms[1] * ug * u
    return _Memory(H, select(taken, p, pair.p), facts.pairs + taken, taken)


def _direct(call: Call, found: _Measured, facts: _Facts, memory: _Memory) -> _Direction:
    """Return `H v`, or a multiple of v if H has no pairs, the last search failed, or
    `v'H v` is not positive."""
    # usually v is g, and H g is known
    v, vv, pairs = found.v, found.vv, memory.pairs
    p = memory.p if call.is_gradient else broyden.product(memory.inverse, v)
    slope = inner(v, p)
    descends = (slope > 0) & jnp.isfinite(slope)
    lost = facts.finite & (pairs > 0) & (vv > 0) & ~descends
    plain = facts.stuck | lost | (pairs == 0)
    scale = first_scale(facts.gamma, vv)
    p, slope = select(plain, (scale * v, scale * vv), (p, slope))
    return _Direction(p, plain, lost, jnp.where(facts.finite, slope, 0.0))


def _on_face(
    call: Call,
    box: Box,
    found: _Measured,
    facts: _Facts,
    memory: _Memory,
    direction: _Direction,
) -> tuple[_Direction, jax.Array]:
    """Return the direction in the free entries, with the others led to their bounds,
    and the number of these.

    Held entries are those that a gradient step of length gamma leads to a bound.
    """
    reach = first_scale(facts.gamma, found.vv)
    side = face(box, call.params, call.updates, reach)
    free, ahead = ~ravel_mask(side.held), ravel(side.ahead)
    v = jnp.where(free, found.v, 0.0)
    p = jax.lax.cond(
        jnp.any(~free),
        lambda: broyden.reduced_product(memory.inverse, v, free),
        lambda: direction.p,
    )
    descends = (inner(v, p) > 0) & ~direction.plain
    p = jnp.where(descends, p, first_scale(facts.gamma, inner(v, v)) * v)
    p = jnp.where(free, p, ahead.astype(p.dtype))
    slope = jnp.where(facts.finite, inner(found.v, p), 0.0)
    return direction._replace(p=p, slope=slope), count(side.held)


def _settle(
    facts: _Facts, memory: _Memory, direction: _Direction
) -> broyden.InverseHessian:
    """Return the H of the next state: reset if `v'H v` is not positive, and folded if
    the storage of terms is full."""
    # after a failed search H is kept until the next pair, for `inverse_hessian`
    H = broyden.restarted(memory.inverse, direction.lost, facts.gamma)
    room = broyden.room(H)
    if not room:
        return H
    # XLA would copy the matrix if the fold came before the last product with H
    full = memory.taken & ~direction.plain & (memory.pairs % room == 0)
    return jax.lax.cond(full, broyden.folded, lambda H: H, H)


def _report(
    old: BfgsInfo,
    facts: _Facts,
    memory: _Memory,
    direction: _Direction,
    factor: jax.Array,
) -> BfgsInfo:
    skipped = facts.moved & ~memory.taken
    reset = facts.spoilt | direction.lost | (facts.stuck & (old.pairs > 0))
    status = {
        StepStatus.NONFINITE: ~facts.finite,
        StepStatus.PAIR_SKIPPED: skipped,
        StepStatus.MEMORY_RESET: reset,
    }
    return BfgsInfo(
        status=step_status(status),
        pairs=jnp.where(direction.plain & facts.finite, 0, memory.pairs),
        pairs_skipped=old.pairs_skipped + skipped.astype(jnp.int32),
        resets=old.resets + reset.astype(jnp.int32),
        predicted=direction.slope / (2 * factor),
        evaluations=jnp.zeros((), jnp.int32),
        held=None,
    )


def inverse_hessian(state: optax.OptState) -> Matrix:
    """Return the approximation H of the inverse Hessian in a state of `bfgs`.

    Args:
      state: a state of `scale_by_bfgs`, or of any optimizer that contains it once.

    Returns:
      `(n, n)`, symmetric, in the order of the real entries of
      `jax.tree.leaves(params)`, with the real parts of a complex leaf before the
      imaginary parts, in units of params^2 / f with f the objective. H is positive definite up to rounding,
      and zero before the first pair. After a failed search H is kept until the next
      pair replaces it.

      At a minimum of a negative log posterior, H estimates the covariance (Laplace's
      approximation) in the directions of the steps of the run. On a quadratic it
      converges within a few times n steps and is inaccurate before; a self-scaled
      formula can scale it at an update. Use `gtol` to end the run: otherwise it ends in
      searches that fail because of rounding, after which a pair restarts H
      (`info.pairs` counts the pairs in it). `hessopt.hessian` computes the exact
      curvature.

    Raises:
      ValueError: if the state does not contain exactly one state of `scale_by_bfgs`.

    Cost: at most `32 n^2` multiplications.

    Example:
      >>> import jax.numpy as jnp, hessopt
      >>> value_fn = lambda x: 0.5 * (x[0] ** 2 + 4.0 * x[1] ** 2)
      >>> solution = hessopt.minimize(value_fn, jnp.array([3.0, 1.0]), hessopt.bfgs(), gtol=1e-5)
      >>> error = inverse_hessian(solution.state) - jnp.diag(jnp.array([1.0, 0.25]))
      >>> bool(jnp.max(jnp.abs(error)) < 0.05)
      True

    Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., 2006, section 6.1.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, BfgsState))
    found = [node for node in nodes if isinstance(node, BfgsState)]
    if len(found) != 1:
        raise ValueError(f"state must have one part of scale_by_bfgs, got {len(found)}")
    (part,) = found
    return part.factor * broyden.dense(part.inverse)
