"""Train one run of a sweep in a process of its own: `python -m mhc_jax.sweeps.worker WORKDIR NAME PARENT`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from absl import logging

from mhc_jax.errors import InputError, of_disk
from mhc_jax.loop import EXIT_CODES, train
from mhc_jax.runs.lock import Busy, require_free
from mhc_jax.runs.stop import exit_if_a_save_hangs
from mhc_jax.sweeps.grid import read_planned
from mhc_jax.sweeps.results import failure_file, write_results

BUSY = 75
"""Exit status of a worker if another process already trains its run (EX_TEMPFAIL in Unix's sysexits.h)."""


def run(workdir: Path, name: str) -> int:
    """Train the run `name` of the sweep in the folder `workdir`, and bring the results table up to date.

    Returns:
      Exit status: 0 if the run finished, 3 if it diverged, 130 if a signal stopped it and it was saved.

    Raises:
      Busy: another process trains the run.
      InputError: the run folder or the data cannot be used.
    """
    config = read_planned(workdir, name)
    require_free(workdir / name)
    failure_file(workdir, name).unlink(missing_ok=True)
    summary = train(config, workdir / name, label=name)
    write_results(workdir)
    return EXIT_CODES[summary["status"]]


def watch(parent: int) -> None:
    """Wait until `parent`, the id of the process that started this one, is gone, then send SIGTERM to this process.

    On SIGTERM a worker saves its run and stops.  A sweep that is killed therefore leaves no worker running.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Train the run that the command line names, and return the exit status."""
    workdir, name, parent = sys.argv[1:]
    threading.Thread(target=watch, args=(int(parent),), daemon=True).start()
    logging.set_verbosity(logging.FATAL)  # as in cli.main, because Orbax logs many lines for each checkpoint
    try:
        return run(Path(workdir), name)
    except Busy as busy:
        print(f"{name}: {busy.holder} has this run", file=sys.stderr)
        return BUSY
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not (sentence := of_disk(error)):
            exit_if_a_save_hangs(1, error)
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    exit_status = main()
    exit_if_a_save_hangs(exit_status)
    sys.exit(exit_status)
