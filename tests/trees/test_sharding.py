"""Oracles: the same run on one device; the collectives of compiled programs, read from
their text."""

import functools
import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hessopt
from tests.marks import needs_explicit, slow_if

LEAFWISE = {
    "search": lambda: optax.chain(
        optax.scale(-0.1), hessopt.scale_by_wolfe_linesearch()
    ),
    "lbfgs": hessopt.lbfgs,
    "lbfgs, same batch": lambda: hessopt.lbfgs(same_batch_pairs=True),
    "newton_cg": lambda: hessopt.newton_cg(max_iterations=10, warm_start=True),
    "trust region, cg": lambda: hessopt.trust_region_newton(subproblem="cg"),
    "generalized_newton": lambda: hessopt.generalized_newton(
        optax.sgd(0.1, momentum=0.9)
    ),
    "generalized_newton, forward": lambda: hessopt.generalized_newton(
        optax.sgd(0.1), mode="forward"
    ),
    "grouped_newton": lambda: hessopt.grouped_newton(optax.sgd(0.1, momentum=0.9)),
}
DENSE = {
    "newton": hessopt.newton,
    "newton, backtracking": lambda: hessopt.newton(
        linesearch=optax.scale_by_backtracking_linesearch(20)
    ),
    "bfgs": hessopt.bfgs,
    "trust region": hessopt.trust_region_newton,
}

QUICK = ("search", "lbfgs")
"""Those that run in the fast suite; `test_contract.py` has a row of eight devices for
all."""


def marked(names: Any) -> list[Any]:
    """All names; those that are not quick run in the slow suite."""
    return slow_if(lambda name: name not in QUICK, names)


class Problem(NamedTuple):
    """A training problem, and how its parameters are split."""

    init: Any  # dtype -> params
    # (params, x, y, place) -> scalar; place(activations) says how they lie after a
    # split contraction
    loss: Any
    data: tuple[Any, Any]
    specs: Any  # a tree like params


def penalty(params: Any) -> jax.Array:
    """What makes minima isolated, so that roundings do not grow."""
    return 1e-2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def mlp_problem(sizes: tuple[int, ...], batch: int) -> Problem:
    rng = np.random.default_rng(0)
    shapes = list(itertools.pairwise(sizes))
    arrays = {}
    for i, (m, n) in enumerate(shapes):
        arrays |= {f"w{i}": rng.normal(size=(m, n)) / m**0.5, f"b{i}": np.zeros(n)}
    # columns are split, then rows, in turn; the last layer is whole
    splits = [((None, "model"), ("model",)), (("model", None), (None,))]
    specs = {}
    for i in range(len(shapes)):
        w, b = splits[i % 2] if i < len(shapes) - 1 else ((None, None), (None,))
        specs |= {f"w{i}": PartitionSpec(*w), f"b{i}": PartitionSpec(*b)}
    x, y = rng.normal(size=(batch, sizes[0])), rng.normal(size=(batch, sizes[-1]))

    def loss(params: Any, x: Any, y: Any, place: Any) -> jax.Array:
        for i in range(len(shapes)):
            if i:
                x = jnp.tanh(x)
            x = place(x, params[f"w{i}"]) + params[f"b{i}"]
        return jnp.mean((x - y) ** 2) + penalty(params)

    return Problem(
        lambda dtype: jax.tree.map(lambda a: jnp.asarray(a, dtype), arrays),
        loss,
        (x, y),
        specs,
    )


class Cnn(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(
            8,
            (3, 3),
            strides=2,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.dtype,
        )(x)
        x = nn.BatchNorm(
            use_running_average=False, dtype=self.dtype, param_dtype=self.dtype
        )(x)
        x = jnp.tanh(x).mean((1, 2))
        return nn.Dense(4, dtype=self.dtype, param_dtype=self.dtype)(x)


def cnn_problem() -> Problem:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 8, 8, 2)), rng.normal(size=(64, 4))

    def init(dtype: Any) -> Any:
        return Cnn(dtype).init(jax.random.key(0), jnp.asarray(x, dtype))["params"]

    def loss(params: Any, x: Any, y: Any, place: Any) -> jax.Array:
        out, _ = Cnn(x.dtype).apply({"params": params}, x, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2) + penalty(params)

    specs = jax.tree.map(
        lambda _: PartitionSpec(), jax.eval_shape(lambda: init(np.float64))
    )
    specs["Dense_0"] = {
        "kernel": PartitionSpec(None, "model"),
        "bias": PartitionSpec("model"),
    }
    return Problem(init, loss, (x, y), specs)


