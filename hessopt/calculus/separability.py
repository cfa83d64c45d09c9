"""Recognizes linear functions that act on each entry, or on each sample, separately.

The program of the function is interpreted with values that say on which input a result
depends, and how. Entries are numbered in row-major order, so that they keep their
numbers in a reshape; samples are the entries of the first axis.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from hessopt.calculus.jaxprs import Equation, interpret

ENTRY, SAMPLE, WHOLE, MIXED = range(4)
"""How a result depends on an input: entry by entry, sample by sample, otherwise; or on
several inputs."""

Source = tuple[int, int]
"""The number of an input, and how a result depends on it."""

_ENTRYWISE = frozenset(
    [
        "neg",
        "convert_element_type",
        "copy",
        "mul",
        "div",
        "add_any",
        "add",
        "sub",
        "select_n",
        "real",
        "imag",
    ]
)

_RENUMBERED = frozenset(["reshape", "squeeze", "expand_dims", "broadcast_in_dim"])
"""Operations that keep the row-major order if they keep the number of entries."""


def is_diagonal(linear: Callable[[Any], Any], example: Any) -> bool:
    """Return whether each entry of a linear function's result is recognized to depend
    only on the same entry of its argument."""
    return all(source in (None, (i, ENTRY)) for i, source in _sources(linear, example))


def is_samplewise(linear: Callable[[Any], Any], example: Any) -> bool:
    """Return whether each sample of a linear function's result, along the first axis of
    each array, is recognized to depend only on the same sample of its argument."""
    counts = [leaf.shape[0] for leaf in jax.tree.leaves(example)]
    return all(
        source is None
        or source in ((i, ENTRY), (i, SAMPLE))
        or (source == (i, WHOLE) and counts[i] == 1)
        for i, source in _sources(linear, example)
    )


def _sources(
    linear: Callable[[Any], Any], example: Any
) -> list[tuple[int, Source | None]]:
    """Return on what each leaf of a linear function's result depends, numbered."""
    leaves, treedef = jax.tree.flatten(example)
    program = jax.make_jaxpr(
        lambda leaves: jax.tree.leaves(linear(jax.tree.unflatten(treedef, leaves)))
    )(leaves)
    inputs: list[Source | None] = [(i, ENTRY) for i in range(len(leaves))]
    found = interpret(program, inputs, _source, constant=lambda _: None)
    return list(enumerate(found))


def _source(equation: Equation, sources: list[Source | None]) -> list[Source | None]:
    """Return on what the results depend; None if they depend on no input."""
    read = [source for source in sources if source is not None]
    if not read:
        return [None] * len(equation.results)
    inputs, worst = {source[0] for source in read}, max(how for _, how in read)
    how = max(worst, _dependence(equation, sources)) if len(inputs) == 1 else MIXED
    return [(min(inputs), how)] * len(equation.results)


def _dependence(equation: Equation, sources: list[Source | None]) -> int:
    """Return how the results depend on the operands that depend on an input."""
    positions = [i for i, source in enumerate(sources) if source is not None]
    shapes = [equation.operands[i].shape for i in positions]
    after = equation.results[0].shape
    # an operand of another shape is broadcast, which is not entry by entry
    if equation.name in _ENTRYWISE and all(shape == after for shape in shapes):
        return ENTRY
    keeps_size = math.prod(shapes[0]) == math.prod(after)
    if equation.name in _RENUMBERED and keeps_size:
        return ENTRY
    keeps_count = all(shape[:1] == after[:1] != () for shape in shapes)
    return SAMPLE if keeps_count and _keeps_samples(equation, positions) else WHOLE


def _keeps_samples(equation: Equation, positions: list[int]) -> bool:
    """Return whether an equation that keeps the length of the first axis acts on each of
    its entries separately."""
    params = equation.params
    match equation.name:
        case "slice" | "complex":
            return True
        case "broadcast_in_dim":
            return params["broadcast_dimensions"][:1] == (0,)
        case "reshape":
            return params.get("dimensions") is None
        case "reduce_sum":
            return 0 not in params["axes"]
        case "transpose":
            return params["permutation"][0] == 0
        case "concatenate":
            return params["dimension"] > 0
        case "pad":
            return positions == [0] and params["padding_config"][0] == (0, 0, 0)
        case "dot_general":
            over, shared = params["dimension_numbers"]
            if positions not in ([0], [1]):
                return False
            is_shared = shared[positions[0]][:1] == (0,)
            is_first = not shared[0] and positions == [0] and 0 not in over[0]
            return is_shared or is_first
    return False
