"""Makes the pages of the reference from code: all settings, one page for each command, and the Python API.

Nothing here imports mkdocs, so that a test can read these pages without it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {path.stem: path for path in [*sorted(ROOT.glob("experiments/*.py")), ROOT / "kernels" / "bench.py"]}
# The steps of another commit, which steptime.py starts; nobody calls it.
del COMMANDS["steptime_worker"]
SECTIONS = {
    "model": "The decoder and its connection",
    "data": "Text, tokenizer and batches",
    "optimizer": "Optimizer and learning rate",
    "train": "Length of a run, logs, checkpoints, warm start, trackers",
    "mesh": "Devices",
    "pipeline": "Pipeline",
}
KERNELS = ["api", "layout", "backend_choice", "arguments", "sharded", "ops/rms_norm", "ops/sinkhorn/reference"]
KERNELS += ["ops/sinkhorn/steps", "ops/coefficients/reference", "ops/read/reference", "ops/write/reference"]
KERNELS += ["ops/write_read/reference", "backends", "measure", "gpu_inspect"]
"""The modules of `mhc_kernels` that the reference shows."""

SETTINGS_HEAD = """# All settings

A configuration has six sections: {sections}. Every command that takes `--config` takes each setting as a flag:

    python experiments/train.py --config=experiments/configs/demo.py:mhc --config.train.steps=400 --workdir=runs/mhc-400

`python -m mhc_jax settings` prints this page, and `python -m mhc_jax settings optimizer.` a part of it. A setting that does
not exist is refused with the nearest name. `config.json` in a run folder has every setting of the run. A config file
is Python with a function `get_config`, as in `experiments/configs/`.

Some settings are texts with parts, such as `mhc:init=home:t_max=5` or `muon:rms=0.2`. Parts of such a text are listed below it.
The entries of a tuple are joined with commas on the command line, and with `+` within a text.
"""


def pages() -> dict[str, str]:
    """Return the Markdown of all pages of the reference, by their path in docs/."""
    return {"settings.md": settings_page(), "records.md": records_page(), **command_pages(), **api_pages()}


# -- settings


def settings_page() -> str:
    """Return the page of all settings, made of the dataclasses of `mhc_jax/config/` and `mhc_jax/connections/`."""
    from mhc_jax.cli.settings import kinds_of
    from mhc_jax.config.described import settings

    lines = [SETTINGS_HEAD.format(sections=", ".join(f"[`{name}`](#{name})" for name in SECTIONS))]
    seen: set[str] = set()
    for section, title in SECTIONS.items():
        lines.append(f"## `{section}`: {title} {{ #{section} }}\n")
        for setting in settings(f"{section}."):
            anchor = re.sub(r"[.:=]", "-", setting.name)
            if setting.name not in seen:
                lines.append(f"### `{setting.name}` {{ #{anchor} }}\n")
            seen.add(setting.name)
            kinds = f" · kinds: {kinds_of(setting)}" if setting.kinds else ""
            lines.append(f"`{setting.type}` · default `{setting.default}`{kinds}\n\n{setting.meaning}\n")
    return "\n".join(lines)


def records_page() -> str:
    """Return the page that lists all records, the newest first, with their first headings."""
    found = sorted(ROOT.glob("experiments/records/*/README.md"), key=lambda path: path.parent.name, reverse=True)
    titles = [(path.parent.name, path.read_text().partition("\n")[0].strip("# ")) for path in found]
    rows = [f"| [`{name}`](../experiments/records/{name}/README.md) | {escaped(title)} |" for name, title in titles]
    return RECORDS_HEAD + "| record | what it is |\n| --- | --- |\n" + "\n".join(rows) + "\n"


RECORDS_HEAD = """# All records

