"""The wheel has every file of both packages, and its files alone run an example of docs/your_model.md."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from support.tiny_runs import ROOT

# What the import of `mhc_kernels` loads besides jax's own packages, and what `connect` must not load.
REPORT = """
import json, sys, jax
before = set(sys.modules)
import mhc_kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
exec(sys.argv[1])
import mhc_jax
print(json.dumps([sorted(new), sorted({name.partition(".")[0] for name in sys.modules}), mhc_jax.__file__, mhc_kernels.__file__]))
"""
FOR_THE_DECODER = {"array_record", "grain", "matplotlib", "ml_collections", "orbax", "pyarrow", "scipy"}
FOR_THE_DECODER |= {"tensorflow_datasets", "tokenizers"}


@pytest.mark.full
def test_the_wheel_is_whole_and_runs_alone(tmp_path):
    """It is built as users build it, with the setuptools that pyproject.toml asks for."""
    for package in ("mhc_jax", "kernels"):
        shutil.copytree(ROOT / package, tmp_path / "source" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "source")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        tmp_path,
        tmp_path / "source",
    ]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "alone")
    expected = set()
    for folder in (ROOT / "mhc_jax", ROOT / "kernels" / "mhc_kernels"):
        files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        expected |= {path.relative_to(folder.parent).as_posix() for path in files}
    assert names == expected

    page = (ROOT / "docs" / "your_model.md").read_text()
    (example,) = re.findall(r"^## Gains and streams\n.*?```python\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "alone")}
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", REPORT, example], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    of_kernels, of_connect, *places = json.loads(done.stdout)
    assert all(place.startswith(str(tmp_path / "alone")) for place in places)
    assert set(of_kernels) <= {"mhc_kernels", "jaxtyping", "jax", "numpy"}
    assert set(of_connect) & FOR_THE_DECODER == set()
