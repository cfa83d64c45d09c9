"""Oracle: the run that was never killed."""

import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def start(folder):
    command = [sys.executable, "-m", "tests.killed_run", str(folder), "6"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def ended(process):
    said, _ = process.communicate()
    assert process.returncode == 0
    return said


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for folder in (unbroken, killed):
        folder.mkdir()
    assert "from step 0" in ended(start(unbroken))
    process = start(killed)
    for line in process.stdout:
        if line == "saved 3\n":
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()

    begin = int(ended(start(killed)).split()[2])
    assert begin >= 3
    with np.load(unbroken / "end.npz") as one, np.load(killed / "end.npz") as other:
        assert set(one) == set(other)
        assert len(one) > 20
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
