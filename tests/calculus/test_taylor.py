import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hessopt import restriction, taylor
from tests.marks import needs_explicit, slow_if


def data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def tree(*shapes):
    return [0.5 * data(*shape, seed=i + 1) for i, shape in enumerate(shapes)]


def mlp(params):
    h, targets = data(11, 4), jax.nn.softmax(data(11, 3, seed=7))
    for i in range(0, len(params), 2):
        h = h @ params[i] + params[i + 1]
        h = jnp.tanh(h) if i + 2 < len(params) else h
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(h), axis=-1))


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(3, (3, 3), param_dtype=float)(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(4, (3, 3), param_dtype=float)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        return nn.Dense(3, param_dtype=float)(x)


def cnn(params):
    return jnp.mean((Cnn().apply(params, data(5, 8, 8, 1)) - data(5, 3, seed=3)) ** 2)


def gru(params):
    W, U, b, out = params

    def step(h, x):
        z, r = jnp.split(jax.nn.sigmoid(x @ W[0] + h @ U[0] + b[0]), 2, axis=-1)
        new = jnp.tanh(x @ W[1, :, :4] + (r * h) @ U[1, :, :4])
        return (1 - z) * h + z * new, None

    h, _ = jax.lax.scan(step, jnp.zeros((6, 4)), data(7, 6, 3))
    return jnp.mean((h @ out - data(6, seed=5)) ** 2)


def attention(params):
    Q, K, V, out, scale, bias = params
    x = data(2, 5, 6)
    weights = jax.nn.softmax(jnp.einsum("bid,bjd->bij", x @ Q, x @ K) / 6**0.5)
    x = x + jnp.einsum("bij,bjd->bid", weights, x @ V) @ out
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(
        x.var(-1, keepdims=True) + 1e-5
    ) * scale + bias
    return jnp.mean(jnp.sin(x) ** 2)


def pinn(params):
    def u(x):
        h = jnp.tanh(params[0].T @ x + params[1])
        return params[2] @ jnp.tanh(params[3] @ h)

    residual = lambda x: jnp.trace(jax.hessian(u)(x)) - u(x) ** 3
    return jnp.mean(jax.vmap(residual)(data(9, 2)) ** 2)


def pieces(params):
    """What is not smooth, and what is not arithmetic."""
    a, b, c = params
    h = jnp.where(a > 0, jnp.exp(a), jnp.sin(a) * b)
    h = (
        jnp.abs(h)
        + jax.nn.relu(b)
        + jnp.sort(a * c, axis=0)
        + jnp.maximum(h, c) * jnp.minimum(b, c)
    )
    h = h.at[jnp.array([2, 0])].add(c[:2] ** 2)
    h = h.at[jnp.array([1])].set(jnp.cumsum(h, axis=0)[3])
    picked = jax.nn.logsumexp(h[jnp.array([0, 3, 3])], axis=0) / (1.0 + jnp.sum(h**2))
    return (
        jnp.sum(picked * jnp.clip(c[1:4], -0.4, 0.4))
        + jnp.prod(jnp.max(jnp.exp(b), axis=1))
        + jnp.linalg.norm(h)
    )


def shared(params):
    """One tensor in two places, one variable on both sides of a product, a constant
    factor, a group without effect."""
    a, b, unused = params
    h = jnp.tanh(data(5, 4) @ a) @ a.T
    return (
        jnp.sum(h * h)
        + jnp.vdot(b, b) * jnp.sum(h[0])
        + jnp.sum(jax.lax.stop_gradient(b) * b)
        + 0.0 * jnp.sum(unused)
    )


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvp(lambda x, t: (straight_through(x[0]), t[0] * jnp.cos(x[0])))


def calls(params):
    """Programs in programs, and rules that must not be looked into."""
    a, b = params
    inner = jax.jit(lambda x, y: jnp.sin(x) * y)
    kept = jax.checkpoint(lambda x: jnp.exp(inner(x, x)))
    h = (
        kept(a)
        + straight_through(3 * b) * inner(a, b)
        + jax.jit(jnp.tanh)(jax.jit(jnp.tanh)(a))
    )
    h = jax.lax.cond(
        jnp.sum(b) > 0, lambda x: jnp.sin(x) * b, lambda x: jnp.cos(x) ** 2, h
    )
    # a loop off the differentiated path
    count = jax.lax.while_loop(lambda n: n < 3, lambda n: n + 1, jnp.sum(a > 100))
    held = jax.lax.while_loop(
        lambda x: x < 3, lambda x: 2 * x + 1, jax.lax.stop_gradient(jnp.sum(a**2))
    )
    turns = jax.lax.while_loop(
        lambda x: x[0] < jnp.sum(a**2), lambda x: (x[0] + 1, 2 * x[1]), (0.0, 1.0)
    )[1]
    return jnp.sum(h) * count * held * turns + jnp.sum(
        jnp.real(jnp.fft.fft(a + 1j * b[:4]) ** 2)
    )


def implicit(params):
    """The solution of a linear system, by the rule that JAX has for it."""
    a, b = params
    B = data(4, 4)
    matrix = lambda v: B.T @ (B @ v) + jnp.exp(a) * v
    x, _ = jax.scipy.sparse.linalg.cg(matrix, jnp.sin(b), tol=1e-15, maxiter=20)
    return jnp.sum(x**3)


def complex_leaf(params):
    (z,) = params
    return jnp.sum(jnp.abs(jnp.exp(z * z)) ** 2) + jnp.sum(jnp.real(z) ** 3)


MODELS = {
    "mlp": (mlp, tree((4, 5), (5,), (5, 5), (5,), (5, 3), (3,))),
    "cnn": (cnn, Cnn().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))),
    "gru": (gru, tree((2, 3, 8), (2, 4, 8), (2, 8), (4,))),
    "attention": (attention, tree((6, 6), (6, 6), (6, 6), (6, 6), (6,), (6,))),
    "pinn": (pinn, tree((2, 4), (4,), (3,), (3, 4))),
    "pieces": (pieces, tree((4, 4), (4, 4), (4, 4))),
    "shared": (shared, tree((4, 3), (2,), (2,))),
    "calls": (calls, tree((4,), (4,))),
    "implicit": (implicit, tree((4,), (4,))),
    "complex": (complex_leaf, [data(3) + 1j * data(3, seed=2)]),
}


