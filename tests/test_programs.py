"""Programs do not grow: no step executes more instructions than the committed record."""

import importlib.metadata
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

import hessopt
from benchmarks import programs

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
RECORD = json.loads((RESULTS / "cpu-2-cores" / "programs.json").read_text())

SLACK = 1.1
"""Factor that another version of the compiler may need."""


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:3]))


RECORDED, PRESENT = (
    _release(version)
    for version in (RECORD["machine"]["jax"], importlib.metadata.version("jax"))
)
pytestmark = [
    pytest.mark.skipif(
        PRESENT < RECORDED, reason="the record is of a later compiler of JAX"
    ),
    pytest.mark.skipif(
        jax.default_backend() != "cpu", reason="the record is of programs for CPUs"
    ),
]


def _check(name: str, found: dict[str, int]) -> None:
    known, slack = RECORD["rows"][name], 1.0 if PRESENT == RECORDED else SLACK
    grown = {
        key: (known[key], found[key])
        for key in ("instructions", "turns", "branches", "traces")
        if found[key] > slack * known[key]
    }
    assert not grown, f"{name}: (recorded, now) {grown}"
    assert found["one function"] >= known["one function"]


@pytest.mark.parametrize("name", list(programs.MINIMIZERS)[1:])
def test_a_step_of_minimize(name):
    with jax.enable_x64(True):
        found = programs.minimized(programs.MINIMIZERS[name])
    _check(f"minimize, {name}", found)


@pytest.mark.parametrize("name", list(programs.RATES)[1:])
def test_a_training_step(name):
    with jax.enable_x64(False):
        found = programs.trained(programs.RATES[name])
    _check(f"training, {name}", found)


@pytest.mark.parametrize("method", [hessopt.lbfgs, hessopt.bfgs, hessopt.newton_cg])
def test_a_small_run_is_one_function(method):
    params, tx = jnp.full(programs.SIZE, -1.2), method()
    run = jax.jit(lambda x: hessopt.minimize(programs.rosenbrock, x, tx).params)
    text = run.lower(params).compile().as_text() or ""
    program = programs.parsed(text)
    assert programs.is_one_function(program)
    entry = program.computations[program.entry]
    # XLA runs more than 8 kernels on several threads
    assert sum(kind not in programs.FREE for kind, _ in entry) <= 8


PROGRAM = """HloModule jit_f

%turn (x: (s32[], f32[2])) -> (s32[], f32[2]) {
  %x = (s32[], f32[2]{0}) parameter(0)
  %i = s32[] get-tuple-element(%x), index=0
  %a = f32[2]{0} fusion(%i), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[2]{0}) tuple(%i, %a)
}

%test (x: (s32[], f32[2])) -> pred[] {
  %x = (s32[], f32[2]{0}) parameter(0)
  ROOT %less = pred[] compare(%x, %x), direction=LT
}

%one (x: f32[2]) -> f32[2] {
  ROOT %y = f32[2]{0} add(%x, %x)
}

%two (x: f32[2]) -> f32[2] {
  %y = f32[2]{0} add(%x, %x)
  ROOT %z = f32[2]{0} multiply(%y, %y)
}

%step (x: (s32[], f32[2])) -> (s32[], f32[2]) {
  %w = (s32[], f32[2]{0}) while(%x), condition=%test, body=%turn, backend_config={"known_trip_count":{"n":"3"}}
  %v = (s32[], /*index=1*/f32[2]{0}) while(%w), condition=%test, body=%turn
  ROOT %c = f32[2]{0} conditional(%p, %v, %v), branch_computations={%one, %two}
}

%called (x: (s32[], f32[2])) -> (s32[], f32[2]) {
  ROOT %loop = (s32[], f32[2]{0}) while(%x), condition=%test, body=%step
}

ENTRY %main (x: f32[2]) -> f32[2] {
  ROOT %call = (s32[], f32[2]{0}) call(%x), to_apply=%called
}
"""


def test_instructions_are_counted_as_executed():
    found = programs.turn(programs.parsed(PROGRAM))
    # three known turns and an unknown one, of 2 instructions each; two loops, the
    # condition and its larger branch
    assert found == programs.Size(instructions=4 * 2 + 2 + 1 + 2, turns=4, branches=1)
