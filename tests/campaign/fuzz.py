"""Run the fuzzers of the test suite on other and more examples, and count what they tried.

The tests `tests/*/test_hostile_*.py` feed settings, texts, tokenizers, weights, sweep files and names of any content to the
project, and assert that each is taken or refused in a sentence.  In the suite they always try the same examples.  Here a seed draws
others.
pytest imports this module as a plugin, too.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

from campaign import processes
from campaign.trials import Part, Trial

EXAMPLES, COUNTS = "CAMPAIGN_EXAMPLES", "CAMPAIGN_COUNTS"
"""Variables of the environment: the number of examples of each fuzzer, and the file that gets the counts."""
TIMEOUT_S = 1800


def part(scratch: Path) -> Part:
    """Return the part of the campaign that fuzzes inputs."""
    files = sorted(
        path.relative_to(processes.ROOT).as_posix() for path in processes.ROOT.glob("tests/*/test_hostile_*.py")
    )
    return Part("fuzz", dict.fromkeys(files, 1.0), lambda trial, rng: _trial(scratch, trial, rng))


def _trial(scratch: Path, trial: Trial, rng: random.Random) -> None:
    counts = scratch / "fuzz.json"
    counts.unlink(missing_ok=True)
    env = {**os.environ, EXAMPLES: "300", COUNTS: str(counts)}
    del env["JAX_COMPILATION_CACHE_DIR"]
    plugins = ["-p", "campaign.fuzz", f"--hypothesis-seed={rng.getrandbits(31)}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", trial.case, *plugins]
    try:
        done = subprocess.run(command, cwd=processes.ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        trial.fail("hang", f"still there after {TIMEOUT_S} s")
        return
    tried = json.loads(counts.read_text()) if counts.exists() else {}
    trial.tried = sum(tried.values())
    trial.moments = {re.sub(r"\[.*", "", name): 0 for name in tried}
    for name, count in tried.items():
        trial.moments[re.sub(r"\[.*", "", name)] += count
    if done.returncode:
        trial.fail("traceback", done.stdout[-2800:])


# ------------------------------------------------------------------------------------------------------- the plugin


def pytest_collection_modifyitems(items) -> None:
    """Give each fuzzer its number of examples, without a fixed seed, and count the examples of every test."""
    import hypothesis

    examples = int(os.environ[EXAMPLES])
    for item in items:
        function = item.function
        if not hypothesis.is_hypothesis_test(function):
            continue
        before = function._hypothesis_internal_use_settings
        most = max(examples, before.max_examples)
        function._hypothesis_internal_use_settings = hypothesis.settings(
            before, max_examples=most, derandomize=False, database=None
        )
        if not hasattr(function.hypothesis.inner_test, "counted"):
            function.hypothesis.inner_test = _counting(function.hypothesis.inner_test, item.originalname)


_counts: dict[str, int] = {}


def _counting(test, name: str):
    def counted(*args, **kwargs):
        _counts[name] = _counts.get(name, 0) + 1
        return test(*args, **kwargs)

    counted.counted = True  # pyright: ignore[reportFunctionMemberAccess]
    return counted


def pytest_runtest_logreport(report) -> None:
    """Count a test without examples as one input."""
    if report.when == "call":
        _counts.setdefault(report.nodeid.rpartition("::")[2], 1) if "[" in report.nodeid else None


def pytest_sessionfinish() -> None:
    """Write the counts."""
    Path(os.environ[COUNTS]).write_text(json.dumps(_counts))
