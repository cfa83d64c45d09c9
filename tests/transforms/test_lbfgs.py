import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessopt
from hessopt import StepStatus, minimize, scale_by_lbfgs
from hessopt.trees import vectors
from tests.problems import cross_entropy, digits, init_mlp


def two_loop(g, pairs):
    """The textbook recursion (Nocedal and Wright, algorithm 7.4)."""
    q, alphas = g.copy(), []
    for s, y in reversed(pairs):
        alphas.append(s @ q / (s @ y))
        q = q - alphas[-1] * y
    s, y = pairs[-1] if pairs else (g, g)
    r = (s @ y / (y @ y) if pairs else g.dtype.type(1 / np.linalg.norm(g))) * q
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + s * (alpha - y @ r / (s @ y))
    return r


CURVATURES = np.logspace(0, 5, 50)


def gradient(x):
    return CURVATURES * x + 0.1 * x**3


def walk(tx, dtype, steps, memory, **extra):
    """Directions of tx beside those of the recursion in float64 and in dtype, along an
    ill-conditioned descent."""
    x = np.random.default_rng(0).normal(size=50).astype(dtype)
    state, update, pairs, old, rows = (
        tx.init(jnp.asarray(x)),
        jax.jit(tx.update),
        [],
        None,
        [],
    )
    for _ in range(steps):
        g = gradient(x.astype(np.float64)).astype(dtype)
        if old is not None:
            pairs = [*pairs, (x - old[0], g - old[1])][-memory:]
        p, state = update(jnp.asarray(g), state, jnp.asarray(x), **extra)
        wide = [(s.astype(np.float64), y.astype(np.float64)) for s, y in pairs]
        exact = two_loop(g.astype(np.float64), wide)
        rows.append((np.asarray(p), exact, two_loop(g, pairs)))
        old = x, g
        x = (x - (g @ exact) / (exact @ (CURVATURES * exact)) * exact).astype(dtype)
    return rows, state


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(params=[False, True], ids=["small", "large"])
def _as_if_large(request, monkeypatch):
    """The program for many parameters, on few."""
    if request.param:
        monkeypatch.setattr(vectors, "LARGE", 0)


@pytest.mark.usefixtures("_as_if_large")
@pytest.mark.parametrize("memory", [1, 7, 50])
def test_directions_are_those_of_the_two_loop_recursion(memory):
    rows, state = walk(scale_by_lbfgs(memory), np.float64, 40, memory)
    assert max(relative(p, exact) for p, exact, _ in rows) < 1e-10
    assert int(state.info.pairs) == min(memory, 39)
    assert int(state.info.status) == StepStatus.OK


def test_leaves_of_all_sizes_count_alike(monkeypatch):
    monkeypatch.setattr(vectors, "LARGE", 25)
    tx, update = scale_by_lbfgs(5), jax.jit(scale_by_lbfgs(5).update)
    split = lambda x: {"small": x[:20].reshape(4, 5), "large": x[20:].reshape(5, 6)}
    x = jnp.asarray(np.random.default_rng(0).normal(size=50))
    whole, parts = tx.init(x), tx.init(split(x))
    for _ in range(12):
        g = gradient(x)
        p, whole = update(g, whole, x)
        q, parts = update(split(g), parts, split(x))
        x = x - 0.1 * p
        chex.assert_trees_all_close(q, split(p), rtol=1e-9, atol=1e-12)
    assert int(parts.info.pairs) == int(whole.info.pairs) == 5


@pytest.mark.usefixtures("_as_if_large")
def test_in_single_precision_they_err_no_more_than_the_recursion_does():
    rows, _ = walk(scale_by_lbfgs(7), np.float32, 40, 7)
    ours = [relative(p, exact) for p, exact, _ in rows]
    recursion = [relative(p, exact) for _, exact, p in rows]
    assert max(ours) < 3 * max(recursion)
    assert np.median(ours) < 3 * np.median(recursion)


def test_pairs_may_be_kept_in_half_precision():
    rows, state = walk(scale_by_lbfgs(7, memory_dtype=jnp.bfloat16), np.float32, 20, 7)
    assert state.pairs.dtype == jnp.bfloat16
    assert (
        np.median(
            [
                p @ exact / np.linalg.norm(p) / np.linalg.norm(exact)
                for p, exact, _ in rows
            ]
        )
        > 0.9
    )
    loss = lambda x: 0.5 * jnp.sum(jnp.logspace(0, 3, 30) * x**2)
    solution = minimize(loss, jnp.ones(30), hessopt.lbfgs(memory_dtype=jnp.bfloat16))
    assert solution.reason == "GRADIENT"