def steps(params):
    return jax.tree.map(lambda leaf: jnp.cos(7 * leaf) / leaf.size**0.5, params)


@functools.partial(jax.jit, static_argnums=(0, 3))
def oracle(value_fn, params, updates, groups):
    """The terms by JAX's own derivatives of the restricted objective."""
    phi = restriction(value_fn, params, updates, groups=groups)
    count = len(jax.tree.leaves(params)) if groups == "leaf" else 1
    zero = jnp.zeros(count)
    along = lambda s: lambda eta: phi(zero.at[s].set(eta))
    third = [jax.jacfwd(jax.jacfwd(jax.jacfwd(along(s))))(0.0) for s in range(count)]
    return phi(zero), jax.grad(phi)(zero), jax.hessian(phi)(zero), jnp.stack(third)


def assert_same(terms, exact, rtol=1e-11):
    for found, expected in zip(terms, exact, strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * scale)


LARGE = ("gru", "attention", "pinn")
"""Programs whose derivatives compile for long, left to the slow suite."""


@pytest.mark.parametrize("name", slow_if(LARGE.__contains__, MODELS))
def test_it_equals_the_derivatives_of_the_restriction(name):
    value_fn, params = MODELS[name]
    exact = oracle(value_fn, params, steps(params), "leaf")
    assert_same(taylor(value_fn, params, steps(params), groups="leaf"), exact)


@pytest.mark.parametrize("name", slow_if(LARGE.__contains__, ["mlp", "gru", "complex"]))
def test_rows_a_few_at_a_time_are_the_same(name):
    value_fn, params = MODELS[name]
    exact = oracle(value_fn, params, steps(params), "leaf")
    assert_same(
        taylor(value_fn, params, steps(params), groups="leaf", chunk_size=3), exact
    )
    assert_same(
        taylor(value_fn, params, steps(params), groups="leaf", chunk_size=1, order=2)[
            :3
        ],
        exact[:3],
    )


def test_lower_orders_are_parts_of_higher_ones():
    value_fn, params = MODELS["mlp"]
    exact = oracle(value_fn, params, steps(params), "all")
    for order in (1, 2, 3):
        terms = taylor(value_fn, params, steps(params), order=order)
        assert [term is None for term in terms] == [i > order for i in range(4)]
        assert_same(terms[: order + 1], exact[: order + 1])


def test_groups_are_sums_of_leaves():
    value_fn, params = MODELS["mlp"]
    _, gradient, hessian, _ = oracle(value_fn, params, steps(params), "leaf")
    labels = [0, 1, 0, 1, 0, 1]
    terms = taylor(value_fn, params, steps(params), groups=labels)
    sums = np.eye(2)[labels]
    np.testing.assert_allclose(terms.gradient, gradient @ sums, rtol=1e-11)
    np.testing.assert_allclose(terms.hessian, sums.T @ hessian @ sums, rtol=1e-11)
    phi = restriction(value_fn, params, steps(params), groups=labels)
    third = jnp.diagonal(
        jnp.diagonal(jax.jit(jax.jacfwd(jax.hessian(phi)))(jnp.zeros(2)))
    )
    np.testing.assert_allclose(terms.third, third, rtol=1e-10)


