"""Print the settings of a run: `python -m mhc_jax settings [PREFIX]`."""

from __future__ import annotations

import sys
import textwrap

from mhc_jax.config.described import Setting, settings
from mhc_jax.connections import KINDS
from mhc_jax.errors import InputError, require

USAGE = """usage: python -m mhc_jax settings [PREFIX]

Print all settings of a run with type, default and meaning, or those whose name begins with PREFIX.

    python -m mhc_jax settings
    python -m mhc_jax settings optimizer.
    python -m mhc_jax settings model.connection.init

A command of experiments/ takes a setting as --config.NAME=VALUE, such as --config.optimizer.learning_rate=0.01.
The settings of a connection may also follow its kind: --config=experiments/configs/demo.py:mhc:t_max=5.
"""

OTHERS = "These are the defaults.  A config file may set other values.  The values of a run are in its report.html and config.json."


def kinds_of(setting: Setting) -> str:
    """Return the kinds of connection that have a setting, joined with commas, or the word `all`."""
    return "all" if len(setting.kinds) == len(KINDS) else ", ".join(setting.kinds)


def text_of(setting: Setting) -> str:
    """Return a paragraph about a setting: its name, type and default, the kinds of connection that have it, and its meaning."""
    kinds = f"\nKinds: {kinds_of(setting)}." if setting.kinds else ""
    below = textwrap.indent(f"{setting.meaning}{kinds}", "    ")
    return f"{setting.name}  ({setting.type}, default {setting.default})\n{below}"


def main(words: list[str]) -> int:
    """Run the command and return its exit status: 0, or 2 after a mistake, which is told in one sentence."""
    if not words or "--help" in words or "-h" in words:
        print(USAGE, end="")
        return 0
    try:
        command, *rest = words
        require(command == "settings", f"There is no command {command!r}; use `python -m mhc_jax settings`.")
        require(len(rest) <= 1, f"Unexpected argument {words[-1]!r}; give one prefix, such as 'optimizer.'.")
        print("\n\n".join([*map(text_of, settings(*rest)), OTHERS]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
