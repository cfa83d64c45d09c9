import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import hessopt
from hessopt import value_and_grad_from_state


def loss(params, scale=1.0):
    return scale * sum(
        jnp.sum((leaf - 1.0) ** 2 + leaf**4) for leaf in jax.tree.leaves(params)
    )


ZOOM = optax.chain(optax.scale(-1.0), optax.scale_by_zoom_linesearch(20))
# names that optax's own look-up stumbles on
PARAMS = {"value": jnp.array([3.0, -2.0]), "grad": jnp.array(0.5)}


PARTIAL = optax.masked(
    optax.scale_by_zoom_linesearch(20), {"value": True, "grad": False}
)


def stepped(tx):
    value, grad = jax.value_and_grad(loss)(PARAMS)
    updates, state = tx.update(
        grad, tx.init(PARAMS), PARAMS, value=value, grad=grad, value_fn=loss
    )
    return optax.apply_updates(PARAMS, updates), state


@pytest.mark.parametrize("tx", [ZOOM, hessopt.newton()], ids=["zoom", "newton"])
def test_what_the_search_accepted_is_reused_and_nothing_evaluated(tx):
    params, state = stepped(tx)

    def poisoned(params):
        return loss(params) + jnp.nan

    value, grad = jax.jit(lambda p, s: value_and_grad_from_state(poisoned)(p, state=s))(
        params, state
    )
    chex.assert_trees_all_close((value, grad), jax.value_and_grad(loss)(params))


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        # keeps no gradient
        optax.chain(optax.scale(-1.0), optax.scale_by_backtracking_linesearch(20)),
        optax.chain(
            optax.scale(-1.0),
            optax.masked(
                optax.scale_by_zoom_linesearch(20), {"value": True, "grad": False}
            ),
        ),
        hessopt.newton(linesearch=optax.scale_by_backtracking_linesearch(20)),
    ],
    ids=["no search", "no gradient", "part of the parameters", "newton"],
)
def test_without_a_kept_pair_it_evaluates(tx):
    state = tx.init(PARAMS)
    pair = value_and_grad_from_state(loss)(PARAMS, state=state)
    chex.assert_trees_all_close(pair, jax.value_and_grad(loss)(PARAMS))


def test_a_fresh_state_has_nothing_to_reuse_and_data_is_passed_on():
    pair = jax.jit(lambda p, s: value_and_grad_from_state(loss)(p, scale=3.0, state=s))(
        PARAMS, ZOOM.init(PARAMS)
    )
    chex.assert_trees_all_close(pair, jax.value_and_grad(loss)(PARAMS, 3.0))
