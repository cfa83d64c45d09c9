"""The pages that cite measurements are made of the committed records, and of nothing
else."""

import pathlib

import pytest

from benchmarks import report

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_page_of_results_is_that_of_the_records():
    assert (RESULTS.parent / "RESULTS.md").read_text() == report.page(RESULTS)


@pytest.mark.parametrize("name", report.CITING)
def test_what_is_cited_is_in_the_records(name):
    text = (ROOT / name).read_text()
    assert text == report.filled(text, report.records(RESULTS / report.HOME))
