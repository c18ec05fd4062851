"""The tables of planted faults fit the code: each text to change occurs once in its file, and each test that is named exists."""

import ast
import collections

import pytest
from planted import plant
from support.tiny_runs import ROOT

FAULTS = plant.faults()


@pytest.mark.parametrize("table", sorted({fault.table for fault in FAULTS}))
def test_faults_can_be_planted(table):
    for fault in (f for f in FAULTS if f.table == table):
        before = ast.parse((ROOT / fault.file).read_text())
        assert ast.dump(ast.parse(fault.planted())) != ast.dump(before), f"{fault.name} changes nothing"


def test_names_are_unique():
    assert [name for name, count in collections.Counter(f.name for f in FAULTS).items() if count > 1] == []


def test_the_tests_they_name_exist():
    missing = []
    for fault in FAULTS:
        for test in fault.tests:
            file, _, name = test.partition("::")
            functions = {n.name for n in ast.parse((ROOT / file).read_text()).body if isinstance(n, ast.FunctionDef)}
            if name and name.split("[")[0] not in functions:
                missing.append((fault.name, test))
    assert missing == []
