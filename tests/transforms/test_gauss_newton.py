"""The directions equal dense solutions in both spaces, with every kind of J."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import hessopt
from hessopt import StepStatus
from tests.marks import needs_explicit
from tests.problems import init_mlp, mlp

RNG = np.random.default_rng(0)
SPACES = ("parameters", "samples")


def direction(tx, value_fn, params, **data):
    """One direction, compiled, and its report."""

    @jax.jit
    def update(params, state):
        value, grad = jax.value_and_grad(value_fn)(params, **data)
        grad = jax.tree.map(jnp.conj, grad)
        return tx.update(grad, state, params, value=value, value_fn=value_fn, **data)

    p, state = update(params, tx.init(params))
    return p, state.info


def linear(params, a, b):
    return a @ params - b


def half_squares(residuals):
    return 0.5 * jnp.sum(residuals**2)


LINEAR = hessopt.composite(hessopt.rowwise(linear), half_squares)


def jacobian(kind, m, n):
    J = RNG.normal(size=(m, n))
    if kind == "rank-deficient":
        J = RNG.normal(size=(m, 3)) @ RNG.normal(size=(3, n))
    if kind == "zero rows":
        J[::2] = 0.0
    return J


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("kind", ["full", "rank-deficient", "zero rows"])
@pytest.mark.parametrize(("m", "n"), [(6, 11), (13, 5)])
@pytest.mark.parametrize("space", SPACES)
def test_it_is_the_solution_of_the_normal_equations_of_least_length(
    space, m, n, kind, damping
):
    J, b, x = jacobian(kind, m, n), RNG.normal(size=m), RNG.normal(size=n)
    tx = hessopt.scale_by_gauss_newton(damping, damping_rule="constant", space=space)
    p, info = direction(tx, LINEAR, x, a=J, b=b)
    stacked = np.concatenate([J, damping**0.5 * np.eye(n)])
    r = np.concatenate([J @ x - b, np.zeros(n)])
    expected = np.linalg.lstsq(stacked, r, rcond=1e-9)[0]
    np.testing.assert_allclose(p, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(info.predicted, expected @ J.T @ (J @ x - b) / 2)
    assert info.status == StepStatus.OK


SIZES = (4, 5, 3)
PARAMS = init_mlp(0, SIZES)
N = ravel_pytree(PARAMS)[0].size
LABELS = jnp.asarray(RNG.integers(0, 3, 40))
INPUTS = jnp.asarray(RNG.normal(size=(40, 4)))
LOSSES = {
    "squares": lambda z, y: jnp.mean((z - jax.nn.one_hot(y, 3)) ** 2),
    "softmax": lambda z, y: jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(z, y)
    ),
    "logistic": lambda z, y: jnp.mean(
        optax.sigmoid_binary_cross_entropy(z, jax.nn.one_hot(y, 3))
    ),
    "coupled in a sample": lambda z, y: (
        jnp.sum((z[:, 0] - z[:, 1] * z[:, 2]) ** 2) + 0.1 * jnp.sum(jnp.exp(z))
    ),
}


def of_sample(params, x):
    return mlp(params, x[None])[0]


@pytest.mark.parametrize("m", [5, 40])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_the_newton_step_of_the_gauss_newton_matrix(loss, space, m):
    data = {"x": INPUTS[:m], "y": LABELS[:m]}
    value_fn = hessopt.composite(hessopt.rowwise(of_sample, over=["x"]), LOSSES[loss])
    tx = hessopt.scale_by_gauss_newton(1e-4, damping_rule="constant", space=space)
    p, _ = direction(tx, value_fn, PARAMS, **data)
    z = mlp(PARAMS, data["x"])
    J = jax.jacobian(lambda v: mlp(ravel_pytree(PARAMS)[1](v), data["x"]).ravel())(
        ravel_pytree(PARAMS)[0]
    )
    in_outputs = lambda flat: LOSSES[loss](flat.reshape(z.shape), data["y"])
    L, slopes = jax.hessian(in_outputs)(z.ravel()), jax.grad(in_outputs)(z.ravel())
    w, V = jnp.linalg.eigh(L)
    G = J.T @ (V * jnp.maximum(w, 0)) @ V.T @ J
    expected = jnp.linalg.solve(G + 1e-4 * jnp.eye(N), J.T @ slopes)
    np.testing.assert_allclose(ravel_pytree(p)[0], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("space", SPACES)
def test_its_momentum_is_that_of_spring(space):
    """The dense transliteration of arXiv 2401.10190, over 50 steps."""
    m, n, lam, mu, rate = 6, 9, 1e-2, 0.95, 0.2
    A, B = RNG.normal(size=(50, m, n)), RNG.normal(size=(50, m))
    tx = hessopt.gauss_newton(
        rate,
        damping=lam,
        damping_rule="constant",
        momentum=mu,
        space=space,
        linesearch=None,
    )

    @jax.jit
    def run(x, A, B):
        def step(carry, batch):
            x, state = carry
            data = dict(zip("ab", batch, strict=True))
            grad = jax.grad(LINEAR)(x, **data)
            u, state = tx.update(grad, state, x, value=1.0, value_fn=LINEAR, **data)
            return (x + u, state), x + u

        return jax.lax.scan(step, (x, tx.init(x)), (A, B))[1]

    x, phi, path = np.ones(n), np.zeros(n), []
    for J, b in zip(A, B, strict=True):
        zeta = J @ x - b - mu * J @ phi
        phi = mu * phi + J.T @ np.linalg.solve(J @ J.T + lam * np.eye(m), zeta)
        x = x - rate * phi
        path.append(x)
    np.testing.assert_allclose(run(jnp.ones(n), A, B), path, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ["real", "complex outputs", "complex"])
def test_a_centered_metric_is_the_covariance_of_the_rows(kind, space):
    m, n, lam = 12, 4, 1e-3
    is_complex = kind == "complex"
    params = RNG.normal(size=n) + (1j * RNG.normal(size=n) if is_complex else 0)
    x = RNG.normal(size=(m, n)) + (
        0 if kind == "real" else 1j * RNG.normal(size=(m, n))
    )
    local = RNG.normal(size=m) + (0 if kind == "real" else 1j * RNG.normal(size=m))

    def log_psi(params, x):
        return jnp.sum(jnp.sin(params * x)) + jnp.prod(params[:2])

    # |.|^2 with a derivative at 0
    squares = lambda z: jnp.real(z) ** 2 + jnp.imag(z) ** 2
    loss_fn = lambda z, local: (
        0.5 * jnp.mean(squares(z - jax.lax.stop_gradient(z) + local - jnp.mean(local)))
    )
    value_fn = hessopt.composite(hessopt.rowwise(log_psi, over=["x"]), loss_fn)
    tx = hessopt.scale_by_gauss_newton(
        lam, damping_rule="constant", space=space, centered=True
    )
    p, _ = direction(tx, value_fn, jnp.asarray(params), x=x, local=local)

    grad = jax.grad(log_psi, holomorphic=True)
    deviations = jax.vmap(grad, (None, 0))(params + 0j, x + 0j)
    deviations = np.asarray(deviations - deviations.mean(axis=0))
    S = deviations.conj().T @ deviations / m
    F = deviations.conj().T @ (local - local.mean()) / m
    if not is_complex:
        S, F = S.real, F.real
    np.testing.assert_allclose(
        p, np.linalg.solve(S + lam * np.eye(n), F), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("m", [30, 31])  # divided by the number of chunks, or not
def test_chunks_of_rows_give_the_same_direction(monkeypatch, space, m):
    value_fn = hessopt.composite(
        (hessopt.rowwise(of_sample), hessopt.rowwise(lambda p, z: of_sample(p, z)[:2])),
        lambda y: jnp.mean(y[0] ** 2) + jnp.mean((y[1] - 1.0) ** 2),
    )
    data = {"x": INPUTS[:m], "z": INPUTS[m:]}
    found = []
    for limit in (2**30, 7 * 3 * N * 8):
        monkeypatch.setattr(
            "hessopt.transforms.gauss_newton.row_bytes", lambda limit=limit: limit
        )
        monkeypatch.setattr("hessopt.transforms.gauss_newton.KERNEL_BYTES", limit)
        tx = hessopt.scale_by_gauss_newton(1e-3, space=space, momentum=0.5)
        found.append(direction(tx, value_fn, PARAMS, **data)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), *found)


@pytest.mark.parametrize(("sketch", "most"), [(8, 120), (256, 4)])  # of 120 outputs
def test_conjugate_gradients_give_the_direction_to_their_tolerance(
    monkeypatch, sketch, most
):
    monkeypatch.setattr("hessopt.kinds.damped_least_squares.SKETCH_SIZE", sketch)
    value_fn = hessopt.composite(
        hessopt.rowwise(of_sample, over=["x"]), LOSSES["squares"]
    )
    data = {"x": INPUTS, "y": LABELS}
    expected, found = (
        direction(
            hessopt.scale_by_gauss_newton(1e-4, momentum=0.5, solver=solver),
            value_fn,
            PARAMS,
            **data,
        )
        for solver in ("cholesky", "cg")
    )
    length = optax.tree.norm(expected[0])
    distance = optax.tree.norm(jax.tree.map(jnp.subtract, expected[0], found[0]))
    assert distance < 1e-3 * length
    assert expected[1].products == 0
    assert 0 < found[1].products <= most


def test_the_smaller_space_is_chosen():
    def widths(m):
        tx = hessopt.scale_by_gauss_newton()
        data = {"a": jnp.ones((m, 7)), "b": jnp.ones(m)}
        update = lambda x: tx.update(x, tx.init(x), x, value_fn=LINEAR, **data)
        program = str(jax.make_jaxpr(update)(jnp.ones(7)))
        return f"f64[{m},{m}]" in program, "f64[7,7]" in program

    assert widths(3) == (True, False)
    assert widths(20) == (False, True)


def test_a_model_of_all_samples_will_do():
    whole = hessopt.composite(linear, half_squares)
    J, b, x = jacobian("full", 6, 11), RNG.normal(size=6), RNG.normal(size=11)
    tx = hessopt.scale_by_gauss_newton()
    found = [direction(tx, f, x, a=J, b=b)[0] for f in (whole, LINEAR)]
    np.testing.assert_allclose(*found, rtol=1e-9)


@pytest.mark.parametrize("space", SPACES)
def test_the_outputs_of_a_model_of_all_samples_may_be_coupled(space):
    whole = hessopt.composite(linear, lambda z: jax.nn.logsumexp(z) + jnp.sum(z**4))
    J, b, x = jacobian("full", 6, 11), RNG.normal(size=6), RNG.normal(size=11)
    tx = hessopt.scale_by_gauss_newton(0.1, damping_rule="constant", space=space)
    p, _ = direction(tx, whole, x, a=J, b=b)
    L, slopes = (
        jax.hessian(whole.loss_fn)(J @ x - b),
        jax.grad(whole.loss_fn)(J @ x - b),
    )
    expected = np.linalg.solve(J.T @ L @ J + 0.1 * np.eye(11), J.T @ slopes)
    np.testing.assert_allclose(p, expected, rtol=1e-9)


def test_without_curvature_it_is_the_gradient():
    value_fn = hessopt.composite(hessopt.rowwise(linear), jnp.sum)
    J, b, x = jacobian("full", 6, 11), RNG.normal(size=6), RNG.normal(size=11)
    for damping in (0.0, 1e-2):
        tx = hessopt.scale_by_gauss_newton(damping, damping_rule="constant")
        p, info = direction(tx, value_fn, x, a=J, b=b)
        g = J.sum(axis=0)
        np.testing.assert_allclose(p, g / (damping or np.linalg.norm(g)), rtol=1e-12)
        assert info.status == StepStatus.NO_CURVATURE


def test_a_sample_with_a_slope_and_no_curvature_moves_along_its_gradient():
    """A saturated logistic loss: the sample's curvature underflows, its slope is 1."""
    value_fn = hessopt.composite(
        hessopt.rowwise(lambda p, a: a @ p),
        lambda z: jnp.sum(optax.sigmoid_binary_cross_entropy(z, jnp.ones_like(z))),
    )
    A, x = jnp.array([[-1e3, 0.0, 0.0], [0.0, 1.0, 0.0]]), jnp.array([1.0, 0.3, 0.0])
    tx = hessopt.scale_by_gauss_newton(1e-2, damping_rule="constant")
    found = [
        direction(tx, value_fn, x, a=A)[0],
        direction(
            hessopt.scale_by_gauss_newton(
                1e-2, damping_rule="constant", space="parameters"
            ),
            value_fn,
            x,
            a=A,
        )[0],
    ]
    slope = jax.nn.sigmoid(0.3) - 1.0
    weight = jax.nn.sigmoid(0.3) * (1 - jax.nn.sigmoid(0.3))
    for p in found:
        np.testing.assert_allclose(p[1], slope / (weight + 1e-2), rtol=1e-6)
        np.testing.assert_allclose(p[0], 1e5, rtol=1e-1)


