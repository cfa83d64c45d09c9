"""Oracles: the tracked files; twine; fresh environments with nothing but the wheel or
the sdist and what it asks for."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import hessopt

ROOT = pathlib.Path(__file__).parents[1]

TRAIN = """
import jax, jax.numpy as jnp, hessopt
def loss_fn(params, x, y):
    return jnp.mean(jnp.logaddexp(0.0, -y * (x @ params))) + 1e-3 * jnp.sum(params**2)
x = jax.random.normal(jax.random.key(0), (200, 3))
y = jnp.sign(x @ jnp.array([1.0, -2.0, 0.5]) + 0.3)
solution = hessopt.minimize(loss_fn, jnp.zeros(3), hessopt.newton(), data={"x": x, "y": y}, gtol=1e-5)
print(hessopt.__file__, solution.reason)
"""

pytestmark = pytest.mark.slow


def run(where, *command):
    """Run without a way to the checkout, but with pip's settings; return what it
    printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=where, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(source):
    return {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sources, the sdist made of them, and the wheel made of that."""
    source, dist = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    if (ROOT / ".git").exists():
        for name in run(ROOT, "git", "ls-files", "-z").rstrip("\0").split("\0"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    else:  # a copy of them already
        shutil.copytree(
            ROOT,
            source,
            ignore=shutil.ignore_patterns(".*", "__pycache__"),
            dirs_exist_ok=True,
        )
    run(dist, sys.executable, "-m", "build", "--outdir", str(dist), str(source))
    return source, *dist.glob("*.tar.gz"), *dist.glob("*.whl")


def test_wheel_holds_the_package_and_nothing_else(built, tmp_path):
    source, _, wheel = built
    shutil.unpack_archive(wheel, tmp_path, "zip")
    about = f"hessopt-{hessopt.__version__}.dist-info"
    expected = {f"hessopt/{name}" for name in files(source / "hessopt")}
    expected |= {
        f"{about}/{name}"
        for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")
    }
    assert files(tmp_path) == expected >= {"hessopt/py.typed"}


def test_release_is_described(built):
    source, sdist, wheel = built
    run(
        sdist.parent,
        sys.executable,
        "-m",
        "twine",
        "check",
        "--strict",
        str(sdist),
        str(wheel),
    )
    name = f"hessopt-{hessopt.__version__}"
    assert (sdist.name, wheel.name) == (f"{name}.tar.gz", f"{name}-py3-none-any.whl")
    changelog = (source / "CHANGELOG.md").read_text()
    assert (
        f"\n## [{hessopt.__version__}]" in changelog or "\n## [Unreleased]" in changelog
    )


def interpreter(version):
    """The interpreter of a minor version, on PATH or under pyenv; None without one."""
    root = os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")
    under_pyenv = sorted(pathlib.Path(root, "versions").glob(f"{version}.*/bin/python"))
    for found in (shutil.which(f"python{version}"), *map(str, under_pyenv)):
        works = found and subprocess.run([found, "-c", "import venv"], check=False)
        if works and works.returncode == 0:
            return found
    return None


@pytest.mark.parametrize(
    ("version", "kind", "constraints"),
    [
        ("3.11", "wheel", ["--constraint", str(ROOT / ".ci" / "oldest.txt")]),
        ("3.12", "wheel", []),
        ("3.13", "wheel", []),
        ("3.13", "sdist", []),
    ],
    ids=["oldest wheel", "3.12 wheel", "3.13 wheel", "3.13 sdist"],
)
def test_what_is_released_installs_alone_and_trains(
    built, tmp_path, version, kind, constraints
):
    found = interpreter(version)
    if found is None:
        pytest.skip(f"there is no Python {version} here")
    run(tmp_path, found, "-m", "venv", "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    artifact = {"sdist": built[1], "wheel": built[2]}[kind]
    run(tmp_path, python, "-m", "pip", "install", *constraints, str(artifact))
    file, ended = run(tmp_path, python, "-c", TRAIN).split()
    assert pathlib.Path(file).is_relative_to(tmp_path)
    assert ended == "GRADIENT"
