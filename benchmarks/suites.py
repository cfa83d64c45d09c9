"""Every suite: how to measure, and how a record reads."""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import (
    beside_torch,
    bounded,
    cutest,
    features,
    gauss_newton,
    gpu,
    harness,
    kernels,
    multistart,
    nist,
    pinn,
    programs,
    rates,
    rows,
    sizes,
    training,
    validation,
)


class Suite(NamedTuple):
    """What `python -m benchmarks NAME` does."""

    # quick -> record for JSON, figure
    measure: Callable[[bool], tuple[dict[str, Any], Any]]
    markdown: Callable[[dict[str, Any]], list[str]]  # record -> Markdown


SUITES = {
    "features": Suite(features.measure, features.markdown),
    "kernels": Suite(
        lambda quick: harness.record(kernels.tables(quick)), harness.markdown
    ),
    "sizes": Suite(lambda quick: harness.record(sizes.tables(quick)), harness.markdown),
    "rows": Suite(lambda quick: harness.record(rows.tables(quick)), harness.markdown),
    "gpu": Suite(lambda quick: harness.record(gpu.tables(quick)), harness.markdown),
    "programs": Suite(programs.measure, programs.markdown),
    "cutest": Suite(cutest.measure, cutest.markdown),
    "validation": Suite(validation.measure, validation.markdown),
    "bounded": Suite(bounded.measure, bounded.markdown),
    "nist": Suite(nist.measure, nist.markdown),
    "rates": Suite(rates.measure, rates.markdown),
    "training": Suite(training.measure, training.markdown),
    "multistart": Suite(multistart.measure, multistart.markdown),
    "pinn": Suite(pinn.measure, pinn.markdown),
    "gauss-newton": Suite(gauss_newton.measure, gauss_newton.markdown),
    "torch": Suite(
        lambda quick: harness.record(beside_torch.tables(quick)), harness.markdown
    ),
}
