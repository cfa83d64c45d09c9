"""The table of transformations that the contract is swept over. A new method gets every
law by one row."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import hessopt


class Case(NamedTuple):
    """One transformation, and what its documentation claims about it."""

    name: str
    factory: Callable[..., optax.GradientTransformation]
    arguments: Mapping[str, Any] = MappingProxyType({})
    # "optimizer": gradient in, update out; "direction": +P g out; "rate": update in and
    # out
    kind: str = "optimizer"
    rate: float = 1.0  # of a direction, where it trains optax's test problems
    needs: tuple[str, ...] = ()  # keywords of `update` that it cannot do without
    # numbers for `optax.inject_hyperparams`; other arguments, where given, are static
    injectable: tuple[str, ...] = ()
    composite: bool = False  # wants `hessopt.composite` for an objective
    # its first step is the same in whatever unit the objective is measured
    unitless: bool = False
    # largest unit of the objective in float32: a rate measures the objective along
    # updates that may be proportional to it, and third derivatives along them
    float32_unit: float = 1e25
    scaled: bool = False  # its steps are the same in whatever units parameters are
    real: bool = False  # takes real parameters only
    # shares its state with the main row of bounds, which runs the costly sweeps
    light: bool = False
    main: bool = False  # one that runs the costly sweeps in the fast suite too
    # facts, besides negative curvature, of its first step here
    reports: hessopt.StepStatus = hessopt.StepStatus.OK
    # law -> why this foreign transformation is known to break it
    fails: Mapping[str, str] = MappingProxyType({})

    def make(self) -> optax.GradientTransformationExtraArgs:
        """Build the transformation."""
        return optax.with_extra_args_support(self.factory(**self.arguments))


SEARCHED = ("value", "grad", "value_fn")


def newton(name: str, **arguments: Any) -> Case:
    return Case(
        f"newton, {name}",
        hessopt.newton,
        arguments,
        needs=SEARCHED,
        injectable=("damping",),
        unitless="damping" not in arguments,
        scaled="damping" not in arguments,
    )


def subsampled_newton(probability: float) -> optax.GradientTransformation:
    return hessopt.subsampled(hessopt.scale_by_newton(), probability=probability)


RATES = ("learning_rate", "curvature_decay", "rate_decay", "min_rate", "max_change")


def masked_newton() -> optax.GradientTransformation:
    return hessopt.masked(
        hessopt.newton(),
        lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) > 0, params),
    )


HESSOPT = (
    newton("shift")._replace(main=True),
    newton("absolute", on_indefinite="absolute"),
    newton(
        "none, backtracking",
        on_indefinite="none",
        linesearch=optax.scale_by_backtracking_linesearch(30),
    ),
    newton("leaf blocks", blocks="leaf", update_every=2),
    newton("layer blocks", blocks="layer"),
    newton("weights and biases", blocks="weights_biases"),
    newton("Gauss-Newton", curvature="gauss_newton", damping=1e-3)._replace(
        composite=True
    ),
    newton("no search", damping=1e-3, learning_rate=0.5, linesearch=None)._replace(
        needs=("value_fn",), injectable=("damping", "learning_rate")
    ),
    Case(
        "scale_by_newton",
        hessopt.scale_by_newton,
        kind="direction",
        needs=("value_fn",),
        injectable=("damping",),
    ),
    Case(
        "subsampled",
        subsampled_newton,
        {"probability": 0.5},
        kind="direction",
        rate=1e-3,  # for the gradients that it mixes in
        needs=("value_fn",),
        injectable=("probability",),
    ),
)

HESSOPT += (
    Case("lbfgs", hessopt.lbfgs, needs=SEARCHED, unitless=True, main=True),
    Case(
        "lbfgs, same batch",
        hessopt.lbfgs,
        {"same_batch_pairs": True, "memory_size": 3},
        needs=SEARCHED,
    ),
    Case(
        "lbfgs, no search",
        hessopt.lbfgs,
        {"learning_rate": 0.3, "linesearch": None, "memory_size": 2},
        injectable=("learning_rate",),
        unitless=True,
    ),
    Case(
        "scale_by_lbfgs",
        hessopt.scale_by_lbfgs,
        kind="direction",
        rate=0.1,
        unitless=True,
    ),
    Case(
        "scale_by_wolfe_linesearch",
        hessopt.scale_by_wolfe_linesearch,
        {"max_rate": 2.0},
        kind="rate",
        needs=SEARCHED,
        injectable=("slope_rtol", "curv_rtol", "max_rate"),
    ),
)

HESSOPT += (
    Case("bfgs", hessopt.bfgs, needs=SEARCHED, unitless=True, main=True),
    Case(
        "bfgs, SSBroyden",
        hessopt.bfgs,
        {"formula": "ssbroyden"},
        needs=SEARCHED,
        unitless=True,
    ),
    Case(
        "bfgs, SSBFGS, damped",
        hessopt.bfgs,
        {"formula": "ssbfgs", "on_bad_curvature": "powell"},
        needs=SEARCHED,
    ),
    Case(
        "bfgs, no search",
        hessopt.bfgs,
        {"learning_rate": 0.3, "linesearch": None},
        injectable=("learning_rate",),
        unitless=True,
    ),
    Case(
        "scale_by_bfgs, DFP",
        hessopt.scale_by_bfgs,
        {"formula": "dfp"},
        kind="direction",
        rate=0.1,
        unitless=True,
    ),
)

HESSOPT += (
    Case(
        "generalized_newton",
        hessopt.generalized_newton,
        {"base": optax.sgd(1.0, momentum=0.9)},
        needs=("value_fn",),
        injectable=RATES,
        unitless=True,
        float32_unit=1e8,
        main=True,
    ),
    Case(
        "scale_by_generalized_newton, forward, leaves",
        hessopt.scale_by_generalized_newton,
        {"mode": "forward", "groups": "leaf", "update_every": 3, "initial_rate": 0.5},
        kind="rate",
        reports=hessopt.StepStatus.RATE_KEPT,
        needs=("value_fn",),
        injectable=RATES,
    ),
    Case(
        "grouped_newton",
        hessopt.grouped_newton,
        {"base": optax.sgd(1.0)},
        needs=("value_fn",),
        reports=hessopt.StepStatus.SAFEGUARDED,
        injectable=(
            "cubic_damping",
            "learning_rate",
            "curvature_decay",
            "rate_decay",
            "ridge",
        ),
        unitless=True,
        float32_unit=1e6,
    ),
    Case("masked", masked_newton, needs=SEARCHED, unitless=True),
)

HESSOPT += (
    Case(
        "trust_region_newton",
        hessopt.trust_region_newton,
        needs=("value_fn",),
        unitless=True,
        scaled=True,
    ),
    Case(
        "trust_region_newton, radius, cg",
        hessopt.trust_region_newton,
        {"step_bound": "radius", "subproblem": "cg"},
        needs=("value_fn",),
        unitless=True,
    ),
    Case(
        "trust_region_newton, Gauss-Newton",
        hessopt.trust_region_newton,
        {"curvature": "gauss_newton", "geodesic_acceleration": True},
        needs=("value_fn",),
        unitless=True,
        scaled=True,
        composite=True,
    ),
    Case(
        "gauss_newton",
        hessopt.gauss_newton,
        needs=SEARCHED,
        injectable=("damping",),
        unitless=True,
        composite=True,
    ),
    Case(
        "scale_by_gauss_newton, samples, momentum",
        hessopt.scale_by_gauss_newton,
        {"space": "samples", "momentum": 0.5, "damping_rule": "constant"}
        | {"damping": 0.1},
        kind="direction",
        needs=("value_fn",),
        injectable=("damping", "momentum"),
        composite=True,
    ),
    Case(
        "scale_by_grid_linesearch",
        hessopt.scale_by_grid_linesearch,
        {"max_rate": 2.0},
        kind="rate",
        needs=("value", "value_fn"),
        injectable=("max_rate", "factor"),
    ),
    Case("newton_cg", hessopt.newton_cg, needs=SEARCHED, unitless=True),
    Case(
        "scale_by_newton_cg, Gauss-Newton, warm",
        hessopt.scale_by_newton_cg,
        {"curvature": "gauss_newton", "warm_start": True, "rematerialize": True},
        kind="direction",
        needs=("value_fn",),
        composite=True,
    ),
)

BOUNDS = {"bounds": (-0.56, 0.66)}
"""Bounds that contain the start of the contract's objective, and not its minimum."""


