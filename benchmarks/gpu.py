"""The device suite, for one GPU and at most five minutes: small problems, lanes,
networks, matrices, and every optimizer tried on the device.

It runs on any device; results are stored under the name of the device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import hessopt
from benchmarks import multistart, programs
from benchmarks.harness import Contender, Table, compare, compiled
from benchmarks.problems import mlp, poisson
from hessopt.objective.binding import bind

STEPS = 20
"""Steps of a run on 10 variables, before it ends."""

TRAINING_STEPS = 16

Make = dict[str, Callable[[], optax.GradientTransformation]]
"""Optimizers by name."""


def tables(quick: bool) -> list[Table]:
    """All tables; `quick` for a test that it runs."""
    rounds = 2 if quick else 7
    minimizers, rates = (
        dict(list(make.items())[1:2] if quick else make)
        for make in (programs.MINIMIZERS, programs.RATES)
    )
    digits = mlp.digits((64, 8, 10) if quick else (64, 32, 10), 100 if quick else 1500)
    network = mlp.noise((8, 8, 4) if quick else (784, 256, 256, 10), 512)
    name = f"{TRAINING_STEPS} training steps, {network.name}"
    with jax.enable_x64(True):
        wide = [
            compare(f"{STEPS} steps, 10 variables", small(minimizers), rounds, 0.0),
            *(
                compare(
                    f"{count} lanes, two exponentials", lanes(count, quick), rounds, 0.0
                )
                for count in ((8,) if quick else (256, 16_384))
            ),
            compare("one step, 3-D Poisson, float64", pinn(quick), rounds, 0.0),
            *(
                compare(f"factorizations, {title}, float64", rows, rounds, 0.0)
                for title, rows in factorizations(quick).items()
            ),
        ]
    return [
        compare(
            "every optimizer, 5 steps: 1 if it works", smoke(minimizers | rates), 1, 0.0
        ),
        *wide,
        compare(f"one step, {digits.name}", steps(digits, minimizers), rounds, 0.0),
        compare(f"Hessian, {digits.name}", chunks(digits, quick), rounds, 0.0),
        compare(name, training(network, rates), rounds, 0.0),
    ]


def _run(
    value_fn: Any, params: Any, tx: optax.GradientTransformation, count: int
) -> Any:
    return hessopt.minimize(value_fn, params, tx, max_steps=count, gtol=0.0).params


def _minimized(
    value_fn: Any,
    params: Any,
    make: Make,
    count: int,
) -> list[Contender]:
    """Runs of a number of steps, each in one program."""
    return [
        compiled(name, functools.partial(_run, value_fn, tx=tx(), count=count), params)
        for name, tx in make.items()
    ]


def small(make: Make) -> list[Contender]:
    """A loop that does nothing, then runs of every method."""
    params = jnp.full(programs.SIZE, -1.2)

    def empty(x: Any) -> Any:
        # as many turns, which the compiler cannot count
        return jax.lax.while_loop(lambda x: x[0] < STEPS - 1.2, lambda x: x + 1, x)

    return [
        compiled("an empty loop", empty, params),
        *_minimized(programs.rosenbrock, params, make, STEPS),
    ]


def lanes(count: int, quick: bool) -> list[Contender]:
    """Fits from many starts; the facts are the lanes that reach the lowest value."""
    starts = multistart.starts(count)
    own = ("bfgs", "newton", "trust_region_newton, Gauss-Newton")
    peers = ("BFGS", "LevenbergMarquardt")
    names = {
        *(f"hessopt {name}, in lanes" for name in own[: 1 if quick else None]),
        *(f"optimistix {name}, in lanes" for name in peers[: 1 if quick else None]),
    }
    methods = {
        name: method for name, method in multistart.methods().items() if name in names
    }
    found = {
        name: compiled(name, method.solve, starts) for name, method in methods.items()
    }
    values = {
        name: jax.vmap(multistart.value_fn)(contender.run())
        for name, contender in found.items()
    }
    best = min(float(jnp.nanmin(value)) for value in values.values())
    return [
        contender._replace(
            facts=contender.facts
            | {"solved": float(jnp.sum(values[name] <= best * (1 + 1e-6)))}
        )
        for name, contender in found.items()
    ]


def steps(problem: mlp.Problem, make: Make) -> list[Contender]:
    """One gradient, then single steps of every method."""
    return [
        compiled(
            "one value and gradient",
            jax.value_and_grad(problem.value_fn),
            problem.params,
        ),
        *_minimized(problem.value_fn, problem.params, make, 1),
    ]


def chunks(problem: mlp.Problem, quick: bool) -> list[Contender]:
    """`jax.hessian`, then ours with several numbers of vectors at once."""
    flat, restore = ravel_pytree(problem.params)
    sizes = {
        "default": None,
        **{str(size): size for size in ((16,) if quick else (16, 64, 256))},
        "all": flat.size,
    }
    return [
        compiled(
            "jax.hessian", jax.hessian(lambda v: problem.value_fn(restore(v))), flat
        ),
        *(
            compiled(
                f"chunk_size {name}",
                lambda p, size=size: hessopt.hessian(
                    problem.value_fn, p, chunk_size=size
                ),
                problem.params,
            )
            for name, size in sizes.items()
        ),
    ]


def training(problem: mlp.Problem, make: Make) -> list[Contender]:
    """Steps of plain SGD in one program, then with rates from curvature."""

    def contender(name: str, tx: optax.GradientTransformation) -> Contender:
        step = mlp.stepper(tx, problem.value_fn)

        def scan(params: Any) -> Any:
            carry = params, tx.init(params)
            return jax.lax.scan(
                lambda carry, _: (step(carry), None), carry, length=TRAINING_STEPS
            )[0]

        return compiled(name, scan, problem.params)

    return [contender(name, tx()) for name, tx in make.items()]


def pinn(quick: bool) -> list[Contender]:
    """One gradient, then single steps."""
    where = poisson.points(50, 20) if quick else poisson.points()
    params = poisson.init(0, (3, 4, 1) if quick else poisson.SIZES)
    value_fn = bind(poisson.by_rows(), where._asdict(), caller="pinn")
    make: Make = {
        "ssbroyden": functools.partial(hessopt.bfgs, formula="ssbroyden"),
        "newton": hessopt.newton,
        "trust_region_newton, Gauss-Newton": functools.partial(
            hessopt.trust_region_newton, curvature="gauss_newton"
        ),
    }
    if quick:
        del make["newton"]
    return [
        compiled("one value and gradient", jax.value_and_grad(value_fn), params),
        *_minimized(value_fn, params, make, 1),
    ]


def factorizations(quick: bool) -> dict[str, list[Contender]]:
    """Cholesky, QR, eigenvectors and singular vectors of one large matrix, and of many
    small ones."""
    kinds: dict[str, Callable[[jax.Array], Any]] = {
        "cholesky": jnp.linalg.cholesky,
        "qr": functools.partial(jnp.linalg.qr, mode="r"),
        "eigh": jnp.linalg.eigh,
        "svd": functools.partial(jnp.linalg.svd, full_matrices=False),
    }
    found = {}
    for title, shape in {
        "n = 1217": (20, 20) if quick else (1217, 1217),
        "16384 of n = 4": (8, 4, 4) if quick else (16_384, 4, 4),
    }.items():
        A = jax.random.normal(jax.random.key(0), shape)
        A = A @ jnp.swapaxes(A, -1, -2) + jnp.eye(shape[-1])
        found[title] = [compiled(name, kind, A) for name, kind in kinds.items()]
    return found


def smoke(every: Make) -> list[Contender]:
    """Five steps of every optimizer on a small network; 1 in its facts if the loss is
    finite and lower than at the start."""
    problem = mlp.noise((6, 4, 3), 32)
    contenders = []
    for name, make in every.items():
        (found,) = _minimized(problem.value_fn, problem.params, {name: make}, 5)
        value, start = (problem.value_fn(p) for p in (found.run(), problem.params))
        works = bool(jnp.isfinite(value) & (value < start))
        contenders.append(found._replace(facts=found.facts | {"works": float(works)}))
    return contenders
