import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt
from hessopt import value_and_grad_from_state
from hessopt.kinds.line_searches import evaluations, tried


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


@pytest.mark.parametrize(
    "search",
    [optax.scale_by_zoom_linesearch(20), optax.scale_by_backtracking_linesearch(20)],
)
def test_the_evaluations_of_a_search_are_counted(search):
    made = []

    def counted(params):
        jax.debug.callback(lambda: made.append(1))
        return loss(params)

    grad = jax.grad(loss)(PARAMS)
    step = jax.tree.map(lambda g: -g, grad)
    _, state = search.update(
        step,
        search.init(PARAMS),
        PARAMS,
        value=loss(PARAMS),
        grad=grad,
        value_fn=counted,
    )
    jax.effects_barrier()
    np.testing.assert_equal(int(evaluations(state)), len(made))


def test_an_update_that_waits_has_neither_tried_nor_evaluated():
    tx = optax.MultiSteps(hessopt.newton(), 2)
    value, grad = jax.value_and_grad(loss)(PARAMS)
    state, told = tx.init(PARAMS), []
    for _ in range(4):
        _, new = tx.update(grad, state, PARAMS, value=value, grad=grad, value_fn=loss)
        told.append(
            (bool(tried(new, state, asked=True)), int(evaluations(new, state)) > 0)
        )
        state = new
    assert told == [(False, False), (True, True)] * 2


@pytest.mark.parametrize(("failure", "expected"), [(jnp.nan, True), (1.0, False)])
def test_what_evaluates_no_trials_has_tried_where_it_tells_of_a_failure(
    failure, expected
):
    tx = hessopt.scale_by_newton()
    old = tx.init(PARAMS)
    _, new = tx.update(
        jax.grad(loss)(PARAMS), old, PARAMS, value_fn=lambda p: failure * loss(p)
    )
    assert tried(new, old, asked=True) == expected
    assert tried((), (), asked=expected) == expected  # it tells nothing


def test_what_is_not_finite_has_tried_though_it_is_not_counted_and_a_pair_is_no_trial():
    tx = hessopt.lbfgs(same_batch_pairs=True)
    old, grad = tx.init(PARAMS), jax.grad(loss)(PARAMS)
    update = lambda grad, state: tx.update(
        grad, state, PARAMS, value=loss(PARAMS), grad=grad, value_fn=loss
    )[1]
    spoilt = update(jax.tree.map(lambda g: jnp.inf * g, grad), old)
    assert spoilt[0].count == old[0].count
    assert tried(spoilt, old, asked=True)
    direction = hessopt.scale_by_lbfgs(same_batch_pairs=True)
    _, state = direction.update(grad, direction.init(PARAMS), PARAMS, value_fn=loss)
    assert evaluations(state) == 1
    assert not tried(state, direction.init(PARAMS), asked=True)