def bounded(name: str, factory: Callable[..., Any], **arguments: Any) -> Case:
    needs = ("value_fn",) if factory is hessopt.trust_region_newton else SEARCHED
    return Case(
        f"{name}, bounds",
        factory,
        BOUNDS | arguments,
        needs=needs,
        unitless=True,
        real=True,
        light=factory is not hessopt.lbfgs,
        composite="curvature" in arguments,
    )


HESSOPT += (
    bounded("lbfgs", hessopt.lbfgs),
    bounded("bfgs", hessopt.bfgs),
    bounded("newton", hessopt.newton),
    bounded("newton_cg", hessopt.newton_cg),
    bounded("trust_region_newton", hessopt.trust_region_newton),
    bounded(
        "trust_region_newton, Gauss-Newton",
        hessopt.trust_region_newton,
        curvature="gauss_newton",
    ),
)

NO_STATUS = {"reports_a_status": "optax has no statuses"}
NAN_THROUGH = {"survives_what_is_not_finite": "optax leaves that to apply_if_finite"}

FOREIGN = (
    Case(
        "adam",
        optax.adam,
        {"learning_rate": 0.1},
        injectable=("learning_rate",),
        fails=NO_STATUS | NAN_THROUGH,
    ),
    Case(
        "scale",
        optax.scale,
        {"step_size": 0.5},
        "rate",
        injectable=("step_size",),
        fails=NO_STATUS | NAN_THROUGH,
    ),
    Case(
        "lbfgs",
        optax.lbfgs,
        needs=SEARCHED,
        fails=NO_STATUS
        | {
            "has_a_stable_strongly_typed_state": "the search's state starts weakly typed",
            "is_traced_and_compiled_once": "therefore its second step compiles anew",
            "continues_from_a_checkpoint_bit_for_bit": "therefore a restored one does too",
            "shares_no_buffer": "fresh leaves share one array of zeros",
            "starts_abstractly": "the search looks for a leaf in optax's placeholder",
            "takes_injected_hyperparameters": "its memory_size is taken for one",
            "names_what_is_missing": "the missing keyword is named, the call to write is not",
            "survives_what_is_not_finite": "the memory takes in the step",
        }
        | (
            {"ignores_unknown_keywords": "the search refuses them"}
            if optax.__version__ != "0.2.5"
            else {}
        ),
    ),
)
