"""Oracle: the objective over the whole batch at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt
from hessopt import composite, microbatched
from tests.marks import slow_if
from tests.problems import init_mlp, mlp

X = jax.random.normal(jax.random.key(0), (24, 5))
Y = jax.random.normal(jax.random.key(1), (24, 2))
PARAMS = init_mlp(0, (5, 6, 2))


def loss(params, x, y, weight=1.0, *, penalty):
    return weight * jnp.mean((mlp(params, x) - y) ** 2) + penalty * optax.tree.norm(
        params, squared=True
    )


OPTIMIZERS = {
    "lbfgs": hessopt.lbfgs,
    "newton_cg": lambda: hessopt.newton_cg(rematerialize=True),
    "generalized_newton": lambda: hessopt.generalized_newton(optax.sgd(0.1)),
    "grouped_newton": lambda: hessopt.grouped_newton(optax.sgd(0.1)),
}


@pytest.mark.parametrize(
    "name", slow_if(lambda name: name != "generalized_newton", OPTIMIZERS)
)
def test_an_optimizer_sees_the_whole_batch(name):
    tx = OPTIMIZERS[name]()
    data = {"x": X, "y": Y, "weight": 2.0, "penalty": 1e-3}
    ends = []
    for value_fn in (loss, microbatched(loss, 4, over=("x", "y"))):
        ends.append(hessopt.minimize(value_fn, PARAMS, tx, data=data, max_steps=3))
    for a, b in zip(*(jax.tree.leaves(end.params) for end in ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)
    assert ends[0].evaluations == ends[1].evaluations


def test_memory_is_that_of_a_part():
    x, y, params = jnp.ones((4096, 5)), jnp.ones((4096, 2)), init_mlp(0, (5, 64, 64, 2))

    def memory(value_fn):
        program = jax.jit(jax.grad(value_fn)).lower(params, x, y, penalty=0.0).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert memory(microbatched(loss, 16, over=("x", "y"))) < memory(loss) / 5


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError,
        match=r"count must divide the length of the data to split .*, got 5 and",
    ):
        microbatched(loss, 5, over=("x", "y"))(PARAMS, X, Y, penalty=0.0)
    with pytest.raises(ValueError, match="count must be an int, at least 1, got 0"):
        microbatched(loss, 0)
    with pytest.raises(ValueError, match="over must name arguments of value_fn"):
        microbatched(loss, 2, over=("z",))
    with pytest.raises(TypeError, match="parts of a composite"):
        microbatched(composite(mlp, jnp.sum), 2)
