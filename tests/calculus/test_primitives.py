"""Objectives of any operation of JAX: `jax.hessian` on the raveled parameters and JAX's
own third derivatives are the oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hessopt
from hessopt import composite
from hessopt.calculus.curvature import curvature_product
from hessopt.calculus.least_squares import root
from hessopt.calculus.separability import is_diagonal
from hessopt.trees.vectors import real_leaves
from tests.marks import slow_if

RNG = np.random.default_rng(0)
PARAMS = {"W": RNG.normal(size=(3, 4)), "b": RNG.normal(size=4), "s": np.array(0.7)}
ROWS = RNG.normal(size=(5, 3))
IMAGE = RNG.normal(size=(2, 6, 5, 2))
SIGNAL = RNG.normal(size=(2, 2, 9))
STEP = jax.tree.map(lambda leaf: np.cos(3 * leaf) / leaf.size**0.5, PARAMS)


def data(array, p):
    return jnp.asarray(array, p["W"].dtype)


def hidden(p):
    return jnp.tanh(data(ROWS, p) @ p["W"] + p["b"]) * p["s"]


def spd(p):
    """A positive definite matrix with well separated eigenvalues, `(4, 4)`."""
    ramp = jnp.arange(1.0, 5, dtype=p["W"].dtype)
    return p["W"].T @ p["W"] / 4 + jnp.diag(2 * ramp + jnp.sin(p["b"])) * p["s"]


def square(p):
    ramp = jnp.arange(1.0, 5, dtype=p["W"].dtype)
    return jnp.diag(3 * ramp) + jnp.concatenate([p["W"], p["b"][None]]) * p["s"]


def convolved(p, shape, **how):
    kernel = jnp.resize(jnp.sin(p["W"]), shape) * p["b"][: shape[-1]]
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        data(IMAGE, p), kernel, dimension_numbers=names, **how
    )


def signal(p):
    kernel = jnp.resize(p["W"], (2, 2, 3)) * p["s"]
    return jax.lax.conv_general_dilated(data(SIGNAL, p), kernel, (2,), "SAME")


def pooled(p, init, combine):
    x = hidden(p)[None, ..., None]
    return jax.lax.reduce_window(x, init, combine, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")


def scanned(p):
    def body(h, x):
        h = jnp.tanh(h * p["s"] + x @ p["W"] + p["b"])
        return h, jnp.sin(h)

    return jax.lax.scan(body, p["b"], data(ROWS, p))


def repeated(p):
    body = lambda i, h: jnp.sin(h * p["s"] + p["b"] * (i + 1)) + h @ (p["W"].T @ p["W"])
    return jax.lax.fori_loop(0, 3, body, p["b"])


def branched(p):
    first = jax.lax.cond(p["s"] > 0, jnp.sin, jnp.cos, p["W"])
    branches = [jnp.sin, lambda x: x**3, jnp.exp]
    return first, jax.lax.switch(jnp.int32(1), branches, p["b"] * p["s"])


def mapped_switch(p):
    branches = [jnp.sin, lambda x: x**3 * p["s"], lambda x: jnp.exp(x) * p["b"][0]]
    return jax.vmap(lambda i, x: jax.lax.switch(i, branches, x))(
        jnp.array([0, 2, 1, 1]), p["b"]
    )


def scattered(p):
    h, i = hidden(p), jnp.array([3, 0, 3])
    return (
        h.at[i].add(p["W"] ** 2),
        h.at[i[:2]].multiply(p["W"][:2] * p["s"], unique_indices=True),
        h.at[i].max(p["W"]),
        h.at[jnp.array([1, 2])].set(p["b"] ** 2),
    )


def sliced(p):
    begin = jnp.int32(1)
    part = jax.lax.dynamic_slice(p["W"], (begin, begin), (2, 3)) * p["s"]
    return jax.lax.dynamic_update_slice(hidden(p), part**2, (begin, begin))


def moved(p):
    h = hidden(p)
    padded = jax.lax.pad(h, p["s"] ** 2, ((1, 0, 1), (-1, 2, 0)))
    joined = jnp.concatenate([h, p["W"], p["b"][None]]) * p["s"]
    turned = jnp.roll(jnp.flip(joined, 0), 2, axis=1).T.reshape(6, 6)
    return padded, turned, jnp.tile(turned, (2, 1)), jnp.stack([h, h[::-1]], 1)


def reduced(p):
    h = hidden(p)
    return (
        jnp.max(h, axis=0),
        jnp.min(h, axis=1),
        jnp.prod(h, axis=0),
        jax.nn.logsumexp(h, axis=1),
        jnp.var(h, axis=0),
        jnp.linalg.norm(h, axis=1),
        jnp.cumsum(h[::-1], axis=0),
    )


def special(p):
    a, b = jnp.exp(0.3 * p["b"]) + 0.5, jnp.exp(0.2 * p["W"]) + 0.7
    scipy = jax.scipy.special
    return (
        scipy.erf(p["W"]),
        scipy.gammaln(b),
        scipy.digamma(b),
        scipy.betaln(a, b[0]),
        scipy.ndtr(p["b"] * p["s"]),
        scipy.log_ndtr(p["b"]),
        scipy.i0e(p["b"]),
        scipy.expit(p["b"]),
        scipy.xlogy(a, b[0]),
        scipy.logit(jax.nn.sigmoid(p["b"]) * 0.9),
    )


def incomplete(p):
    # JAX differentiates these in their last argument only
    x = jax.nn.sigmoid(p["b"] * p["s"])
    gamma = jax.scipy.special.gammainc(1.5, jnp.exp(0.3 * p["W"]))
    return jax.scipy.special.betainc(1.5, 2.5, x), gamma


def activations(p):
    h = hidden(p) * 3
    names = "relu gelu silu softplus elu selu celu leaky_relu log_sigmoid mish relu6 glu squareplus hard_swish"
    every = [getattr(jax.nn, name)(h) for name in names.split()]
    return (*every, jax.nn.softmax(h), jax.nn.standardize(h, axis=0))


@jax.custom_jvp
def called_sine(x):
    return _called(np.sin, x)


@jax.custom_jvp
def called_cosine(x):
    return _called(np.cos, x)


def _called(fun, x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    outside = lambda x: fun(np.asarray(x)).astype(x.dtype)
    return jax.pure_callback(outside, shape, x, vmap_method="expand_dims")


called_sine.defjvp(lambda x, t: (called_sine(x[0]), t[0] * called_cosine(x[0])))
called_cosine.defjvp(lambda x, t: (called_cosine(x[0]), -t[0] * called_sine(x[0])))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def powered(n, x):
    return x**n


powered.defjvp(lambda n, x, t: (powered(n, x[0]), n * powered(n - 1, x[0]) * t[0]))


def complex_inside(p):
    z = jnp.exp(1j * p["W"]) * (p["b"] + 1j * p["s"])
    w = z @ z.conj().T
    return jnp.abs(w), jnp.angle(z + 3), jnp.real(z**3), jnp.imag(jnp.sqrt(z + 4))


def nested(p):
    inner = jax.jit(lambda x, y: jnp.sin(x) * jax.jit(jnp.tanh)(y))
    kept = jax.checkpoint(lambda x: jnp.exp(inner(x, p["b"])))
    named = jax.named_call(lambda x: kept(x) * p["s"], name="named")
    with jax.named_scope("scope"):
        return named(p["W"]), jax.vmap(named)(p["W"][:, None].repeat(2, 1))


def solved(p):
    A, b = spd(p), p["b"]
    x = jax.lax.custom_linear_solve(
        lambda v: A @ v, b, lambda _, r: jnp.linalg.solve(A, r), symmetric=True
    )

    def newton(f, x):
        step = lambda _, x: x - f(x) / jax.jvp(f, (x,), (jnp.ones_like(x),))[1]
        return jax.lax.fori_loop(0, 30, step, x)

    f = lambda y: y + 0.2 * jnp.sin(y) - p["W"] * p["s"]
    y = jax.lax.custom_root(
        f, jnp.zeros_like(p["W"]), newton, lambda g, y: y / g(jnp.ones_like(y))
    )
    return x, y


def randomized(p):
    key = jax.random.key(0)
    kept = jax.random.bernoulli(key, 0.6, (5, 4))
    noise = data(jax.random.normal(key, (5, 4), jnp.float64), p)
    return jnp.where(kept, hidden(p) / 0.6, 0.0) + noise * p["s"]


def segments(p):
    h, owner = hidden(p), jnp.array([0, 2, 0, 1, 2])
    hot = jax.nn.one_hot(owner, 3, dtype=h.dtype)
    return (
        jax.ops.segment_sum(h, owner, 3),
        jax.ops.segment_max(h, owner, 3),
        hot.T @ h,
        jnp.take_along_axis(h, jnp.argmax(h, 1, keepdims=True), 1),
        jnp.interp(jnp.sin(p["b"]) * 2, jnp.linspace(-3, 3, 4), p["W"][0]),
        p["b"].take(jnp.array([0, 0, 9]), mode="clip"),
    )


def products(p):
    h = jnp.stack([hidden(p), jnp.cos(hidden(p))])
    return (
        jnp.einsum("bij,bkj->bik", h, h),
        jnp.einsum("bij,jb->i", h, p["W"].T[:, :2]),
        jnp.kron(p["b"], p["W"]),
        jnp.convolve(p["b"], p["W"][0]),
        jnp.outer(p["b"], p["b"]) @ p["W"].T,
        jnp.vander(p["b"], 3),
        jnp.cross(p["W"][:, 0], p["W"][:, 1]),
    )


def entries(p):
    x, y = p["W"], p["W"][::-1] * p["s"] + p["b"]
    a = jnp.abs(y) + 0.3
    return (
        jnp.where(x > y, x**2, jnp.sin(y)),
        jnp.maximum(x, y) + jnp.clip(y, -0.5, 0.5) + jnp.abs(x),
        jnp.arctan2(x, a) + jnp.hypot(x, y),
        jnp.power(a, x) + jnp.log1p(a) + jnp.expm1(x) + jax.lax.rsqrt(a) + jnp.cbrt(a),
        jnp.sinh(x) + jnp.arcsinh(x) + jnp.arctan(y) + jnp.sinc(x) + jnp.exp2(x),
        jnp.logaddexp(x, y) + jax.lax.integer_pow(a, -2) + jnp.mod(y, 2.0),
        jnp.nan_to_num(x) + jax.lax.stop_gradient(x) * x + jnp.sign(x) * jnp.floor(y),
        jax.lax.reduce_precision(x, 11, 52) + x.astype(jnp.float32).astype(x.dtype) * 0,
    )


MODELS = {
    "fft": lambda p: (
        jnp.abs(jnp.fft.fft(p["b"] * p["s"])) ** 2,
        jnp.real(jnp.fft.fft(p["W"].T)),
    ),
    "fft of hidden": lambda p: jnp.abs(jnp.fft.fft2(hidden(p))) ** 2,
    "rfft, irfft": lambda p: jnp.fft.irfft(
        jnp.fft.rfft(hidden(p)) * jnp.fft.rfft(p["b"])
    ),
    "ifft": lambda p: jnp.imag(jnp.fft.ifft(jnp.exp(1j * hidden(p)), axis=0)),
    "fft in a scan": lambda p: jax.lax.scan(
        lambda h, _: (jnp.real(jnp.fft.fft(jnp.sin(h))) * p["s"], None),
        p["b"],
        length=2,
    )[0],
    "convolution": lambda p: convolved(
        p, (3, 2, 2, 3), window_strides=(2, 1), padding="SAME"
    ),
    "convolution, 1d": signal,
    "convolution, grouped": lambda p: convolved(
        p, (2, 2, 1, 4), window_strides=(1, 1), padding="VALID", feature_group_count=2
    ),
    "convolution, dilated": lambda p: convolved(
        p,
        (2, 2, 2, 3),
        window_strides=(1, 1),
        padding=((0, 1), (1, 1)),
        rhs_dilation=(2, 1),
        lhs_dilation=(1, 2),
    ),
    "max pooling": lambda p: pooled(p, -jnp.inf, jax.lax.max),
    "sum pooling": lambda p: pooled(p, 0.0, jax.lax.add),
    "sort": lambda p: (
        jnp.sort(hidden(p), axis=0),
        jax.lax.top_k(hidden(p), 2)[0],
        p["b"][jnp.argsort(p["b"])] * p["s"],
        jax.lax.sort((p["W"], p["W"] * p["b"]), dimension=0, num_keys=1),
    ),
    "cumulative": lambda p: (
        jnp.cumsum(hidden(p), axis=0),
        jnp.cumprod(hidden(p), axis=1),
        jax.lax.cummax(hidden(p), axis=0),
        jax.lax.cumlogsumexp(p["W"], axis=1) * p["s"],
        jax.lax.associative_scan(jnp.multiply, p["b"]),
    ),
    "scan": scanned,
    "loop": repeated,
    "branches": branched,
    "switch, mapped": mapped_switch,
    "scatter": scattered,
    "gather": lambda p: (
        hidden(p)[jnp.array([0, 4, 4]), 1:3],
        p["b"][::-1] * p["W"][jnp.array([1, 1, 0]), jnp.array([3, 3, 0])].sum(),
        jax.vmap(lambda row, i: row[i])(p["W"], jnp.array([0, 3, 1])) * p["s"],
    ),
    "dynamic slices": sliced,
    "moved": moved,
    "reductions": reduced,
    "special": special,
    "incomplete": incomplete,
    "activations": activations,
    "callback": lambda p: called_sine(p["W"] * p["s"]) + p["b"],
    "own forward rule": lambda p: powered(4, p["W"] + p["b"]) * p["s"],
    "complex inside": complex_inside,
    "nested calls": nested,
    "cholesky": lambda p: jnp.linalg.cholesky(spd(p)),
    "triangular solve": lambda p: jax.scipy.linalg.solve_triangular(
        square(p), p["W"].T, lower=True
    ),
    "solve": lambda p: (
        jnp.linalg.solve(square(p), p["W"].T),
        jnp.linalg.inv(spd(p)),
        jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(spd(p)), p["b"]),
    ),
    "determinants": lambda p: (
        jnp.linalg.det(square(p)) / 1000,
        jnp.linalg.slogdet(spd(p))[1],
        jnp.linalg.slogdet(square(p))[1],
    ),
    "eigh": lambda p: (
        jnp.linalg.eigvalsh(spd(p)),
        jnp.abs(jnp.linalg.eigh(spd(p))[1]),
    ),
    "qr": lambda p: jnp.linalg.qr(square(p)),
    "svd": lambda p: (
        jnp.linalg.svd(square(p), compute_uv=False),
        jnp.abs(jnp.linalg.svd(square(p), full_matrices=False)[0]),
    ),
    "lu": lambda p: jax.scipy.linalg.lu(square(p))[1:],
    "expm": lambda p: jax.scipy.linalg.expm(spd(p) / 8),
    "implicit solves": solved,
    "random": randomized,
    "segments": segments,
    "products": products,
    "entries": entries,
    "nothing depends on some": lambda p: (p["b"] ** 3, jnp.ones(3)),
}
FAST = ("fft", "convolution", "sort", "scan", "cholesky", "gather")


def loss_fn(outputs):
    """A sum over outputs, with a diagonal Hessian."""
    return sum(jnp.sum(jnp.cosh(z / 4 - 0.1)) for z in jax.tree.leaves(outputs))


def kernels(name, order, p):
    """All derivatives that the methods use, in one program."""
    value_fn = composite(MODELS[name], loss_fn)
    step = jax.tree.map(lambda u, leaf: jnp.asarray(u, leaf.dtype), STEP, p)
    leaves, restore = real_leaves(p)
    return {
        "hessian": hessopt.hessian(value_fn, p),
        "blocks": list(hessopt.hessian(value_fn, p, blocks="leaf").values()),
        "hvp": hessopt.hvp(value_fn, p, step),
        "gauss_newton": hessopt.hessian(value_fn, p, curvature="gauss_newton"),
        "times": curvature_product(value_fn, p, "gauss_newton")(step),
        "root": root(
            composite(lambda parts: MODELS[name](restore(parts)), loss_fn), leaves
        ),
        "taylor": hessopt.taylor(value_fn, p, step, groups="leaf", order=order)[1:],
        "newton": newton_update(value_fn, p),
    }


def newton_update(value_fn, p):
    tx = hessopt.scale_by_newton(damping=1.0, on_indefinite="none")
    return tx.update(jax.grad(value_fn)(p), tx.init(p), p, value_fn=value_fn)[0]


@functools.partial(jax.jit, static_argnums=0)
def dense(name, p):
    vector, unravel = ravel_pytree(p)
    f = lambda v: loss_fn(MODELS[name](unravel(v)))
    return jax.grad(f)(vector), jax.hessian(f)(vector)


@functools.partial(jax.jit, static_argnums=0)
def others(name, p):
    """The Gauss-Newton matrix, and the third derivatives along the step of each leaf."""
    vector, unravel = ravel_pytree(p)
    model = lambda v: ravel_pytree(MODELS[name](unravel(v)))[0]
    f = lambda v: loss_fn(model(v))
    third = []
    for leaf in ("W", "b", "s"):
        u = ravel_pytree({k: STEP[k] * float(k == leaf) for k in p})[0]
        along = lambda g, u=u: lambda v: jax.jvp(g, (v,), (u,))[1]
        third.append(along(along(along(f)))(vector))
    J, L = jax.jacfwd(model)(vector), jax.hessian(loss_fn)(model(vector))
    return J.T @ L @ J, jnp.stack(third)


def check(actual, expected, rtol, what, scale=0.0):
    actual, expected = np.asarray(actual), np.asarray(expected)
    atol = rtol * (max(scale, np.abs(expected).max()) + rtol)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=what)


def check_step(p, H, g, rtol):
    """`(H + I) p = g`, up to the rounding of a backward stable solution."""
    A, p = H + np.eye(len(H)), ravel_pytree(p)[0]
    check(A @ p, g, rtol, "newton", np.linalg.norm(A) * np.linalg.norm(p))


@pytest.mark.parametrize("name", slow_if(lambda name: name not in FAST, MODELS))
def test_the_hessian_and_the_step_of_newton_are_those_of_jax_hessian(name):
    g, H = map(np.asarray, dense(name, PARAMS))

    @jax.jit
    def ours(p):
        value_fn = lambda p: loss_fn(MODELS[name](p))
        return hessopt.hessian(value_fn, p), newton_update(value_fn, p)

    found, step = ours(jax.tree.map(jnp.asarray, PARAMS))
    check(found, H, 1e-9, "hessian")
    check_step(step, H, g, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_all_kernels_equal_the_derivatives_of_jax(name, dtype):
    g, H, G, third = map(np.asarray, (*dense(name, PARAMS), *others(name, PARAMS)))
    order = 3 if dtype == "float64" else 2
    p = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PARAMS)
    found = jax.jit(functools.partial(kernels, name, order))(p)
    rtol = 1e-9 if dtype == "float64" else 2e-3

    flat = lambda tree: ravel_pytree(tree)[0]
    u, sizes = flat(STEP), [leaf.size for leaf in jax.tree.leaves(PARAMS)]
    ends = np.cumsum(sizes)
    spans = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    check(found["hessian"], H, rtol, "hessian")
    for block, span in zip(found["blocks"], spans, strict=True):
        check(block, H[span, span], rtol, "blocks", np.abs(H).max())
    check(flat(found["hvp"]), H @ u, rtol, "hvp")
    check(found["gauss_newton"], G, rtol, "gauss_newton")
    check(flat(found["times"]), G @ u, rtol, "times")
    K, r, rest = found["root"]
    check(K.T @ K, G, rtol, "K'K")
    check(K.T @ r + rest, g, rtol, "K'r + rest", np.linalg.norm(K) * np.linalg.norm(r))
    along = np.stack([np.eye(len(u))[span].T @ u[span] for span in spans])
    check(found["taylor"][0], along @ g, rtol, "slopes", np.abs(g).max())
    check(found["taylor"][1], along @ H @ along.T, rtol, "taylor", np.abs(H).max())
    if order == 3:
        check(found["taylor"][2], third, rtol, "third")
    check_step(found["newton"], H, g, rtol)


@pytest.mark.parametrize("name", slow_if(lambda name: name not in FAST, MODELS))
def test_a_hessian_taken_for_diagonal_is_diagonal(name):
    loss = lambda p: loss_fn(MODELS[name](p))
    if is_diagonal(jax.linearize(jax.grad(loss), PARAMS)[1], PARAMS):
        H = dense(name, PARAMS)[1]
        np.testing.assert_array_equal(H, np.diag(np.diag(H)))
