import jax
import jax.numpy as jnp
import pytest

from hessopt import group_labels
from hessopt.trees.groups import combine, take

PARAMS = {
    "enc": {"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))},
    "dec": {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))},
    "scale": jnp.zeros(()),
}


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ("all", ("all",)),
        ("leaf", ("dec/bias", "dec/kernel", "enc/bias", "enc/kernel", "scale")),
        ("layer", ("dec", "enc", ".")),
        ("weights_biases", ("biases", "weights")),
        (lambda path, leaf: leaf.ndim, ("1", "2", "0")),
        (jax.tree.map(lambda leaf: leaf.size % 2, PARAMS), ("1", "0")),
    ],
)
def test_every_word_names_its_groups(groups, names):
    labels, got = group_labels(PARAMS, groups)
    assert got == names
    assert jax.tree.structure(labels) == jax.tree.structure(PARAMS)
    assert sorted(set(jax.tree.leaves(labels))) == list(range(len(names)))


def test_take_and_combine_are_inverse():
    labels, names = group_labels(PARAMS, "layer")
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    for group in range(len(names)):
        part = take(ones, labels, group)
        assert len(jax.tree.leaves(part)) == jax.tree.leaves(labels).count(group)
        zeros = combine(part, zeros)
    assert all(jnp.all(leaf == 1) for leaf in jax.tree.leaves(zeros))


def test_what_does_not_match_is_named():
    with pytest.raises(
        ValueError, match=r"groups must be one of .*'layer'.*, got 'layers'"
    ):
        group_labels(PARAMS, "layers")
    with pytest.raises(ValueError, match="'dec/kernel' has no label"):
        group_labels(
            PARAMS, {"enc": {"bias": 0, "kernel": 0}, "dec": {"bias": 0}, "scale": 1}
        )
    with pytest.raises(ValueError, match="'extra' is labelled but no parameter"):
        group_labels(PARAMS, jax.tree.map(lambda _: 0, PARAMS) | {"extra": 1})


def test_a_bare_array_and_an_empty_tree():
    assert group_labels(jnp.zeros(3), "layer") == (0, (".",))
    assert group_labels({}, "leaf") == ({}, ())


def test_boxed_parameters_belong_to_the_layer_of_their_module():
    from flax import linen as nn

    boxed = {
        "dense": {
            "kernel": nn.Partitioned(jnp.zeros((2, 2)), ("a", "b")),
            "bias": jnp.zeros(2),
        }
    }
    assert group_labels(boxed, "layer")[1] == ("dense",)


def test_labels_are_matched_by_path_and_not_by_its_spelling():
    labels, names = group_labels(
        {"a/b": 1.0, "a": {"b": 1.0}}, {"a/b": "u", "a": {"b": "v"}}
    )
    assert (names[labels["a/b"]], names[labels["a"]["b"]]) == ("u", "v")
