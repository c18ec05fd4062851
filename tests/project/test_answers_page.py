"""The page and notebook of the three questions are what their records give."""

import pytest
from support.tiny_runs import ROOT

from mhc_jax.reports.answers import page
from mhc_jax.reports.questions import questions

PAGE = ROOT / "experiments" / "records" / "ANSWERS.md"


@pytest.mark.skipif(not PAGE.exists(), reason="no question has a record yet")
def test_the_page_is_rebuilt_from_records_to_the_digit():
    found = questions(ROOT / "experiments")
    assert PAGE.read_text() == page([question.text for question in found.values()])
