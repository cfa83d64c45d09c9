"""Functions of one sample, mapped over the first axis of their data.

The outputs of a sample depend on that sample alone, so one reverse pass of the sample
gives its row of the Jacobian. `Rowwise` keeps the function of one sample available to
methods that use its rows; called, it is an ordinary function of all samples.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hessopt.typing import Data, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The outputs of all samples as a function of params alone; equal only to itself,
    since arrays have no hash."""

    fn: Callable[[Params, Data], Params]  # (params, data of one sample) -> outputs
    samples: Data  # the data of all samples, with a leading axis of their number

    def __call__(self, params: Params) -> Params:
        """Return the outputs, with a leading axis of the number of samples."""
        return jax.vmap(self.fn, (None, 0))(params, self.samples)

    def precompose(self, inner: Callable[..., Params]) -> "Rows":
        """Return `self(inner(.))`, as rows."""
        return Rows(lambda x, sample: self.fn(inner(x), sample), self.samples)


@dataclasses.dataclass(frozen=True)
class Rowwise:
    """A function of one sample as a function of data; see `rowwise`."""

    fn: Callable[..., Params]
    over: tuple[str, ...] | None

    @property
    def __name__(self) -> str:
        """The name of the function, for error messages."""
        return getattr(self.fn, "__name__", "model_fn")

    @property
    def __signature__(self) -> inspect.Signature:
        """The arguments of the function of one sample."""
        return inspect.signature(self.fn)

    def __call__(self, params: Params, *args: Any, **data: Any) -> Params:
        """Return the outputs of all samples."""
        # raises an error for arguments that fn does not take, or that are given twice
        self.__signature__.bind(params, *args, **data)
        names = list(self.__signature__.parameters)[1:]
        return self.bind(dict(zip(names, args, strict=False)) | data)(params)

    def bind(self, data: Data) -> Rows:
        """Return the outputs as a function of params alone, given the data by name."""
        over = data if self.over is None else self.over
        mapped = {name: data[name] for name in over if name in data}
        shared = {name: thing for name, thing in data.items() if name not in mapped}
        _check_lengths(mapped)

        def of_sample(params: Params, sample: Data) -> Params:
            return self.fn(params, **shared, **sample)

        return Rows(of_sample, mapped)


@dataclasses.dataclass(frozen=True)
class Several:
    """Several functions of params, as one that returns the tuple of their results."""

    fns: tuple[Callable[..., Params], ...]

    @property
    def __signature__(self) -> inspect.Signature:
        """The parameters, and the data of all functions as keywords."""
        first = inspect.Parameter("params", inspect.Parameter.POSITIONAL_ONLY)
        named = {
            parameter.name: _keyword(parameter)
            for fn in self.fns
            for parameter in list(inspect.signature(fn).parameters.values())[1:]
        }
        rest = sorted(named.values(), key=lambda parameter: parameter.kind)
        return inspect.Signature([first, *rest])

    def __call__(self, params: Params) -> tuple[Params, ...]:
        """Return the results of functions of params alone."""
        return tuple(fn(params) for fn in self.fns)


def rowwise(fn: Callable[..., Params], *, over: Sequence[str] | None = None) -> Rowwise:
    """Map a model of one sample over the first axis of its data.

    The result is used as the model of a `composite`, alone or in a tuple of several,
    and as an ordinary function everywhere else. Methods that need the Jacobian of the
    model compute its rows, one reverse pass per sample and output, if a sample has
    fewer outputs than there are parameters, instead of its columns, one tangent per
    parameter.

    Args:
      fn: `fn(params, ...)`, the outputs of one sample: any pytree of floating or
        complex arrays. Its data are given by name.
      over: names of the data with one entry per sample along their first axis, which
        fn receives without that axis; by default all. Other data are passed as they
        are. Arrays of random keys may be mapped too.

    Returns:
      A callable with the arguments of fn, whose result has a leading axis of the number
      of samples.

    Raises:
      ValueError: for a name in `over` that fn does not have; when called, for mapped
        data without a first axis, or of different lengths.

    Cost: that of `jax.vmap(fn)`. The rows of m samples with k outputs cost about k
    gradients of the sum of all outputs.

    Example:
      >>> import jax.numpy as jnp, hessopt
      >>> def residual(params, x, y):
      ...     return params[0] * jnp.exp(params[1] * x) - y
      >>> value_fn = hessopt.composite(hessopt.rowwise(residual), lambda r: 0.5 * jnp.sum(r**2))
      >>> x = jnp.linspace(0.0, 1.0, 5)
      >>> float(value_fn(jnp.array([2.0, 0.0]), x=x, y=2.0 * jnp.ones(5)))
      0.0

    Source: Martens, "New insights and perspectives on the natural gradient method",
    2020; arXiv 2505.12149 for physics-informed networks.
    """
    parameters = inspect.signature(fn).parameters
    names = list(parameters)[1:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [] if takes_any else sorted(set(over or ()) - set(names))
    if unknown:
        raise ValueError(f"over must name data of fn, {names}, got {unknown}")
    return Rowwise(fn, None if over is None else tuple(over))


def _check_lengths(data: Data) -> None:
    """Raise `ValueError` unless all leaves have first axes of one length."""
    lengths = {
        f"{name}{jax.tree_util.keystr(path)}": np.shape(leaf)[:1]
        for name, tree in data.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if len(set(lengths.values())) != 1 or () in lengths.values():
        found = {
            name: length[0] if length else None for name, length in lengths.items()
        }
        raise ValueError(
            "rowwise needs data with first axes of one length, the number of samples "
            f"(name the mapped ones in `over`), got lengths {found}"
        )


def _keyword(parameter: inspect.Parameter) -> inspect.Parameter:
    if parameter.kind is parameter.VAR_KEYWORD:
        return parameter
    return parameter.replace(kind=parameter.KEYWORD_ONLY)