def test_the_pairs_come_from_grad_and_the_direction_is_applied_to_the_updates():
    tx, x = scale_by_lbfgs(3), jnp.array([1.0, -2.0, 0.5])
    H = jnp.diag(jnp.array([1.0, 10.0, 100.0]))
    state = tx.init(x)
    for _ in range(5):
        p, state = tx.update(H @ x, state, x)
        x = x - 0.3 * p
    g, u = H @ x, jnp.array([1.0, 1.0, 1.0])
    apart, _ = tx.update(u, state, x, grad=g)
    # linear in the updates
    as_one = jax.vmap(lambda e: tx.update(e, state, x, grad=g)[0])(jnp.eye(3))
    np.testing.assert_allclose(apart, u @ as_one, rtol=1e-10)
    np.testing.assert_allclose(as_one, as_one.T, rtol=1e-10, atol=1e-14)
    assert (np.linalg.eigvalsh(as_one) > 0).all()


def test_without_a_search_it_does_not_climb_where_the_curvature_is_negative():
    tx = optax.chain(scale_by_lbfgs(), optax.scale(-1.0))
    x, state, values, skipped = jnp.array(0.5), None, [], []
    state = tx.init(x)
    for _ in range(30):
        values.append(float(jnp.cos(x)))
        updates, state = tx.update(-jnp.sin(x), state, x)
        skipped.append(StepStatus.PAIR_SKIPPED in StepStatus(int(state[0].info.status)))
        x = x + updates
    assert np.all(np.diff(values) <= 1e-12) or values[-1] < -0.999
    assert max(values) == values[0]
    np.testing.assert_allclose(jnp.cos(x), -1.0)
    assert sum(skipped) == int(state[0].info.pairs_skipped) > 0


def test_parameters_that_have_not_moved_empty_the_memory():
    tx, x = scale_by_lbfgs(4), jnp.array([1.0, -2.0])
    state = tx.init(x)
    for factor in (1.0, 0.5, 0.2):
        p, state = tx.update(factor * x, state, factor * x)
    scale = float(state.info.scale)
    p, state = tx.update(0.2 * x, state, 0.2 * x)
    assert StepStatus(int(state.info.status)) == StepStatus.MEMORY_RESET
    assert int(state.info.pairs) == 0
    np.testing.assert_allclose(p, scale * 0.2 * x)  # the scale is still the best guess
    p, state = tx.update(5.0 * x, state, 0.2 * x)
    # but a long step is cut to unit length
    np.testing.assert_allclose(jnp.linalg.norm(p), 1.0)


def test_a_converged_run_without_a_search_stays_where_it_is():
    center = jnp.array([1.0, -1.0, 1.0], jnp.float32)
    tx, x = (
        hessopt.lbfgs(0.3, linesearch=None),
        jnp.array([-1.0, 10.0, 1.0], jnp.float32),
    )

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(2 * (x - center), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), jnp.max(jnp.abs(x - center))

    _, error = jax.lax.scan(step, (x, tx.init(x)), length=400)
    assert jnp.max(error[100:]) < 1e-6


def test_pairs_of_the_same_batch_hold_no_noise_of_the_batches():
    rng = np.random.default_rng(0)
    loss = lambda x, c: 0.5 * jnp.sum(jnp.array([1.0, 10.0]) * (x - c) ** 2)
    tx = scale_by_lbfgs(2, same_batch_pairs=True)
    x = jnp.array([1.0, 1.0])
    state = tx.init(x)
    for _ in range(4):
        c = jnp.asarray(rng.normal(size=2))
        g = jax.grad(loss)(x, c)
        p, state = tx.update(g, state, x, value_fn=loss, c=c)
        x = x - 0.1 * p
    assert int(state.info.pairs) == 2
    np.testing.assert_allclose(
        state.pairs[:, 1],
        state.factor * jnp.array([1.0, 10.0]) * state.pairs[:, 0],
        rtol=1e-12,
    )
    with pytest.raises(
        TypeError, match=r"scale_by_lbfgs\(same_batch_pairs=True\) needs the objective"
    ):
        tx.update(g, state, x)


