"""Every law of the contract, for every transformation of the table."""

import pytest

from tests import contract
from tests.table import FOREIGN, HESSOPT

CASES = {case.name: case for case in (*HESSOPT, *FOREIGN)}


def _pairs():
    for case in CASES.values():
        for law in contract.LAWS:
            if case.light and law in contract.COSTLY:
                continue
            marks = (
                [pytest.mark.slow] if law in contract.COSTLY and not case.main else []
            )
            yield pytest.param(
                case.name, law.__name__, marks=marks, id=f"{case.name}: {law.__name__}"
            )


@pytest.mark.parametrize(("name", "law"), list(_pairs()))
def test_keeps_the_law(name, law):
    known = CASES[name].fails.get(law)
    try:
        getattr(contract, law)(CASES[name])
    except Exception:
        if known is None:
            raise
    else:
        assert known is None, (
            f"{name} is listed as breaking {law} ({known}), and keeps it"
        )


def test_the_table_lists_laws_by_their_names():
    names = {law.__name__ for law in contract.LAWS}
    assert all(set(case.fails) <= names for case in CASES.values())
