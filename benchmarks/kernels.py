"""The kernels: Hessians, products, spectra, quasi-Newton updates, lanes, Taylor terms,
rates and the cubic solve."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import hessopt
from benchmarks.harness import Contender, Table, compare, compiled
from benchmarks.problems import mlp

# updates between two writings of the matrix
from hessopt.transforms.bfgs import FOLD_PERIOD as PERIOD

LANES, STEPS = 64, 10
RATED = 16  # training steps, behind those that are all measured
# 6, 24 and 60 tensors
NETWORKS = ((784, 256, 256, 10), (784, *[100] * 11, 10), (784, *[100] * 29, 10))


def tables(quick: bool) -> Sequence[Table]:
    """All tables; `quick` for a test that it runs."""
    rounds, settle, batch, size = (
        (2, 0.0, 100, 1000) if quick else (9, 0.4, 1500, 1_000_000)
    )
    problems = [
        mlp.digits((64, 32, 10), batch),
        mlp.digits((64, 16, 10), batch),
        mlp.regression((3, 20, 20, 1), min(batch, 1000)),
    ]
    networks = ((8, 8, 8, 4),) if quick else NETWORKS
    rated = mlp.noise(networks[0], 512)
    large = mlp.noise(
        (784, 32, 10) if quick else (784, 1024, 256, 128, 10), 64 if quick else 2048
    )
    count = f"{sum(leaf.size for leaf in jax.tree.leaves(large.params)):.1e} parameters"
    with jax.enable_x64(True):
        updates = [
            compare(
                f"{PERIOD} BFGS updates, n = {n}, float64",
                bfgs_updates(n),
                3 * rounds,
                0.0,
            )
            for n in ((50,) if quick else (500, 2000))
        ]
    return [
        *(
            compare(f"Hessian, {p.name}", hessians(p), rounds, settle)
            for p in (problems[1:2] if quick else problems)
        ),
        *(
            compare(f"Hessian times vector, {p.name}", products(p), 5 * rounds, 0.0)
            for p in problems[:1]
        ),
        *(
            compare(f"extreme eigenvalues, {p.name}", spectra(p), rounds, settle)
            for p in (problems[2:] if quick else problems[1:2])
        ),
        compare(
            f"L-BFGS direction, n = {size:.0e}, m = 10, float32",
            lbfgs_directions(size),
            5 * rounds,
            0.0,
        ),
        *updates,
        *(
            compare(
                f"Taylor terms, a group for each tensor, {p.name}",
                taylor_terms(p),
                rounds,
                0.0,
            )
            for p in (mlp.noise(sizes, 512) for sizes in networks)
        ),
        compare(
            f"Newton-CG, {large.name}, {count}", newton_cg_updates(large), rounds, 0.0
        ),
        compare(
            f"{RATED} training steps, {rated.name}",
            rated_steps(rated, quick),
            rounds,
            0.0,
        ),
        *(
            compare(
                f"cubic model, {n} groups, float32", cubic_models(n), 5 * rounds, 0.0
            )
            for n in ((6,) if quick else (6, 60))
        ),
        *(
            compare(
                f"{LANES} lanes of {STEPS} steps, {p.name}",
                lanes(p, quick),
                rounds,
                0.0,
            )
            for p in problems[1:2]
        ),
    ]


def hessians(problem: mlp.Problem) -> list[Contender]:
    """`jax.hessian` of the raveled parameters, then ours, equal to 1e-5 or an error."""
    flat, restore = ravel_pytree(problem.params)
    reference = compiled(
        "jax.hessian", jax.hessian(lambda v: problem.value_fn(restore(v))), flat
    )

    def ours(name: str, **options: Any) -> Contender:
        return compiled(
            name,
            lambda p: hessopt.hessian(problem.value_fn, p, **options),
            problem.params,
        )

    whole = ours("hessopt.hessian")
    exact, computed = reference.run(), whole.run()
    error = float(jnp.max(jnp.abs(computed - exact)) / jnp.max(jnp.abs(exact)))
    if not error <= 1e-5:
        raise ValueError(
            f"hessopt.hessian differs from jax.hessian by {error:.1e} on {problem.name}"
        )
    return [
        reference,
        whole._replace(facts=whole.facts | {"relative error": error}),
        ours("hessopt.hessian, layer blocks", blocks="layer"),
        ours("hessopt.hessian, leaf blocks", blocks="leaf"),
        ours("hessopt.hessian, Gauss-Newton", curvature="gauss_newton"),
        compiled(
            "one value and gradient",
            jax.value_and_grad(problem.value_fn),
            problem.params,
        ),
    ]


def products(problem: mlp.Problem) -> list[Contender]:
    """One value and gradient, then one product."""
    vector = jax.tree.map(jnp.ones_like, problem.params)
    return [
        compiled(
            "one value and gradient",
            jax.value_and_grad(problem.value_fn),
            problem.params,
        ),
        compiled(
            "hessopt.hvp",
            lambda p, v: hessopt.hvp(problem.value_fn, p, v),
            problem.params,
            vector,
        ),
    ]


def spectra(problem: mlp.Problem) -> list[Contender]:
    """All eigenvalues of the matrix, then the ends alone."""
    return [
        compiled(
            "hessopt.hessian and eigvalsh",
            lambda p: jnp.linalg.eigvalsh(hessopt.hessian(problem.value_fn, p)),
            problem.params,
        ),
        compiled(
            "hessopt.spectrum",
            lambda p: hessopt.spectrum(problem.value_fn, p),
            problem.params,
        ),
    ]


def lbfgs_directions(size: int, dtype: Any = jnp.float32) -> list[Contender]:
    """One update with its state donated: optax's, then ours; and what the memory takes
    to read twice."""
    keys = jax.random.split(jax.random.key(0), 8)
    points = [jax.random.normal(key, (size,), dtype) for key in keys]
    curvature = jnp.linspace(1.0, 10.0, size, dtype=dtype)

    def updates(name: str, tx: optax.GradientTransformation) -> Contender:
        # optax's fresh leaves share a buffer
        state = jax.tree.map(jnp.copy, tx.init(points[0]))

        def update(state: Any, x: Any) -> Any:
            # the state first: of arguments and results of one shape, the first of each
            # share a buffer
            direction, state = tx.update(curvature * x, state, x)
            return state, direction

        step = jax.jit(update, donate_argnums=0)
        contender = compiled(name, update, state, points[0])
        turn = [0, state]

        def run() -> Any:
            turn[0] += 1
            turn[1], direction = step(turn[1], points[turn[0] % len(points)])
            return direction

        return contender._replace(run=run)

    memory = jnp.stack([*points, *points, *points[:4]])
    return [
        updates("optax.scale_by_lbfgs", optax.scale_by_lbfgs(10)),
        updates("hessopt.scale_by_lbfgs", hessopt.scale_by_lbfgs(10)),
        compiled(
            "reading the memory twice", lambda m, x: (m @ x) @ m, memory, points[0]
        ),
    ]


def bfgs_updates(size: int) -> list[Contender]:
    """A period of products with a matrix, then of updates: from Python, waiting once,
    and in a compiled loop."""
    keys = jax.random.split(jax.random.key(0), 8)
    points = jnp.stack([jax.random.normal(key, (size,)) for key in keys])
    matrix, curvature = jnp.ones((size, size)), jnp.linspace(1.0, 10.0, size)
    tx = hessopt.scale_by_bfgs()

    def update(state: Any, x: Any) -> Any:
        return tx.update(curvature * x, state, x)[::-1]  # the state first, see above

    def period(state: Any, points: Any) -> Any:
        return jax.lax.scan(update, state, jnp.tile(points, (PERIOD // len(points), 1)))

    def stepped(name: str, fun: Any, *args: Any) -> Contender:
        step, carry = jax.jit(fun, donate_argnums=0), [tx.init(points[0])]

        def run() -> Any:
            last = None
            for x in args:
                carry[0], last = step(carry[0], x)
            return last

        return compiled(name, fun, carry[0], args[0])._replace(run=run)

    rows = list(points) * (PERIOD // len(points))
    multiply = jax.jit(lambda matrix, x: matrix @ x)
    return [
        compiled(
            "matrix times vector", lambda matrix, x: matrix @ x, matrix, points[0]
        )._replace(run=lambda: [multiply(matrix, x) for x in rows][-1]),
        stepped("hessopt.scale_by_bfgs", update, *rows),
        stepped("hessopt.scale_by_bfgs, in a loop", period, points),
    ]


def newton_cg_updates(problem: mlp.Problem) -> list[Contender]:
    """A gradient, then updates of Newton-CG with 1 and with 11 products: ten iterations
    are what lies between."""

    # positive definite, or CG would end earlier
    def penalised(params: Any) -> jax.Array:
        return problem.value_fn(params) + 0.5 * optax.tree.norm(params, squared=True)

    grads = jax.jit(jax.grad(penalised))(problem.params)

    def updates(name: str, **options: Any) -> Contender:
        tx = hessopt.scale_by_newton_cg(**options)
        # a first gradient so large that no residual is small enough
        fresh: Any = tx.init(problem.params)
        state = fresh._replace(first_length=jnp.asarray(1e30, jnp.float32))
        return compiled(
            name,
            lambda g, p: tx.update(g, state, p, value_fn=penalised),
            grads,
            problem.params,
        )

    return [
        compiled("gradient", jax.grad(penalised), problem.params),
        updates("hessopt.scale_by_newton_cg, 1 product", max_iterations=1),
        updates("hessopt.scale_by_newton_cg, 11 products", max_iterations=11),
        updates(
            "hessopt.scale_by_newton_cg, 11, rematerialize",
            max_iterations=11,
            rematerialize=True,
        ),
    ]


def lanes(problem: mlp.Problem, quick: bool) -> list[Contender]:
    """L-BFGS from many starts under `vmap`: optax's training step, the same in our
    driver, and ours there."""
    keys = jax.random.split(jax.random.key(0), LANES)
    starts = jax.vmap(
        lambda key: jax.tree.map(
            lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), problem.params
        )
    )(keys)
    value_and_grad = optax.value_and_grad_from_state(problem.value_fn)

    def stepped(params: Any) -> Any:
        tx = optax.lbfgs()

        def step(_: int, carry: Any) -> Any:
            params, state = carry
            value, grad = value_and_grad(params, state=state)
            updates, state = tx.update(
                grad, state, params, value=value, grad=grad, value_fn=problem.value_fn
            )
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, STEPS, step, (params, tx.init(params)))[0]

    def driven(tx: optax.GradientTransformation) -> Any:
        return jax.vmap(
            lambda p: (
                hessopt.minimize(
                    problem.value_fn, p, tx, max_steps=STEPS, gtol=0.0
                ).params
            )
        )

    drivable = [("optax.lbfgs", optax.lbfgs), ("hessopt.lbfgs", hessopt.lbfgs)]
    return [
        compiled("optax.lbfgs, training step", jax.vmap(stepped), starts),
        *(
            compiled(f"{name} in minimize", driven(tx()), starts)
            for name, tx in (drivable[1:] if quick else drivable)
        ),
        compiled(
            "one value and gradient",
            jax.vmap(jax.value_and_grad(problem.value_fn)),
            starts,
        ),
    ]


def taylor_terms(problem: mlp.Problem) -> list[Contender]:
    """One value and gradient, then phi's derivatives in the sweep and by JAX; equal to
    1e-3 or an error."""
    updates = jax.tree.map(jnp.negative, jax.grad(problem.value_fn)(problem.params))
    count = len(jax.tree.leaves(updates))

    def ours(order: int) -> Contender:
        def terms(params: Any, updates: Any) -> hessopt.Taylor:
            return hessopt.taylor(
                problem.value_fn, params, updates, groups="leaf", order=order
            )

        return compiled(
            f"hessopt.taylor, order {order}", terms, problem.params, updates
        )

    def hessian(params: Any, updates: Any) -> jax.Array:
        phi = hessopt.restriction(problem.value_fn, params, updates, groups="leaf")
        return jax.hessian(phi)(jnp.zeros(count))

    theirs = compiled("jax.hessian of phi", hessian, problem.params, updates)
    contenders = [ours(2), ours(3)]
    exact = theirs.run()
    for contender in contenders:
        error = float(
            jnp.max(jnp.abs(contender.run().hessian - exact)) / jnp.max(jnp.abs(exact))
        )
        if not error <= 1e-3:
            raise ValueError(
                f"{contender.name} differs from jax.hessian by {error:.1e} on {problem.name}"
            )
    return [
        compiled(
            "one value and gradient",
            jax.value_and_grad(problem.value_fn),
            problem.params,
        ),
        *contenders,
        theirs,
    ]


def rated_steps(problem: mlp.Problem, quick: bool) -> list[Contender]:
    """Training steps of plain SGD, then with rates that find themselves, dispatched one
    by one."""

    def stepped(
        name: str, tx: optax.GradientTransformation, count: int = 0
    ) -> Contender:
        step, state = mlp.stepper(tx, problem.value_fn), tx.init(problem.params)
        if count:
            state = optax.tree.set(state, count=jnp.int32(count))
        run_step, carry = jax.jit(step), [(problem.params, state)]

        def run() -> Any:
            for _ in range(RATED):
                carry[0] = run_step(carry[0])
            return carry[0][0]

        return compiled(name, step, carry[0])._replace(run=run)

    generalized, grouped, sgd = (
        hessopt.generalized_newton,
        hessopt.grouped_newton,
        functools.partial(optax.sgd, 1.0),
    )
    # by a negative rate it would climb, and measure
    resting = grouped(sgd(), update_every=10**6, nonnegative=True)
    options: dict[str, dict[str, Any]] = {
        "": {},
        ", no safeguard": {"safeguard": False},
        ", every 8": {"update_every": 8},
        ", forward": {"mode": "forward"},
        ", forward, no safeguard": {"mode": "forward", "safeguard": False},
    }
    return [
        stepped("optax.sgd", optax.sgd(1e-2)),
        *(
            stepped(f"generalized_newton{name}", generalized(sgd(), **own))
            for name, own in list(options.items())[: 1 if quick else None]
        ),
        *([] if quick else [stepped("grouped_newton", grouped(sgd()))]),
        stepped("grouped_newton, not measured", resting, count=2 * 10**6 + 1),
    ]


def cubic_models(size: int) -> list[Contender]:
    """An eigendecomposition, for scale, and the minimiser of an indefinite model over
    ten orders of magnitude."""
    keys = jax.random.split(jax.random.key(0), 4)
    scale = 10 ** jax.random.uniform(keys[0], (size,), minval=-5, maxval=5)
    A = jax.random.normal(keys[1], (size, size))
    H = (A + A.T) * scale * scale[:, None]
    g = jax.random.normal(keys[2], (size,)) * scale
    return [
        compiled("jnp.linalg.eigh", jnp.linalg.eigh, A + A.T),
        compiled(
            "hessopt.solve_cubic", hessopt.solve_cubic, g, H, scale, jnp.float32(1.0)
        ),
    ]
