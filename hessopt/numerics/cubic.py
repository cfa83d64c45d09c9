"""The global minimizer of a cubic model, `g.eta + eta.H eta / 2 + (damping / 6) |D
eta|^3` with D = diag(scale) >= 0.

It satisfies `(H + kappa D^2) eta = -g` with `kappa = (damping / 2) |D eta|` for the
only kappa at which the matrix is positive semidefinite. D^-1 H D^-1 is never formed,
because the range of its entries exceeds that of float32. Instead

1. H is equilibrated by powers of two, and all quantities are scaled to size 1;
2. the power of two above kappa is found by bisection of its exponent, one Cholesky
   factorization per iteration;
3. with `M = H + W^2 = L L'` at this power, `W = sqrt(kappa) D`, one scalar equation
   remains in the eigenvectors of `L^-1 W^2 L^-T`, the secular equation. Its unknown is
   the distance from the point where the matrix is singular, so that there is no
   cancellation near that point;
4. in the hard case (g orthogonal to the lowest eigenvector) g is changed along that
   vector by less than rounding: the solution of the secular equation then has the
   component along it that the step needs.

Source: Nesterov and Polyak, "Cubic regularization of Newton method and its global
performance", 2006, section 5; More and Sorensen, "Computing a trust region step", 1983,
for the hard case.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax.linalg import triangular_solve
from jax.scipy.linalg import solve_triangular

from hessopt._checks import check_range
from hessopt.numerics.equilibration import equilibration, power, unit_power
from hessopt.numerics.guards import divide, matmul, or_one, select
from hessopt.numerics.secular import decreasing_root, without_hard_case
from hessopt.typing import Matrix, StepStatus, Vector, step_status


class CubicSolution(NamedTuple):
    """The minimizer of a cubic model."""

    eta: Vector  # (S,); zeros unless the model has a minimizer
    radius: jax.Array  # scalar, |scale * eta|
    # int32 scalar, StepStatus: NEGATIVE_CURVATURE, UNBOUNDED_MODEL, NONFINITE
    status: jax.Array


def solve_cubic(
    gradient: Vector, hessian: Matrix, scale: Vector, damping: jax.typing.ArrayLike
) -> CubicSolution:
    """Minimize `gradient.eta + eta.hessian.eta / 2 + (damping / 6) |scale * eta|^3`
    over eta.

    Args:
      gradient: `(S,)`, the gradient of the model at 0.
      hessian: `(S, S)`; its symmetric part is used. It may be indefinite.
      scale: `(S,)`; signs do not matter. Entries may be zero, and differ by many orders
        of magnitude.
      damping: scalar >= 0. With 0, or a scale of zeros, eta is Newton's step.

    Returns:
      A `CubicSolution` with a global minimizer; in the hard case there are several, and
      one of them is returned. Its `status`:

      NEGATIVE_CURVATURE: hessian is not positive definite. UNBOUNDED_MODEL, with zeros
      for eta: hessian is not positive definite on entries on which the cubic term does
      not act, or eta exceeds the range of the dtype. NONFINITE, with zeros for eta: an
      input is not finite.

      The function can be differentiated in forward mode only.

    Raises:
      ValueError: for damping < 0 (traced: NONFINITE), or shapes that do not fit.

    Cost: about 14 Cholesky factorizations and one eigendecomposition, `14 S^3`; no
    evaluation of the objective.

    Example:
      >>> import jax.numpy as jnp
      >>> gradient, hessian = jnp.array([0.0, 1.0]), jnp.diag(jnp.array([-1.0, 2.0]))
      >>> solution = solve_cubic(gradient, hessian, jnp.ones(2), 1.0)
      >>> [round(abs(float(rate)), 3) for rate in solution.eta]
      [1.972, 0.333]

    Source: Nesterov and Polyak, "Cubic regularization of Newton method and its global
    performance", 2006; More and Sorensen, "Computing a trust region step", 1983.
    """
    dtype = jnp.result_type(jnp.float32, gradient, hessian, scale)
    g, H, d = (jnp.asarray(a, dtype) for a in (gradient, hessian, scale))
    size = g.size
    if (
        g.shape != (size,)
        or H.shape != (size, size)
        or d.shape != (size,)
        or jnp.ndim(damping)
    ):
        raise ValueError(
            "gradient, hessian, scale and damping must be (S,), (S, S), (S,) and (), "
            f"got {g.shape}, {H.shape}, {d.shape} and {jnp.shape(damping)}"
        )
    check_range("damping", damping, 0)
    if not size:
        return CubicSolution(g, jnp.zeros((), dtype), jnp.zeros((), jnp.int32))
    return _solve(g, H, d, jnp.asarray(damping, dtype))


class _Model(NamedTuple):
    """`g.eta + eta.H eta / 2 + (lam / 6) |d eta|^3`."""

    g: Vector
    H: Matrix
    d: Vector  # not negative
    lam: jax.Array  # scalar


class _Scaled(NamedTuple):
    """The equations of the minimizer in units in which all quantities have size 1.

    `(A + kappa d^2) y = -g` with `kappa = 2^weight |d y|` and `eta = gamma t y`.
    """

    A: Matrix
    d: Vector
    g: Vector
    weight: jax.Array  # scalar
    is_cubic: jax.Array  # bool scalar, whether there is a cubic term; else kappa = 0
    t: Vector
    gamma: jax.Array  # scalar


@jax.jit
def _solve(g: Vector, H: Matrix, d: Vector, lam: jax.Array) -> CubicSolution:
    # a model that is not finite is replaced by one with eta = 0
    lam = jnp.where(lam >= 0, lam, jnp.nan)
    finite = jnp.isfinite(lam)
    for a in (g, H, d):
        finite &= jnp.all(jnp.isfinite(a))
    given = _Model(g, (H + H.T) / 2, jnp.abs(d), lam)
    plain = jax.tree.map(jnp.zeros_like, given)
    plain = plain._replace(H=jnp.eye(g.size, dtype=g.dtype))
    model = select(finite, given, plain)

    # 1. scale all quantities to size 1
    scaled = _scale(model)

    # 2. kappa is between 2^(k - 2) and 2^(k - 1), and the matrix is definite from the
    # latter on; without a cubic term A itself must be definite
    definite = jnp.all(jnp.isfinite(jnp.linalg.cholesky(scaled.A)))
    k, found = _exponent(scaled)
    bounded = jnp.where(scaled.is_cubic, found, definite)

    # 3. (A + kappa d^2) y = -g, and eta = gamma t y
    eta = _minimiser(scaled, k)

    ok = finite & bounded & jnp.all(jnp.isfinite(eta))
    eta = jnp.where(ok, eta, 0.0)
    facts = {
        StepStatus.NONFINITE: ~finite,
        StepStatus.NEGATIVE_CURVATURE: finite & ~definite,
        StepStatus.UNBOUNDED_MODEL: finite & ~ok,
    }
    largest = jnp.max(jnp.abs(model.d * eta))
    radius = largest * jnp.linalg.norm(model.d * eta / or_one(largest))
    return CubicSolution(eta, radius, step_status(facts))


def _scale(model: _Model) -> _Scaled:
    """Equilibrate H, and scale d and g to size 1."""
    g, H, d, lam = model
    dtype = g.dtype

    # A = t H t; an entry of eta that is in no term gets a curvature of 1, and is 0
    curved = jnp.any(H != 0, axis=1)
    idle = (d == 0) & (g == 0) & ~curved
    t = jnp.where(curved, equilibration(H), unit_power(d))
    A, d, g = H * t * t[:, None] + jnp.diag(idle.astype(dtype)), t * d, t * g

    # kappa = (lam / 2) |d eta| by its logarithm, since kappa itself may exceed the
    # range of the dtype
    delta = or_one(jnp.max(d, initial=0.0))
    weight = jnp.log2(lam / 2) + 3 * jnp.log2(delta)
    is_cubic = jnp.isfinite(weight) & jnp.any(model.d > 0)

    # if g is zero or nearly zero, use the size of eta that follows from the curvature
    # alone, limited so that g is not lost in rounding
    most = jnp.max(jnp.abs(g), initial=0.0)
    least = power(jnp.where(is_cubic, 2 * _log_eps(dtype) - weight, 0.0))
    gamma = jnp.where(most > 0, jnp.clip(least, most, most * 2.0**40), least)
    weight = weight + jnp.log2(gamma)
    return _Scaled(A, d / delta, g / gamma, weight, is_cubic, t, gamma)


def _minimiser(scaled: _Scaled, k: jax.Array) -> Vector:
    """Compute eta from the secular equation, in units of the shift `2^k`."""
    A, d, g, weight, is_cubic, t, gamma = scaled

    # A + sigma W^2 = j^-1 L (1 - (1 - sigma) B B') L' j^-1  with  kappa = 2^k sigma and
    # B = L^-1 j W, where jax.scipy would take 200 times as long on CPUs
    L, w, j = _factor(A, d, jnp.where(is_cubic, k, -jnp.inf))
    B = triangular_solve(L, jnp.diag(w), left_side=True, lower=True)
    theta, Q = jnp.linalg.eigh(matmul(B, B.T))
    z = matmul(Q.T, solve_triangular(L, j * g, lower=True))

    # |W y| = 2^level sigma; a step along negative curvature does not shrink with g, and
    # is scaled to size 1 as well
    level = jnp.where(is_cubic, 1.5 * k - weight, 0.0)
    unit = power(jnp.where((theta[-1] > 1) & (level > 0), level, 0.0))
    x = _secular(jnp.maximum(theta, 0.0), z / unit, level - jnp.log2(unit))
    y = solve_triangular(L.T, matmul(Q, jnp.where(is_cubic, x, z)), lower=False)
    return -(gamma * unit) * t * j * y


def _factor(A: Matrix, d: Vector, k: jax.Array) -> tuple[Matrix, Vector, Vector]:
    """Return `L L' = j (A + W^2) j` for `W = 2^(k/2) d`, where j scales its diagonal to
    size 1; and `j W`, j."""
    w = power(k / 2) * d
    j = 1 / jnp.maximum(w, 1.0)
    return jnp.linalg.cholesky(A * j * j[:, None] + jnp.diag((j * w) ** 2)), j * w, j


def _exponent(scaled: _Scaled) -> tuple[jax.Array, jax.Array]:
    """Return the exponent, plus one, of the smallest power of two that is at least
    kappa, and whether there is one."""
    A, d, g, weight, *_ = scaled
    eps, used = _log_eps(d.dtype), d > 0
    least = jnp.log2(jnp.min(d, where=used, initial=1.0))
    ratio = _log_norm(divide(g, d, used))

    # above the top kappa d^2 dominates A in every row; below the bottom it is lost in
    # rounding
    bottom = int(2 * eps) - 4
    prevailing = jnp.maximum(-2 * least, (weight + 1 + ratio) / 2)
    top = prevailing - eps + math.log2(2 * max(d.size, 1)) + 1
    limit = 2 * jnp.finfo(d.dtype).maxexp - 8
    top = jnp.clip(top, bottom + 2, limit).astype(jnp.int32)

    def reached(k: jax.Array) -> jax.Array:
        # 2^weight |d y| <= 2^k with W = 2^(k/2) d; false if L is NaN
        L, w, j = _factor(A, d, k.astype(d.dtype))
        rho = _log_norm(w * jax.scipy.linalg.cho_solve((L, True), j * g))
        return rho + weight <= 1.5 * k

    def halve(ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) // 2
        return select(reached(middle), (low, middle), (middle, high))

    start = jnp.full_like(top, bottom), top
    _, high = jax.lax.while_loop(lambda ends: ends[1] - ends[0] > 1, halve, start)
    return (high + 1).astype(d.dtype), reached(top)


def _secular(theta: Vector, z: Vector, level: jax.Array) -> Vector:
    """Return `z / (1 - (1 - sigma) theta)` for the sigma at which `|sqrt(theta) x| =
    2^level sigma`, where x is this quotient and theta is ascending.

    The unknown is u = log t with `t = 1 - (1 - sigma) max(theta)`, in which all terms
    are positive. The equation is solved by Newton's method, restricted to a bracket.
    """
    largest = or_one(theta[-1])
    # the last quotient must be 1, however XLA rounds the division
    q = (theta / largest).at[-1].set(1.0)
    # if an eigenvalue exceeds 1, the matrix is singular at a sigma > 0
    z = without_hard_case(z, -1, largest > 1)

    def excess(u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the logarithm of the left side over the right one, and its
        derivative."""
        t = jnp.exp(u)
        below = (1 - q) + t * q
        terms, sigma = jnp.sqrt(theta) * z / below, 1 - (1 - t) / largest
        squares = (terms / or_one(jnp.max(jnp.abs(terms)))) ** 2
        positive = sigma > 0
        safe = jnp.where(positive, sigma, 1.0)
        value = (_log_norm(terms) - level) * math.log(2) - jnp.log(safe)
        of_left = -t * jnp.sum(squares * q / below) / or_one(jnp.sum(squares))
        slope = of_left - t / (largest * safe)
        return jnp.where(positive, value, jnp.inf), slope

    zero = jnp.zeros((), z.dtype)
    lowest = zero + math.log(float(jnp.finfo(z.dtype).tiny))
    t = jnp.exp(decreasing_root(excess, lowest, zero))
    return z / ((1 - q) + t * q)


def _log_norm(v: Vector) -> jax.Array:
    """Return the logarithm to base 2 of the length of v, also if its square is out of
    range; -inf for zero."""
    largest = jnp.max(jnp.abs(v))
    return jnp.log2(largest) + jnp.log2(or_one(jnp.linalg.norm(v / or_one(largest))))


def _log_eps(dtype: jax.typing.DTypeLike) -> float:
    return math.log2(float(jnp.finfo(dtype).eps))
