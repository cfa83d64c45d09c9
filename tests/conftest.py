"""Double precision everywhere; float32 is asked for by dtype where it is meant."""

import itertools

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)

MANY = 200
"""Tests after which a worker forgets its programs: they pile up until no more memory
can be mapped."""

_tests = itertools.count(1)


@pytest.fixture
def quick_compiles():
    """For tests that hold at any level of optimization, and whose time is mostly
    compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_runtest_teardown():
    """Forget them now and then."""
    if next(_tests) % MANY == 0:
        from tests import contract  # not before the configuration

        contract.forget()
