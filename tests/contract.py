"""The laws that every transformation keeps: section by section what the page of
guarantees promises of any update.

A law is a function of a `Case` that raises where the transformation breaks it.
`test_contract.py` sweeps all laws over the table, `test_contract_itself.py` shows that
each catches what it is there for.
"""

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import hessopt
from hessopt import StepStatus
from hessopt.kinds import rates
from hessopt.kinds.reports import reports
from tests.table import Case

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(16, 8)), RNG.normal(size=(16, 2))
W, B = 0.3 * RNG.normal(size=(8, 2)), 0.3 * RNG.normal(size=2)


def initial(dtype: Any) -> dict[str, jax.Array]:
    """A matrix that 8 devices can share, a vector, a scalar and an empty leaf."""
    tree = {"w": W, "b": B, "scale": np.array(0.2), "empty": np.zeros((0, 2))}
    return {name: jnp.asarray(leaf, dtype) for name, leaf in tree.items()}


def model_fn(params: Any, x: Any) -> Any:
    x = jnp.asarray(x, params["w"].dtype)
    return jnp.tanh(x @ params["w"] + params["b"]) * (1 + params["scale"]), params


def loss_fn(outputs: Any, y: Any, weight: Any = 1.0) -> jax.Array:
    prediction, params = outputs
    squares = lambda leaf: jnp.sum((leaf * jnp.conj(leaf)).real)
    penalty = sum(squares(leaf) for leaf in jax.tree.leaves(params))
    error = prediction - jnp.asarray(y, prediction.dtype)
    return jnp.asarray(weight, penalty.dtype) * (
        squares(error) / len(y) + 0.05 * penalty
    )


def objective(params: Any, x: Any, y: Any, weight: Any = 1.0) -> jax.Array:
    return loss_fn(model_fn(params, x), y, weight)


COMPOSITE = hessopt.composite(model_fn, loss_fn)


def objective_of(case: Case) -> Any:
    return COMPOSITE if case.composite else objective


class Result(NamedTuple):
    """What one step gives."""

    params: Any
    state: Any
    updates: Any
    grad: Any


class Trouble(NamedTuple):
    """What is added to the value and to the gradient, what multiplies every probe; and
    the weight of the objective."""

    value: Any = 0.0
    grad: Any = 0.0
    probe: Any = 1.0
    weight: Any = 1.0


NONE = Trouble()