def test_it_is_batched_and_jitted():
    value_fn, params = MODELS["mlp"]
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), params)
    fun = lambda p: taylor(value_fn, p, steps(p), groups="leaf")
    batched = jax.jit(jax.vmap(fun))(many)
    each = jax.lax.map(fun, many)
    chex.assert_trees_all_close(batched, each, rtol=1e-10, atol=1e-14)


def test_half_precision_is_right_to_its_rounding():
    def mixed(params):
        W, v = params
        h = jnp.tanh(data(64, 4).astype(jnp.bfloat16) @ W.astype(jnp.bfloat16))
        return jnp.mean(jnp.square(h.astype(jnp.float32) @ v - 0.3))

    params = [leaf.astype(jnp.float32) for leaf in tree((4, 5), (5,))]
    exact = oracle(
        lambda p: jnp.mean((jnp.tanh(data(64, 4) @ p[0]) @ p[1] - 0.3) ** 2),
        tree((4, 5), (5,)),
        steps(tree((4, 5), (5,))),
        "leaf",
    )
    terms = taylor(mixed, params, steps(params), groups="leaf")
    assert {term.dtype for term in terms} == {jnp.dtype("float32")}
    assert_same(terms, exact, rtol=0.03)
    small = [leaf.astype(jnp.bfloat16) for leaf in params]
    assert_same(taylor(mixed, small, steps(small), groups="leaf"), exact, rtol=0.1)


def test_sharded_parameters_and_data_give_the_same():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    place = lambda x, *axes: jax.device_put(
        x, NamedSharding(mesh, PartitionSpec(*axes))
    )
    x, params = data(8, 4), tree((4, 6), (6,), (6,))

    def value_fn(params, x):
        return jnp.mean(jnp.tanh(x @ params[0] + params[1]) @ params[2] ** 2)

    fun = jax.jit(
        lambda p, x: taylor(lambda p: value_fn(p, x), p, steps(p), groups="leaf")
    )
    spread = [
        place(params[0], None, "model"),
        place(params[1], "model"),
        place(params[2], "model"),
    ]
    chex.assert_trees_all_close(
        fun(spread, place(x, "data")), fun(params, x), rtol=1e-12
    )


@needs_explicit
@pytest.mark.parametrize("split", [None, "model"])
def test_explicit_sharding_gives_the_same(split):
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=explicit, devices=jax.devices()[:4]
    )
    x, params = data(8, 4), tree((4, 6), (6,), (6,))

    def value_fn(params, x):
        return jnp.mean(
            jnp.sum(jnp.tanh(x @ params[0] + params[1]) * params[2] ** 2, axis=1) ** 2
        )

    fun = jax.jit(
        lambda p, x: taylor(lambda p: value_fn(p, x), p, steps(p), groups="leaf")
    )
    place = lambda x, *axes: jax.device_put(
        x, NamedSharding(mesh, PartitionSpec(*axes))
    )
    with jax.set_mesh(mesh):
        spread = [
            place(params[0], None, split),
            place(params[1], split),
            place(params[2], split),
        ]
        chex.assert_trees_all_close(
            fun(spread, place(x, "data")), fun(params, x), rtol=1e-12
        )


@jax.custom_vjp
def reversed_only(x):
    return jnp.sin(x)


reversed_only.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x) * 1.0,))


def test_a_reverse_rule_of_its_own_is_good_for_two_orders():
    def inside(params):
        h, _ = jax.lax.scan(
            lambda h, x: (reversed_only(h + x), None), params[0], data(3, 4)
        )
        return jnp.sum(reversed_only(h * params[1]) ** 2)

    def plain(params):
        h, _ = jax.lax.scan(lambda h, x: (jnp.sin(h + x), None), params[0], data(3, 4))
        return jnp.sum(jnp.sin(h * params[1]) ** 2)

    params = tree((4,), (4,))
    exact = oracle(plain, params, steps(params), "leaf")
    assert_same(
        taylor(inside, params, steps(params), groups="leaf", order=2)[:3], exact[:3]
    )
    with pytest.raises(TypeError, match=r"reversed_only has a jax.custom_vjp"):
        taylor(inside, params, steps(params), groups="leaf")


@jax.custom_vjp
def clipped_backwards(x):
    return x


clipped_backwards.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))


