"""Oracles: the same training in one process; the run that was never killed."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trees.test_sharding import LEAFWISE, PROBLEMS, steps_of, tolerance_of, train

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_two_processes_train_as_one(dtype, problem, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    file = str(tmp_path / "end.npz")
    own = [file, problem, dtype]
    command = [sys.executable, "-m", "tests.many_processes", address]
    processes = [subprocess.Popen([*command, str(i), *own], cwd=ROOT) for i in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    here = PROBLEMS[problem]()
    with np.load(file) as arrays:
        for name, make in LEAFWISE.items():
            data = (jnp.asarray(a, dtype) for a in here.data)
            params, _ = train(
                here, make(), here.init(np.dtype(dtype)), *data, steps_of(name)
            )
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
                there = arrays[f"{name}{jax.tree_util.keystr(path)}"]
                np.testing.assert_allclose(
                    leaf, there, atol=tolerance_of(name, np.dtype(dtype)), err_msg=name
                )


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_the_run_resumes(tmp_path):
    def run(folder, *more):
        command = [
            sys.executable,
            "examples/multi_process.py",
            "--folder",
            str(tmp_path / folder),
            "--steps",
            "40",
            *more,
        ]
        began = time.monotonic()
        here = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=ROOT, env=here, capture_output=True, text=True, timeout=400
        )
        return done, time.monotonic() - began

    whole, usual = run("unbroken")
    assert whole.returncode == 0
    broken, seconds = run("killed", "--die-at", "35")
    assert broken.returncode != 0
    # else JAX waits for 100 seconds
    if "heartbeat_timeout_seconds" in jax.distributed.initialize.__annotations__:
        assert seconds < usual + 60
    again, _ = run("killed")
    assert again.returncode == 0
    assert "goes on from step" in again.stdout
    assert again.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]
