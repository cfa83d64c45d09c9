"""Binds the keyword arguments of `update` to the objective and raises an error for
missing ones."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hessopt.objective.rowwise import Rows, Rowwise, Several
from hessopt.trees.groups import combine, take
from hessopt.typing import Aux, Labels, ObjectiveFn, Params, ValueFn

PROTOCOL_KEYWORDS = ("value", "grad", "value_fn")
"""The keywords of `update` that are not data."""

UPDATE_CALL = "tx.update(grads, state, params, value_fn={name}, {given})"
"""The call to write for an objective that lacks data."""

UpdateFn = Callable[..., tuple[optax.Updates, optax.OptState]]
"""`tx.update`, of any keywords."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A scalar objective, stored as the functions that it is composed of: one function,
    or a model and a loss.

    The first part takes params, every other part the result of the one before it. Every
    part takes data by name.
    """

    parts: tuple[Callable[..., Params], ...]

    @property
    def is_composite(self) -> bool:
        """Whether the model and the loss are separate, as Gauss-Newton requires."""
        return len(self.parts) > 1

    @property
    def model_fn(self) -> Callable[..., Params]:
        """Everything before the loss: the model of a composite, else the identity."""
        return self.parts[0] if self.is_composite else lambda params: params

    @property
    def loss_fn(self) -> Callable[..., jax.Array]:
        """The last part, which returns the scalar."""
        return self.parts[-1]

    def __call__(self, params: Params, *args: object, **data: object) -> jax.Array:
        """Evaluate the objective."""
        result = params
        for part in self.close(*args, **data).parts:
            result = part(result)
        return result

    def close(self, *args: object, **data: object) -> "Objective":
        """Return the objective as a function of params alone, given all of its data."""
        if not self.is_composite:
            return Objective((lambda params: self.loss_fn(params, *args, **data),))
        taken = {
            name: p for part in self.parts for name, p in _data_names(part).items()
        }
        names = [name for name, p in taken.items() if p.kind is not p.VAR_KEYWORD]
        every = [parameter for part in self.parts for parameter in _parameters(part)]
        if args and any(p.kind is p.VAR_POSITIONAL for p in every):
            raise TypeError(
                "composite cannot place positional data where a part takes *args: pass the data by name"
            )
        if len(args) > len(names):
            raise TypeError(
                f"composite takes {len(names)} data arguments {names}, got {len(args)}"
            )
        positional = dict(zip(names, args, strict=False))
        twice = [name for name in data if name in positional]
        takes_any = len(names) < len(taken)
        unknown = [name for name in data if not (takes_any or name in names)]
        if twice or unknown:
            raise TypeError(
                f"composite got {twice or unknown} {'twice' if twice else 'but takes only ' + str(names)}"
            )
        return bind(self, positional | data, caller="composite")


def as_objective(value_fn: ObjectiveFn) -> Objective:
    """Convert a function or a `composite` to an `Objective`."""
    return value_fn if isinstance(value_fn, Objective) else Objective((value_fn,))


def composite(
    model_fn: Callable[..., Params] | Sequence[Callable[..., Params]],
    loss_fn: Callable[..., jax.Array],
) -> Objective:
    """Compose an objective of a model and a loss, as the Gauss-Newton matrix requires.

    Computes `f(params) = loss_fn(model_fn(params, ...), ...)`. With `J` the Jacobian of
    the model and `L` the Hessian of the loss with respect to the outputs, the
    Gauss-Newton matrix of f is `J' L J`. It is positive semi-definite for every convex
    loss. A penalty on the parameters is represented exactly if the model returns the
    parameters along with its outputs.

    Args:
      model_fn: `model_fn(params, ...)`, returning any pytree of floating arrays; or
        several such functions, with the tuple of their results for outputs. See
        `rowwise` for models of one sample.
      loss_fn: `loss_fn(outputs, ...)`, returning a real scalar; convex in the outputs.

    Returns:
      A callable `value_fn(params, ...)`. Each part receives the keyword data that it
      names. Positional data is assigned to the names of the model first, then to those
      of the loss.

    Raises:
      TypeError: when called without data that a part requires.

    Example:
      >>> import jax.numpy as jnp
      >>> def model_fn(params, x):
      ...     return x @ params
      >>> def loss_fn(outputs, y):
      ...     return 0.5 * jnp.mean((outputs - y) ** 2)
      >>> value_fn = composite(model_fn, loss_fn)
      >>> float(value_fn(jnp.ones(2), x=jnp.ones((3, 2)), y=jnp.zeros(3)))
      2.0

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order
    gradient descent", 2002.
    """
    several = model_fn if callable(model_fn) else Several(tuple(model_fn))
    return Objective((several, loss_fn))


def bind(
    value_fn: ObjectiveFn | None,
    data: Mapping[str, object],
    *,
    caller: str,
    call: str = UPDATE_CALL,
    has_aux: bool = False,
) -> Objective:
    """Return `value_fn` as an objective of params alone, given the data that it names.

    Other data is ignored, since it may be meant for another transformation of a chain.
    Raises `TypeError`, naming `caller` and the call to write, if value_fn is None, if
    required data is missing, or if value_fn does not return a scalar (with has_aux: a
    pair with a scalar first).
    """
    if value_fn is None:
        raise TypeError(
            f"{caller} needs the objective: call `tx.update(grads, state, params, value_fn=value_fn, ...)`"
        )
    *first, last = (
        _bind(part, data, caller, call) for part in as_objective(value_fn).parts
    )
    checked = _scalar_and_aux(last, caller) if has_aux else _scalar(last, caller)
    return Objective((*first, checked))


def require_taken(
    value_fn: ObjectiveFn, data: Mapping[str, object], *, caller: str
) -> None:
    """Raise `TypeError` if `data` has names that `value_fn` does not take."""
    parts = as_objective(value_fn).parts
    taken = {name: p for part in parts for name, p in _data_names(part).items()}
    unknown = sorted(set(data) - set(taken))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise TypeError(
            f"{caller} got data {unknown}, but value_fn takes only {sorted(taken)}"
        )


def require_params(params: Params | None, *, caller: str) -> None:
    """Raise `TypeError` if `params` is missing in a call to `update`."""
    if params is None:
        raise TypeError(
            f"{caller} needs the parameters: call `tx.update(grads, state, params, ...)`"
        )


def require_given(*, caller: str, **things: object) -> None:
    """Raise `TypeError` if one of these keywords of `update` is missing."""
    for name, given in things.items():
        if given is None:
            raise TypeError(
                f"{caller} needs {name}: call `tx.update(grads, state, params, value=value, grad=grads, "
                "value_fn=value_fn, ...)`"
            )


def informed_update(tx: optax.GradientTransformation) -> UpdateFn:
    """Return `tx.update` as a function of any keywords; those that it does not take are
    dropped."""
    taken = {p.name: p for p in _parameters(tx.update)}
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return tx.update
    return lambda updates, state, params=None, **data: tx.update(
        updates,
        state,
        params,
        **{name: thing for name, thing in data.items() if name in taken},
    )


def precompose(value_fn: ObjectiveFn, inner: Callable[..., Params]) -> Objective:
    """Return `value_fn(inner(.))`; the parts of a `composite` stay separate."""
    first, *rest = as_objective(value_fn).parts
    return Objective((_composed(first, inner), *rest))


def _composed(
    fn: Callable[..., Params], inner: Callable[..., Params]
) -> Callable[..., Params]:
    """Return `fn(inner(.))`; rows stay rows."""
    if isinstance(fn, Several):
        return Several(tuple(_composed(each, inner) for each in fn.fns))
    return fn.precompose(inner) if isinstance(fn, Rows) else lambda x: fn(inner(x))


def without_aux(value_fn: ObjectiveFn) -> Objective:
    """Return an objective of params alone, without the auxiliary output if value_fn
    returns one."""
    *first, last = as_objective(value_fn).parts

    def loss_fn(x: Params) -> jax.Array:
        out = last(x)
        return out[0] if isinstance(out, tuple) else out

    return Objective((*first, loss_fn))


def of_group(
    labels: Labels,
    group: int,
    params: Params,
    keywords: Mapping[str, Any],
    *,
    caller: str,
) -> dict[str, Any]:
    """Return the keywords of `update` restricted to the leaves of one group; the
    objective holds the other leaves fixed."""
    own = {
        name: thing
        for name, thing in keywords.items()
        if thing is not None or name not in PROTOCOL_KEYWORDS
    }
    if "grad" in own:
        own["grad"] = take(own["grad"], labels, group)
    if "value_fn" in own:
        data = {
            name: thing for name, thing in own.items() if name not in PROTOCOL_KEYWORDS
        }
        objective = bind(own["value_fn"], data, caller=caller)
        own["value_fn"] = precompose(objective, lambda part: combine(part, params))
    return own


def _parameters(fn: Callable[..., object]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(fn).parameters.values())
    except ValueError:  # some builtins have no signature; they take no data
        return []


def _data_names(fn: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """Return the parameters of `fn` after its first one, in order."""
    return {p.name: p for p in _parameters(fn)[1:] if p.kind is not p.VAR_POSITIONAL}


def _bind(
    fn: Callable[..., Params], data: Mapping[str, object], caller: str, call: str
) -> Callable[[Params], Params]:
    if isinstance(fn, Rows):
        return fn
    if isinstance(fn, Several):
        return Several(tuple(_bind(each, data, caller, call) for each in fn.fns))
    names = _data_names(fn)
    if any(p.kind is p.VAR_KEYWORD for p in names.values()):
        return _given(fn, data)
    missing = [
        p.name for p in names.values() if p.default is p.empty and p.name not in data
    ]
    if missing:
        name = getattr(fn, "__name__", "value_fn")
        given = ", ".join(f"{m}={m}" for m in missing)
        call = call.format(name=name, given=given)
        raise TypeError(
            f"{caller} cannot evaluate {name}: it requires {missing}; call `{call}`"
        )
    return _given(fn, {name: data[name] for name in names if name in data})


def _given(fn: Callable[..., Params], data: Mapping[str, Any]) -> Callable[..., Params]:
    return fn.bind(data) if isinstance(fn, Rowwise) else functools.partial(fn, **data)


def _scalar(fn: Callable[[Params], Params], caller: str) -> ValueFn:
    def checked(x: Params) -> jax.Array:
        value = fn(x)
        if isinstance(value, tuple) or jnp.shape(value) != ():
            got = "a tuple" if isinstance(value, tuple) else f"shape {jnp.shape(value)}"
            raise TypeError(
                f"{caller} needs value_fn to return a scalar, got {got}; only minimize takes aux, with has_aux"
            )
        return value

    return checked


def _scalar_and_aux(
    fn: Callable[[Params], Params], caller: str
) -> Callable[[Params], tuple[jax.Array, Aux]]:
    def checked(x: Params) -> tuple[jax.Array, Aux]:
        pair = fn(x)
        if not isinstance(pair, tuple) or len(pair) != 2 or jnp.shape(pair[0]) != ():
            raise TypeError(
                f"{caller} with has_aux=True needs value_fn to return (scalar, aux), got {type(pair)}"
            )
        return pair

    return checked
