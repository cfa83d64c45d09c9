"""Where arrays lie: what is like a leaf lies as the leaf does, small results lie whole
on every device.

On a mesh with automatic axes the compiler sees to that inside a program, and only what
begins one, a fresh state, has to be placed. With explicit axes the type of every array
says how it is split, and a contraction over a split axis, or a reshape of one, must say
what becomes of it.
"""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hessopt.typing import Params


def contract(
    a: jax.Array, b: jax.Array, axes: int, *, rowwise: bool = False, dtype: Any = None
) -> jax.Array:
    """Sum the products over the last `axes` axes of both at highest precision; the
    result lies whole on every device.

    Args:
      a, b: `(..., *shape)`, with `axes` the length of shape, split alike there and
        nowhere else.
      axes: number of axes.
      rowwise: whether the first axes belong together; else all of those of a meet all
        of those of b.
      dtype: of the sums.
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
    """The same array, whole on every device of an explicit mesh."""
    whole = _whole(x)
    return x if whole is None else jax.sharding.reshard(x, whole)


def split_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """The same array, split as another of its shape is on an explicit mesh."""
    return (
        x
        if _whole(like) is None
        else jax.sharding.reshard(x, jax.typeof(like).sharding)
    )


def varying(x: jax.Array) -> tuple[str, ...]:
    """The axes of a `jax.shard_map` along which every device has an x of its own."""
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return tuple(sorted(kind.manual_axis_type.varying))
    return tuple(sorted(getattr(kind, "vma", ())))  # older versions of JAX


def _whole(x: jax.Array) -> NamedSharding | None:
    """How x would lie whole on the explicit mesh that it is split over; None where
    there is none."""
    sharding = jax.typeof(x).sharding
    is_split = any(axis is not None for axis in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec()) if is_split else None


def stack_of(leaf: Any, *leading: int, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """The shape and place of a stack of arrays that lie as `leaf` does."""
    sharding = _sharding(leaf)
    if sharding is not None:
        spec = PartitionSpec(*[None] * len(leading), *sharding.spec)
        sharding = NamedSharding(sharding.mesh, spec)
    return jax.ShapeDtypeStruct(
        (*leading, *jnp.shape(leaf)), dtype or jnp.result_type(leaf), sharding=sharding
    )


def zeros(shapes: Any, params: Params = ()) -> Any:
    """Return zeros for each `jax.ShapeDtypeStruct` of a tree, by one program: one each
    takes seconds to compile.

    Where nothing is said of its place, an array lies whole on every device of the
    params.
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
    kinds: tuple[tuple[tuple[int, ...], Any], ...], places: tuple[Any, ...]
) -> Any:
    return jax.jit(
        lambda: [jnp.zeros(shape, dtype) for shape, dtype in kinds],
        out_shardings=list(places),
    )


def beside(state: Any, params: Params) -> Any:
    """Return a fresh state of a few scalars, whole on every device of the params, where
    an update will leave it."""
    default = _everywhere(params)
    if default is None or isinstance(default.mesh, jax.sharding.AbstractMesh):
        return state
    return jax.tree.map(
        lambda leaf: leaf if _sharding(leaf) else jax.device_put(leaf, default), state
    )


def _everywhere(params: Params) -> NamedSharding | None:
    """What lies whole on every device of the params' mesh."""
    meshes = [
        sharding.mesh
        for sharding in map(_sharding, jax.tree.leaves(params))
        if sharding is not None
    ]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else None


def _sharding(leaf: Any) -> NamedSharding | None:
    """How a leaf is split over a mesh, as far as it is known: of a tracer, over
    explicit axes."""
    if isinstance(leaf, jax.core.Tracer):
        return None if _whole(leaf) is None else jax.typeof(leaf).sharding
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