def test_a_reverse_rule_need_not_be_linear():
    params = tree((4,), (4,))
    # never clipped
    value_fn = lambda p: jnp.sum(clipped_backwards(p[0]) * jnp.sin(p[1]) ** 2)
    exact = oracle(
        lambda p: jnp.sum(p[0] * jnp.sin(p[1]) ** 2), params, steps(params), "leaf"
    )
    assert_same(
        taylor(value_fn, params, steps(params), groups="leaf", order=2)[:3], exact[:3]
    )


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_leaves_that_are_not_floating_are_constants(chunk_size):
    value_fn = lambda p: jnp.sum(jnp.where(p["mask"], p["x"] ** 3, 0.0)) * p["count"]
    params = {
        "count": jnp.array(2),
        "mask": jnp.array([True, False]),
        "x": jnp.array([0.5, 2.0]),
    }
    updates = {"count": jnp.array(1), "mask": jnp.array([True, True]), "x": jnp.ones(2)}
    terms = taylor(value_fn, params, updates, groups="leaf", chunk_size=chunk_size)
    np.testing.assert_allclose(terms.gradient, [0, 0, 1.5])
    np.testing.assert_allclose(terms.hessian, np.diag([0, 0, 6.0]))
    np.testing.assert_allclose(terms.third, [0, 0, 12.0])
    phi = restriction(value_fn, params, updates, groups="leaf")
    np.testing.assert_allclose(jax.grad(phi)(jnp.zeros(3)), terms.gradient)


@jax.tree_util.register_pytree_node_class
class Box:
    def __init__(self, content):
        self.content = content

    def tree_flatten(self):
        return (self.content,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_parameters_may_be_of_any_class():
    terms = taylor(lambda p: jnp.sum(p.content**2), Box(jnp.ones(2)), Box(jnp.ones(2)))
    np.testing.assert_allclose(terms.hessian, [[4.0]])


def test_no_parameters_give_no_terms():
    for chunk_size in (None, 1):
        value, *terms = taylor(
            lambda p: jnp.asarray(3.0), {}, {}, groups="leaf", chunk_size=chunk_size
        )
        assert value == 3.0
        assert [term.shape for term in terms] == [(0,), (0, 0), (0,)]


def test_a_constant_objective_has_no_terms():
    terms = taylor(
        lambda p: jnp.asarray(2.0), tree((2,), (3,)), tree((2,), (3,)), groups="leaf"
    )
    assert terms.value == 2.0
    assert not any(np.any(term) for term in terms[1:])


def test_wrong_arguments_are_named():
    params = tree((2,), (3,))
    quadratic = lambda p: sum(jnp.vdot(x, x) for x in p)
    with pytest.raises(ValueError, match="order must be 1, 2 or 3, got 4"):
        taylor(quadratic, params, params, order=4)
    with pytest.raises(
        ValueError, match="chunk_size must be an int, at least 1, got 0"
    ):
        taylor(quadratic, params, params, chunk_size=0)
    with pytest.raises(ValueError, match="updates must be a tree like params"):
        taylor(quadratic, params, tree((2,), (4,)))
    with pytest.raises(
        TypeError, match=r"value_fn must return a real scalar, got float64\[2\]"
    ):
        taylor(lambda p: p[0], params, params)
    with pytest.raises(ValueError, match="groups must be one of"):
        restriction(quadratic, params, params, groups="leaves")


def deep(layers):
    """A network of tanh layers, its objective and its parameters, in float32."""
    shapes = [s for _ in range(layers) for s in ((16, 16), (16,))]
    params = [leaf.astype(jnp.float32) for leaf in tree(*shapes)]
    x = data(64, 16).astype(jnp.float32)

    def value_fn(params):
        h = x
        for W, b in zip(params[::2], params[1::2], strict=True):
            h = jnp.tanh(h @ W + b)
        return jnp.mean(h**2)

    return value_fn, params


def lowered(layers, order):
    value_fn, params = deep(layers)
    return jax.jit(
        lambda p, u: taylor(value_fn, p, u, groups="leaf", order=order)
    ).lower(params, steps(params))


@pytest.mark.parametrize("order", [2, 3])
def test_the_sweep_forgets_as_it_goes(order):
    """Memory is that of a few stacks of tangents at the last layer, not of all layers,
    and programs grow linearly."""
    programs = {layers: lowered(layers, order) for layers in (4, 12)}
    lines = {
        layers: len(program.as_text().splitlines())
        for layers, program in programs.items()
    }
    assert lines[12] < 3.3 * lines[4]
    stack = 24 * 64 * 16 * 4
    memory = programs[12].compile().memory_analysis()
    if memory is not None:
        assert memory.temp_size_in_bytes < (5 if order == 2 else 8) * stack
