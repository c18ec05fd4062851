"""What `--help` prints about a script of `experiments/`: its docstring, its flags, and where its settings are explained.

The documentation's page of a command is made of the same parts.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

SETTINGS = "A setting of the run; `python -m mhc_jax settings` lists them with type, default and meaning."
HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull")


class FlagText(NamedTuple):
    """One flag of a command."""

    usage: str
    """The flag as it is written, such as `--workers=INT`."""
    default: str
    """Default, or `required`; empty: the flag does nothing unless it is given."""
    meaning: str
    """What it is for."""


def flag_texts(values: Iterable[Any], of_all_runs: bool = False) -> list[FlagText]:
    """Return the texts of a command's absl flags, in order, and behind `--config` that of `--config.NAME`.

    Args:
      values: the flags.
      of_all_runs: whether the command takes settings for a file that it is given, as sweep.py does, and has no flag `--config`.
    """
    found = []
    for flag in values:
        if flag.name == "config":
            found.append(FlagText("--config=FILE.py[:ARGUMENT]", "", flag.help))
            found.append(FlagText("--config.NAME=VALUE", "", SETTINGS))
            continue
        allowed = getattr(flag.parser, "enum_values", None)
        kind = flag.flag_type()
        value = "|".join(allowed) if allowed else {"comma separated list of strings": "A,B"}.get(kind, kind.upper())
        default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
        usage = f"--[no]{flag.name}" if kind == "bool" else f"--{flag.name}={'TEXT' if value == 'STRING' else value}"
        given = "required" if _required(flag) else "" if default is None or default is False else str(default)
        found.append(FlagText(usage, given, flag.help.removeprefix(f"<{value}>: ")))
    return [*found, FlagText("--config.NAME=VALUE", "", SETTINGS)] if of_all_runs else found


def help_text(file: str, docstring: str, positional: Sequence[str] | None, texts: Sequence[FlagText]) -> str:
    """Return the text of `--help`.

    Args:
      file: name of the script.
      docstring: that of the script, with at least one example.
      positional: names of the positional arguments.  None: any number of them.
      texts: the flags, of `flag_texts`.
    """
    words = " ".join(["WORD ..."] if positional is None else positional)
    usage = " ".join(f"usage: python experiments/{file} {words} [--FLAG=VALUE ...]".split())
    lines = [usage, "", docstring.strip(), "", "Flags:"]
    for text in texts:
        default = f"  (default {text.default})".replace("(default required)", "(required)") if text.default else ""
        meaning = re.sub(r"\s+", " ", text.meaning)
        lines += [
            f"  {text.usage}{default}",
            textwrap.fill(meaning, 120, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    return "\n".join(lines)


def _required(flag: Any) -> bool:
    return any("must have a value" in validator.message for validator in flag.validators)
