"""Train one network in several processes, and resume after one of them has died.

Each process holds its part of scikit-learn's digits and a copy of an MLP (64-32-10,
tanh). L-BFGS takes the same steps as one process on all data, since the objective and
all inner products are sums over all devices. Every tenth step is written to a
checkpoint. If a process dies, the others end within seconds, the limit of the
heartbeat; a new run resumes from the last checkpoint. The last line shows the loss, the
accuracy on the 297 test images and a checksum of the parameters.

    python examples/multi_process.py            # two processes of two devices each, on this machine
    python examples/multi_process.py --coordinator HOST:PORT --processes 4 --process-id I    # each of four machines
"""

import argparse
import inspect
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

HEARTBEAT = 10
"""Seconds without a heartbeat after which a process counts as dead."""


def start_all(args: argparse.Namespace) -> int:
    """Start every process on this machine; if one fails, wait until the others detect
    it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    own = ["--coordinator", address, "--devices", str(args.devices or 2)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], *own, "--process-id", str(i)]
        )
        for i in range(args.processes)
    ]
    return max(abs(process.wait()) for process in processes)


def train(args: argparse.Namespace) -> None:
    """Train as one of the processes."""
    import jax

    if args.devices:
        jax.config.update("jax_num_cpu_devices", args.devices)
    named: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT}
    # JAX before 0.7 waits for 100 seconds
    known = inspect.signature(jax.distributed.initialize).parameters
    jax.distributed.initialize(
        args.coordinator,
        args.processes,
        args.process_id,
        **{k: v for k, v in named.items() if k in known},
    )

    import jax.numpy as jnp
    import numpy as np
    import optax
    import orbax.checkpoint
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from sklearn.datasets import load_digits

    import hessopt

    mesh = Mesh(jax.devices(), ("data",))
    whole, split = (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("data")),
    )
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    here, every = jax.process_index(), jax.process_count()
    share = slice(here * 1500 // every, (here + 1) * 1500 // every)
    x, y = (
        jax.make_array_from_process_local_data(split, a[:1500][share])
        for a in (images, labels)
    )

    def logits(params: Any, x: Any) -> jax.Array:
        return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]

    def loss(params: Any, x: Any, y: Any) -> jax.Array:
        error = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, x), y
        ).mean()
        return error + 1e-3 * optax.tree.norm(params, squared=True)

    rng = np.random.default_rng(0)
    shapes = {"w1": (64, 32), "b1": (32,), "w2": (32, 10), "b2": (10,)}
    start = {
        name: rng.normal(size=s) / np.sqrt(s[0]) * (len(s) == 2)
        for name, s in shapes.items()
    }
    params = jax.tree.map(lambda a: jax.device_put(a.astype(np.float32), whole), start)
    tx = hessopt.lbfgs()
    value_and_grad = hessopt.value_and_grad_from_state(loss)

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = value_and_grad(params, x, y, state=state)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=loss, x=x, y=y
        )
        return optax.apply_updates(params, updates), state, value

    run, begin = {"params": params, "state": tx.init(params)}, 0
    with orbax.checkpoint.CheckpointManager(args.folder.absolute()) as manager:
        latest = manager.latest_step()
        if latest is not None:
            begin, run = (
                latest,
                manager.restore(
                    latest, args=orbax.checkpoint.args.StandardRestore(run)
                ),
            )
            print(f"process {here} goes on from step {begin}", flush=True)
        params, state = run["params"], run["state"]
        for count in range(begin + 1, args.steps + 1):
            params, state, value = step(params, state, x, y)
            if count == args.die_at and here == every - 1:
                jax.block_until_ready(value)
                os.kill(os.getpid(), 9)
            if count % 10 == 0 or count == args.steps:
                manager.save(
                    count,
                    args=orbax.checkpoint.args.StandardSave(
                        {"params": params, "state": state}
                    ),
                )
    if here == 0:
        local = jax.tree.map(np.asarray, params)
        accuracy = np.mean(
            np.argmax(logits(local, images[1500:]), axis=1) == labels[1500:]
        )
        checksum = sum(float(np.sum(leaf, dtype=np.float64)) for leaf in local.values())
        value = jax.jit(loss)(local, images[:1500], labels[:1500])
        print(
            f"loss {float(value):.6f}, test accuracy {accuracy:.3f}, checksum {checksum:.4f}",
            flush=True,
        )


def main() -> int:
    """Start the processes, or run one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--devices",
        type=int,
        help="CPU devices per process; all that there are by default",
    )
    parser.add_argument(
        "--coordinator",
        help="address of process 0; by default all processes start on this machine",
    )
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("checkpoints/multi_process")
    )
    parser.add_argument(
        "--die-at", type=int, help="step at which the last process kills itself"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, to see that it runs"
    )
    args = parser.parse_args()
    if args.quick:
        args.steps = min(args.steps, 12)
    if args.coordinator is None:
        return start_all(args)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
