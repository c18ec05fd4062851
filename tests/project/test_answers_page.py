"""The page and notebook of the three questions are what their records give."""

import re
import shutil

import pytest
from support.in_process import run_here
from support.tiny_runs import ROOT

from mhc_jax.errors import InputError
from mhc_jax.reports.answers import page
from mhc_jax.reports.questions import questions

PAGE = ROOT / "experiments" / "records" / "ANSWERS.md"


def test_the_page_is_rebuilt_from_records_to_the_digit():
    found = questions(ROOT / "experiments")
    assert PAGE.read_text() == page([question.text for question in found.values()])


def test_means_and_intervals_in_the_words_are_those_of_the_tables():
    """A mean with its interval stands in a row of ANSWERS.md or BOARD.md, with its sign."""
    number = r"[+-]?\d+\.\d+"
    pages = ("answers.md", "answers_limits.md")
    words = " ".join(word for name in pages for word in (ROOT / "docs" / name).read_text().split())
    found = set(re.findall(rf"({number}) \[({number}), ({number})\]", words))
    assert len(found) >= 35
    assert len(found) == len({*re.findall(rf"{number} \[[^\]]*\]", words)}), "an interval has no mean before it"
    tables = PAGE.read_text() + PAGE.with_name("BOARD.md").read_text()
    known = set(re.findall(rf"\| ({number}) \| ({number}) to ({number}) \|", tables))
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


def test_freezing_names_the_runs_that_are_missing(tmp_path):
    status, _, error = run_here("answers", f"--freeze={tmp_path}")
    assert status == 2
    assert "of 40 of the 40 runs of mHC, such as mhc-init-home-entry-copy-num_streams-4-seed0;" in error
