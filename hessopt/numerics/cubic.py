"""The global minimiser of a cubic model, `g.eta + eta.H eta / 2 + (damping / 6) |D
eta|^3` with D = diag(scale) >= 0.

It satisfies `(H + kappa D^2) eta = -g` with `kappa = (damping / 2) |D eta|` for the
only kappa at which the matrix is positive semidefinite. D^-1 H D^-1 is never formed:
its entries differ by more than float32 can hold. Instead

1. H is equilibrated by powers of two, and everything is brought to size 1; 2. the power
of two above kappa is found by bisection of its exponent, one Cholesky factorisation a
turn; 3. there, `M = L L'`, and in the eigenvectors of `W M^-1 W`, W = sqrt(kappa) D,
one scalar equation is left (the secular
   one). Its unknown is the distance from where the matrix is singular, so that nothing
   cancels next to it;
4. in the hard case (g orthogonal to the lowest eigenvector) g is changed along that
vector by less than rounding: the
   secular equation then completes the step by itself.

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
from hessopt.numerics.guards import divide, matmul, or_one
from hessopt.numerics.secular import decreasing_root
from hessopt.typing import Matrix, StepStatus, Vector, step_status


class CubicSolution(NamedTuple):
    """The minimiser of a cubic model."""

    eta: Vector  # (S,); zeros unless the model has a minimiser
    radius: jax.Array  # scalar, |scale * eta|
    # int32 scalar, StepStatus: NEGATIVE_CURVATURE, UNBOUNDED_MODEL, NONFINITE
    status: jax.Array


def solve_cubic(
    gradient: Vector, hessian: Matrix, scale: Vector, damping: jax.typing.ArrayLike
) -> CubicSolution:
    """Minimise `gradient.eta + eta.hessian.eta / 2 + (damping / 6) |scale * eta|^3`
    over eta.

    Args:
      gradient: `(S,)`, signed.
      hessian: `(S, S)`; its symmetric part is taken. It may be indefinite.
      scale: `(S,)`, of which magnitudes count; entries may be zero, and differ by many
        orders of magnitude.
      damping: scalar, not negative. With 0, or without scale, it is Newton's step.

    Returns:
      A global minimiser; one of two or more in the hard case. `status` has
      NEGATIVE_CURVATURE where hessian is not positive definite, UNBOUNDED_MODEL, and
      zero for eta, where it is not so on entries on which the cubic term does not act,
      or where eta is out of the range of the dtype, NONFINITE for an input that is not
      finite. Derivatives are to be had in forward mode only.

    Raises:
      ValueError: for damping < 0 (traced: NONFINITE), or shapes that do not fit.

    Cost: about 14 Cholesky factorisations and one eigendecomposition, `14 S^3`; no
    evaluation of the objective.

    Example:
      >>> import jax.numpy as jnp
      >>> solution = solve_cubic(jnp.array([0.0, 1.0]), jnp.diag(jnp.array([-1.0, 2.0])), jnp.ones(2), 1.0)
      >>> [round(abs(float(rate)), 3) for rate in solution.eta]
      [1.972, 0.333]

    Source: see the head of this file.
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


@jax.jit
def _solve(g: Vector, H: Matrix, d: Vector, lam: jax.Array) -> CubicSolution:
    size, dtype = g.size, g.dtype
    lam = jnp.where(lam >= 0, lam, jnp.nan)
    finite = (
        jnp.all(jnp.isfinite(g))
        & jnp.all(jnp.isfinite(H))
        & jnp.all(jnp.isfinite(d))
        & jnp.isfinite(lam)
    )
    g, H, d, lam = (
        jnp.where(finite, a, b)
        for a, b in (
            (g, 0.0),
            ((H + H.T) / 2, jnp.eye(size, dtype=dtype)),
            (d, 0.0),
            (lam, 0.0),
        )
    )

    # 1. eta = gamma t y, with kappa = 2^weight |d y|
    d = jnp.abs(d)
    idle = (d == 0) & (g == 0) & ~jnp.any(H != 0, axis=1)  # in no term: eta is 0
    t = jnp.where(jnp.any(H != 0, axis=1), equilibration(H), unit_power(d))
    A, d_t, g_t = H * t * t[:, None] + jnp.diag(idle.astype(dtype)), t * d, t * g
    delta = or_one(jnp.max(d_t, initial=0.0))
    weight = jnp.log2(lam / 2) + 3 * jnp.log2(delta)
    cubic = jnp.isfinite(weight) & jnp.any(d > 0)
    most, least = (
        jnp.max(jnp.abs(g_t), initial=0.0),
        power(jnp.where(cubic, 2 * _log_eps(dtype) - weight, 0.0)),
    )
    # what curvature alone would make of it, where g is zero or next to it, but not so
    # large that g is lost
    gamma = jnp.where(most > 0, jnp.clip(least, most, most * 2.0**40), least)
    d_t, g_t, weight = d_t / delta, g_t / gamma, weight + jnp.log2(gamma)

    # 2. kappa is at least 2^(k - 2), and the matrix definite from 2^(k - 1) on
    definite = jnp.all(jnp.isfinite(jnp.linalg.cholesky(A)))
    k, found = _exponent(A, d_t, g_t, weight)
    bounded = jnp.where(cubic, found, definite)

    # 3. all in units of 2^k
    L, w, j = _factor(A, d_t, jnp.where(cubic, k, -jnp.inf))
    # jax.scipy takes 200 times as long, on CPUs
    B = triangular_solve(L, jnp.diag(w), left_side=True, lower=True)
    theta, Q = jnp.linalg.eigh(matmul(B, B.T))
    z = matmul(Q.T, solve_triangular(L, j * g_t, lower=True))
    level = jnp.where(cubic, 1.5 * k - weight, 0.0)
    # a step along negative curvature does not shrink with g: brought to size 1 as well
    unit = power(jnp.where((theta[-1] > 1) & (level > 0), level, 0.0))
    x = _secular(jnp.maximum(theta, 0.0), z / unit, level - jnp.log2(unit))
    eta = (
        -(gamma * unit)
        * t
        * j
        * solve_triangular(L.T, matmul(Q, jnp.where(cubic, x, z)), lower=False)
    )

    ok = finite & bounded & jnp.all(jnp.isfinite(eta))
    eta = jnp.where(ok, eta, 0.0)
    facts = {
        StepStatus.NONFINITE: ~finite,
        StepStatus.NEGATIVE_CURVATURE: finite & ~definite,
        StepStatus.UNBOUNDED_MODEL: finite & ~ok,
    }
    length = jnp.max(jnp.abs(d * eta))
    return CubicSolution(
        eta, length * jnp.linalg.norm(d * eta / or_one(length)), step_status(facts)
    )


