import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessopt.trees import stacks, vectors

M = 3
SHAPES = {"matrix": (3, 4), "scalar": (), "empty": (0, 2), "vector": (5,)}
DTYPES = [jnp.float32, jnp.float64, jnp.complex64, jnp.bfloat16]


def tree(dtype, *leading, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(shape):
        x = rng.normal(size=(2, *leading, *shape))
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        return jnp.asarray(x[0] + 1j * x[1] if is_complex else x[0], dtype)

    return {name: leaf(shape) for name, shape in SHAPES.items()}


def columns(stack):
    """A stack as the matrix `(n, 2 m)`, in double precision."""
    wide = np.complex128 if jnp.iscomplexobj(stack["vector"]) else np.float64
    parts = [np.asarray(x, wide).reshape(2 * M, -1) for x in stack.values()]
    return np.concatenate(parts, axis=1).T


def vector(tree):
    return np.concatenate([np.ravel(np.asarray(x)) for x in tree.values()])


@pytest.fixture(params=[0, 6, 2**16], ids=["large", "mixed", "small"])
def _sizes(request, monkeypatch):
    """The programs for large leaves and for small ones."""
    monkeypatch.setattr(vectors, "LARGE", request.param)


@pytest.mark.usefixtures("_sizes")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_products_and_combinations_are_those_of_the_matrix(dtype):
    like = jnp.float32 if dtype == jnp.bfloat16 else dtype
    stack, x, y = tree(dtype, M, 2), tree(like, seed=1), tree(like, seed=2)
    zero, A = jnp.zeros((M, 2), jnp.finfo(like).dtype), columns(stack)
    for found, v in zip(stacks.products(zero, stack, x, y), (x, y), strict=True):
        assert found.dtype == zero.dtype
        exact = (A.T @ vector(v).conj()).real.reshape(M, 2)
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)

    weights = jnp.arange(2.0 * M, dtype=zero.dtype).reshape(M, 2)
    found = stacks.combination(stack, weights)
    exact = A @ np.arange(2.0 * M)
    np.testing.assert_allclose(vector(found), exact, rtol=1e-5, atol=1e-5)
    assert jax.tree.map(jnp.shape, found) == SHAPES
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(like)}


def test_a_stack_without_leaves_has_products_of_zero():
    zero = jnp.zeros((M, 2))
    (found,) = stacks.products(zero, {}, {})
    np.testing.assert_array_equal(found, zero)
    assert stacks.combination({}, zero) == {}


@pytest.mark.parametrize("slot", range(M))
def test_a_pair_is_written_into_its_slot_if_it_may_be(slot):
    stack, s, y = tree(jnp.bfloat16, M, 2), tree(jnp.float32), tree(jnp.float32, seed=1)
    write = jax.jit(stacks.write)
    kept = write(stack, jnp.int32(slot), (s, y), jnp.asarray(False))
    written = write(stack, jnp.int32(slot), (s, y), jnp.asarray(True))
    for name in SHAPES:
        np.testing.assert_array_equal(kept[name], stack[name])
        expected = stack[name].at[slot, 0].set(s[name].astype(jnp.bfloat16))
        expected = expected.at[slot, 1].set(y[name].astype(jnp.bfloat16))
        np.testing.assert_array_equal(written[name], expected)


def test_leaves_are_parted_by_their_size(monkeypatch):
    monkeypatch.setattr(vectors, "LARGE", 5)
    stack, x = tree(jnp.float32, M, 2), tree(jnp.float32)
    shapes = [
        [[leaf.shape for leaf in leaves] for leaves in part]
        for part in stacks.by_size(stack, x)
    ]
    # in the order of the names
    assert shapes[0] == [[(M, 2, 0, 2), (M, 2)], [(0, 2), ()]]
    assert shapes[1] == [[(M, 2, 3, 4), (M, 2, 5)], [(3, 4), (5,)]]