def train(
    problem: Problem,
    tx: Any,
    params: Any,
    x: Any,
    y: Any,
    steps: int,
    place: Any = jnp.dot,
) -> tuple[Any, Any]:
    def value_fn(params: Any, x: Any, y: Any) -> jax.Array:
        return problem.loss(params, x, y, place)

    traces = []

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        traces.append(1)
        value, grads = jax.value_and_grad(value_fn)(params, x, y)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=value_fn, x=x, y=y
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, x, y)
    assert len(traces) == 1
    return params, state


def mesh_of(*, explicit: bool) -> Mesh:
    if not explicit:
        return Mesh(np.reshape(jax.devices(), (-1, 2)), ("data", "model"))
    return jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )


def dot_over_data(x: jax.Array, w: jax.Array) -> jax.Array:
    """A product whose result is split over the data, and over the model if the columns
    of w are."""
    return jnp.dot(
        x, w, out_sharding=PartitionSpec("data", jax.typeof(w).sharding.spec[1])
    )


def on_many_devices(
    problem: Problem, make: Any, dtype: Any, steps: int, *, explicit: bool
) -> tuple[Any, Any]:
    mesh = mesh_of(explicit=explicit)
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    params = jax.tree.map(place, problem.init(dtype), problem.specs)
    x, y = (place(np.asarray(a, dtype), PartitionSpec("data")) for a in problem.data)
    if not explicit:
        return train(problem, make(), params, x, y, steps)
    with jax.set_mesh(mesh):
        return train(problem, make(), params, x, y, steps, dot_over_data)