def _factor(A: Matrix, d: Vector, k: jax.Array) -> tuple[Matrix, Vector, Vector]:
    """`L L' = j (A + W^2) j` for `W = 2^(k/2) d`, with j that brings its diagonal to
    size 1; and `j W`, j."""
    w = power(k / 2) * d
    j = 1 / jnp.maximum(w, 1.0)
    return jnp.linalg.cholesky(A * j * j[:, None] + jnp.diag((j * w) ** 2)), j * w, j


def _exponent(
    A: Matrix, d: Vector, g: Vector, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One more than the exponent of the lowest power of two that is no less than kappa,
    and whether there is one."""
    eps, used = _log_eps(d.dtype), d > 0
    least = jnp.log2(jnp.min(d, where=used, initial=1.0))
    ratio = _log_norm(divide(g, d, used))
    # above the top the term in kappa^2 prevails in every row; below the bottom it is
    # lost in rounding
    bottom = int(2 * eps) - 4
    top = (
        jnp.maximum(-2 * least, (weight + 1 + ratio) / 2)
        - eps
        + math.log2(2 * max(d.size, 1))
        + 1
    )
    limit = 2 * jnp.finfo(d.dtype).maxexp - 8
    top = jnp.clip(top, bottom + 2, limit).astype(jnp.int32)

    def reached(k: jax.Array) -> jax.Array:
        L, w, j = _factor(A, d, k.astype(d.dtype))
        rho = _log_norm(w * jax.scipy.linalg.cho_solve((L, True), j * g))
        return rho + weight <= 1.5 * k  # not so for NaN

    def halve(ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        middle = (ends[0] + ends[1]) // 2
        good = reached(middle)
        return jnp.where(good, ends[0], middle), jnp.where(good, middle, ends[1])

    _, high = jax.lax.while_loop(
        lambda ends: ends[1] - ends[0] > 1, halve, (jnp.full_like(top, bottom), top)
    )
    return (high + 1).astype(d.dtype), reached(top)


def _secular(theta: Vector, z: Vector, level: jax.Array) -> Vector:
    """`z / (1 - (1 - sigma) theta)` for the sigma at which `|sqrt(theta) that| =
    2^level sigma`, theta ascending.

    The unknown is u = log t with `t = 1 - (1 - sigma) max(theta)`, in which all terms
    are positive. Newton's method, kept within a bracket.
    """
    largest, info = or_one(theta[-1]), jnp.finfo(z.dtype)
    # exactly 1, however XLA divides
    q, tiny = (theta / largest).at[-1].set(1.0), float(info.tiny) ** 0.5
    # singular at a sigma > 0, and nothing there to stop at
    hard = (largest > 1) & (jnp.abs(z[-1]) < tiny)
    z = z.at[-1].set(jnp.where(hard, jnp.where(z[-1] < 0, -tiny, tiny), z[-1]))

    def excess(u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logarithm of the left side over the right one, and its derivative."""
        t = jnp.exp(u)
        below = (1 - q) + t * q
        terms, sigma = jnp.sqrt(theta) * z / below, 1 - (1 - t) / largest
        squares = (terms / or_one(jnp.max(jnp.abs(terms)))) ** 2
        positive = sigma > 0
        safe = jnp.where(positive, sigma, 1.0)
        value = (_log_norm(terms) - level) * math.log(2) - jnp.log(safe)
        slope = -t * jnp.sum(squares * q / below) / or_one(jnp.sum(squares)) - t / (
            largest * safe
        )
        return jnp.where(positive, value, jnp.inf), slope

    zero = jnp.zeros((), z.dtype)
    t = jnp.exp(decreasing_root(excess, zero + math.log(float(info.tiny)), zero))
    return z / ((1 - q) + t * q)


def _log_norm(v: Vector) -> jax.Array:
    """The logarithm to base 2 of the length of v, also where its square is out of
    range; -inf for zero."""
    largest = jnp.max(jnp.abs(v))
    return jnp.log2(largest) + jnp.log2(or_one(jnp.linalg.norm(v / or_one(largest))))


def _log_eps(dtype: jax.typing.DTypeLike) -> float:
    return math.log2(float(jnp.finfo(dtype).eps))
