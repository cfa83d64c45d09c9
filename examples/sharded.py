"""Train on eight devices with explicit sharding: data over four, weights over two.

On a mesh with explicit axes the type of every array contains its sharding. L-BFGS and
its line search operate on the sharded leaves: the state is sharded like the parameters,
and inner products are sums over devices. The program shows the shardings of each
parameter and of its part of the memory, and that 60 steps give the same result as on
one device. (The eight devices are CPU devices; the same code runs on eight GPUs. With
JAX before 0.6 the mesh has automatic axes.)

    python examples/sharded.py
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import hessopt

EXPLICIT = hasattr(jax, "set_mesh")
SPLIT = {
    "w1": P(None, "model"),
    "b1": P("model"),
    "w2": P("model", None),
    "b2": P(None),
}


def loss_fn(
    params: Any, x: jax.Array, y: jax.Array, *, over: P | None = None
) -> jax.Array:
    """Return the cross-entropy of a 64-32-10 network; `over` is the sharding of the sum
    over sharded hidden units."""
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    how: dict[str, Any] = {} if over is None else {"out_sharding": over}
    logits = jnp.dot(hidden, params["w2"], **how) + params["b2"]
    error = optax.softmax_cross_entropy(logits, y).mean()
    return error + 1e-3 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def train(
    params: Any, x: Any, y: Any, steps: int, over: P | None = None
) -> hessopt.Solution:
    """Minimize by L-BFGS."""

    def objective(params: Any, x: Any, y: Any) -> jax.Array:
        return loss_fn(params, x, y, over=over)

    return hessopt.minimize(
        objective, params, hessopt.lbfgs(), data={"x": x, "y": y}, max_steps=steps
    )


def main() -> None:
    """Train on eight devices, and on one."""
    jax.config.update("jax_num_cpu_devices", 8)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, to see that it runs"
    )
    args = parser.parse_args()
    steps = 3 if args.quick else args.steps
    images, labels = load_digits(return_X_y=True)
    x, y = (
        (images[:1792] / 16).astype(np.float32),
        np.eye(10, dtype=np.float32)[labels[:1792]],
    )
    rng = np.random.default_rng(0)
    shapes = {"w1": (64, 32), "b1": (32,), "w2": (32, 10), "b2": (10,)}
    start = {
        name: (rng.normal(size=s) / s[0] ** 0.5 * (len(s) == 2)).astype(np.float32)
        for name, s in shapes.items()
    }

    if EXPLICIT:
        mesh = jax.make_mesh(
            (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
        )
        jax.set_mesh(mesh)
    else:
        mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (4, 2)), ("data", "model"))
    params = {
        name: jax.device_put(leaf, NamedSharding(mesh, SPLIT[name]))
        for name, leaf in start.items()
    }
    split_x, split_y = (
        jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, y)
    )

    state: Any = hessopt.scale_by_lbfgs().init(params)
    for name, leaf in params.items():
        rows = state.pairs[name]
        print(
            f"{name}: {leaf.shape} as {leaf.sharding.spec}, its pairs {rows.shape} as {rows.sharding.spec}"
        )
    spread = train(
        params, split_x, split_y, steps, P("data", None) if EXPLICIT else None
    )
    alone = train(
        {name: jnp.asarray(leaf) for name, leaf in start.items()},
        jnp.asarray(x),
        jnp.asarray(y),
        steps,
    )
    print(
        f"loss after {int(spread.steps)} steps on 8 devices {float(spread.value):.6f}, on one {float(alone.value):.6f}"
    )


if __name__ == "__main__":
    main()
