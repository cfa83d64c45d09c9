"""`python -m benchmarks SUITE`: measure, keep record and figure, and write what is read
of them."""

import argparse
import importlib.util
import pathlib
import subprocess
import sys

import jax

from benchmarks import harness, report, scoreboard
from benchmarks.suites import SUITES

GROUPS = {"all": SUITES, "scoreboard": scoreboard.LISTS}
"""Suites that one command measures, each in a process of its own."""


def main() -> None:
    """Parse the command line and run the suite or the group of suites."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure hessopt beside its peers."
    )
    parser.add_argument(
        "suite",
        choices=[*SUITES, *GROUPS, "report"],
        help="all and scoreboard: several suites; report: measure nothing",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small and few: a test that it runs, no measurement",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results"
    )
    options = parser.parse_args()
    if options.suite in GROUPS:
        for name in GROUPS[options.suite]:
            if name == "torch" and not importlib.util.find_spec("torch"):
                continue
            if name == "gpu" and jax.default_backend() == "cpu" and not options.quick:
                continue
            more = ["--quick"] if options.quick else []
            command = [
                sys.executable,
                "-m",
                "benchmarks",
                name,
                "--out",
                str(options.out.absolute()),
                *more,
            ]
            subprocess.run(command, check=True)
        return
    if options.suite == "report":
        report.write(options.out)
        return
    if options.quick:
        # most of the time of a small run is compilation
        jax.config.update("jax_disable_most_optimizations", True)
    suite = SUITES[options.suite]
    record, figure = suite.measure(options.quick)
    record = harness.save(options.out, options.suite, record, figure)
    report.write(options.out)
    print("\n".join(suite.markdown(record)))


if __name__ == "__main__":
    main()
