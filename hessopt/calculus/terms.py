"""A model as models of single samples.

A `Term` is a model of one sample at given data (`hessopt.rowwise`), or an ordinary model,
which counts as one sample with many outputs. The outputs of a sample are a vector of k
real numbers; complex outputs count as real and imaginary parts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessopt.objective.rowwise import Rows, Several
from hessopt.trees.vectors import ravel, solve_dtype, unravel
from hessopt.typing import Data, Params, Vector

Leaves = Sequence[jax.Array]
"""The real leaves of a tree like params."""


class Term(NamedTuple):
    """A model of one sample, with the data of all samples."""

    fn: Callable[[Leaves, Data], Vector]  # (params, data of a sample) -> outputs (k,)
    samples: Data  # with a leading axis of length m
    count: int  # m, number of samples
    width: int  # k, number of real outputs of a sample
    is_rowwise: bool  # else m = 1, and the data are not used
    # (m, k) -> the outputs as the model has them
    restore: Callable[[jax.Array], Params]
    flatten: Callable[[Params], jax.Array]  # the inverse

    @property
    def size(self) -> int:
        """The number of outputs of all samples."""
        return self.count * self.width

    def outputs(self, parts: Leaves) -> jax.Array:
        """Return the outputs of all samples, `(m, k)`."""
        return jax.vmap(self.fn, (None, 0))(parts, self.samples)


def terms_of(model_fn: Callable[..., Params], parts: Leaves) -> list[Term]:
    """Return the terms of a model of real leaves."""
    fns = model_fn.fns if isinstance(model_fn, Several) else (model_fn,)
    return [_term(fn, parts) for fn in fns]


def split_outputs(
    model_fn: Callable[..., Params], trees: Sequence[Params]
) -> list[tuple[Params, ...]]:
    """Return for each term of a model its part of trees like the outputs."""
    if isinstance(model_fn, Several):
        return list(zip(*trees, strict=True))
    return [tuple(trees)]


def join_outputs(model_fn: Callable[..., Params], found: list[Params]) -> Params:
    """Return the outputs of a model, given those of its terms."""
    return tuple(found) if isinstance(model_fn, Several) else found[0]


def _term(fn: Callable[..., Params], parts: Leaves) -> Term:
    dtype = solve_dtype(parts)

    def flat(tree: Params) -> Vector:
        return ravel(tree).astype(dtype)

    if isinstance(fn, Rows):
        sample = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
            jax.tree.map(jnp.asarray, fn.samples),
        )
        example = _zeros(jax.eval_shape(fn.fn, parts, sample))
        return Term(
            fn=lambda parts, sample: flat(fn.fn(parts, sample)),
            samples=fn.samples,
            count=len(jax.tree.leaves(fn.samples)[0]),
            width=ravel(example).size,
            is_rowwise=True,
            restore=jax.vmap(lambda y: unravel(y, example)),
            flatten=jax.vmap(flat),
        )
    example = _zeros(jax.eval_shape(fn, parts))
    return Term(
        fn=lambda parts, _: flat(fn(parts)),
        samples={"sample": jnp.zeros(1)},
        count=1,
        width=ravel(example).size,
        is_rowwise=False,
        restore=lambda y: unravel(y[0], example),
        flatten=lambda tree: flat(tree)[None],
    )


def _zeros(shapes: Params) -> Params:
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
