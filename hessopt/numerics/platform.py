"""What a program is compiled for.

On CPUs XLA compiles a loop over small arrays to a single function, if it calls no
library: products of two matrices and factorizations are such calls. Otherwise every
kernel of a turn is dispatched on its own, which takes longer than the arithmetic of a
small problem. On accelerators each kernel is a launch, and a loop inside of a step costs
more than a call of a library.
"""

import jax


def on_cpu() -> bool:
    """Return whether programs run on CPUs by default."""
    return jax.default_backend() == "cpu"
