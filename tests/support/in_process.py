"""Scripts of experiments/ run in this process, since a new one would spend seconds on importing JAX."""

import contextlib
import io
import runpy
import sys
import warnings
from unittest import mock

from absl.flags import FLAGS
from support.tiny_runs import ROOT

from mhc_jax import cli


def run_here(name: str, *args: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of experiments/<name>.py."""
    script, out, err = str(ROOT / "experiments" / f"{name}.py"), io.StringIO(), io.StringIO()
    with (
        _own_flags(),
        warnings.catch_warnings(action="ignore"),  # as in a process of its own: libraries warn of each other
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(ROOT),
        mock.patch.object(sys, "argv", [script, *map(str, args)]),
        mock.patch.object(sys, "unraisablehook", sys.unraisablehook),
        mock.patch.object(cli, "cpu_alone", return_value=False),  # it would start pytest again
    ):
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    return status, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _own_flags():
    """Remove the flags that a script declares afterwards; those of libraries, which are imported once, stay."""
    known = set(FLAGS)
    try:
        yield
    finally:
        sys.modules.pop("config_config", None)  # the config file: the next would be loaded on top of it
        for flag in set(FLAGS) - known:
            module = FLAGS.find_module_defining_flag(flag)
            if flag.startswith("config") or module.startswith(("mhc_jax", "ml_collections", "script_", str(ROOT))):
                delattr(FLAGS, flag)
