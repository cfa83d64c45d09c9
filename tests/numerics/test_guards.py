"""Oracles: the quotient where it exists, and finite derivatives where it does not."""

import jax
import jax.numpy as jnp
import numpy as np

from hessopt.numerics.guards import divide, or_one, select, zero_unless

X, Y = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 0.0, -2.0])


def test_divides_where_it_may_and_never_looks_at_the_divisor_elsewhere():
    np.testing.assert_array_equal(divide(X, Y, Y > 0), [0.25, 0.0, 0.0])
    np.testing.assert_array_equal(divide(X, Y, Y != 0, 7.0), [0.25, 7.0, -1.5])
    slopes = jax.grad(lambda y: jnp.sum(divide(X, y, y != 0)))(Y)
    np.testing.assert_array_equal(slopes, [-1 / 16, 0.0, -0.75])


def test_or_one_keeps_what_is_positive():
    np.testing.assert_array_equal(or_one(Y), [4.0, 1.0, 1.0])


def test_select_chooses_whole_trees():
    new, old = {"a": X, "b": jnp.int32(1)}, {"a": Y, "b": jnp.int32(2)}
    for condition, expected in ((True, new), (False, old)):
        jax.tree.map(
            np.testing.assert_array_equal,
            select(jnp.asarray(condition), new, old),
            expected,
        )


def test_zero_unless_keeps_trees_and_dtypes():
    tree = {"a": X.astype(jnp.float32), "b": X * 1j}
    kept = zero_unless(jnp.asarray(True), tree)
    none = zero_unless(jnp.asarray(False), {"a": tree["a"] * jnp.nan, "b": tree["b"]})
    partly = zero_unless(Y > 0, tree)
    for name, leaf in tree.items():
        np.testing.assert_array_equal(kept[name], leaf)
        np.testing.assert_array_equal(none[name], jnp.zeros(3))
        np.testing.assert_array_equal(partly[name], leaf * jnp.array([1, 0, 0]))
        assert kept[name].dtype == none[name].dtype == leaf.dtype