def test_what_is_not_finite_gives_a_step_of_zero_and_keeps_the_momentum():
    tx = hessopt.scale_by_gauss_newton(momentum=0.9)
    x, J, b = jnp.ones(4), jnp.ones((3, 4)), jnp.zeros(3)
    state = tx.init(x)
    grad = jax.grad(LINEAR)(x, J, b)
    _, state = tx.update(grad, state, x, value_fn=LINEAR, a=J, b=b)
    bad = J.at[1, 1].set(jnp.nan)
    p, after = tx.update(grad, state, x, value_fn=LINEAR, a=bad, b=b)
    np.testing.assert_array_equal(p, 0.0)
    np.testing.assert_array_equal(after.direction, state.direction)
    assert after.info.status == StepStatus.NONFINITE


def test_wrong_objectives_are_refused():
    tx, x = hessopt.scale_by_gauss_newton(), jnp.ones(3)
    with pytest.raises(TypeError, match=r"needs value_fn=hessopt\.composite"):
        tx.update(x, tx.init(x), x, value_fn=jnp.sum)
    across = hessopt.composite(hessopt.rowwise(linear), lambda z: jnp.sum(z) ** 2)
    with pytest.raises(TypeError, match="recognized as one matrix per sample"):
        tx.update(x, tx.init(x), x, value_fn=across, a=jnp.ones((2, 3)), b=jnp.ones(2))
    whole, centered = (
        hessopt.composite(linear, half_squares),
        hessopt.scale_by_gauss_newton(centered=True),
    )
    data = {"a": jnp.ones((2, 3)), "b": jnp.ones(2)}
    with pytest.raises(TypeError, match="needs the model of one sample"):
        centered.update(x, tx.init(x), x, value_fn=whole, **data)
    with pytest.raises(ValueError, match='solver="cg" is for space="samples"'):
        hessopt.scale_by_gauss_newton(space="parameters", solver="cg")
    with pytest.raises(ValueError, match="space must be one of"):
        hessopt.scale_by_gauss_newton(space="outputs")
    with pytest.raises(ValueError, match="momentum must be in"):
        hessopt.scale_by_gauss_newton(momentum=1.5)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_flax_model_of_one_sample_trains(library):
    x = jax.random.normal(jax.random.key(0), (20, 4))
    y = jnp.sin(x[:, 0])
    if library == "linen":
        net = flax.linen.Dense(1)
        params = net.init(jax.random.key(1), x[0])
        model_fn = lambda params, x: net.apply(params, x)[0]
    else:
        graph, params = nnx.split(nnx.Linear(4, 1, rngs=nnx.Rngs(1)))
        model_fn = lambda params, x: nnx.merge(graph, params)(x)[0]
    value_fn = hessopt.composite(
        hessopt.rowwise(model_fn, over=["x"]), lambda u, y: jnp.mean((u - y) ** 2)
    )
    tx, data = hessopt.gauss_newton(damping=0.0), {"x": x, "y": y}
    solution = hessopt.minimize(value_fn, params, tx, data=data, max_steps=2)
    design = np.concatenate([x, np.ones((20, 1))], axis=1)
    least = np.linalg.lstsq(design, y, rcond=None)[1][0] / 20
    np.testing.assert_allclose(solution.value, least, rtol=1e-5)


