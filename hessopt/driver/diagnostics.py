"""Collects the scalars of an optimizer state in a flat dictionary, for a logger."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from hessopt.trees.boxes import Box


def diagnostics(state: object) -> dict[str, jax.Array]:
    """Collect the scalars of an optimizer's state: counters, rates, and the fields of
    every `info`.

    Args:
      state: the state of any optax transformation, chained and wrapped in any way; or
        an object that has such a state in a field `opt_state`, as Flax's train states
        do.

    Returns:
      `{name: scalar}`. A name consists of the name of the transformation, derived from
      the type of its state (`NewtonState` gives `newton`, `ScaleByAdamState` gives
      `adam`), and the name of the field: `newton.count`, `newton.status`. The entries
      of a vector in `info` are numbered, `grouped_newton.rate.0`, unless the vector has
      a single entry. The names of nested states are prefixed by those of the enclosing
      states and by the keys of mappings between them. If names coincide, the later ones
      get a number. Arrays like the parameters are omitted. Works under jit.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> state = optax.chain(optax.clip(1.0), optax.scale_by_adam()).init(jnp.ones(3))
      >>> {name: int(x) for name, x in diagnostics(state).items()}
      {'adam.count': 0}
    """
    found: dict[str, jax.Array] = {}
    _collect(state, "", found)
    # NNX variables are replaced by their values
    return {name: jnp.asarray(x) for name, x in found.items()}


def _collect(node: Any, prefix: str, found: dict[str, jax.Array]) -> None:
    if isinstance(node, dict):
        for key, child in node.items():
            _collect(child, f"{prefix}{key}.", found)
    elif hasattr(node, "_fields"):  # the state of one transformation
        prefix = _unused(prefix + _name(type(node)), found)
        for field, child in zip(node._fields, node, strict=True):
            if field in ("info", "hyperparams") and (
                isinstance(child, dict) or hasattr(child, "_asdict")
            ):
                every = [(name, x) for name, x in _items(child) if _is_array(x)]
                # a batch of states has leading axes
                lanes = min((jnp.ndim(x) for _, x in every), default=0)
                found.update(
                    {
                        f"{prefix}.{name}": x
                        for pair in every
                        for name, x in _scalars(*pair, lanes)
                    }
                )
            elif isinstance(child, Box):
                continue
            elif _is_array(child):
                found.update(
                    {f"{prefix}.{field}": child} if jnp.ndim(child) == 0 else {}
                )
            else:
                _collect(child, f"{prefix}.", found)
    elif isinstance(node, tuple | list):
        for child in node:
            _collect(child, prefix, found)
    elif hasattr(node, "opt_state"):  # a train state
        _collect(node.opt_state, prefix, found)


def _items(node: Any) -> list[tuple[str, jax.Array]]:
    return list((node if isinstance(node, dict) else node._asdict()).items())


def _scalars(name: str, x: jax.Array, lanes: int) -> list[tuple[str, jax.Array]]:
    """Return a scalar, or the entries of a vector, with their names."""
    if jnp.ndim(x) == lanes:
        return [(name, x)]
    size = jnp.shape(x)[-1]
    return [(name if size == 1 else f"{name}.{i}", x[..., i]) for i in range(size)]


def _is_array(x: object) -> bool:
    return isinstance(x, jax.Array | float | int) or hasattr(x, "dtype")


def _name(kind: type) -> str:
    """`ScaleByZoomLinesearchState` -> `zoom_linesearch`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()
    return words.removeprefix("scale_by_").removesuffix("_state") or words


def _unused(name: str, found: dict[str, jax.Array]) -> str:
    """Return `name`, or the first of `name_2`, `name_3`, ... that is not in use."""
    taken = {key.rsplit(".", 1)[0] for key in found}
    return next(
        n
        for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3)))
        if n not in taken
    )
