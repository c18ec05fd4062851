"""What a run folder holds is read back as it was written, or refused in a sentence, whoever writes and whatever is damaged."""

import errno
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from support.synthetic_runs import write_run
from support.tiny_runs import PATIENCE_S, assert_same_run, flags_of, lines, script, tiny

from mhc_jax import loop
from mhc_jax.analysis.run_reader import identities, read_run
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.errors import InputError
from mhc_jax.files.aside import aside
from mhc_jax.loop import train
from mhc_jax.runs import lock
from mhc_jax.runs.folder import (
    check_run_folder,
    create_run_folder,
    read_json,
    read_summary,
    recorded_data,
    run_folder,
    write_json,
)
from mhc_jax.runs.lock import Busy, holder, run_lock
from mhc_jax.runs.metrics import MetricsWriter
from mhc_jax.sweeps.grid import Grid, plan, read_planned, write_plan
from mhc_jax.sweeps.results import result_rows, run_status

DAMAGES = {
    "empty": b"",
    "half": b'{"status": "fin',
    "null": b"null",
    "list": b"[1]",
    "zeros": b"\0" * 200,
    "no text": b'\xff\xfe{"a": 1}',
    "deep": b"[" * 200_000,
    "long integer": b'{"a": ' + b"9" * 9000 + b"}",
    "other keys": b'{"model": 3}',
    "other types": b'{"status": 5, "steps": "x", "data": 1, "model": [], "commit": 1}',
}
RATES = list(np.logspace(-4, -1, 7))


# -------------------------------------------------------------------------------------------- what is written is what is read


@pytest.mark.parametrize("rate", [10**-2.5, 1 / 300, 0.1 + 0.2, 5e-324])
def test_a_setting_read_back_is_the_setting_written_bit_for_bit(rate, text, tmp_path):
    given = to_mapping(tiny(text, "mhc", optimizer={"weight_decay": rate}))
    create_run_folder(tmp_path / "run", given)
    read = read_json(tmp_path / "run" / "config.json")
    assert read == given
    assert read["optimizer"]["weight_decay"].hex() == rate.hex()
    assert check_run_folder(tmp_path / "run", given) is None
    other = to_mapping(from_mapping(given).with_settings(optimizer={"weight_decay": math.nextafter(rate, 1.0)}))
    with pytest.raises(InputError, match="another configuration"):
        check_run_folder(tmp_path / "run", other)


def test_a_log_spaced_sweep_has_its_rates_to_the_last_bit_in_plan_names_and_table(text, tmp_path):
    runs = plan(to_mapping(tiny(text, "residual")), [{"optimizer.learning_rate": rate} for rate in RATES])
    assert [run.name for run in runs] == [f"lr{rate}" for rate in RATES], "no two rates share a folder"
    write_plan(tmp_path, Grid("Rates", runs))
    for run, row in zip(runs, result_rows(tmp_path), strict=True):
        assert read_planned(tmp_path, run.name) == run.config
        create_run_folder(tmp_path / run.name, to_mapping(run.config))
        assert check_run_folder(tmp_path / run.name, to_mapping(read_planned(tmp_path, run.name))) is None
        assert row["optimizer.learning_rate"] == run.config.optimizer.learning_rate


