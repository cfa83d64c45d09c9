import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt
from hessopt.kinds.reports import evaluations, failed, reports


def loss(params):
    return sum(jnp.sum((leaf - 1.0) ** 2 + leaf**4) for leaf in jax.tree.leaves(params))


PARAMS = {"a": jnp.array([3.0, -2.0]), "b": jnp.array(0.5)}


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
    found = reports(state, search.init(PARAMS))
    np.testing.assert_equal(int(evaluations(found)), len(made))


def test_an_update_that_waits_has_neither_failed_nor_evaluated():
    tx = optax.MultiSteps(hessopt.newton(), 2)
    value, grad = jax.value_and_grad(loss)(PARAMS)
    state, told = tx.init(PARAMS), []
    for _ in range(4):
        _, new = tx.update(grad, state, PARAMS, value=value, grad=grad, value_fn=loss)
        told.append(
            (bool(failed(reports(new, state))), int(evaluations(reports(new, state))))
        )
        state = new
    assert told == [(False, 0), (False, 1)] * 2


@pytest.mark.parametrize(("failure", "expected"), [(jnp.nan, True), (1.0, False)])
def test_a_direction_has_failed_where_its_status_says_so(failure, expected):
    tx = hessopt.scale_by_newton()
    old = tx.init(PARAMS)
    _, new = tx.update(
        jax.grad(loss)(PARAMS), old, PARAMS, value_fn=lambda p: failure * loss(p)
    )
    assert failed(reports(new, old)) == expected
    assert evaluations(reports(new, old)) == 0
    assert reports((), ()) == []


def test_what_is_not_finite_has_failed_though_it_is_not_counted_and_a_pair_is_counted():
    tx = hessopt.lbfgs(same_batch_pairs=True)
    old, grad = tx.init(PARAMS), jax.grad(loss)(PARAMS)
    update = lambda grad, state: tx.update(
        grad, state, PARAMS, value=loss(PARAMS), grad=grad, value_fn=loss
    )[1]
    spoilt = update(jax.tree.map(lambda g: jnp.inf * g, grad), old)
    assert spoilt[0].count == old[0].count
    assert failed(reports(spoilt, old))
    direction = hessopt.scale_by_lbfgs(same_batch_pairs=True)
    _, state = direction.update(grad, direction.init(PARAMS), PARAMS, value_fn=loss)
    found = reports(state, direction.init(PARAMS))
    assert evaluations(found) == 1
    assert not failed(found)


@pytest.mark.parametrize("kind", ["generalized_newton", "grouped_newton"])
def test_a_rate_does_not_count_its_evaluations(kind):
    tx = getattr(hessopt, kind)(optax.sgd(1.0))
    old = tx.init(PARAMS)
    _, new = tx.update(jax.grad(loss)(PARAMS), old, PARAMS, value_fn=loss)
    assert evaluations(reports(new, old)) == -1


def test_subsampled_counts_the_evaluations_of_the_blocks_it_draws():
    tx = hessopt.subsampled(
        hessopt.trust_region_newton(), probability=1.0, blocks="leaf"
    )
    old = tx.init(PARAMS)
    _, new = tx.update(
        jax.grad(loss)(PARAMS), old, PARAMS, value=loss(PARAMS), value_fn=loss
    )
    of_blocks = [int(state.info.evaluations) for state in new.inner.values()]
    assert int(new.info.evaluations) == sum(of_blocks) >= 2
