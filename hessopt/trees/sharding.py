"""Sharding: arrays like a leaf are sharded as the leaf is, small results are replicated
on all devices.

On a mesh with automatic axes the compiler chooses the shardings inside a program, and
only its inputs, such as a fresh state, have to be placed. With explicit axes the type
of every array contains its sharding, and a contraction over a sharded axis, or a
reshape of one, must specify the sharding of its result.
"""

import functools
from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from hessopt.typing import Params, Tree


def contract(
    a: jax.Array,
    b: jax.Array,
    axes: int,
    *,
    rowwise: bool = False,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Contract the last `axes` axes of both arrays at highest precision; the result is
    replicated on all devices.

    Args:
      a, b: `(..., *shape)`, with `axes` the length of shape; sharded alike along shape
        and not sharded along other axes.
      axes: number of axes.
      rowwise: whether the first axis is a batch axis that a and b share; else the
        result has the leading axes of both.
      dtype: dtype of the sums.
    """
    over = tuple(range(a.ndim - axes, a.ndim)), tuple(range(b.ndim - axes, b.ndim))
    whole = _whole(a)
    return jax.lax.dot_general(
        a,
        b,
        (over, ((0,), (0,)) if rowwise else ((), ())),
        precision="highest",
        preferred_element_type=dtype,
        **{} if whole is None else {"out_sharding": whole},
    )


def gathered(x: jax.Array) -> jax.Array:
    """Return x replicated on all devices of an explicit mesh."""
    whole = _whole(x)
    return x if whole is None else jax.sharding.reshard(x, whole)


def split_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Return x with the sharding of `like`, an array of its shape, on an explicit
    mesh."""
    return (
        x
        if _whole(like) is None
        else jax.sharding.reshard(x, jax.typeof(like).sharding)
    )


def merged(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Reshape x to `shape`; on an explicit mesh only its first axis stays sharded."""
    if _whole(x) is None:
        return x.reshape(shape)
    sharding = jax.typeof(x).sharding
    first = PartitionSpec(sharding.spec[0], *[None] * (len(shape) - 1))
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, first))


def varying(x: jax.Array) -> tuple[str, ...]:
    """Return the axes of a `jax.shard_map` along which x varies between devices."""
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return tuple(sorted(kind.manual_axis_type.varying))
    return tuple(sorted(getattr(kind, "vma", ())))  # older versions of JAX


def _whole(x: jax.Array) -> NamedSharding | None:
    """Return the sharding that replicates x on its explicit mesh; None if x is not
    sharded over one."""
    sharding = jax.typeof(x).sharding
    is_split = any(axis is not None for axis in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec()) if is_split else None


def stack_of(
    leaf: jax.Array, *leading: int, dtype: DTypeLike | None = None
) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding of a stack of arrays that are sharded as
    `leaf` is."""
    sharding = _sharding(leaf)
    if sharding is not None:
        spec = PartitionSpec(*[None] * len(leading), *sharding.spec)
        sharding = NamedSharding(sharding.mesh, spec)
    return jax.ShapeDtypeStruct(
        (*leading, *jnp.shape(leaf)), dtype or jnp.result_type(leaf), sharding=sharding
    )


def zeros(shapes: Tree, params: Params = ()) -> Tree:
    """Return zeros for each `jax.ShapeDtypeStruct` of a tree, by one program; one
    program for each array would take seconds to compile.

    An array without a specified sharding is replicated on all devices of the params.
    """
    leaves, treedef = jax.tree.flatten(shapes)
    default = _everywhere(params)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    places = tuple(leaf.sharding or default for leaf in leaves)
    if any(
        isinstance(getattr(place, "mesh", None), jax.sharding.AbstractMesh)
        for place in places
    ):
        arrays = [
            jnp.zeros(*kind, device=place)
            for kind, place in zip(kinds, places, strict=True)
        ]
    else:
        arrays = _program(kinds, places)()
    return jax.tree.unflatten(treedef, arrays)


@functools.lru_cache(maxsize=256)
def _program(
    kinds: tuple[tuple[tuple[int, ...], np.dtype], ...],
    places: tuple[Sharding | None, ...],
) -> Callable[[], list[jax.Array]]:
    return jax.jit(
        lambda: [jnp.zeros(shape, dtype) for shape, dtype in kinds],
        out_shardings=list(places),
    )


def beside(state: Tree, params: Params) -> Tree:
    """Return a fresh state of a few scalars, replicated on all devices of the params as
    after an update."""
    default = _everywhere(params)
    if default is None or isinstance(default.mesh, jax.sharding.AbstractMesh):
        return state
    return jax.tree.map(
        lambda leaf: leaf if _sharding(leaf) else jax.device_put(leaf, default), state
    )


def _everywhere(params: Params) -> NamedSharding | None:
    """Return the sharding that replicates an array on the mesh of the params."""
    meshes = [
        sharding.mesh
        for sharding in map(_sharding, jax.tree.leaves(params))
        if sharding is not None
    ]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else None


def _sharding(leaf: object) -> NamedSharding | None:
    """Return the sharding of a leaf over a mesh if it is known; for a tracer it is
    known on explicit axes."""
    if isinstance(leaf, jax.core.Tracer):
        return None if _whole(leaf) is None else jax.typeof(leaf).sharding
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
