"""A script of experiments/ run in this process: a new one would spend seconds on importing JAX."""

import contextlib
import io
import runpy
import sys
import warnings
from unittest import mock

from absl import flags
from support.tiny_runs import ROOT

from mhc_jax import cli


def run_here(name: str, *args: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of experiments/<name>.py; absl forgets the flags of the script."""
    script, known = ROOT / "experiments" / f"{name}.py", set(flags.FLAGS)
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
        for flag in set(flags.FLAGS) - known:
            module = flags.FLAGS.find_module_defining_flag(flag)
            if module in (str(script), "mhc_jax.cli") or module.startswith("ml_collections"):  # libraries keep theirs
                delattr(flags.FLAGS, flag)
    return status, out.getvalue(), err.getvalue()
