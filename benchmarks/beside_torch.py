"""The torch suite: the Taylor terms of one network in the sweep, and in torch by their
definition, in turns.

Needs torch (`pip install torch==2.13.0`, Python 3.11), which is no requirement of
anything else here.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.harness import Contender, Table, compare
from benchmarks.kernels import NETWORKS, taylor_terms
from benchmarks.problems import mlp


def tables(quick: bool) -> Sequence[Table]:
    """A table for each network."""
    networks, rounds = (NETWORKS[:1], 2) if quick else (NETWORKS, 5)
    return [
        compare(
            f"Taylor terms, a group for each tensor, {p.name}",
            _contenders(p),
            rounds,
            0.2,
        )
        for p in (mlp.noise(sizes, 512) for sizes in networks)
    ]


def _contenders(problem: mlp.Problem) -> list[Contender]:
    """Both of the same objective at the same point along the same updates; equal to
    1e-2 or an error."""
    # no requirement, so that type checkers need not find it
    torch: Any = importlib.import_module("torch")
    x, labels = mlp.noise_data(
        len(problem.params[0][0]), problem.params[-1][1].size, 512
    )
    inputs, targets = torch.tensor(x, dtype=torch.float32), torch.tensor(labels)
    params = [
        torch.tensor(np.asarray(leaf), requires_grad=True)
        for leaf in jax.tree.leaves(problem.params)
    ]
    updates = [
        torch.tensor(-np.asarray(leaf))
        for leaf in jax.tree.leaves(jax.grad(problem.value_fn)(problem.params))
    ]

    def value_fn() -> Any:
        h = inputs
        for i in range(0, len(params), 2):
            h = torch.addmm(params[i + 1], h, params[i])
            h = torch.tanh(h) if i + 2 < len(params) else h
        return torch.nn.functional.cross_entropy(h, targets)

    def gradient() -> Any:
        return torch.autograd.grad(value_fn(), params)

    def along(tensors: Sequence[Any]) -> list[Any]:
        return [(t * u).sum() for t, u in zip(tensors, updates, strict=True)]

    def terms(order: int) -> tuple[Any, Any]:
        """The Hessian by one backward pass through the gradient per group, the third
        derivatives by one more."""
        first = along(torch.autograd.grad(value_fn(), params, create_graph=True))
        hessian, third = [], []
        for s, slope in enumerate(first):
            row = along(
                torch.autograd.grad(
                    slope, params, create_graph=order == 3, retain_graph=True
                )
            )
            hessian.append([float(entry.detach()) for entry in row])
            if order == 3:
                (curved,) = torch.autograd.grad(row[s], params[s], retain_graph=True)
                third.append(float((curved * updates[s]).sum()))
        return np.array(hessian), np.array(third)

    ours = [row for row in taylor_terms(problem) if not row.name.startswith("jax.")]
    exact, found = ours[-1].run(), terms(3)
    for a, b in zip((exact.hessian, exact.third), found, strict=True):
        error = np.abs(a - b).max() / np.abs(b).max()
        if not error <= 1e-2:
            raise ValueError(
                f"torch and hessopt.taylor differ by {error:.1e} on {problem.name}"
            )
    return [
        *ours,
        Contender("torch, value and gradient", gradient, {}),
        Contender("torch, order 2", lambda: terms(2), {}),
        Contender("torch, order 3", lambda: terms(3), {}),
    ]
