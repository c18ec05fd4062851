"""A script of experiments/ run in this process: a new one would spend seconds on importing JAX."""

import contextlib
import copy
import io
import runpy
import sys
import warnings
from unittest import mock

from absl import flags
from support.tiny_runs import ROOT

from mhc_jax import cli


def run_here(name: str, *args: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of experiments/<name>.py; absl's flags are left as they were."""
    script, known = ROOT / "experiments" / f"{name}.py", vars(flags.FLAGS)
    before = {key: copy.copy(value) if isinstance(value, dict) else value for key, value in known.items()}
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # as in a process of its own: libraries warn of each other
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            contextlib.chdir(ROOT),
            mock.patch.object(sys, "argv", [str(script), *map(str, args)]),
            mock.patch.object(sys, "unraisablehook", sys.unraisablehook),
            mock.patch.object(cli, "cpu_alone", return_value=False),  # it would change malloc
        ):
            runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        known.clear()
        known.update(before)
    return status, out.getvalue(), err.getvalue()
