"""The pinned stack axis changes where values lie, never what they are: `jax.vmap` is
the oracle."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.calculus.batching import stacked

DATA = jnp.asarray(np.random.default_rng(0).normal(size=(7, 4)))
KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 2)))


def twice(x):
    return x + x  # one variable, two operands


def scanned(x):
    return jax.lax.scan(
        lambda carry, row: (jnp.tanh(carry + row @ x), carry[0]), jnp.zeros(3), DATA
    )[1]


def branched(x):
    return jax.lax.cond(jnp.sum(DATA) > 0, lambda v: DATA @ v, lambda v: DATA @ -v, x)


def convolved(x):
    return jax.lax.conv_general_dilated(
        jnp.broadcast_to(x.T[None, :2], (5, 2, 4)), KERNEL.T, (1,), "SAME"
    )


PROGRAMS = {
    "data first": lambda x: DATA @ x,
    "contracts the data": lambda x: (DATA @ x).T @ DATA,
    "contracts the data, fixed on the left": lambda x: DATA.T @ (DATA @ x),
    "contracts the data, at two precisions": lambda x: jax.lax.dot_general(
        DATA @ x,
        DATA,
        (((0,), (0,)), ((), ())),
        precision=(jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT),
    ),
    "contracts everything": lambda x: jnp.tensordot(DATA @ x, jnp.ones((7, 3)), 2),
    "axes kept in step": lambda x: jnp.einsum("bi,bj->bij", DATA @ x, DATA),
    "both mapped": lambda x: (DATA @ x) @ x.T,
    "broadcast, reduced": lambda x: jax.nn.softmax(DATA @ x) - jnp.max(x),
    "one variable twice": twice,
    "jitted inner": lambda x: jax.jit(twice)(x) * 2.0,
    "rematerialised": jax.checkpoint(lambda x: jnp.sin(DATA @ x)),
    "custom jvp": lambda x: jax.nn.relu(DATA @ x),
    "scan": scanned,
    "cond": branched,
    "convolution": convolved,
    "gathered and sorted": lambda x: jnp.sort(x[jnp.array([2, 0, 0])], axis=0),
    "constant": lambda x: DATA,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_vmap(name):
    program = PROGRAMS[name]
    batch = jnp.asarray(np.random.default_rng(2).normal(size=(5, 4, 3)))
    ours = jax.jit(stacked(lambda x: [program(x)], batch[0]))(batch)
    chex.assert_trees_all_close(
        ours, [jax.vmap(program, axis_size=5)(batch)], rtol=1e-12, atol=1e-13
    )


def test_scalars_and_vectors():
    for shape in ((), (3,)):
        batch = jnp.arange(2.0 * np.prod(shape, dtype=int)).reshape(2, *shape)
        (image,) = stacked(lambda x: [jnp.cos(x) + jnp.sum(x)], batch[0])(batch)
        chex.assert_trees_all_close(
            image, jax.vmap(lambda x: jnp.cos(x) + jnp.sum(x))(batch)
        )
