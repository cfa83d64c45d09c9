"""`python -m tests.killed_run FOLDER STEPS`: train by all transformations of the table,
with checkpoints.

Goes on from the newest checkpoint in the folder, writes one after every step, and at
the end all arrays.
"""

import pathlib
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint

from tests import contract
from tests.table import HESSOPT


def full(tree: Any) -> Any:
    """Without empty arrays, which Orbax refuses."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def main(folder: pathlib.Path, steps: int) -> None:
    """Train, from the newest checkpoint on."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    # one run compiles for those that follow; older versions of JAX reload programs that
    # call LAPACK wrongly
    if jax.__version_info__ >= (0, 10):
        jax.config.update("jax_compilation_cache_dir", str(folder.parent / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    runs: dict[str, Any] = {}
    updates = {}
    for case in HESSOPT:
        tx, params = case.make(), contract.initial(np.float64)
        runs[case.name] = {"params": params, "state": tx.init(params)}

        def step(run: Any, case: Any = case, tx: Any = tx) -> Any:
            result = contract.step_with(case, tx, run["params"], run["state"])
            return {"params": result.params, "state": result.state}

        updates[case.name] = jax.jit(step)

    options = orbax.checkpoint.CheckpointManagerOptions(max_to_keep=2)
    with orbax.checkpoint.CheckpointManager(
        folder / "checkpoints", options=options
    ) as manager:
        begin = manager.latest_step() or 0
        if begin:
            stored = manager.restore(
                begin, args=orbax.checkpoint.args.StandardRestore(full(runs))
            )
            runs = jax.tree.map(
                lambda old, new: old if new is None else new, runs, stored
            )
        print(f"from step {begin}", flush=True)
        for step_number in range(begin + 1, steps + 1):
            runs = {name: updates[name](run) for name, run in runs.items()}
            manager.save(
                step_number, args=orbax.checkpoint.args.StandardSave(full(runs))
            )
            manager.wait_until_finished()
            print(f"saved {step_number}", flush=True)
    arrays = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(runs)[0]
    }
    np.savez(
        folder / "end.npz", **{name: np.asarray(leaf) for name, leaf in arrays.items()}
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute(), int(sys.argv[2]))
