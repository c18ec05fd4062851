"""Plant single faults in copies of the checkout, one at a time, and see which of them the tests catch.

    .venv/bin/python tests/planted/plant.py           # every fault of the tables, about 20 minutes on two cores
    .venv/bin/python tests/planted/plant.py kernels data   # the faults of two tables
    .venv/bin/python tests/planted/plant.py circulant-transposed --whole

The tables are the .toml files beside this script.  Every fault names the tests that should see it.  They run as part of
the fast suite (`make test`) first; where they pass, those of `make test-all` run; where these pass too, the fault has
survived.  With --whole the suites run as wholes wherever the named tests pass.  A table in Markdown is printed; the exit
status is 1 when a fault survived.
"""

from __future__ import annotations

import argparse
import difflib
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUITES = {"fast": None, "all": "not slow and not gpu and not tpu"}
"""Name -> pytest's -m; None: what pyproject.toml says."""


@dataclass(frozen=True)
class Fault:
    """One row of a table.

    `old`, which occurs once in `file`, becomes `new`; `breaks` says what is wrong afterwards; `tests` should see it.
    """

    table: str
    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    def planted(self) -> str:
        """The text of the file with the fault.  ValueError unless `old` occurs once."""
        text = (ROOT / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its old text occurs {text.count(self.old)} times in {self.file}, not once.")
        return text.replace(self.old, self.new)


def faults() -> list[Fault]:
    """All rows of all tables."""
    rows = []
    for path in sorted(Path(__file__).parent.glob("*.toml")):
        for row in tomllib.loads(path.read_text())["fault"]:
            rows.append(Fault(**row | {"table": path.stem, "tests": tuple(row["tests"])}))
    return rows


def copy_checkout(folder: Path) -> None:
    """The files that git knows or would add, as the only commit of a repository: some tests need one."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (source := ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    git = ["git", "-c", "user.name=plant", "-c", "user.email=plant"]
    for step in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message=copy"]):
        subprocess.run([*git, *step], cwd=folder, env=environment(), check=True)


def environment() -> dict[str, str]:
    """The variables without those of git, which may name another repository, and with none of the user's settings of git."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return kept | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


def first_failure(fault: Fault, folder: Path, suite: str, tests: tuple[str, ...]) -> str | None:
    """The first test that fails, None when all pass or when the suite has none of them."""
    variables = environment() | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder / "kernels")])}
    with tempfile.TemporaryDirectory() as data:  # a fault in the data must not stay in a cache
        variables["MHC_JAX_CACHE"] = data
        selected = [] if SUITES[suite] is None else ["-m", SUITES[suite]]
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=no", *selected]
        # The tests of the tables find the fault by its text, which says nothing of the suite.
        command += tests or ["--ignore=tests/planted"]
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if done.returncode in (0, 5):  # 5: no test was selected
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if failed is None:
        raise RuntimeError(
            f"{fault.name}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return failed[1]


def try_fault(fault: Fault, folder: Path, whole: bool) -> tuple[str, str]:
    """(the suite that caught it or "survived", the test that did)."""
    file = folder / fault.file
    original = file.read_text()
    file.write_text(fault.planted())
    try:
        for tests in (fault.tests, ()) if whole else (fault.tests,):
            for suite in SUITES:
                if failed := first_failure(fault, folder, suite, tests):
                    return suite, failed
    finally:
        file.write_text(original)
    return "survived", ""


def main() -> int:
    """Plant what is asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help="names of tables or of faults; without any: all")
    parser.add_argument("--whole", action="store_true", help="run whole suites where the named tests pass")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults at a time")
    asked = parser.parse_args()
    known = faults()
    if unknown := set(asked.which) - {name for fault in known for name in (fault.table, fault.name)}:
        near = difflib.get_close_matches(min(unknown), [fault.name for fault in known], 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        parser.error(f"there is no table and no fault named {', '.join(sorted(unknown))}.{hint}")
    chosen = [fault for fault in known if not asked.which or {fault.table, fault.name} & set(asked.which)]

    with tempfile.TemporaryDirectory() as base, ThreadPoolExecutor(asked.jobs) as pool:
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(asked.jobs):
            copy_checkout(Path(base, str(job)))
            free.put(Path(base, str(job)))

        def one(fault: Fault) -> tuple[str, str]:
            folder = free.get()
            try:
                return try_fault(fault, folder, asked.whole)
            finally:
                free.put(folder)

        print("| table | fault | caught by | test |\n| --- | --- | --- | --- |")
        caught = []
        for fault, (suite, test) in zip(chosen, pool.map(one, chosen), strict=True):
            print(f"| {fault.table} | {fault.name} | {suite} | {test.removeprefix('tests/')} |", flush=True)
            caught.append(suite)
    counts = ", ".join(
        f"{caught.count(name)} {text}"
        for name, text in (
            ("fast", "by the fast suite"),
            ("all", "by the rest of test-all"),
            ("survived", "by no test"),
        )
    )
    print(f"\n{len(chosen)} faults; caught: {counts}.")
    return int("survived" in caught)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
