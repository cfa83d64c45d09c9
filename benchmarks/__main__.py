"""`python -m benchmarks SUITE`: measure, print the table, and keep it with a figure."""

import argparse
import pathlib

from benchmarks import beside_torch, cutest, gauss_newton, harness, kernels, pinn

SUITES = {
    "kernels": lambda quick, out: harness.write(out, "kernels", kernels.run(quick)),
    "cutest": cutest.run,
    "pinn": pinn.run,
    "gauss-newton": gauss_newton.run,
    "torch": lambda quick, out: harness.write(out, "torch", beside_torch.run(quick)),
}


def main() -> None:
    """Parse the command line and run the suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure hessopt beside its peers.")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--quick", action="store_true", help="small and few: a test that it runs, no measurement")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    options = parser.parse_args()
    print(SUITES[options.suite](options.quick, options.out))


if __name__ == "__main__":
    main()
