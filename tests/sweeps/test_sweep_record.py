import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
from support.synthetic_runs import write_run

from mhc_jax.config import ExperimentConfig
from mhc_jax.errors import InputError
from mhc_jax.mapping import to_mapping
from mhc_jax.run_folder import write_json
from mhc_jax.settings import group
from mhc_jax.sweep import load_sweep, write_plan
from mhc_jax.sweep_record import newest_record, read_record, shortened, write_record

SWEEP = '''"""Two kinds, two seeds."""
from mhc_jax.sweep import Sweep, over, product, seeds

def get_sweep():
    return Sweep(base="config.py", points=product(over("connection", ["residual", "hc"]), seeds(2)))
'''
SOURCE = "/x/texts/train.jsonl.zst"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Folder of a sweep whose runs read a file of this machine, four of four ended."""
    file, folder = tmp_path / "pair.py", tmp_path / "runs" / "pair"
    file.write_text(SWEEP)
    config = json.dumps(to_mapping(ExperimentConfig()))
    (tmp_path / "config.py").write_text(
        f"import json\nfrom ml_collections import ConfigDict\n\ndef get_config():\n"
        f"    return ConfigDict(json.loads({config!r}))\n"
    )
    grid = load_sweep(file, [f"data.source={SOURCE}"])
    write_plan(folder, grid)
    for run in grid.runs:
        kind, seed = run.config.model.connection.kind, run.config.train.seed
        place = write_run(folder, run.name, kind, seed=seed)
        write_json(place / "config.json", to_mapping(run.config))
        env = json.loads((place / "env.json").read_text())
        env |= {"packages": {"jax": "0.10.2"}, "python": "3.11.7", "device_count": 1, "data": {"source": SOURCE}}
        env["command"] = f"python experiments/sweep.py {file} --set=data.source={SOURCE}"
        write_json(place / "env.json", env)
        (place / "checkpoints").mkdir()
    return folder


def test_record_of_a_sweep(sweep, tmp_path):
    folder = write_record(sweep, tmp_path / "records" / "2026-01-02-sweep-pair", metrics=True, note="A note.")
    names = {"README.md", "results.csv", "results.parquet", "residual-seed0", "residual-seed1", "hc-seed0", "hc-seed1"}
    assert {path.name for path in folder.iterdir()} == names
    assert {path.name for path in (folder / "hc-seed0").iterdir()} == {
        "config.json",
        "env.json",
        "summary.json",
        "metrics.jsonl",
    }
    for path in folder.rglob("*.*"):
        text = path.read_bytes()
        assert b"/home" not in text, path
        assert str(tmp_path).encode() not in text, path
    readme = (folder / "README.md").read_text()
    assert "\n    python experiments/sweep.py pair.py --set=data.source=train.jsonl.zst\n" in readme
    assert "Shared settings that are not defaults: data.source=train.jsonl.zst." in readme
    assert "4 runs: 4 finished" in readme
    assert "| hc | 2 | 1.6" in readme
    assert "A note." in readme
    settings = group(read_record(folder))
    assert [setting.label for setting in settings] == ["hc", "residual"]
    assert len(settings[0].any_run.train["step"]) == 100
    assert newest_record(folder.parent, "pair") == folder
    assert newest_record(folder.parent, "width") is None


def test_record_without_metrics_has_summaries_alone(sweep, tmp_path):
    runs = read_record(write_record(sweep, tmp_path / "record"))
    assert [len(run.train["step"]) for run in runs] == [0, 0, 0, 0]
    assert all(run.result("validation_loss") for run in runs)
    assert runs[0].tokens == 200 * runs[0].config["data"]["batch_size"] * runs[0].config["data"]["sequence_length"]
    assert pyarrow.parquet.read_table(tmp_path / "record" / "results.parquet").num_rows == 4


def test_unfinished_sweep_is_refused_unless_told(sweep, tmp_path):
    folder = sweep
    (folder / "hc-seed1" / "summary.json").unlink()
    with pytest.raises(InputError, match=r"1 of 4 runs .*hc-seed1.*--unfinished"):
        write_record(folder, tmp_path / "record")
    assert not (tmp_path / "record").exists()
    write_record(folder, tmp_path / "record", unfinished=True)
    readme = (tmp_path / "record" / "README.md").read_text()
    assert "3 finished" in readme
    assert "1 begun" in readme
    assert not (tmp_path / "record" / "hc-seed1").exists()
    with pytest.raises(InputError, match="there already"):
        write_record(folder, tmp_path / "record", unfinished=True)


def test_nothing_to_record(sweep, tmp_path):
    folder = sweep
    for place in folder.glob("*-seed*"):
        shutil.rmtree(place)
    with pytest.raises(InputError, match="No run of"):
        write_record(folder, tmp_path / "record", unfinished=True)
    with pytest.raises(InputError, match="is no record"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/x/a b/c.txt", "a b/c.txt"),
        ('"source": "/x/y/*.zst"', '"source": "*.zst"'),
        ("--set=data.source=/x/y.txt", "--set=data.source=y.txt"),
        ("https://host/path/file", "https://host/path/file"),
        ("texts/a.txt 1/2 +0.1/x", "texts/a.txt 1/2 +0.1/x"),
    ],
)
def test_shortened(text, short):
    assert shortened(text) == short
