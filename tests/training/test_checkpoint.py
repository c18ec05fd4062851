"""A broken checkpoint is passed over, none is lost, and a full disk or another model ends the run with a sentence."""

import asyncio
import json
import os
import re
import shutil
import subprocess
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support.ends import Killed
from support.tiny_runs import assert_same_run, final_state, flags_of, lines, run_script, with_train

from mhc_jax.data import ByteTokenizer
from mhc_jax.errors import InputError
from mhc_jax.files.checksums import CHECKSUMS, damage
from mhc_jax.loop import train
from mhc_jax.runs.checkpoint import Checkpoints, load_params
from mhc_jax.runs.folder import differences
from mhc_jax.train_step import TrainState

CONFIG = {"model": {"width": 4}}
BYTE = ByteTokenizer().saved


def toy(step):
    """A train state whose parameters are its step."""
    return TrainState(jnp.int32(step), {"w": jnp.full(3, step, jnp.float32)}, {"m": jnp.zeros(3)})


def toy_shapes(device=0):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[device])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), toy(0))


def save(folder, *steps, keep=3):
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, toy(step), {"at": step}, CONFIG, BYTE)


def restored(folder, config=CONFIG, device=0):
    """(result of `restore_newest`, steps that are saved)."""
    with Checkpoints(folder, 3) as checkpoints:
        return checkpoints.restore_newest(toy_shapes(device), config), checkpoints.steps()


