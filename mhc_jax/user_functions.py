"""Load a Python function of the user, which a setting such as `my_data.py:documents` names by its file and its name.

Every process runs the file anew, so that the function needs no registration.  The file may import what is installed.  Other files
beside it are not found.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import runpy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mhc_jax.errors import InputError, one_of, require, user_path

_FUNCTION = re.compile(r"(.+\.py):(\w+)")


def is_function(text: str) -> bool:
    """Return whether a text has the form `FILE.py:FUNCTION`.

    Examples:
      >>> is_function("my_data.py:documents"), is_function("shakespeare")
      (True, False)
    """
    return _FUNCTION.fullmatch(text) is not None


def parts(setting: str, text: str) -> tuple[Path, str]:
    """Return the file and the name of the function that a text names.

    Args:
      setting: what the text is, for the error message, as in "the source".
      text: `FILE.py:FUNCTION`.

    Raises:
      InputError: there is no such file.
    """
    match = _FUNCTION.fullmatch(text)
    file = user_path(match[1] if match else text)
    require(
        match is not None and file.is_file(),
        f"There is no file {str(file)!r}, which {setting} {text!r} names; give 'FILE.py:FUNCTION'.",
    )
    return file, match[2] if match else ""


def load(setting: str, text: str, argument: str, called: str) -> Callable[[Any], Any]:
    """Run the file that a text names, and return its function, which takes one argument.

    An exception that the function raises later becomes an `InputError` with its line in the user's file.

    Args:
      setting: what the text is, for error messages, as in "the source".
      text: `FILE.py:FUNCTION`.
      argument: a name for the function's argument, for error messages.
      called: a sentence's end for error messages, which says with what the function is called.

    Raises:
      InputError: the file or the function does not exist or fails, or the function does not take one argument.
    """
    file, name = parts(setting, text)
    try:
        names = runpy.run_path(str(file))
    except (Exception, SystemExit) as error:
        raise failure(text, file, error) from error
    function: Any = names.get(name)
    if not callable(function):
        one_of(
            f"The function in {setting} {text!r}", name, [key for key, value in names.items() if _is_of(file, value)]
        )
    try:
        inspect.signature(function).bind(argument)
    except TypeError:
        message = (
            f"{text!r} does not take one argument; write `def {name}({argument}):`, which is called with {called}."
        )
        raise InputError(message) from None

    return guarded(setting, text, function)


def guarded(setting: str, text: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose exceptions are `InputError`s that name the line in the file that `text` names."""
    file, _ = parts(setting, text)

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except InputError:
            raise
        except (Exception, SystemExit) as error:
            raise failure(text, file, error) from error

    return call


def identity(setting: str, text: str) -> list[str]:
    """Return the path of the file that a text names, the name of the function, and the SHA-256 of the file in hex."""
    file, name = parts(setting, text)
    return [str(file.resolve()), name, hashlib.sha256(file.read_bytes()).hexdigest()]


def failure(text: str, file: Path, error: BaseException) -> InputError:
    """Return the error for an exception that the user's file has raised, with the last line of the file that took part in it."""
    within = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f" at line {within[-1]}" if within else ""
    return InputError(f"{text!r} fails{place}: {type(error).__name__}: {' '.join(str(error).split())}")


def _is_of(file: Path, value: Any) -> bool:
    """Return whether a value is a function that the file defines, and not one that it imports."""
    return inspect.isfunction(value) and value.__code__.co_filename == str(file)
