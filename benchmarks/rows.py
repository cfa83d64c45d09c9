"""Gauss-Newton by rows: Jacobians, and directions in sample space over numbers of
parameters and of samples, beside what a user would write by hand."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import hessopt
from benchmarks.harness import Contender, Table, compare, compiled
from benchmarks.problems import poisson
from hessopt.calculus.row_products import jacobian
from hessopt.calculus.rows import pieces_of, row_bytes
from hessopt.calculus.terms import terms_of
from hessopt.objective.binding import bind, precompose
from hessopt.trees.vectors import real_leaves

DAMPING = 1e-3


class Problem(NamedTuple):
    """A regression on random inputs, of one output per sample."""

    value_fn: Any  # composite of the model of one sample
    params: Any
    data: dict[str, jax.Array]


def tables(quick: bool) -> list[Table]:
    """All comparisons."""
    rounds = 2 if quick else 5
    with jax.enable_x64(True):
        found = [
            compare(title, contenders, rounds, 0.0)
            for title, contenders in _jacobians(quick).items()
        ]
    # (n, m, seconds of rest: by hand J has n m entries)
    sizes = [(1e3, 100), (1e4, 1000), (1e5, 1000), (1e6, 1000)]
    for n, m in [(1e2, 10)] if quick else sizes:
        problem = regression(n, m)
        title = f"direction, n = {_count(problem.params):,}, m = {m:,}, float32"
        found.append(compare(title, directions(problem), rounds, 0.2))
    n, m = (1e2, 20) if quick else (1e4, 8000)
    problem = regression(n, m)
    title = f"many samples, n = {_count(problem.params):,}, m = {m:,}, float32"
    contenders = [
        _direction(f"scale_by_gauss_newton, {solver}", problem, space, solver)
        for space, solver in (("samples", "cholesky"), ("samples", "cg"))
    ]
    return [*found, compare(title, contenders, rounds, 0.2)]


def _jacobians(quick: bool) -> dict[str, list[Contender]]:
    """The Jacobian of the residuals of the 3-D Poisson problem; on all points without
    the functions of JAX, which would need tens of gigabytes."""
    found, sizes = {}, (3, 4, 1) if quick else poisson.SIZES
    some = poisson.points(20, 10) if quick else poisson.points(450, 50)
    for points in (some,) if quick else (some, poisson.points()):
        params, data = poisson.init(0, sizes), points._asdict()
        flat, restore = ravel_pytree(params)

        def outputs(x: jax.Array, points: Any = points, restore: Any = restore) -> Any:
            return jnp.concatenate(poisson.residuals(restore(x), points))

        def by_rows(params: Any, data: Any) -> Any:
            leaves, restore = real_leaves(params)
            bound = bind(poisson.by_rows(), data, caller="rows")
            model_fn = precompose(bound, restore).model_fn
            terms = terms_of(model_fn, leaves)
            return [
                jacobian(
                    pieces_of(
                        term, leaves, jnp.ones((term.count, term.width)), row_bytes()
                    ),
                    leaves,
                )
                for term in terms
            ]

        def by_columns(x: jax.Array, outputs: Any = outputs) -> Any:
            (term,) = terms_of(lambda parts: outputs(parts[0]), [x])
            return jacobian(
                pieces_of(term, [x], jnp.ones((1, term.width)), row_bytes()), [x]
            )

        n, m = len(flat), sum(map(len, points))
        title = f"Jacobian, 3-D Poisson PINN, n = {n:,}, m = {m:,}, float64"
        found[title] = [
            compiled("hessopt, rowwise", by_rows, params, data),
            compiled("hessopt, by columns", by_columns, flat),
        ]
        if points is some:
            found[title] += [
                compiled("jax.jacrev", jax.jacrev(outputs), flat),
                compiled("jax.jacfwd", jax.jacfwd(outputs), flat),
            ]
    return found


def regression(size: float, count: int) -> Problem:
    """A network with three hidden layers of one width and about `size` parameters."""
    width = max(int((size / 2) ** 0.5), 2)
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32),
        poisson.init(0, (20, width, width, width, 1)),
    )

    def of_sample(params: Any, x: jax.Array) -> jax.Array:
        return poisson.apply(params, x[None])[0]

    value_fn = hessopt.composite(
        hessopt.rowwise(of_sample, over=["x"]),
        lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2),
    )
    x = jax.random.normal(jax.random.key(0), (count, 20), jnp.float32)
    return Problem(value_fn, params, {"x": x, "y": jnp.sin(x[:, 0])})


def directions(problem: Problem) -> list[Contender]:
    """The direction in sample space as a user would write it, and ours."""

    def by_hand(params: Any, x: jax.Array, y: jax.Array) -> Any:
        """ENGD-W: J (J'J + lambda m I)^-1 r with J as a matrix."""
        flat, restore = ravel_pytree(params)

        def of_sample(flat: jax.Array, x: jax.Array) -> jax.Array:
            return poisson.apply(restore(flat), x[None])[0]

        r = jax.vmap(of_sample, (None, 0))(flat, x) - y
        J = jax.vmap(jax.grad(of_sample), (None, 0))(flat, x)
        K = J @ J.T + DAMPING * len(y) * jnp.eye(len(y), dtype=J.dtype)
        return restore(
            J.T @ jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(K), r)
        )

    n, m = _count(problem.params), len(problem.data["y"])
    spaces = ["samples"] + (["parameters"] if n <= 2 * m else [])
    return [
        compiled("by hand", by_hand, problem.params, *problem.data.values()),
        *(
            _direction(f"scale_by_gauss_newton, {space}", problem, space, "cholesky")
            for space in spaces
        ),
    ]


def _direction(name: str, problem: Problem, space: str, solver: str) -> Contender:
    tx = hessopt.scale_by_gauss_newton(
        DAMPING, damping_rule="constant", space=space, solver=solver
    )

    def direction(params: Any, data: Any) -> Any:
        update = functools.partial(tx.update, value=1.0, value_fn=problem.value_fn)
        return update(params, tx.init(params), params, **data)[0]

    return compiled(name, direction, problem.params, problem.data)


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
