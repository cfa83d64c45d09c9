import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hessopt.trees.vectors import ravel, solve_dtype, unravel

TREE = {
    "a": jnp.arange(6.0).reshape(2, 3),
    "b": jnp.asarray(7.0),
    "empty": jnp.zeros((0, 2)),
    "c": jnp.ones(2),
}


def test_a_real_tree_is_raveled_as_jax_does():
    np.testing.assert_array_equal(ravel(TREE), ravel_pytree(TREE)[0])


def test_unravel_is_the_inverse():
    tree = TREE | {
        "z": jnp.array([1.0 + 2.0j, 3.0 - 1.0j]),
        "half": jnp.ones(3, jnp.bfloat16),
    }
    vector = ravel(tree)
    assert vector.shape == (6 + 1 + 0 + 2 + 4 + 3,)
    back = unravel(vector, tree)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_complex_leaves_count_as_real_parts_then_imaginary_parts():
    np.testing.assert_array_equal(
        ravel(jnp.array([1.0 + 2.0j, 3.0 + 4.0j])), [1.0, 3.0, 2.0, 4.0]
    )


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float32"], "float32"),
        (["bfloat16"], "float32"),
        (["float16", "bfloat16"], "float32"),
        (["float64", "bfloat16"], "float64"),
        (["complex64"], "float32"),
        (["complex128"], "float64"),
        ([], "float32"),
    ],
)
def test_solves_run_in_at_least_float32(dtypes, expected):
    assert solve_dtype([jnp.zeros(2, dtype) for dtype in dtypes]) == expected
