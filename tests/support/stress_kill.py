"""Kill a training run again and again, and compare its end with that of a run that was left alone.

    PYTHONPATH=tests python -m support.stress_kill 20  # and a seed

The run saves a checkpoint every 5 steps.  `kill -9` lands by turns while it starts (imports, compiling, restoring),
among the steps, and while a checkpoint is being written.  The same command then starts it again.  Every start must go
on, and losses, summary and final state must be bitwise those of the run that was never killed.  A kill takes 10 s.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from support.tiny_runs import assert_same_run, flags_of, run_script, script, tiny, write_text


def stress(folder: Path, kills: int, seed: int = 0) -> str:
    """Kill and start a run in an empty folder until it ends; returns a line of counts.

    Raises:
      AssertionError: a start fails, or the ends differ.
    """
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    rng, steps = random.Random(seed), 25 * kills + 50
    every = {"steps": steps, "checkpoint_every": 5, "validate_every": 20, "diagnostics_every": 40}
    config = tiny(write_text(folder / "text.txt"), "mhc:num_streams=2", train=every)
    arguments = flags_of(config)

    status, _, err = run_script("train", *arguments, f"--workdir={folder / 'alone'}")
    assert status == 0, err
    began = time.monotonic()  # how long a start takes, now that the compile cache is filled
    process = script("train", *arguments, f"--workdir={folder / 'timed'}")
    kill_at(process, folder / "timed", "steps", rng, 0)
    process.communicate()
    start_s = time.monotonic() - began
    places = Counter()
    began = time.monotonic()
    for k in range(kills):
        process = script("train", *arguments, f"--workdir={folder / 'killed'}")
        places[kill_at(process, folder / "killed", ("start", "steps", "saving")[k % 3], rng, start_s)] += 1
        _, err = process.communicate()
        assert process.returncode == -9, f"start {k + 1} ended by itself with {process.returncode}:\n{err[-2000:]}"
    status, _, err = run_script("train", *arguments, f"--workdir={folder / 'killed'}")
    assert status == 0, err
    assert_same_run(folder / "alone", folder / "killed")
    where = ", ".join(f"{places[p]} {p}" for p in ("start", "steps", "saving"))
    took = f"{kills + 1} starts, {steps} steps, {time.monotonic() - began:.0f} s"
    return f"{kills} kills ({where}), {took}: losses, summary and state bitwise equal"


class Watch:
    """Sees from the folder of a run what it is doing."""

    def __init__(self, folder: Path):
        self.folder, self.began, self.size = folder, time.time(), None

    def training(self) -> bool:
        """Whether this start has written train lines; it replaces the file, appends `resumed`, and then its steps."""
        file = self.folder / "metrics.jsonl"
        if not file.exists() or file.stat().st_mtime < self.began:
            return False
        size = file.stat().st_size
        self.size = size if self.size is None else self.size
        return size > self.size + 500

    def saving(self) -> bool:
        return any((self.folder / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def kill_at(process: subprocess.Popen, folder: Path, wanted: str, rng: random.Random, start_s: float) -> str:
    """Kill -9 at a random moment of the wanted sort; returns what the run was doing then."""
    watch = Watch(folder)
    end = time.monotonic() + (rng.uniform(0, start_s) if wanted == "start" else 600)
    while process.poll() is None and time.monotonic() < end and not watch.training():
        time.sleep(0.001)
    if wanted != "start":
        time.sleep(rng.uniform(0, 0.5))
        while wanted == "saving" and process.poll() is None and not watch.saving():
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.05))
    place = ("saving" if watch.saving() else "steps") if watch.training() else "start"
    process.kill()
    return place


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(stress(Path(folder), *map(int, sys.argv[1:])))