A record keeps what matters of a sweep or of a measurement: its page, its numbers and its configuration, in `experiments/records/`.
[Your first sweep](first_sweep.md#a-record) says how a record is made. [How numbers are defined](../tests/numbers.md) says what the
numbers mean.
Older records give their commands with `--set=NAME=VALUE`, which is spelled `--config.NAME=VALUE` today.

"""


# -- commands


def command_pages() -> dict[str, str]:
    """Return a page for each script, made of its docstring and its flags, and the page that lists them."""
    rows, made = [], {}
    for name, path in COMMANDS.items():
        module, flags = _load(path)
        command = f"python {path.relative_to(ROOT).as_posix()}"
        docstring = (module.__doc__ or "").strip()
        made[f"commands/{name}.md"] = f"# {path.name}\n\n{docstring}\n\n## Flags of {path.name}\n\n{flags}\n"
        rows.append(f"| [`{command}`]({name}.md) | {docstring.splitlines()[0]} |")
    return {"commands/index.md": COMMANDS_HEAD + "\n".join(rows) + "\n", **made}


COMMANDS_HEAD = """# All commands

Each command prints its page with `--help`, and `python -m mhc_jax settings` prints [all settings](../settings.md).

| command | what it does |
| --- | --- |
"""


def _load(path: Path):
    """Import a script and return its module and the Markdown of its flags, which absl forgets again."""
    from absl import flags

    from mhc_jax import cli
    from mhc_jax.cli.flag_help import flag_texts

    known, name = set(flags.FLAGS), f"docs_command_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        del sys.modules[name]
    if "ArgumentParser" in path.read_text():
        return module, _printed_flags(module.parse if hasattr(module, "parse") else module.main)
    new = set(flags.FLAGS) - known
    texts = flag_texts([flag for flag in cli.own_flags(name) if flag.name in new], path.stem == "sweep")
    flags.FLAGS.remove_flag_values(new)
    rows = [f"| `{t.usage}` | {f'`{t.default}`' if t.default else ''} | {escaped(t.meaning)} |" for t in texts]
    return module, "| flag | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows)


def _printed_flags(parse) -> str:
    printed = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):
        parse(["--help"])
    return f"```text\n{printed.getvalue().partition('options:')[2].strip()}\n```"


def escaped(text: str) -> str:
    """Return a text for a cell of a table: `<` outside of code is spelled as HTML has it."""
    parts = text.replace("|", "\\|").split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts)


# -- Python API


def api_pages() -> dict[str, str]:
    """Return pages that mkdocstrings fills in: one for each room of `mhc_jax`, for its other modules, and for `mhc_kernels`."""
    made, rows = {}, []
    package = ROOT / "mhc_jax"
    for room in sorted(path.parent for path in package.glob("*/__init__.py")):
        modules = [f"mhc_jax.{room.name}.{path.stem}" for path in sorted(room.glob("*.py")) if path.stem != "__init__"]
        made[f"api/{room.name}.md"] = _api_page(f"mhc_jax.{room.name}", modules)
        rows.append((room.name, f"mhc_jax.{room.name}", room / "__init__.py"))
    roots = [f"mhc_jax.{path.stem}" for path in sorted(package.glob("*.py")) if not path.stem.startswith("__")]
    made["api/mhc_jax.md"] = _api_page("mhc_jax", roots)
    made["api/mhc_kernels.md"] = _api_page("mhc_kernels", [f"mhc_kernels.{path.replace('/', '.')}" for path in KERNELS])
    rows = [("mhc_jax", "mhc_jax", package / "__init__.py"), *rows]
    rows += [("mhc_kernels", "mhc_kernels", ROOT / "kernels" / "mhc_kernels" / "__init__.py")]
    listed = [f"| [`{name}`]({page}.md) | {escaped(_first_line(path))} |" for page, name, path in rows]
    made["api/index.md"] = API_HEAD + "\n".join(listed) + "\n"
    return made


API_HEAD = """# Python API

`from mhc_jax import connect, Wiring` puts connections around the blocks of [your own model](../your_model.md). Everything else is
imported from its module.

::: mhc_jax.wrappers.modules.connect
    options:
      heading_level: 2

::: mhc_jax.wrappers.wiring.Wiring
    options:
      heading_level: 2

## All modules

| package | content |
| --- | --- |
"""


def _api_page(package: str, modules: Iterable[str]) -> str:
    # The members of a package are those of its modules, which the page shows.
    head = f"::: {package}\n    options:\n      members: false\n      heading_level: 1\n"
    return "\n".join([head, *(f"::: {module}\n    options:\n      heading_level: 2\n" for module in modules)])


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
