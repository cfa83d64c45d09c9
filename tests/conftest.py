"""Double precision everywhere; float32 is asked for by dtype where it is meant."""

import gc
import itertools
import os

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
# laws hold at any level of optimization, and compilation is most of the time of a run
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def optimized():
    """For tests of counts and losses that rounding changes: programs are optimized as a
    user's are."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


MANY = 200
"""Tests after which a worker forgets its programs: they pile up until no more memory
can be mapped."""

_tests = itertools.count(1)


def pytest_collection_finish():
    """Collect garbage less often, and never what the modules have created: the
    collector would visit all of it again and again while JAX traces."""
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def pytest_runtest_teardown():
    """Forget them now and then."""
    if next(_tests) % MANY == 0:
        from tests import contract  # not before the configuration

        contract.forget()
        gc.collect()
