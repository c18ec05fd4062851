"""The page and notebook of the three questions are what their records give."""

import re
import shutil

import numpy as np
import pytest
from support.in_process import run_here
from support.tiny_runs import ROOT

from mhc_jax.analysis.contrasts import by_connection, minus
from mhc_jax.analysis.statistics import t_interval
from mhc_jax.errors import InputError
from mhc_jax.reports.answers import page
from mhc_jax.reports.questions import questions
from mhc_jax.reports.record import read_newest

PAGE = ROOT / "experiments" / "records" / "ANSWERS.md"


@pytest.mark.skipif(not PAGE.exists(), reason="no question has a record yet")
def test_the_page_is_rebuilt_from_records_to_the_digit():
    found = questions(ROOT / "experiments")
    assert PAGE.read_text() == page([question.text for question in found.values()])


def test_intervals_in_the_words_on_question_1_are_those_of_the_record():
    """An interval is that of ANSWERS.md, of the record's page, of another record, or of a difference that is made here."""
    interval = r"[+-]?0\.\d+"
    page = (ROOT / "docs" / "answers.md").read_text()
    found = set(re.findall(rf"\[({interval}), ({interval})\]", page))
    assert len(found) >= 7
    runs = read_newest(PAGE.parent, "which_map")
    losses = by_connection(runs)
    known = set(re.findall(rf"({interval}) to ({interval})", PAGE.read_text()))
    known |= set(re.findall(rf"\[({interval}), ({interval})\]", (runs[0].folder.parent / "README.md").read_text()))
    known |= {("-0.066", "-0.005")}  # H_res alone in the sweep `components`
    for a, b in (("mhc:init=paper", "mhc:disable=res:init=paper"), ("scalar_gated", "mhc:init=paper")):
        low, high = t_interval(np.array([*minus(losses[a], losses[b]).values()]))
        known.add((f"{low:+.4f}", f"{high:+.4f}"))
    known |= {(high.replace("-", ""), low.replace("-", "")) for low, high in known}  # "x below" in the place of -x
    assert found - known == set()


def test_a_file_beside_a_record_that_is_not_of_its_form_is_told(tmp_path):
    record = tmp_path / "records" / "2026-01-01-sweep-residual_longer"
    for folder in sorted(PAGE.parent.glob("*-sweep-*"))[:1]:
        shutil.copytree(folder, record)
    for content in ('{"steps": 3}', '{"steps": {"hc": 3}}', "{}", '{"steps": {"hc": {"ratio": "x"}}}'):
        (record / "step_times.json").write_text(content)
        with pytest.raises(
            InputError, match=r"step_times\.json is not in the form .* run experiments/steptime.py --json again"
        ):
            questions(tmp_path)


@pytest.mark.skipif(not PAGE.exists(), reason="no question has a record yet")
def test_freezing_names_the_runs_that_are_missing(tmp_path):
    status, _, error = run_here("answers", f"--freeze={tmp_path}")
    assert status == 2
    assert "has no trained model of mhc-init-home-entry-copy-num_streams-4-seed0, " in error