def truncate(folder):
    """Cut every file of a checkpoint, or of all, to half its size, as a crash of the machine may."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_differences_name_every_leaf():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(old, new) == ["a.c: 2 -> 4", "d: 3 -> None", "e: None -> 5"]
    assert differences(old, old) == []


def test_round_trip_keeps_the_newest_and_the_first_of_a_step_saved_twice(tmp_path):
    assert restored(tmp_path) == (None, [])
    save(tmp_path, 1, 2, 3, keep=2)
    with Checkpoints(tmp_path, 3) as checkpoints:
        checkpoints.save(3, toy(30), {"at": 30}, CONFIG, BYTE)
        with mock.patch.object(checkpoints._manager, "save") as written:
            checkpoints.save(4, toy(4), given := {"at": [4]}, CONFIG, BYTE)
        given["at"].append(5)  # as a run does while Orbax still writes
        assert written.call_args.kwargs["args"].loop.item == {"at": [4]}
    (state, loop, remarks), steps = restored(tmp_path, device=3)
    assert (int(state.step), loop, remarks, steps) == (3, {"at": 3}, [], [2, 3])
    np.testing.assert_array_equal(state.params["w"], [3, 3, 3])
    assert state.params["w"].devices() == {jax.devices()[3]}, "not the device that it was saved on"


def test_a_broken_checkpoint_is_set_aside_for_the_one_before(tmp_path):
    save(tmp_path, 1, 2, 3)
    truncate(tmp_path / "checkpoints" / "3")
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "loop")
    with Checkpoints(tmp_path, 3) as checkpoints:
        state, loop, remarks = checkpoints.restore_newest(toy_shapes(), CONFIG)
        assert (int(state.step), loop) == (1, {"at": 1})
        assert [r.split(" cannot")[0] for r in remarks] == ["checkpoint 3", "checkpoint 2"]
        assert "moved to broken-checkpoint-3" in remarks[0]
        checkpoints.save(3, toy(30), {"at": 3}, CONFIG, BYTE)
    assert (tmp_path / "broken-checkpoint-3").is_dir()
    assert int(restored(tmp_path)[0][0].step) == 30


def flipped(file, bit):
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)


def test_one_flipped_bit_in_any_file_is_detected_and_the_checkpoint_before_is_used(tmp_path):
    """In 40 places of each file, of which the last one is tried as a run does."""
    save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints" / "2"
    assert damage(folder) == ""
    files = [folder / name for name in json.loads((folder / CHECKSUMS).read_text())]
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        for bit in np.random.default_rng(0).integers(8 * len(content), size=40) if content else []:
            flipped(file, int(bit))
            assert damage(folder) == f"{file.relative_to(folder)} is damaged: its SHA-256 is not the one that was saved"
            file.write_bytes(content)
    flipped(max(files, key=lambda file: file.stat().st_size), 0)
    with pytest.raises(
        InputError, match=r"checkpoints/2 cannot be read \(.* is damaged.*\); remove it to use an earlier one"
    ):
        load_params(tmp_path)
    (state, loop, remarks), steps = restored(tmp_path)
    assert (int(state.step), loop, steps) == (1, {"at": 1}, [1])
    assert re.fullmatch(
        r"checkpoint 2 cannot be read \(.* is damaged: .*\); moved to broken-checkpoint-2, using .*", *remarks
    )


def test_checkpoints_that_a_kill_kept_from_being_removed_go_at_the_next_start(tmp_path):
    save(tmp_path, 1, 2, 3)
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "0")
    truncate(tmp_path / "checkpoints" / "3")
    found, steps = restored(tmp_path)
    assert (found[1]["at"], steps) == (2, [0, 1, 2])
    shutil.copytree(tmp_path / "checkpoints" / "2", tmp_path / "checkpoints" / "3")
    assert restored(tmp_path)[1] == [1, 2, 3]


def test_ctrl_c_while_a_checkpoint_is_read_sets_none_aside(tmp_path, monkeypatch):
    """Orbax makes an error of its own of the exception by which asyncio ends a read."""
    save(tmp_path, 1, 2)

    def cancelled(*_, **__):
        try:
            raise asyncio.CancelledError
        except BaseException as error:
            raise Exception("Encountered error while reading array index") from error

    monkeypatch.setattr(ocp.CheckpointManager, "restore", cancelled)
    with pytest.raises(KeyboardInterrupt):
        restored(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        load_params(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]
    monkeypatch.undo()
    assert restored(tmp_path)[1] == [1, 2]


def test_missing_and_damaged_checksums(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    (folder / "loop" / "metadata").unlink()
    assert damage(folder) == "loop/metadata cannot be read: No such file or directory"
    (folder / CHECKSUMS).write_text("{")
    assert damage(folder) == "checksums.json is damaged"
    (folder / CHECKSUMS).unlink()
    assert damage(folder) == "", "a checkpoint of an older version has none"


def test_the_first_checkpoint_is_opened_again_before_it_gets_its_name(tmp_path):
    """In a folder whose name Orbax takes for a pattern, it leaves out the arrays without a word."""
    with pytest.raises(InputError, match="arrays read otherwise than they were written; there is no earlier one"):
        save(tmp_path / "exp[1]", 1)
    assert not (tmp_path / "exp[1]" / "checkpoints" / "1").exists()
    otherwise = pytest.raises(InputError, match="loop reads otherwise than it was written")
    with mock.patch("mhc_jax.runs.read_back.read_json", return_value={}), otherwise:
        save(tmp_path / "run", 1)


def test_a_checkpoint_of_the_same_step_is_replaced_and_a_kill_on_the_way_loses_neither(tmp_path):
    save(tmp_path, 1)
    with Checkpoints(tmp_path, 3) as checkpoints:
        kill = mock.patch.object(checkpoints._manager, "save", side_effect=Killed)
        with kill, pytest.raises(Killed):
            checkpoints.save(1, toy(1), {"at": "new"}, CONFIG, BYTE, replace=True)
    assert [path.name for path in tmp_path.iterdir() if path.name != "checkpoints"] == ["replaced-checkpoint-1"]
    assert restored(tmp_path)[0][1] == {"at": 1}
    with Checkpoints(tmp_path, 3) as checkpoints:
        checkpoints.save(1, toy(1), {"at": "new"}, CONFIG, BYTE, replace=True)
        assert restored(tmp_path)[0][1] == {"at": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    shutil.copytree(
        tmp_path / "checkpoints" / "1", tmp_path / "replaced-checkpoint-1"
    )  # killed after the new one was whole
    assert restored(tmp_path)[0][1] == {"at": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_all_broken_is_a_sentence_at_every_start_and_moves_nothing(tmp_path):
    save(tmp_path, 1, 2)
    truncate(tmp_path / "checkpoints")
    for _ in range(2):
        with pytest.raises(InputError, match=r"No checkpoint in .* can be read \(2: .*; 1: "):
            restored(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_another_architecture_is_refused_with_what_differs(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(InputError, match=r"another model \(model.width: 4 -> 8\)"):
        restored(tmp_path, {"model": {"width": 8}})
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    save(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "half"
    leftover.mkdir(parents=True)
    assert int(restored(tmp_path)[0][0].step) == 1
    save(tmp_path, 2)
    assert not leftover.parent.exists()
    assert restored(tmp_path)[1] == [1, 2]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(InputError, match=r"Cannot use .*/checkpoints for checkpoints: File exists"):
        Checkpoints(tmp_path, 2)


@pytest.mark.parametrize("how", ["save", "wait", "close"])
def test_a_save_that_failed_in_the_background_is_told_once(how, tmp_path, monkeypatch):
    fail = mock.Mock(side_effect=OSError(28, "No space left on device"))
    checkpoints = Checkpoints(tmp_path, 3)
    checkpoints.save(1, toy(1), {"at": 1}, CONFIG, BYTE)
    checkpoints.wait()
    action = {"save": lambda: checkpoints.save(3, toy(3), {}, CONFIG, BYTE)}.get(how, getattr(checkpoints, how))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "wait_until_finished", fail)
        with pytest.raises(InputError, match=r"the disk is full; the checkpoint of step 1 is whole. Make room and run"):
            action()
        checkpoints.close()
    checkpoints.close()


def undone(alone, folder):
    """A copy of a finished run as if it had been killed after its last save."""
    shutil.copytree(alone, folder)
    (folder / "summary.json").unlink()
    return folder


def test_a_run_whose_checkpoints_are_truncated_goes_on_from_one_that_is_not(residual, alone, tmp_path, capsys):
    """Where all checkpoints are truncated, the run ends with a sentence and its metrics stay."""
    some, none = (undone(alone, tmp_path / name) for name in ("some", "none"))
    truncate(some / "checkpoints/8")
    truncate(none / "checkpoints")
    train(residual, some)
    assert "checkpoint 8 cannot be read" in capsys.readouterr().err
    events = [(e["event"], e["step"]) for e in lines(some, "event")]
    assert events == [("checkpoint_skipped", 6), ("resumed", 6)]
    assert_same_run(alone, some)
    with pytest.raises(InputError, match="No checkpoint in"):
        train(residual, none)
    assert lines(none) == lines(alone)


def test_load_params_and_the_configuration_with_the_vocabulary(residual, alone, tmp_path):
    config, params = load_params(alone)
    assert config["model"]["vocab_size"] == params["embedding"].shape[0] > 0
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), final_state(alone)["params"])
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_params(tmp_path)
    folder = undone(alone, tmp_path / "run")
    truncate(folder / "checkpoints" / "8")
    with pytest.raises(InputError, match=r"checkpoints/8 cannot be read .*; remove it to use an earlier one"):
        load_params(folder)


def test_load_params_puts_those_of_the_latest_step_on_the_first_device_here(tmp_path):
    with Checkpoints(tmp_path, 3) as checkpoints:
        for step in (9, 10):
            checkpoints.save(step, jax.device_put(toy(step), jax.devices()[3]), {}, CONFIG, BYTE)
    params = load_params(tmp_path)[1]
    assert params["w"].devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(params["w"], [10, 10, 10])
    assert checkpoints.newest() == "the checkpoint of step 10"


@pytest.mark.full
def test_a_full_disk_stops_the_run_with_a_sentence_and_it_goes_on_with_more_room(residual, alone, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        config, flags = with_train(residual, checkpoint_every=1), os.environ["XLA_FLAGS"]
        command = ["train", *flags_of(config), f"--workdir={disk / 'run'}"]
        status, _, err = run_script(*command, env={"XLA_FLAGS": flags})
        assert status == 2, err
        told = "\n".join(line for line in err.splitlines() if not line.startswith("run: "))
        whole = "is whole. Make room and run the same command again to go on."
        assert re.fullmatch(f"error: Could not save a checkpoint in .*the disk is full.*{whole}", told), err
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        status, _, err = run_script(*command, env={"XLA_FLAGS": flags})
        assert status == 0, err
        assert "going on from the checkpoint of step" in err
        assert_same_run(alone, disk / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