@functools.partial(jax.jit, static_argnums=0)
def measured(
    kind: str, params: Any, trouble: Trouble, data: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Value, gradient and updates that one step is called with."""
    value, grad = jax.value_and_grad(objective)(params, weight=trouble.weight, **data)
    value += jnp.asarray(trouble.value, value.dtype)
    grad = jax.tree.map(
        lambda g: jnp.conj(g) + jnp.asarray(trouble.grad, g.dtype), grad
    )
    given = jax.tree.map(lambda g: -0.1 * g, grad) if kind == "rate" else grad
    return value, grad, given


@functools.partial(jax.jit, static_argnums=0)
def applied(kind: str, params: Any, updates: Any) -> Any:
    sign = -1 if kind == "direction" else 1
    return optax.apply_updates(params, jax.tree.map(lambda u: sign * u, updates))


def step_with(
    case: Case, tx: Any, params: Any, state: Any, trouble: Trouble = NONE, **data: Any
) -> Result:
    data = {"x": X, "y": Y} | data
    value, grad, given = measured(case.kind, params, trouble, data)
    keywords = {"value": value, "grad": grad, "value_fn": objective_of(case)}
    weight = trouble.weight * trouble.probe
    updates, state = tx.update(given, state, params, **keywords, weight=weight, **data)
    return Result(applied(case.kind, params, updates), state, updates, grad)


def compiled(tx: Any) -> Any:
    update = jax.jit(tx.update, static_argnames="value_fn")
    return optax.GradientTransformationExtraArgs(tx.init, update)


class Stepper(NamedTuple):
    """A case whose update is compiled, once for all laws that call it with the same
    types."""

    tx: optax.GradientTransformationExtraArgs
    run: Callable[..., Result]  # (params, state, trouble)


_STEPPERS: dict[tuple[str, str], Stepper] = {}


def stepper(case: Case, dtype: Any = np.float64) -> Stepper:
    key = (case.name, jnp.dtype(dtype).name)
    if key not in _STEPPERS:
        tx = compiled(case.make())
        _STEPPERS[key] = Stepper(tx, functools.partial(step_with, case, tx))
    return _STEPPERS[key]


def forget() -> None:
    """Drop the steppers and every compiled program."""
    _STEPPERS.clear()
    jax.clear_caches()


def walk(case: Case, steps: int, dtype: Any = np.float64) -> tuple[Any, Any]:
    """Parameters and state after some steps from the start."""
    tx, run = stepper(case, dtype)
    params = initial(dtype)
    state = tx.init(params)
    for _ in range(steps):
        params, state, *_ = run(params, state)
    return params, state


def inner(a: Any, b: Any) -> float:
    return float(
        sum(
            jnp.sum((jnp.conj(x) * y).real)
            for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
        )
    )


def types(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: (np.shape(x), x.dtype, getattr(x, "weak_type", True)),
        tree,
    )


def close(actual: Any, desired: Any, rtol: float = 1e-9) -> None:
    chex.assert_trees_all_close(actual, desired, rtol=rtol, atol=rtol)


# What an update gives


def steps_downhill(case: Case) -> None:
    params, state = walk(case, 0)
    _, _, updates, grad = stepper(case).run(params, state)
    slope = inner(grad, updates)
    assert slope > 0 if case.kind == "direction" else slope < 0


def reaches_a_lower_value_in_every_dtype(
    case: Case, dtypes: tuple[str, ...] = ("float32", "bfloat16", "complex64")
) -> None:
    for dtype in dtypes:
        if case.real and dtype == "complex64":
            continue
        params, state = walk(case, 3, jnp.dtype(dtype))
        chex.assert_trees_all_equal_shapes_and_dtypes(params, initial(dtype))
        info = getattr(state, "info", None)
        if hasattr(info, "predicted"):  # infinite where the model has no minimum
            assert not jnp.isnan(info.predicted)
            info = info._replace(predicted=0)
        chex.assert_tree_all_finite((params, info))
        result = stepper(case, jnp.dtype(dtype)).run(params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(result.updates, result.grad)
        if case.kind != "direction":  # a direction alone has no length to go by
            assert objective(params, X, Y) < objective(initial(dtype), X, Y), dtype


def is_the_same_without_jit(case: Case) -> None:
    params, state = walk(case, 1)
    result = stepper(case).run(params, state)
    close(step_with(case, case.make(), params, state), result, rtol=1e-7)


# State


def has_a_stable_strongly_typed_state(case: Case) -> None:
    for dtype in (np.float64, np.float32):
        tx, run = stepper(case, dtype)
        params = initial(dtype)
        fresh = tx.init(params)
        assert not any(
            getattr(leaf, "weak_type", True) for leaf in jax.tree.leaves(fresh)
        ), "weakly typed when fresh"
        state = fresh
        for step in range(3):  # traced: types need no numbers
            params, state, *_ = jax.eval_shape(run, params, state)
            assert jax.tree.structure(state) == jax.tree.structure(fresh)
            assert types(state) == types(fresh), f"types change in step {step}"


def holds_numbers_only(case: Case) -> None:
    _, state = walk(case, 0)
    assert all(
        jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == bool
        for leaf in jax.tree.leaves(state)
    )


def is_traced_and_compiled_once(case: Case) -> None:
    walk(case, 4)
    assert stepper(case).tx.update._cache_size() == 1


def shares_no_buffer(case: Case) -> None:
    params = initial(np.float64)
    state = case.make().init(params)
    leaves = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.size]
    places = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(places)) == len(places)
    donated = jax.jit(
        lambda s, p: step_with(case, stepper(case).tx, p, s)[:3], donate_argnums=0
    )
    close(donated(state, params), stepper(case).run(*walk(case, 0))[:3])


def starts_abstractly(case: Case) -> None:
    tx, params = case.make(), initial(np.float64)
    state = tx.init(params)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert (
        jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, params))
        == shapes
    )
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), mapped) == shapes


# Transformations of JAX


def batches_like_a_loop(case: Case) -> None:
    tx = stepper(case).tx
    lanes = [
        jax.tree.map(lambda p, k=k: p * (1 + 0.1 * k), initial(np.float64))
        for k in range(3)
    ]

    step = jax.jit(jax.vmap(lambda p, s: step_with(case, tx, p, s)[:2]))
    params = jax.tree.map(lambda *ps: jnp.stack(ps), *lanes)
    batched, _ = step(*step(params, jax.vmap(tx.init)(params)))
    for k, params in enumerate(lanes):
        first = stepper(case).run(params, tx.init(params))
        lane = jax.tree.map(lambda leaf, k=k: leaf[k], batched)
        close(lane, stepper(case).run(first.params, first.state).params, rtol=1e-7)


def scans_like_a_loop(case: Case) -> None:
    tx = stepper(case).tx

    @jax.jit
    def scanned(params: Any) -> Any:
        body = lambda carry, _: (step_with(case, tx, *carry)[:2], None)
        return jax.lax.scan(body, (params, tx.init(params)), length=3)[0]

    close(scanned(initial(np.float64)), walk(case, 3), rtol=1e-7)


def lowers_for_every_platform(case: Case) -> None:
    params, state = walk(case, 0)
    step = jax.jit(
        lambda params, state: step_with(case, stepper(case).tx, params, state)
    )
    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(params, state)
    assert exported.platforms == ("cpu", "cuda", "tpu")


def runs_on_eight_devices_as_on_one(case: Case) -> None:
    tx, alone = stepper(case).tx, stepper(case).run(*walk(case, 0))
    mesh = jax.sharding.Mesh(jax.devices(), ("devices",))  # automatic axes
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = jax.jit(
        lambda params, x, y: (
            step_with(case, tx, params, tx.init(params), x=x, y=y).params
        )
    )
    for of_w in (whole, split):
        params = {
            name: jax.device_put(p, of_w if name == "w" else whole)
            for name, p in initial(np.float64).items()
        }
        close(
            step(params, jax.device_put(X, split), jax.device_put(Y, split)),
            alone.params,
            rtol=1e-7,
        )


# Company: optax's combinators


def first_updates(case: Case, tx: Any) -> Any:
    params = initial(np.float64)
    return step_with(case, tx, params, tx.init(params)).updates


def chains_with_clipping_before_and_after(case: Case) -> None:
    plain = stepper(case).run(*walk(case, 0)).updates
    bound = 0.5 * float(optax.tree.norm(plain))
    tx = optax.named_chain(
        ("before", optax.clip_by_global_norm(1e9)),
        ("law", stepper(case).tx),
        ("after", optax.clip_by_global_norm(bound)),
    )
    close(first_updates(case, tx), jax.tree.map(lambda u: 0.5 * u, plain), rtol=1e-7)


def is_followed_by_weight_decay(case: Case) -> None:
    if case.kind == "rate":
        plain = stepper(case).run(*walk(case, 0)).updates
        tx = optax.chain(stepper(case).tx, optax.add_decayed_weights(-0.01))
        decayed = jax.tree.map(lambda u, p: u - 0.01 * p, plain, initial(np.float64))
        close(first_updates(case, tx), decayed, rtol=1e-7)


def takes_injected_hyperparameters(case: Case) -> None:
    # as a user writes it: only what was given, and is no hyperparameter, is static
    static = tuple(name for name in case.arguments if name not in case.injectable)
    tx = optax.inject_hyperparams(case.factory, static_args=static)(**case.arguments)
    close(
        first_updates(case, compiled(tx)),
        stepper(case).run(*walk(case, 0)).updates,
        rtol=1e-7,
    )


def is_guarded_by_apply_if_finite(case: Case) -> None:
    tx = optax.apply_if_finite(case.make(), 3)
    close(
        first_updates(case, compiled(tx)),
        stepper(case).run(*walk(case, 0)).updates,
        rtol=1e-7,
    )


def accumulates_in_multi_steps(case: Case) -> None:
    multi = optax.MultiSteps(case.make(), 2).gradient_transformation()

    @jax.jit
    def two(params: Any) -> tuple[Any, Any]:
        first = step_with(case, multi, params, multi.init(params))
        return first.updates, step_with(case, multi, first.params, first.state).updates

    none, updates = two(initial(np.float64))
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(none))
    # optax averages in float32
    close(updates, stepper(case).run(*walk(case, 0)).updates, rtol=1e-5)


# Keywords


def ignores_unknown_keywords(case: Case) -> None:
    params = initial(np.float64)
    tx = case.make()
    keywords = {
        "value": 1.0,
        "grad": params,
        "value_fn": objective_of(case),
        "x": X,
        "y": Y,
        "nobody_knows": 1.0,
    }
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, **keywords)[0], params)


def names_what_is_missing(case: Case) -> None:
    params = initial(np.float64)
    tx = case.make()
    keywords = {
        "value": 1.0,
        "grad": params,
        "value_fn": objective_of(case),
        "x": X,
        "y": Y,
    }
    for name in case.needs:
        given = {key: thing for key, thing in keywords.items() if key != name}
        with pytest.raises(TypeError, match=rf"needs .*tx\.update\(.*{name}="):
            jax.eval_shape(
                lambda p, given=given: tx.update(p, tx.init(p), p, **given)[0], params
            )
    if "value_fn" in case.needs:
        lacking = {key: thing for key, thing in keywords.items() if key != "y"}
        with pytest.raises(TypeError, match=r"requires \['y'\]; call `tx.update"):
            jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, **lacking)[0], params)


def passes_data_on_to_the_objective(case: Case) -> None:
    if "value_fn" not in case.needs or case.composite:
        return
    seen = []

    def recorded(params: Any, x: Any, y: Any, weight: Any = "the default") -> jax.Array:
        seen.append(weight)
        return objective(params, x, y)

    params, tx = initial(np.float64), case.make()
    keywords = {
        "value": 1.0,
        "grad": params,
        "value_fn": recorded,
        "x": X,
        "y": Y,
        "weight": "the data",
    }
    jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, **keywords)[0], params)
    assert set(seen) == {"the data"}


# Trouble


def survives_what_is_not_finite(case: Case) -> None:
    """In value, gradient or probes: parameters stay finite, the next step is sound, and
    the memory stays as it was.

    What a direction has taken in before a search behind it met trouble in its probes
    may also be as after a sound step, and a rate may have been halved a few times.
    """
    run = stepper(case).run
    params, state = walk(case, 1)
    sound_memory = _memory(run(params, state).state)
    for bad in (np.nan, np.inf):
        for trouble in (Trouble(value=bad), Trouble(grad=bad), Trouble(probe=bad)):
            result = run(params, state, trouble)
            chex.assert_tree_all_finite(result.params)
            # a direction does without the value
            if "value" in case.needs or trouble.value == 0.0:
                jax.tree.map(
                    _is_one_of, _memory(result.state), _memory(state), sound_memory
                )
            sound = run(result.params, result.state)
            chex.assert_tree_all_finite(sound.params)
            assert inner(sound.grad, sound.updates) != 0


def _is_one_of(leaf: jax.Array, before: jax.Array, sound: jax.Array) -> None:
    assert np.array_equal(leaf, before) or np.array_equal(leaf, sound)


def _memory(state: Any) -> Any:
    """A state without its reports and counters; of rates, which may have been halved,
    the mantissas."""
    if isinstance(state, rates.Memory):
        # 0 where no step may follow
        state = state._replace(rate=np.frexp(state.rate)[0], length=())
    if hasattr(state, "_fields"):
        return {
            name: _memory(child)
            for name, child in state._asdict().items()
            if name != "info" and not (name == "count" and jnp.ndim(child) == 0)
        }
    if isinstance(state, dict):
        return {name: _memory(child) for name, child in state.items()}
    return (
        [_memory(child) for child in state]
        if isinstance(state, tuple | list)
        else state
    )


def reports_a_status(case: Case) -> None:
    params, state = walk(case, 1)
    assert all(np.ndim(x) == 0 for x in hessopt.diagnostics(state).values())
    assert reports(state, state), "info has no evaluations"
    statuses = [
        int(x)
        for name, x in hessopt.diagnostics(state).items()
        if name.endswith(".status")
    ]
    assert statuses
    assert not any(
        status & ~(StepStatus.NEGATIVE_CURVATURE | case.reports) for status in statuses
    )
    poisoned = stepper(case).run(params, state, Trouble(grad=np.nan)).state
    flags = [
        int(x)
        for name, x in hessopt.diagnostics(poisoned).items()
        if name.endswith(".status")
    ]
    assert functools.reduce(lambda a, b: a | b, flags) & StepStatus.NONFINITE


def does_not_depend_on_the_unit_of_the_objective(case: Case) -> None:
    if case.unitless:
        for dtype, unit, rtol in (
            (np.float64, 1e12, 1e-8),
            # units that are not powers of two round differently
            (np.float32, case.float32_unit, 1e-2),
        ):
            plain = _weighted_steps(case, dtype, 1.0)
            for weight in (1 / unit, unit):
                close(_weighted_steps(case, dtype, weight), plain, rtol)


def _weighted_steps(case: Case, dtype: Any, weight: float) -> Any:
    """Parameters after three steps from the start on a multiple of the objective."""
    params, state = walk(case, 0, dtype)
    trouble = NONE._replace(weight=np.asarray(weight, dtype))
    for _ in range(3):
        params, state, *_ = stepper(case, dtype).run(params, state, trouble)
    return params


def does_not_depend_on_the_units_of_parameters(case: Case) -> None:
    if case.scaled:
        plain = _steps_in_units(case, jax.tree.map(jnp.ones_like, initial(np.float64)))
        rng = np.random.default_rng(1)
        units = jax.tree.map(
            lambda leaf: jnp.asarray(10.0 ** rng.integers(-6, 7, leaf.shape)),
            initial(np.float64),
        )
        close(_steps_in_units(case, units), plain, 1e-6)


def _model_in_units(params: Any, x: Any, units: Any) -> Any:
    return model_fn(jax.tree.map(jnp.multiply, params, units), x)


OBJECTIVE_IN_UNITS = hessopt.composite(_model_in_units, loss_fn)


def _steps_in_units(case: Case, units: Any) -> Any:
    """Parameters after three steps with each parameter measured in its unit, in the
    units of `initial`."""
    tx, data = stepper(case).tx, {"x": X, "y": Y, "units": units}
    params = jax.tree.map(jnp.divide, initial(np.float64), units)
    state = tx.init(params)
    for _ in range(3):
        value, grad = _measured_in_units(params, data)
        given = {"value": value, "grad": grad, "value_fn": OBJECTIVE_IN_UNITS}
        updates, state = tx.update(grad, state, params, **given, **data)
        params = applied(case.kind, params, updates)
    return jax.tree.map(jnp.multiply, params, units)


@jax.jit
def _measured_in_units(params: Any, data: Any) -> Any:
    return jax.value_and_grad(OBJECTIVE_IN_UNITS)(params, **data)


# Storage


def continues_from_a_checkpoint_bit_for_bit(case: Case) -> None:
    params, state = walk(case, 2)
    template = stepper(case).tx.init(params)
    packed = flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))
    for stored in (packed, _through_orbax(state, template)):
        # without Orbax's commitment to a device, which would compile the step anew
        p, s = params, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), stored)
        assert types(s) == types(template)
        for _ in range(2):
            p, s, *_ = stepper(case).run(p, s)
        chex.assert_trees_all_equal((p, s), walk(case, 4))


def _through_orbax(state: Any, template: Any) -> Any:
    if not jax.tree.leaves(template):
        return template
    # Orbax refuses empty arrays
    full = lambda tree: jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = pathlib.Path(folder).resolve() / "state"
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, full(state))
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(path, full(template))
    return jax.tree.map(
        lambda old, new: old if new is None else new, template, restored
    )


LAWS = (
    steps_downhill,
    reaches_a_lower_value_in_every_dtype,
    is_the_same_without_jit,
    has_a_stable_strongly_typed_state,
    holds_numbers_only,
    is_traced_and_compiled_once,
    shares_no_buffer,
    starts_abstractly,
    batches_like_a_loop,
    scans_like_a_loop,
    lowers_for_every_platform,
    runs_on_eight_devices_as_on_one,
    chains_with_clipping_before_and_after,
    is_followed_by_weight_decay,
    takes_injected_hyperparameters,
    is_guarded_by_apply_if_finite,
    accumulates_in_multi_steps,
    ignores_unknown_keywords,
    names_what_is_missing,
    passes_data_on_to_the_objective,
    survives_what_is_not_finite,
    reports_a_status,
    does_not_depend_on_the_unit_of_the_objective,
    does_not_depend_on_the_units_of_parameters,
    continues_from_a_checkpoint_bit_for_bit,
)

COSTLY = (
    reaches_a_lower_value_in_every_dtype,
    is_the_same_without_jit,
    shares_no_buffer,
    batches_like_a_loop,
    runs_on_eight_devices_as_on_one,
    is_guarded_by_apply_if_finite,
    accumulates_in_multi_steps,
    does_not_depend_on_the_unit_of_the_objective,
    does_not_depend_on_the_units_of_parameters,
    continues_from_a_checkpoint_bit_for_bit,
)
"""Laws that compile much of their own: in the fast suite for the main cases only."""