@pytest.mark.parametrize("name", ["exp[1]", "a*b", "what?", "back\\slash", "new\nline", os.fsdecode(b"bad\xff")])
def test_a_folder_in_which_checkpoints_cannot_be_read_is_refused_before_it_is_made(
    name, residual, tmp_path, monkeypatch
):
    for path in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(InputError, match=r"checkpoints there could not be read again; choose another folder"):
            train(residual, path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(InputError, match="could not be read again"):
        train(residual, Path("run"))


# ------------------------------------------------------------------------------------- what may change when a run goes on


def test_what_changes_nothing_about_a_run_may_change_when_it_goes_on(residual, alone, text, tmp_path, monkeypatch):
    """The text has moved, its path is spelled otherwise, and checkpoints are saved at other steps."""
    shutil.copytree(alone, folder := tmp_path / "run")
    for lost in (folder / "summary.json", folder / "checkpoints" / "8"):
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    shutil.copy(text, tmp_path / "moved.txt")
    monkeypatch.chdir(tmp_path)
    other = residual.with_settings(data={"source": "./moved.txt"}, train={"checkpoint_every": 4})
    assert train(other, folder)["status"] == "finished"
    assert_same_run(alone, folder)
    assert train(residual, folder) == read_json(folder / "summary.json"), "and nothing is left to do under either name"
    assert train(other, folder) == read_json(folder / "summary.json")


def test_another_text_under_another_name_is_refused_whatever_the_run_has_left(residual, alone, text, tmp_path):
    shutil.copytree(alone, folder := tmp_path / "run")
    (tmp_path / "other.txt").write_text(text.read_text().replace("stream", "DREAMS"))
    other = residual.with_settings(data={"source": str(tmp_path / "other.txt")})
    for lost in (folder / "summary.json", folder / "checkpoints", folder / "metrics.jsonl"):
        with pytest.raises(InputError, match=r"The training text is not the one that .*run was trained with"):
            train(other, folder)
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    (folder / "env.json").unlink()
    with pytest.raises(InputError, match=r"another configuration \(data.source: "):
        train(other, folder)


def test_runs_with_the_same_text_are_one_variant_whatever_its_name(tmp_path):
    data = {"train_sha256": "ab" * 32, "validation_sha256": "cd" * 32, "fingerprint": "ef" * 32}
    records = []
    for seed, source in enumerate(("a.txt", "./a.txt", "b.txt")):
        folder = write_run(tmp_path, f"run{seed}", "hc", seed=seed, config={"data.source": source})
        env = read_json(folder / "env.json") | {
            "data": data | ({"train_sha256": "12" * 32} if source == "b.txt" else {})
        }
        (folder / "env.json").write_text(json.dumps(env))
        records.append(read_run(folder))
    first, second, third = identities(records)
    assert first == second
    assert first["data.source"] == "a.txt"
    assert third["data.source"] == "b.txt"


# ------------------------------------------------------------------------------------------------------- several writers


def test_writers_of_one_file_never_disturb_each_other_or_a_reader(tmp_path):
    """Six threads write one file while two read it: nobody fails, and a reader finds the whole file of one of the writers."""
    file, failures = tmp_path / "plan.json", []
    write_json(file, {"writer": 0, "filling": [0] * 500})

    def attempt(action):
        try:
            for _ in range(60):
                action()
        except Exception as error:
            failures.append(error)

    def read():
        value = read_json(file)
        assert value["filling"] == [value["writer"]] * 500

    actions = [lambda k=k: write_json(file, {"writer": k, "filling": [k] * 500}) for k in range(6)] + [read, read]
    threads = [threading.Thread(target=attempt, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"], "no temporary file stays"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"new": math.inf})
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"Cannot write .*folder: Is a directory; mend that"):
        write_json(tmp_path / "folder", {"new": 1})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "folder"]


# ---------------------------------------------------------------------------------------------------------- the lock


def test_a_second_command_on_a_folder_is_refused_in_a_sentence_and_writes_nothing(residual, alone, tmp_path):
    """Both where the lock is held from the start, and where it is taken while the second command reads its text."""
    folder = tmp_path / "run"
    folder.mkdir()
    sentence = rf"run is in use: process {os.getpid()} on .* writes into it; wait until"
    with run_lock(folder):
        with pytest.raises(Busy, match=sentence):
            train(residual, folder)
        with pytest.raises(Busy, match=sentence), run_folder(folder, to_mapping(residual)):
            pass
    assert [path.name for path in folder.iterdir()] == ["lock"]
    train(residual, folder)
    assert holder(folder) == ""
    assert_same_run(alone, folder)


def test_a_run_that_another_command_has_ended_in_the_meantime_is_not_repeated(residual, alone, tmp_path, monkeypatch):
    prepare = loop.prepare

    def meanwhile(*arguments):
        monkeypatch.undo()
        train(residual, tmp_path / "run")
        return prepare(*arguments)

    monkeypatch.setattr(loop, "prepare", meanwhile)
    summary = train(residual, tmp_path / "run")
    assert summary == read_json(tmp_path / "run" / "summary.json")
    assert_same_run(alone, tmp_path / "run")


HOLD = "import sys, time; from pathlib import Path; from mhc_jax.runs.lock import run_lock\n"
HOLD += "with run_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(1000)"


def test_a_killed_process_leaves_no_lock(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert holder(tmp_path).startswith(f"process {process.pid} on ")
        with pytest.raises(Busy, match=f"process {process.pid} on "), run_lock(tmp_path):
            pass
        process.kill()
    assert holder(tmp_path) == ""
    with run_lock(tmp_path):
        assert holder(tmp_path).startswith(f"process {os.getpid()} on ")
    with aside(tmp_path, "config.json") as half:
        left = half.name
    (tmp_path / left).mkdir()  # what a killed process was writing
    with run_folder(tmp_path, {"a": 1}) as ended:
        assert ended is None
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "lock"]


def test_a_file_system_without_locks_is_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock.fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with run_lock(tmp_path):
        pass
    assert "lock cannot be locked (No locks available); let no second command" in capsys.readouterr().err


@pytest.mark.full
def test_two_commands_on_one_folder_at_the_same_moment(residual, alone, tmp_path):
    command = ["train", *flags_of(residual), f"--workdir={tmp_path / 'run'}"]
    both = [script(*command, env={"XLA_FLAGS": os.environ["XLA_FLAGS"]}) for _ in range(2)]
    ends = [(process.communicate(timeout=PATIENCE_S)[1], process.returncode) for process in both]
    assert sorted(code for _, code in ends) in ([0, 2], [0, 0]), ends
    for err, code in ends:
        assert code == 0 or "run is in use: process" in err, err
    assert_same_run(alone, tmp_path / "run")


# --------------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config", "env", "summary"])
def test_a_damaged_file_of_a_run_is_a_sentence_that_names_it(name, damage, tmp_path):
    folder = write_run(tmp_path, "run", "hc")
    (folder / f"{name}.json").write_bytes(DAMAGES[damage])
    if name != "env" or not damage.startswith("other"):  # every key of env.json may be missing
        with pytest.raises(InputError, match=f"{name}.json.*[.]$"):
            read_run(folder)
    if name == "config":
        with pytest.raises(InputError, match=r"config.json cannot|config.json holds|another configuration"):
            check_run_folder(folder, {"model": {"width": 1}})
    if name == "env" and damage != "other types":
        with pytest.raises(InputError, match=r"env.json .* remove it to go on without it"):
            recorded_data(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_summary_is_none_so_that_the_same_command_writes_it_anew(damage, tmp_path):
    folder = write_run(tmp_path, "run", "hc")
    assert read_summary(folder)["status"] == run_status(tmp_path, "run") == "finished"
    (folder / "summary.json").write_bytes(DAMAGES[damage])
    assert read_summary(folder) is None
    assert check_run_folder(folder, read_json(folder / "config.json")) is None
    (tmp_path / ".sweep" / "failed").mkdir(parents=True)
    assert run_status(tmp_path, "run") == "begun"


def test_damaged_summary_env_and_metrics_of_a_finished_run_are_mended_and_said(residual, alone, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    whole = lines(folder)
    (folder / "summary.json").write_bytes(b"\0" * 100)
    (folder / "env.json").write_text("{")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"null\n\xff\n" + (folder / "metrics.jsonl").read_bytes().splitlines()[0] + b'\n{"kind": "tra')
    assert train(residual, folder)["status"] == "finished"
    said = capsys.readouterr().err
    for sentence in (
        "summary.json is damaged",
        "env.json is damaged",
        "3 lines of metrics.jsonl were damaged or doubled",
    ):
        assert sentence in said
    assert lines(folder)[:-1] == whole
    assert read_json(folder / "env.json")["data"] == read_json(alone / "env.json")["data"]
    assert_same_run(alone, folder)


LINE = json.dumps({"kind": "train", "step": 1, "loss": 1.5}).encode()
EVENT = json.dumps({"kind": "event", "step": 1, "event": "resumed"}).encode()


@pytest.mark.parametrize(
    ("damaged", "dropped"),
    [
        (b"null", 1),
        (b"[1]", 1),
        (b"3", 1),
        (b'{"kind": "train"}', 1),
        (b'{"kind": "train", "step": "a"}', 1),
        (b'{"kind": [], "step": 2}', 1),
        (b"\xff\xfe", 1),
        (b"[" * 200_000, 1),
        (LINE, 1),
        (EVENT + b"\n" + EVENT, 0),
    ],
    ids=["null", "list", "number", "no step", "text", "kind", "no text", "deep", "doubled", "two equal events"],
)
def test_a_damaged_line_of_metrics_is_left_out_and_said_and_ends_no_reader_in_a_traceback(damaged, dropped, tmp_path):
    folder = write_run(tmp_path, "run", "hc")
    after = LINE.replace(b": 1,", b": 2,")
    (folder / "metrics.jsonl").write_bytes(LINE + b"\n" + damaged + b"\n" + after + b"\n")
    if dropped:
        with pytest.raises(InputError, match=r"Line 2 of .* is not a JSON object with a kind and a new step"):
            read_run(folder)
    with MetricsWriter(folder, 5) as writer:
        assert ("1 lines of metrics.jsonl" in writer.remark) == bool(dropped)
    assert len((folder / "metrics.jsonl").read_bytes().splitlines()) == (2 if dropped else 4)
    read_run(folder)


def test_a_look_at_the_lock_does_not_refuse_a_command(tmp_path, monkeypatch):
    """`holder` locks the file for a moment, in which a command that starts must wait and not give up."""
    monkeypatch.setattr(lock, "PATIENCE_S", 60.0)
    monkeypatch.setattr(lock.time, "sleep", lambda _: look.close())
    look = (tmp_path / lock.LOCK).open("a+")
    fcntl.flock(look, fcntl.LOCK_SH)
    with lock.run_lock(tmp_path):
        assert look.closed
