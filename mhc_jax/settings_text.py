"""Read and write settings that are one line of text: `head:key=value:key=value`, or `head:number`.

Connections, model.attention_kind, model.experts and entries of train.trackers have the first form.  model.remat and
pipeline.schedule have the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mhc_jax.errors import InputError, one_of, require, shown


def read_settings(name: str, text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that follow the head of a text, by name.  Each value gets the type of its default.

    >>> read_settings("model.attention_kind", "mla:kv_rank=16", {"kv_rank": 512, "rope_width": 64})
    {'kv_rank': 16}

    Args:
      name: name of the setting whose value is the text, for error messages.
      text: `head` or `head:key=value:key=value`; the entries of a tuple are joined with +.
      defaults: every setting that may follow the head, and its default.

    Raises:
      InputError: a setting is unknown (the message names the nearest known one) or given twice, or a value has the wrong type.
    """
    head, *pairs = text.split(":")
    require(
        not pairs or bool(defaults), f"{name} is {text!r}, and {head!r} has no settings; leave out what follows it."
    )
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        require(bool(equals), f"{pair!r} in {name} {text!r} is not of the form key=value.")
        one_of(f"A setting of {name} {head!r}", key, defaults)
        require(key not in values, f"{name} is {text!r}, which sets {key} twice; set it once.")
        values[key] = _read(value, type(defaults[key]), f"{name} {text!r}: {key}")
    return values


def write_settings(
    head: str, settings: Mapping[str, Any], defaults: Mapping[str, Any], always: Iterable[str] = ()
) -> str:
    """Return a text with the head and those `settings`, in order, that differ from their default or are named in `always`.

    >>> write_settings("mla", {"kv_rank": 16, "rope_width": 64}, {"kv_rank": 512, "rope_width": 64})
    'mla:kv_rank=16'
    """
    named = [key for key in settings if key in always or key not in defaults or settings[key] != defaults[key]]
    return ":".join([head, *(f"{key}={_write(settings[key], type(defaults.get(key)))}" for key in named)])


def read_number(name: str, text: str, heads: Iterable[str], kinds: Mapping[str, type]) -> tuple[str, Any]:
    """Return (head, number) of a text `head:number`, or (head, None) of a text `head`.

    >>> read_number("model.remat", "connection:6", ["none", "connection"], {"connection": int})
    ('connection', 6)

    Args:
      name: name of the setting whose value is the text, for error messages.
      text: the text to read.
      heads: every allowed head.
      kinds: `int` or `float` for each head that a number may follow.

    Raises:
      InputError: the head is unknown (the message names the nearest known one), a number follows a head that takes none, or what
        follows the colon is no number.
    """
    head, colon, number = text.partition(":")
    one_of(name, head, heads)
    if not colon:
        return head, None
    require(
        head in kinds, f"{name} is {text!r}; a number can follow {' or '.join(map(repr, kinds))}, and not {head!r}."
    )
    return head, _read(number, kinds[head], f"The number in {name} {text!r}")


def _read(text: str, kind: type, name: str) -> Any:
    readers = {
        bool: {"True": True, "true": True, "False": False, "false": False}.__getitem__,
        tuple: lambda t: tuple(t.split("+")),
    }
    try:
        return readers.get(kind, kind)(text)
    except (ValueError, KeyError):
        form = "entries joined with +" if kind is tuple else f"a {kind.__name__}"
        raise InputError(f"{name} is {shown(text)}; it must be {form}.") from None


def _write(value: Any, kind: type) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    # Python's `str` of a float is the shortest text from which `float` makes the same number.
    return str(float(value) if kind is float else value)
