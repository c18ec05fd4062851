"""Every setting of a run with its type, its default and its meaning, read from the dataclasses and the texts below their fields.

`python -m mhc_jax settings` prints what this file returns, and the page of all settings in the documentation is made of it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
from typing import Any, NamedTuple

from mhc_jax import connections
from mhc_jax.config.compound import Experts, LatentAttention, Muon, Wandb
from mhc_jax.config.run import ExperimentConfig
from mhc_jax.errors import require

PARTS = {
    "model.attention_kind": ("mla", LatentAttention),
    "model.experts": ("64", Experts),
    "optimizer.name": ("muon", Muon),
    "train.trackers": ("wandb", Wandb),
}
"""Settings that are texts of several parts: the head of such a text, and the class of the parts that may follow it."""


class Setting(NamedTuple):
    """One setting."""

    name: str
    """Full name, such as `model.width`.  That of a part follows a colon, as in `optimizer.name=muon:rms`."""
    type: str
    """Type as it is written in the dataclass."""
    default: str
    """Default as Python spells it.  Where kinds of connection differ, each default is followed by its kinds."""
    meaning: str
    """The text below the field.  It says which values are allowed."""
    kinds: tuple[str, ...] = ()
    """The kinds of connection that have this setting; empty: it belongs to no kind."""


@functools.cache
def field_texts(cls: type) -> dict[str, str]:
    """Return the text below each field of a dataclass.  A field that a subclass repeats without a text has its base class's."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                texts[field.target.id] = inspect.cleandoc(str(below.value.value))
    return texts


def settings(prefix: str = "") -> list[Setting]:
    """Return all settings whose name begins with `prefix`, or else those whose last part does, in the order of the dataclasses.

    Raises:
      InputError: there is no such setting.  The message has the nearest spelling and the sections.
    """
    found: list[Setting] = []
    for section in dataclasses.fields(ExperimentConfig):
        for setting in _of(_default(section), f"{section.name}."):
            if setting.name == "model.connection":
                found += [setting._replace(type="kind:key=value:...", default=repr(connections.spec(_mhc())))]
                found += connection_settings()
                continue
            found.append(setting)
            if setting.name in PARTS:
                head, cls = PARTS[setting.name]
                parts = [part for part in _of(cls(), "") if part.name != "number"]
                found += [part._replace(name=f"{setting.name}={head}:{part.name}") for part in parts]
    chosen = [setting for setting in found if setting.name.startswith(prefix)]
    chosen = chosen or [setting for setting in found if re.split("[.:]", setting.name)[-1].startswith(prefix)]
    near = _nearest(prefix, [setting.name for setting in found])
    require(
        bool(chosen),
        f"No setting begins with {prefix!r}.{f' Did you mean {near!r}?' if near else ''} The sections are "
        f"{', '.join(field.name for field in dataclasses.fields(ExperimentConfig))}.",
    )
    return chosen


def _nearest(given: str, names: list[str]) -> str | None:
    """Return the name that is spelled most like `given`, with its section or without it, or of whose words it is the initials."""
    last = {name: re.split("[.:]", name)[-1] for name in names}
    word = re.split("[.:]", given)[-1]
    short = [name for name in names if len(word) > 1 and "".join(part[:1] for part in last[name].split("_")) == word]
    if near := short or difflib.get_close_matches(given, names, n=1):
        return near[0]
    alike = difflib.get_close_matches(word, last.values(), n=1)
    return next((name for name in names if last[name] in alike), None)


def connection_settings() -> list[Setting]:
    """Return the settings of all kinds of connection.  Kinds share a row if name, type and text agree."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for kind in connections.KINDS:
        for setting in _of(connections.default_config(kind), ""):
            rows.setdefault((setting.name, setting.type, setting.meaning), {})[kind] = setting.default
    order = dict.fromkeys(name for name, _, _ in rows)
    return [
        Setting(f"model.connection.{name}", kind, _shared(defaults), meaning, tuple(defaults))
        for name in order
        for (own, kind, meaning), defaults in rows.items()
        if own == name
    ]


def _shared(defaults: dict[str, str]) -> str:
    by_value: dict[str, list[str]] = {}
    for kind, default in defaults.items():
        by_value.setdefault(default, []).append(kind)
    if len(by_value) == 1:
        return next(iter(by_value))
    most = max(by_value, key=lambda value: len(by_value[value]))
    others = [f"{default} ({', '.join(kinds)})" for default, kinds in by_value.items() if default != most]
    return "; ".join([most, *others])


def _of(config: Any, prefix: str) -> list[Setting]:
    texts = field_texts(type(config))
    return [
        Setting(prefix + field.name, str(field.type), repr(getattr(config, field.name)), texts.get(field.name, ""))
        for field in dataclasses.fields(config)
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def _mhc() -> Any:
    return connections.default_config("mhc")