def assert_same_as_on_one(
    problem: Problem, make: Any, dtype: Any, steps: int, tolerance: float, meshes: Any
) -> None:
    alone, _ = train(
        problem,
        make(),
        problem.init(dtype),
        *(jnp.asarray(a, dtype) for a in problem.data),
        steps,
    )
    for explicit in meshes:
        spread, _ = on_many_devices(problem, make, dtype, steps, explicit=explicit)
        for a, b, spec in zip(
            *map(jax.tree.leaves, (alone, spread, problem.specs)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=tolerance)
            # what is made of a dense matrix the compiler places
            if explicit or make in LEAFWISE.values():
                assert b.sharding.is_equivalent_to(
                    NamedSharding(b.sharding.mesh, spec), b.ndim
                )


@pytest.mark.parametrize(
    "explicit",
    [
        pytest.param(False, marks=pytest.mark.slow),
        pytest.param(True, marks=needs_explicit),
    ],
)
@pytest.mark.parametrize("name", marked([*LEAFWISE, *DENSE]))
def test_a_small_network_trains_on_eight_devices_as_on_one(name, explicit):
    make = (LEAFWISE | DENSE)[name]
    assert_same_as_on_one(
        mlp_problem((6, 8, 4, 2), 16), make, np.float64, 6, 1e-10, [explicit]
    )


PROBLEMS = {"mlp": lambda: mlp_problem((784, 256, 256, 10), 512), "cnn": cnn_problem}


def steps_of(name: str) -> int:
    """By truncated CG the difference of two runs grows in every step, since these
    losses are not convex."""
    return 3 if "cg" in name else 20


def tolerance_of(name: str, dtype: Any) -> float:
    """A rate that is measured by differences has half of the digits, and one by third
    derivatives loses one."""
    if dtype == np.float32:
        return {"generalized_newton, forward": 1e-4, "grouped_newton": 1e-4}.get(
            name, 1e-5
        )
    return {"generalized_newton, forward": 1e-6}.get(name, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAFWISE)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_networks_train_on_eight_devices_as_on_one(problem, name, dtype):
    tolerance, meshes = (
        tolerance_of(name, np.dtype(dtype)),
        [False, True] if hasattr(jax, "set_mesh") else [False],
    )
    assert_same_as_on_one(
        PROBLEMS[problem](),
        LEAFWISE[name],
        np.dtype(dtype),
        steps_of(name),
        tolerance,
        meshes,
    )


# from when on types say over which axes of a shard_map an array is spread
@needs_explicit
@pytest.mark.parametrize("name", marked([*LEAFWISE, *DENSE]))
def test_inside_a_shard_map_an_update_is_that_of_one_device(name):
    problem, tx = mlp_problem((6, 8, 4, 2), 16), (LEAFWISE | DENSE)[name]()
    mesh, whole, split = (
        Mesh(jax.devices(), ("data",)),
        PartitionSpec(),
        PartitionSpec("data"),
    )

    def value_fn(params: Any, x: Any, y: Any) -> jax.Array:
        return jax.lax.pmean(problem.loss(params, x, y, jnp.dot), "data")

    def step(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(value_fn)(params, x, y)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=value_fn, x=x, y=y
        )
        return optax.apply_updates(params, updates), state

    mapped = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(whole, whole, split, split),
            out_specs=(whole, whole),
        )
    )
    params, (x, y) = problem.init(np.float64), map(jnp.asarray, problem.data)
    alone, _ = train(problem, tx, params, x, y, 4)
    state = tx.init(params)
    for _ in range(4):
        params, state = mapped(params, state, x, y)
    for a, b in zip(*map(jax.tree.leaves, (alone, params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


def collectives(program: str) -> list[tuple[str, int]]:
    """Every collective of a compiled program, and how many numbers it moves."""
    found = []
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append(
                (
                    match[2],
                    sum(
                        math.prod(map(int, filter(None, s.split(",")))) for s in shapes
                    ),
                )
            )
    return found


@functools.cache
def eight() -> Mesh:
    return Mesh(jax.devices(), ("all",))


# below and above flat.LARGE
@pytest.mark.parametrize("width", [pytest.param(4, marks=pytest.mark.slow), 2048])
@pytest.mark.parametrize("name", marked(LEAFWISE))
def test_beyond_the_objective_an_update_only_sums_a_few_scalars(name, width):
    split, whole = (
        NamedSharding(eight(), PartitionSpec(*axes)) for axes in ((None, "all"), ())
    )
    params = {
        "u": jax.device_put(np.ones((64, 8 * width)), split),
        "v": jax.device_put(np.ones(8), whole),
    }

    def value_fn(params: Any) -> jax.Array:  # itself one sum over devices
        return jnp.sum(jnp.cosh(params["u"])) + jnp.sum(params["v"] ** 4)

    tx = LEAFWISE[name]()
    step = jax.jit(
        lambda g, s, p: tx.update(g, s, p, value=value_fn(p), grad=g, value_fn=value_fn)
    )
    found = collectives(step.lower(params, tx.init(params), params).compile().as_text())
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert (
        sum(size for _, size in found) <= 4 * 50 + 50
        if "cg" in name
        else 2 * 10 * 4 + 50
    )


@pytest.mark.parametrize("explicit", [False, pytest.param(True, marks=needs_explicit)])
def test_the_memory_of_lbfgs_is_split_as_the_parameters_are(explicit):
    axes = {"axis_types": (jax.sharding.AxisType.Explicit,)} if explicit else {}
    mesh = jax.make_mesh((8,), ("all",), **axes) if explicit else eight()
    params = jax.device_put(
        np.ones((64, 1024)), NamedSharding(mesh, PartitionSpec("all"))
    )

    def per_device(state: Any) -> int:
        return sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)
        )

    tx, at_most = hessopt.lbfgs(), 64 * 1024 * 8 * 23 / 7
    assert per_device(tx.init(jnp.ones((64, 1024)))) > 7 * at_most
    state = tx.init(params)
    assert per_device(state) <= at_most
    _, state = jax.jit(
        lambda g, s, p: tx.update(
            g, s, p, value=1.0, grad=g, value_fn=lambda p: jnp.sum(p**2)
        )
    )(params, state, params)
    assert per_device(state) <= at_most
