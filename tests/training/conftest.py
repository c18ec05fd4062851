"""Fixtures that the tests of runs share: a text, a finished run, and the programs that runs of one configuration compile."""

import pytest
from support.shared_programs import shared_programs  # noqa: F401
from support.tiny_runs import tiny, write_text

from mhc_jax import loop


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def residual(text):
    """A configuration whose loss jumps at step 4."""
    return tiny(text, "residual", optimizer={"learning_rate": 1.0}, train={"diagnostics_every": 8})


@pytest.fixture(scope="session")
def alone(residual, tmp_path_factory):
    """A finished run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert loop.train(residual, folder)["status"] == "finished", "a signal stopped this run; all tests of it fail"
    return folder
