"""Second-order optimization, and still just an `optax.GradientTransformation`."""

from hessopt.calculus.curvature import hessian as hessian
from hessopt.calculus.curvature import hvp as hvp
from hessopt.calculus.spectrum import spectrum as spectrum
from hessopt.calculus.taylor import Taylor as Taylor
from hessopt.calculus.taylor import taylor as taylor
from hessopt.driver.diagnostics import diagnostics as diagnostics
from hessopt.driver.minimize import Solution as Solution
from hessopt.driver.minimize import minimize as minimize
from hessopt.kinds.line_searches import (
    value_and_grad_from_state as value_and_grad_from_state,
)
from hessopt.numerics.cubic import CubicSolution as CubicSolution
from hessopt.numerics.cubic import solve_cubic as solve_cubic
from hessopt.objective.binding import composite as composite
from hessopt.objective.microbatching import microbatched as microbatched
from hessopt.objective.restriction import restriction as restriction
from hessopt.objective.rowwise import rowwise as rowwise
from hessopt.optimizers import bfgs as bfgs
from hessopt.optimizers import gauss_newton as gauss_newton
from hessopt.optimizers import generalized_newton as generalized_newton
from hessopt.optimizers import grouped_newton as grouped_newton
from hessopt.optimizers import lbfgs as lbfgs
from hessopt.optimizers import newton as newton
from hessopt.optimizers import newton_cg as newton_cg
from hessopt.transforms.bfgs import inverse_hessian as inverse_hessian
from hessopt.transforms.bfgs import scale_by_bfgs as scale_by_bfgs
from hessopt.transforms.gauss_newton import (
    scale_by_gauss_newton as scale_by_gauss_newton,
)
from hessopt.transforms.generalized_newton import (
    scale_by_generalized_newton as scale_by_generalized_newton,
)
from hessopt.transforms.grid_linesearch import (
    scale_by_grid_linesearch as scale_by_grid_linesearch,
)
from hessopt.transforms.grouped_newton import (
    scale_by_grouped_newton as scale_by_grouped_newton,
)
from hessopt.transforms.lbfgs import scale_by_lbfgs as scale_by_lbfgs
from hessopt.transforms.linesearch import (
    scale_by_wolfe_linesearch as scale_by_wolfe_linesearch,
)
from hessopt.transforms.masked import masked as masked
from hessopt.transforms.newton import scale_by_newton as scale_by_newton
from hessopt.transforms.newton_cg import scale_by_newton_cg as scale_by_newton_cg
from hessopt.transforms.subsampled import subsampled as subsampled
from hessopt.transforms.trust_region import trust_region_newton as trust_region_newton
from hessopt.trees.groups import group_labels as group_labels
from hessopt.typing import StepStatus as StepStatus
from hessopt.typing import Termination as Termination

__version__ = "0.2.0"
