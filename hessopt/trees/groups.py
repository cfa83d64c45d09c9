"""Assigns leaves to groups, for the arguments `groups` and `blocks`."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from hessopt._checks import check_word
from hessopt.typing import Labels, Params

Groups: TypeAlias = str | Callable[[KeyPath, jax.Array], object] | Labels
"""A word, a callable `path, leaf -> label`, or a tree of labels; see `group_labels`."""


def group_labels(params: Params, groups: Groups) -> tuple[Labels, tuple[str, ...]]:
    """Assign every leaf of `params` to a group.

    Args:
      params: pytree of arrays.
      groups: `"all"` (one group), `"leaf"` (one per leaf), `"layer"` (leaves with the
        same parent path), `"weights_biases"` (one group for leaves of rank 2 and more,
        one for the others), a tree of labels with the structure of `params` or a prefix
        of it, or a callable `path, leaf -> label` with JAX's key path.

    Returns:
      `(labels, names)`: a tree of ints like `params`, and the names of the groups, in
      the order of their first leaves in `params`; `labels` are indices into `names`.

    Raises:
      ValueError: for an unknown word, or labels that do not match `params`, naming the
        path.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "scale": jnp.ones(())}
      >>> group_labels(params, "layer")
      ({'dense': {'bias': 0, 'kernel': 0}, 'scale': 1}, ('dense', '.'))
      >>> group_labels(params, "weights_biases")[1]
      ('biases', 'weights')
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if callable(groups):
        labels = [groups(path, leaf) for path, leaf in leaves]
    elif not isinstance(groups, str):
        labels = given_labels("groups", groups, params)
    else:
        check_word("groups", groups, WORDS)
        labels = [WORDS[groups](path, leaf) for path, leaf in leaves]
    names = tuple(dict.fromkeys(map(str, labels)))
    return jax.tree.unflatten(
        treedef, [names.index(str(label)) for label in labels]
    ), names


ABSENT: Any = object()


def given_labels(name: str, tree: Labels, params: Params) -> list[object]:
    """Return the label of each leaf of params, from a tree with their structure or a
    prefix of it."""
    given = dict(jax.tree_util.tree_leaves_with_path(tree))
    unused, found = set(given), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda leaf: leaf is None
    ):
        above = next(
            (path[:n] for n in range(len(path) + 1) if path[:n] in given), ABSENT
        )
        if above is ABSENT and leaf is not None:
            raise ValueError(
                f"{name} must be a tree like params: {_name(path)!r} has no label"
            )
        unused.discard(above)
        if leaf is not None:  # None stands for a leaf of another part of the parameters
            found.append(given[above])
    if unused and found:
        raise ValueError(
            f"{name} must be a tree like params: {_name(min(unused, key=str))!r} is labelled but no parameter"
        )
    return found


def check_groups(name: str, groups: Groups) -> None:
    """Raise `ValueError` for an unknown word. Labels are checked later, when the
    parameters are known."""
    if isinstance(groups, str):
        check_word(name, groups, WORDS)


def take(tree: Params, labels: Labels, group: int) -> Params:
    """Return `tree` with None in place of every leaf outside of `group`; the paths are
    the same."""
    return jax.tree.map(
        lambda label, leaf: leaf if label == group else None, labels, tree
    )


def combine(part: Params, tree: Params) -> Params:
    """Return `tree` with the leaves of `part` that are not None in place of its own;
    the inverse of `take`."""
    return jax.tree.map(
        lambda p, t: t if p is None else p, part, tree, is_leaf=lambda p: p is None
    )


def _name(path: KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "."


def _unboxed(path: KeyPath) -> KeyPath:
    """Drop the last key of the path of a boxed parameter (`flax.nnx.Param`,
    `flax.linen.Partitioned`), which selects its value."""
    return path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path


WORDS: dict[str, Callable[..., str]] = {
    "all": lambda path, leaf: "all",
    "leaf": lambda path, leaf: _name(path),
    "layer": lambda path, leaf: _name(_unboxed(path)[:-1]),
    "weights_biases": lambda path, leaf: "weights" if jnp.ndim(leaf) >= 2 else "biases",
}
