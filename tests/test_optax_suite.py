"""optax's own optimizer tests, read from the installed wheel and run on a case of our
table for each public function.

They differentiate an objective and call `update` without it; here the last function
differentiated is handed on as `value_fn`, with value and grad and a keyword that nobody
knows, to every update.
"""

import ast
import functools
import importlib.util
import inspect
import pathlib
import re
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import hessopt
from tests.table import HESSOPT, Case

# the first of each public function: its other options have the contract
PUBLIC = tuple({case.factory: case for case in reversed(HESSOPT)}.values())[::-1]
CASES = {case.name: case for case in PUBLIC}
DIFFERENTIATED: list[Any] = []


def _objective(updates: Any, params: Any) -> Any:
    """The objective last differentiated; for constant gradients a quadratic that has
    them."""
    if DIFFERENTIATED:
        return DIFFERENTIATED[-1]
    squares = lambda leaf: jnp.sum((leaf * jnp.conj(leaf)).real)
    linear = lambda g, p, p0: (
        jnp.sum((jnp.conj(g) * (p - p0)).real) + 0.5 * squares(p - p0)
    )
    return lambda p: sum(jax.tree.leaves(jax.tree.map(linear, updates, p, params)))


def _informed(case: Case, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    tx = optax.with_extra_args_support(case.factory(**arguments))
    if case.kind == "direction":
        tx = optax.chain(tx, optax.scale(-case.rate))
    if case.kind == "rate":
        tx = optax.chain(optax.scale(-1.0), tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        value_fn = _objective(updates, params)
        if case.composite:
            value_fn = hessopt.composite(lambda p: p, value_fn)
        given = {
            "value": value_fn(params),
            "grad": updates,
            "value_fn": value_fn,
            "nobody_knows": 1.0,
        }
        return tx.update(updates, state, params, **given | extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _factory(case: Case) -> Any:
    """A factory of which optax may inject every argument that is left open."""
    static = {
        name: x for name, x in case.arguments.items() if name not in case.injectable
    }

    def make(**numbers: Any) -> optax.GradientTransformationExtraArgs:
        DIFFERENTIATED.clear()
        return _informed(case, **static, **numbers)

    names = [name for name in case.arguments if name in case.injectable]
    make.__signature__ = inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
    )
    return make


class _Jax(types.ModuleType):
    """jax, which remembers what is differentiated."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("grad", "value_and_grad"):
            return getattr(jax, name)

        def remember(fun: Any, *args: Any, **kwargs: Any) -> Any:
            DIFFERENTIATED.append(fun)
            return getattr(jax, name)(fun, *args, **kwargs)

        return remember


@functools.cache  # not a global of this file: pytest would collect it
def _optax_tests() -> Any:
    """The class of optax's common optimizer tests, for our table in place of optax's."""
    spec = importlib.util.find_spec("optax._src.alias_test")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(pathlib.Path(spec.origin).read_text())
    kept = []
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "_OPTIMIZERS_UNDER_TEST"
        ):
            numbers = lambda case: {
                n: x for n, x in case.arguments.items() if n in case.injectable
            }
            table = [
                {"opt_name": case.name, "opt_kwargs": numbers(case)} for case in PUBLIC
            ]
            node.value = ast.parse(repr(tuple(table)), mode="eval").body
        if not isinstance(node, ast.ClassDef) or node.name == "AliasTest":
            kept.append(node)
    module = types.ModuleType("optax_alias_test")
    sys.modules[module.__name__] = module
    exec(compile(ast.Module(kept, []), spec.origin, "exec"), module.__dict__)
    module.__dict__["jax"] = _Jax("jax")
    module.__dict__["alias"] = types.SimpleNamespace(
        **{case.name: _factory(case) for case in PUBLIC}
    )
    return module.__dict__["AliasTest"]


def _runs():
    """One run per generated method: those of the main cases, and in the slow sweep all
    others."""
    for test in (
        name
        for name in dir(_optax_tests())
        if name.startswith("test_") and "explicit_dtype" not in name
    ):
        # where optax uses variants of chex, the method's name has the arguments; else
        # an attribute has
        label = (
            test.rstrip("0123456789") + getattr(_optax_tests(), test).__x_params_repr__
        )
        case = next(
            case for name, case in CASES.items() if f"opt_name='{name}'" in label
        )
        # no addresses in the names
        label = re.sub(r"<(?:function|class) '?([\w.]+)[^>]*>", r"\1", label)
        yield pytest.param(
            test, id=label, marks=[] if case.main else [pytest.mark.slow]
        )


@pytest.fixture(autouse=True)
def _as_optax_runs_them():
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.mark.parametrize("test", list(_runs()))
def test_of_optax(test):
    _optax_tests()(test).debug()
