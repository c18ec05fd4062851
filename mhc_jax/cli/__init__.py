"""Functions that the scripts of `experiments/` share: flags that edit a configuration, and error messages of one sentence."""

from __future__ import annotations

import difflib
import errno
import functools
import io
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mhc_jax.cli.flag_help import HELP, flag_texts, help_text
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.errors import InputError, of_disk, require, shown, user_path
from mhc_jax.parallel import distributed
from mhc_jax.runs.cpu_variables import cpu_alone, set_cpu_variables
from mhc_jax.runs.stop import exit_if_a_save_hangs

DEFAULT_CONFIG = "experiments/configs/demo.py"
UNREAD = 141
"""Exit status of a script whose output nobody reads any more."""
# A flag of a setting that is a list, such as train.trackers, takes entries separated by commas.
config_flags.register_flag_parser_for_type(list, flags.ListParser())


def define_config() -> Callable[[], ExperimentConfig]:
    """Declare the flag `--config=FILE[:arg]` and its overrides, such as `--config.model.width=128`.

    Returns:
      A function to call once flags are parsed.  It returns the frozen configuration, and raises `InputError` if a key is unknown
      or a value is not allowed.
    """
    # The flag has no default.  absl would load a default file and apply overrides to it before errors can be caught.
    holder = config_flags.DEFINE_config_file("config", None, f"Config file, with :arg (default {DEFAULT_CONFIG}).")

    def read() -> ExperimentConfig:
        value = holder.value
        require(
            isinstance(value, ConfigDict),
            f"get_config of the config file returned a {type(value).__name__}; it must return a ConfigDict.",
        )
        return from_mapping(value.to_dict())

    return read


def define_processes() -> Callable[[], None]:
    """Declare the flags by which several processes of one run find each other.

    Returns:
      A function to call once flags are parsed.  It joins this process to the others (`distributed.start`).
    """
    address = flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0, where no scheduler names it.")
    count = flags.DEFINE_integer("num_processes", 0, "Number of processes; 1: this one alone.", lower_bound=0)
    index = flags.DEFINE_integer("process_id", -1, "Number of this process, from 0.", lower_bound=-1)
    wait = flags.DEFINE_integer("start_timeout", 300, "Seconds until all processes must have come.", lower_bound=1)
    silence = flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds until a silent process is dead.", lower_bound=1)
    return lambda: distributed.start(address.value, count.value, index.value, wait.value, silence.value)