def on_eight_devices(mesh, space):
    """The directions of one device and of eight that share the samples."""
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("samples"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    value_fn = hessopt.composite(
        hessopt.rowwise(of_sample, over=["x"]), LOSSES["squares"]
    )
    data = {"x": INPUTS[:16], "y": LABELS[:16]}
    tx = hessopt.scale_by_gauss_newton(space=space)
    update = jax.jit(
        lambda params, x, y: tx.update(
            params, tx.init(params), params, value_fn=value_fn, x=x, y=y
        )[0]
    )
    params = jax.device_put(PARAMS, whole)
    alone = update.lower(params, **jax.device_put(data, whole)).compile()
    assert "all-gather" not in alone.as_text()  # nothing to exchange
    return [update(params, **jax.device_put(data, place)) for place in (whole, split)]


@pytest.mark.parametrize("space", SPACES)
def test_samples_over_eight_devices_give_the_direction_of_one(space):
    mesh = jax.sharding.Mesh(jax.devices(), ("samples",))  # automatic axes
    alone, shared = on_eight_devices(mesh, space)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7), alone, shared
    )


@needs_explicit
@pytest.mark.parametrize("space", SPACES)
def test_samples_on_an_explicit_mesh_give_the_direction_of_one(space):
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ("samples",), axis_types=explicit)
    with jax.set_mesh(mesh):
        alone, shared = on_eight_devices(mesh, space)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7), alone, shared
    )