@pytest.mark.parametrize("shape", [(120_000,), (400, 300)])
def test_nothing_of_the_memorys_size_is_copied(shape):
    tx, x = (
        scale_by_lbfgs(10),
        {"kernel": jnp.ones(shape, jnp.float32), "bias": jnp.ones(300, jnp.float32)},
    )
    program = jax.jit(tx.update, donate_argnums=1).lower(x, tx.init(x), x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 6 * 4 * math.prod(shape)
    text = program.as_text()
    memory = rf"f32\[10,2,{','.join(map(str, shape))}\]"
    assert re.search(memory, text)
    assert not re.search(memory + r"\S* copy\(", text)


def test_a_step_with_a_search_combines_the_pairs_once():
    tx, x = hessopt.lbfgs(), jnp.ones(100_000, jnp.float32)
    loss = lambda x: jnp.sum((x - 1.0) ** 2)

    def step(x, state):
        value, grad = jax.value_and_grad(loss)(x)
        updates, state = tx.update(
            grad, state, x, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(x, updates), state

    text = jax.jit(step, donate_argnums=(0, 1)).lower(x, tx.init(x)).compile().as_text()
    main = text[text.index("ENTRY") :]
    written = re.findall(r"(%\S+) = f32\[10,2,100000\]\S* fusion\(", main)[-1]
    kernels = re.findall(r" (?:fusion|call)\(([^)]*)\)", main)
    assert (
        sum(written in re.split(r",\s*(?:/\S*/)?", operands) for operands in kernels)
        == 1
    )


def test_a_training_step_traces_the_objective_twice_and_compiles_once():
    params = init_mlp(0, (64, 32, 10), np.float32)
    data, traces, compiled = digits(np.float32), [], []
    tx = hessopt.lbfgs()

    def loss(params, x, y):
        traces.append(1)
        return optax.softmax_cross_entropy_with_integer_labels(
            jnp.tanh(x @ params["layer0"]["kernel"]) @ params["layer1"]["kernel"], y
        ).mean()

    @jax.jit
    def step(params, state, x, y):
        compiled.append(1)
        value, grad = hessopt.value_and_grad_from_state(loss)(params, x, y, state=state)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=loss, x=x, y=y
        )
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(12):
        params, state, value = step(params, state, data.x, data.y)
        values.append(float(value))
    assert len(compiled) == 1
    assert len(traces) <= 3  # the caller's, its shapes, the search's
    assert step._cache_size() == 1
    assert values[-1] < 0.5 * values[0]


def test_optax_finds_the_value_and_gradient_that_the_search_kept():
    tx, x = hessopt.lbfgs(), jnp.array([3.0, 4.0])
    loss = lambda x: jnp.sum(x**4)
    state = tx.init(x)
    for _ in range(3):
        value, grad = optax.value_and_grad_from_state(loss)(x, state=state)
        np.testing.assert_allclose(value, loss(x), rtol=1e-12)
        chex.assert_trees_all_close(grad, jax.grad(loss)(x), rtol=1e-12)
        updates, state = tx.update(
            grad, state, x, value=value, grad=grad, value_fn=loss
        )
        x = optax.apply_updates(x, updates)


@pytest.mark.slow
def test_batches_of_digits_train_with_pairs_of_the_same_batch():
    data, tx = (
        digits(np.float32),
        hessopt.lbfgs(0.1, same_batch_pairs=True, linesearch=None),
    )

    @jax.jit
    def epoch(params, state, key):
        def step(carry, chosen):
            params, state = carry
            x, y = data.x[chosen], data.y[chosen]
            grad = jax.grad(cross_entropy)(params, x, y, 1e-4)
            updates, state = tx.update(
                grad, state, params, value_fn=cross_entropy, x=x, y=y, l2=1e-4
            )
            return (optax.apply_updates(params, updates), state), None

        batches = jax.random.permutation(key, 1500)[: 11 * 128].reshape(11, 128)
        return jax.lax.scan(step, (params, state), batches)[0]

    for seed in range(5):
        params = init_mlp(seed, (64, 32, 10), np.float32)
        state, losses = tx.init(params), []
        for number in range(20):
            params, state = epoch(params, state, jax.random.key(100 * seed + number))
            losses.append(float(cross_entropy(params, data.x, data.y, 1e-4)))
        assert max(losses) < 2.5  # a loss of log(10) is that of chance
        assert losses[-1] < 0.1


def test_arguments_out_of_range_are_named():
    with pytest.raises(
        ValueError, match="memory_dtype must have the range of float32, as bfloat16 has"
    ):
        scale_by_lbfgs(memory_dtype=jnp.float16)
    with pytest.raises(
        ValueError, match="memory_size must be an int, at least 1, got 0"
    ):
        scale_by_lbfgs(0)
    with pytest.raises(TypeError, match="scale_by_lbfgs needs the parameters"):
        scale_by_lbfgs().update(jnp.ones(2), scale_by_lbfgs().init(jnp.ones(2)))
