"""`python -m tests.many_processes ADDRESS ID FILE PROBLEM DTYPE`: be one of two
processes of two devices."""

import sys

import jax


def main(address: str, process: int, file: str, problem: str, dtype: str) -> None:
    """Train by every leafwise transformation, on a mesh over both processes; the first
    one writes the parameters."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.distributed.initialize(address, 2, process)

    import numpy as np
    from jax.experimental import multihost_utils

    from tests.trees.test_sharding import LEAFWISE, PROBLEMS, on_many_devices, steps_of

    arrays = {}
    for name, make in LEAFWISE.items():
        steps = steps_of(name)
        params, _ = on_many_devices(
            PROBLEMS[problem](), make, np.dtype(dtype), steps, explicit=False
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            whole = multihost_utils.process_allgather(leaf, tiled=True)
            arrays[f"{name}{jax.tree_util.keystr(path)}"] = np.asarray(whole)
    if process == 0:
        np.savez(file, **arrays)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:6])
