"""BFGS and its relatives of the Broyden class, plain and self-scaled: H approximates
the inverse Hessian, p = H g.

H takes in the pairs `s = params - params_old`, `y = grad - grad_old`
(`numerics/broyden.py`). What an update needs of it is `H y = H grad - H grad_old`, and
the second term is the last direction: one product with H per step, no more.

Source: Nocedal and Wright, "Numerical Optimization", 2nd ed., chapter 6; Al-Baali,
1998; Urban, Stefanou and Pons, arXiv 2405.04230; Powell, "Algorithms for nonlinear
constraints that use Lagrangian functions", 1978, for the damping.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hessopt._checks import check_word, choose
from hessopt.numerics import broyden
from hessopt.numerics.broyden import FORMULAS, Formula
from hessopt.numerics.guards import divide, or_one
from hessopt.numerics.secant import accepts, first_scale
from hessopt.objective.binding import require_params
from hessopt.trees.sharding import zeros
from hessopt.trees.vectors import eps, gram, inner, ravel, unravel
from hessopt.typing import Matrix, Params, StepStatus, step_status

_NAME = "scale_by_bfgs"

ROOM = 16
"""Updates whose terms are kept aside."""
SMALL = 128
"""Parameters up to which none are."""
BENT = 1e-3
"""Squared sine of s to the last direction up to which s is taken as a multiple of it."""
LONG = 10.0
"""The first H, in units of the inverse curvature along the first step. BFGS soon
shortens an H that is too long, and is slow to lengthen one that is too short. (A PINN,
2000 steps: an error of 5e-3 from `s.y / y.y`, of 1e-3 from this.)"""
DAMPED = 0.2
"""The part of s'Bs that s'y keeps at least when damped."""


class BfgsInfo(NamedTuple):
    """What the last update found."""

    status: jax.Array  # int32 scalar, StepStatus
    pairs: jax.Array  # int32 scalar, pairs taken in since H was last reset
    # int32 scalar, pairs that failed the curvature test, since the start
    pairs_skipped: jax.Array
    resets: jax.Array  # int32 scalar, since the start
    evaluations: jax.Array  # int32 scalar, of the objective: 0


class BfgsState(NamedTuple):
    """State of `scale_by_bfgs`; vectors have the n real entries of params, in the order
    of `jax.tree.leaves`."""

    count: jax.Array  # int32 scalar, iterates taken in
    # (3, n), the last one: params x, gradient g, and H g (0 where H was not used)
    last: jax.Array
    # scalar, s.y / y.y of the newest pair, in units of params^2 / f; 0 before the first
    gamma: jax.Array
    # H, of no use where info.pairs is 0: the next pair begins it anew
    inverse: broyden.InverseHessian
    info: BfgsInfo


def scale_by_bfgs(
    formula: str | Formula = "bfgs", *, on_bad_curvature: str = "skip"
) -> optax.GradientTransformationExtraArgs:
    """Multiply the gradient by a dense quasi-Newton approximation H of the inverse
    Hessian.

    Args:
      formula: the member of the Broyden class: `"bfgs"`, `"dfp"`, or with a scaling of
        H at every update `"ssbfgs"`, `"ssbroyden"`; or a callable `(b, h, n) -> (tau,
        phi)`, see `numerics/broyden.py`.
      on_bad_curvature: what becomes of a pair that fails the curvature test: `"skip"`,
        or `"powell"`, which mixes y with B s until `s.y = 0.2 s.Bs`.

    Returns:
      A transformation, gradient in and `+H g` out. `update(grads, state, params, *,
      grad)` takes the pairs from `grad` if given, else from `grads`. Its status is
      `state.info.status`.

      A pair is taken in iff `s.y > 1e-8 |s.g_old|` and `s.y > 10 eps |s| (|g| +
      |g_old|)`, else skipped and counted (PAIR_SKIPPED), unless damped. The first one
      sets `H = 10 (s.s / s.y) I` beforehand. Before it the direction is along the
      gradient, of unit length, or after a reset by the scale of the last pair where
      that is shorter. Parameters that have not moved since the last update tell of a
      failed search, and reset H (MEMORY_RESET), as do a direction that would not
      descend and an H that is no longer positive definite or finite. A value, or a
      squared gradient, that is not finite gives an update of zero (NONFINITE). The
      state is then as before, but for info.

      Self-scaling and damping need s'Bs, known where s is a multiple of the last
      direction `H g_old`. Where clipping, masking or momentum has turned it, the update
      is that of plain BFGS; a pair is then skipped rather than damped.

    Raises:
      ValueError: for a formula or an on_bad_curvature that is none of these.
      TypeError: in `update`, for missing params.

    Cost per update: one product with an n by n matrix, two where `grads` is not `grad`,
    and every 16 updates a writing of it, `32 n^2` multiplications (under vmap in every
    update; up to 128 parameters always, in `2 n^2`). No gradient. Memory: `n^2 + 35 n`.

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

    Source: see the head of this file.
    """
    factors = choose("formula", formula, FORMULAS)
    check_word("on_bad_curvature", on_bad_curvature, ("skip", "powell"))

    def init(params: Params) -> BfgsState:
        vector = jax.eval_shape(ravel, params)
        room = 0 if vector.size <= SMALL else ROOM
        count: Any = jax.ShapeDtypeStruct((), jnp.int32)
        scalar: Any = jax.ShapeDtypeStruct((), vector.dtype)
        inverse = broyden.shapes(vector.size, room, vector.dtype)
        last: Any = jax.ShapeDtypeStruct((3, vector.size), vector.dtype)
        return zeros(
            BfgsState(
                count,
                last,
                scalar,
                inverse,
                BfgsInfo(count, count, count, count, count),
            ),
            params,
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        *,
        value: Any = None,
        grad: optax.Updates | None = None,
        **data: Any,
    ) -> tuple[optax.Updates, BfgsState]:
        require_params(params, caller=_NAME)
        grad = updates if grad is None else grad
        same = all(
            a is b for a, b in zip(*map(jax.tree.leaves, (updates, grad)), strict=True)
        )
        x, g, v = (
            ravel(tree).astype(state.gamma.dtype) for tree in (params, grad, updates)
        )
        (x_old, g_old, p_old), H, info = state.last, state.inverse, state.info

        # the next pair, s and y, and H y
        s, y, p = x - x_old, g - g_old, broyden.product(H, g)
        u = p - p_old
        inners = gram(s, y, g, g_old, p_old, u)
        ss, sy, sg, sg_old, sp_old, _ = inners[0]
        yy, yg, yu = inners[1, [1, 2, 5]]
        gg, gu, gg_old, pp_old = inners[2, 2], inners[2, 5], inners[3, 3], inners[4, 4]
        vv = gg if same else inner(v, v)
        finite = (
            (value is None or jnp.isfinite(value))
            & jnp.isfinite(vv)
            & jnp.all(jnp.isfinite(inners[:4, :4]))
        )
        known = finite & (state.count > 0)
        stuck = known & (ss == 0)
        good = known & accepts(ss, sy, sg_old, gg, gg_old, eps(grad)) & (yy > 0)
        gamma = jnp.where(good, sy / or_one(yy), state.gamma)

        # without pairs, or where rounding has spoilt it, H begins as a multiple of the
        # identity
        sound = jnp.all(jnp.isfinite(inners[:, 4:])) & (~good | (yu > 0))
        spoilt = finite & (info.pairs > 0) & ~sound
        pairs = jnp.where(spoilt, 0, info.pairs)
        fresh = pairs == 0
        first = divide(LONG * ss, sy, good, first_scale(gamma, gg_old))
        u, p = (jnp.where(fresh, first * a, b) for a, b in ((y, u), (g, p)))
        yu, gu = (jnp.where(fresh, first * a, b) for a, b in ((yy, yu), (yg, gu)))

        # s'Bs, by B s = -alpha g_old where s = -alpha H g_old
        sBs = jnp.where(fresh, ss / first, sp_old * sg_old / or_one(pp_old))
        # the product may underflow
        per_ss, per_pp = (sp_old / jnp.where(x > 0, x, jnp.inf) for x in (ss, pp_old))
        turned = jnp.where(fresh, 0.0, 1 - per_ss * per_pp)
        straight = (turned <= BENT) & (sBs > 0)

        # Powell's damping: a mixture of y and B s in place of y
        exact = straight & (turned <= 100 * jnp.finfo(g.dtype).eps)
        damped = (
            known
            & (ss > 0)
            & ~good
            & exact
            & (sy < DAMPED * sBs)
            & (on_bad_curvature == "powell")
        )
        theta = divide((1 - DAMPED) * sBs, sBs - sy, damped, 1.0)
        yu = theta**2 * yu + 2 * theta * (1 - theta) * sy + (1 - theta) ** 2 * sBs
        u, gu, sy = (
            theta * a + (1 - theta) * b for a, b in ((u, s), (gu, sg), (sy, sBs))
        )

        # the update
        good = (good | damped) & (yu > 0)
        sy, yu = (jnp.where(good, a, 1.0) for a in (sy, yu))
        tau, phi = (
            jnp.asarray(a, g.dtype)
            for a in factors(jnp.where(good & straight, sBs / sy, 1.0), yu / sy, x.size)
        )
        r, terms = broyden.term(sy, yu, tau, phi)
        good &= (tau > 0) & jnp.isfinite(tau) & jnp.all(jnp.isfinite(terms))
        c, room = s - r * u, len(H.terms) // 2
        H = broyden.restarted(H, spoilt | (fresh & good), first)
        H = broyden.updated(
            H, pairs % max(room, 1), jnp.stack([c, u]), terms, tau, good
        )
        p = jnp.where(
            good, p / tau + terms[0] * (sg - r * gu) * c + terms[1] * gu * u, p
        )
        pairs += good

        # the direction
        direction = p if same else broyden.product(H, v)
        slope = inner(v, direction)
        lost = finite & (pairs > 0) & (vv > 0) & ~((slope > 0) & jnp.isfinite(slope))
        plain = stuck | lost | (pairs == 0)
        direction = jnp.where(plain, first_scale(gamma, vv) * v, direction)
        # after a failed search H stays as it is, to be read, until the next pair
        H = broyden.restarted(H, lost, gamma)
        if room:
            H = jax.lax.cond(
                good & ~plain & (pairs % room == 0), broyden.folded, lambda H: H, H
            )

        reset = spoilt | lost | (stuck & (info.pairs > 0))
        skipped = known & (ss > 0) & ~good
        status = {
            StepStatus.NONFINITE: ~finite,
            StepStatus.PAIR_SKIPPED: skipped,
            StepStatus.MEMORY_RESET: reset,
        }
        return unravel(jnp.where(finite, direction, 0.0), updates), BfgsState(
            count=state.count + finite.astype(jnp.int32),
            last=jnp.where(
                finite, jnp.stack([x, g, jnp.where(plain, 0.0, p)]), state.last
            ),
            gamma=gamma,
            inverse=H,
            info=BfgsInfo(
                status=step_status(status),
                pairs=jnp.where(plain & finite, 0, pairs),
                pairs_skipped=info.pairs_skipped + skipped.astype(jnp.int32),
                resets=info.resets + reset.astype(jnp.int32),
                evaluations=jnp.zeros((), jnp.int32),
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def inverse_hessian(state: optax.OptState) -> Matrix:
    """Return the approximation H of the inverse Hessian that a state of `bfgs` holds.

    Args:
      state: of `scale_by_bfgs`, or of any optimizer that contains it once.

    Returns:
      `(n, n)`, symmetric, in the order of the real entries of
      `jax.tree.leaves(params)`, real parts of a complex leaf before imaginary ones, in
      units of params^2 / f. Positive definite, but for rounding; zero before the first
      pair. After a failed search it is the one from before, until the next pair
      replaces it.

      At a minimum of a negative log posterior H estimates its covariance (Laplace's
      approximation) along what the run has moved through: exact for a quadratic after n
      steps, crude where few steps were taken, and scaled by its formula where that is a
      self-scaled one. End the run by `gtol`: once searches fail in the noise of
      rounding, the next pair begins H anew (`info.pairs` counts those in it).
      `hessopt.hessian` gives the exact curvature.

    Raises:
      ValueError: when the state has not exactly one part of `scale_by_bfgs`.

    Cost: at most `32 n^2` multiplications.

    Example:
      >>> import jax.numpy as jnp, hessopt
      >>> value_fn = lambda x: 0.5 * (x[0] ** 2 + 4.0 * x[1] ** 2)
      >>> solution = hessopt.minimize(value_fn, jnp.array([3.0, 1.0]), hessopt.bfgs(), gtol=1e-5)
      >>> error = inverse_hessian(solution.state) - jnp.diag(jnp.array([1.0, 0.25]))
      >>> bool(jnp.max(jnp.abs(error)) < 0.05)
      True

    Source: see the head of this file.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, BfgsState))
    found = [node for node in nodes if isinstance(node, BfgsState)]
    if len(found) != 1:
        raise ValueError(f"state must have one part of scale_by_bfgs, got {len(found)}")
    (part,) = found
    return broyden.dense(part.inverse)