def main(
    function: Callable[..., int | None],
    positional: Sequence[str] | None = (),
    configuration: Callable[[str], Mapping[str, Any]] | None = None,
    computes: bool = False,
) -> None:
    """Parse flags with absl and run a script.  An `InputError` is printed without a traceback, and the exit status is then 2.

    A script whose output nobody reads any more, as under `| head`, ends without a word.  Its exit status is 141, as of SIGPIPE.

    Args:
      function: the script.  It gets the positional arguments and returns the exit status, where None means 0.
      positional: names of the positional arguments, which are all required.  None: the script gets all positional arguments as one
        list, however many there are.
      configuration: function that returns the nested configuration for the first positional argument.  Flags such as
        `--config.model.width=128` edit the configuration, and the script gets it as its last argument.  None: the script gets no
        configuration.
      computes: whether JAX compiles large programs in this process.  If it does so for the CPU, the script is started again at
        once if `set_cpu_variables` needs it.
    """

    def guarded(argv: Sequence[str]) -> int:
        try:
            if positional is None:
                status = function(list(argv[1:])) or 0
                sys.stdout.flush()
                return status
            given = argv[1:]
            if missing := positional[len(given) :]:
                command = f"{Path(argv[0]).name} {' '.join(positional)}"
                raise InputError(f"{missing[0]} is missing; the command is {command}.")
            if more := given[len(positional) :]:
                raise InputError(f"Unexpected argument {more[0]!r}; settings are given as --name=value (see --help).")
            edited = [flags.FLAGS.config.to_dict()] if configuration else []
            status = function(*given, *edited) or 0
            sys.stdout.flush()
            distributed.shutdown()
            return status
        except (InputError, distributed.ProcessLostError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2 if isinstance(error, InputError) else distributed.LOST
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            # At the usual end of the interpreter, XLA's threads that still compile would crash the process.
            sys.stdout.flush()
            os._exit(130)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                distributed.exit_if_joined(UNREAD)
                exit_if_a_save_hangs(UNREAD)
                return UNREAD
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                print(f"error: The path {shown(error.filename)} is too long; give a shorter one.", file=sys.stderr)
                distributed.exit_if_joined(2)
                return 2
            if not distributed.joined():
                if sentence := of_disk(error):
                    print(f"error: {sentence}", file=sys.stderr)
                    exit_if_a_save_hangs(2)
                    return 2
                exit_if_a_save_hangs(1, error)
                raise
            lost = distributed.is_lost_process(error)
            print(
                f"error: {distributed.process_lost_error(error)}" if lost else traceback.format_exc(), file=sys.stderr
            )
            status = distributed.LOST if lost else 1
        distributed.exit_if_joined(status)
        exit_if_a_save_hangs(status)
        return status

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # as everywhere but in tests and notebooks
            # Neither a strict ASCII locale nor a file name that is not UTF-8 ends a run.
            stream.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _report_unraisable
    if computes and cpu_alone():
        set_cpu_variables()
    if not set(HELP).isdisjoint(sys.argv[1:]):
        try:
            print(_help(positional, configuration is not None), flush=True)
        except BrokenPipeError:
            sys.exit(UNREAD if _nobody_reads() else 1)
        sys.exit(0)
    app.run(guarded, flags_parser=functools.partial(_parse, configuration=configuration))


def _nobody_reads() -> bool:
    """Return whether the reader of the output has gone, and send what is still to be written nowhere if so."""
    watch, out = select.poll(), sys.stdout.fileno()
    watch.register(out, select.POLLOUT)
    if not any(events & select.POLLERR for _, events in watch.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return True


def own_flags(script: str) -> list[flags.Flag]:
    """Return the flags that a script declares by itself, and those that it declares through this module, in order of declaration.

    Args:
      script: name under which absl knows the script: its path if it is run, else the name of its module.
    """
    by_module = flags.FLAGS.flags_by_module_dict()
    return [*by_module.get(script, []), *by_module.get(__name__, [])]


def _help(positional: Sequence[str] | None, of_all_runs: bool) -> str:
    main_module = sys.modules["__main__"]
    return help_text(
        Path(sys.argv[0]).name,
        main_module.__doc__ or "",
        positional,
        flag_texts(own_flags(sys.argv[0]), of_all_runs),
    )


def _parse(argv: Sequence[str], configuration: Callable[[str], Mapping[str, Any]] | None) -> list[str]:
    """Parse flags with absl and return the other arguments.  After a mistake print a sentence and exit with status 2."""
    argv = list(argv)
    file = ""
    if "config" in flags.FLAGS:
        given = [after for flag, after in zip(argv, [*argv[1:], ""], strict=True) if flag in ("--config", "-config")]
        given += [a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)]
        if not given:
            given = [DEFAULT_CONFIG]
            argv.insert(1, f"--config={DEFAULT_CONFIG}")
        file = given[-1].split(":")[0]
        try:
            there = user_path(file).is_file()
        except InputError as error:
            _exit(str(error))
        if not there:
            hint = f" Did you mean {near!r}?" if (near := _near_config(file)) else ""
            _exit(f"The config file {file!r} does not exist; give --config=FILE.py or --config=FILE.py:arg.{hint}")
    try:
        rest = flags.FLAGS(argv, known_only=configuration is not None)
        if configuration:
            arguments = [word for word in rest[1:] if not word.startswith("-")]
            if not arguments:
                return rest[:1]
            base = ConfigDict(configuration(arguments[0]))
            config_flags.DEFINE_config_dict("config", base, "Settings of all runs, as --config.model.width=128.")
            rest = flags.FLAGS(argv)
    except Exception as error:
        _exit(_sentence(error, file, argv))
    if flags.FLAGS["verbosity"].using_default_value:
        # Orbax logs a page for each checkpoint at level INFO.  At level ERROR it logs the traceback of errors that it also raises.
        flags.FLAGS.verbosity = logging.FATAL
    return rest


def _near_config(file: str) -> str:
    """Return the path of the config file with the nearest name, in the folder of `file` or else in that of the demo, or ""."""
    for folder in (user_path(file).parent, Path(DEFAULT_CONFIG).parent):
        names = [path.stem for path in sorted(folder.glob("*.py"))]
        if near := difflib.get_close_matches(Path(file).stem, names, n=1):
            return str(folder / f"{near[0]}.py")
    return ""


def _whole_key(argv: Sequence[str], key: str) -> str:
    """Return the dotted key, such as train.steps, that has `key` as a part in a flag --config.train.steps, or `key` itself."""
    given = [match[1] for word in argv if (match := re.match(r"--?config\.([\w.]+)", word))]
    return next((whole for whole in given if key in whole.split(".")), key)


def _sentence(error: Exception, file: str, argv: Sequence[str]) -> str:
    """Return one line that says what is wrong in the flags or in the config file.

    Args:
      error: what absl, ml_collections or the config file raised.
      file: path of the config file, or empty.
      argv: the command line.
    """
    chain: list[BaseException] = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)
    root = chain[-1]
    if mistakes := [link for link in chain if isinstance(link, InputError)]:
        # ml_collections wraps an InputError of get_config in another one.  The innermost one says what is wrong.
        return str(mistakes[-1])
    if isinstance(root, SyntaxError):
        return f"The config file {file!r} is not Python: {root.msg} (line {root.lineno})."
    text = " ".join(str(error).split())
    within = [f.lineno for f in traceback.extract_tb(root.__traceback__) if file and Path(f.filename) == Path(file)]
    if within:
        reason = " ".join(str(root).split())
        return f"The config file {file!r} fails at line {within[-1]}: {type(root).__name__}: {reason}"
    if isinstance(root, KeyError) and re.fullmatch(r"'\w+'", str(root)):
        key = root.args[0]
        near = re.search(r'Did you mean "(\w+)"', text)
        whole = _whole_key(argv, key)
        meant = near and ".".join(near[1] if part == key else part for part in whole.split("."))
        hint = f"Did you mean {meant!r}?" if meant else "`python -m mhc_jax settings` prints all settings."
        return f"The configuration has no key {whole!r}. {hint}"
    if "Overriding config is not allowed" in text:
        return "--config=FILE has no use here; --config.a.b=value changes a setting."
    if missing := re.search(r"Flag --(\w+) must have a value other than None", text):
        return f"--{missing[1]} is missing; give --{missing[1]}=... ({flags.FLAGS[missing[1]].help})"
    if unknown := re.match(r"Unknown command line flag '(\w+)'", text):
        sections = to_mapping(ExperimentConfig())
        if keys := [f"{section}.{unknown[1]}" for section in sections if unknown[1] in sections[section]]:
            whole = " or ".join(f"--config.{key}=VALUE" for key in keys)
            return f"There is no flag --{unknown[1]}; settings are given by their whole name, {whole}."
    if illegal := re.match(r"flag --([\w.]+)=(.*?): (?:\2 is not (.+))?", text):
        kind = flags.FLAGS[illegal[1]].flag_type()
        if kind in ("int", "float", "bool"):
            return f"--{illegal[1]} is {illegal[2]!r}; it must be {illegal[3] or f'of type {kind}'}."
    return f"{text} (see --help)"


def _report_unraisable(unraisable: Any) -> None:
    # This error is not shown.  After a save has failed, TensorStore raises it dozens of times.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _exit(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
