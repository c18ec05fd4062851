"""The page of a comparison or a sweep: one self-contained HTML file, and the same table in Markdown."""

from __future__ import annotations

import html
import os
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mhc_jax import plots
from mhc_jax.analysis.comparison import COLUMNS, STATISTICS, Cell, findings, rows, statistics_rows
from mhc_jax.analysis.grouping import Baseline, Setting, group, mean_record
from mhc_jax.analysis.records import RunRecord, flatten, labels, not_defaults, read_run
from mhc_jax.errors import require
from mhc_jax.plots.sweeps import SWEEP_FIGURES
from mhc_jax.runs.folder import read_json

HEADER_KEYS = ("date", "command", "commit", "device")
"""Keys of env.json shown at the top; the others are in a fold below the settings."""
MOST_VALUES = 3
"""Lines of one of them."""
CURVES = 8
"""Settings up to which the figures of single runs are drawn, with the mean of each setting's seeds."""
ROUTINE_EVENTS = ("saved",)
"""Events of no interest to a reader of results."""


def find_runs(folder: Path, order: Sequence[str] = ()) -> list[RunRecord]:
    """Records of the run folders in `folder` (or of `folder` itself) that have begun.

    Args:
      folder: of a sweep or of runs.
      order: names that come first, in this order; the others follow by name.

    Raises:
      InputError: no folder, or no run in it.
    """
    require(folder.is_dir(), f"There is no folder {str(folder)!r}; give the folder of a sweep or of runs.")
    places = [folder] if (folder / "config.json").is_file() else sorted(folder.iterdir())
    rank = {name: k for k, name in enumerate(order)}
    places.sort(key=lambda place: rank.get(place.name, len(rank)))
    found = [read_run(place) for place in places if (place / "metrics.jsonl").is_file()]
    require(bool(found), f"{str(folder)!r} holds no run folder; give the folder of a sweep or of runs.")
    return found


def markdown_table(table: Sequence[Mapping[str, Cell]]) -> str:
    """Rows of the same headings as Markdown, for a page, a notebook or a terminal."""
    lines = [list(table[0]), ["---"] + ["---:"] * (len(table[0]) - 1)]
    lines += [[cell.text for cell in row.values()] for row in table]
    return "\n".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |" for line in lines)


def write_report(
    records: Sequence[RunRecord],
    folder: str | Path,
    title: str,
    notes: Sequence[str] = (),
    baseline: Baseline | None = None,
) -> Path:
    """Write `folder`/report.html, and `folder`/figures/<name>.png and .svg.

    The page needs no network and no other file: figures are inline SVG, styles and the script that sorts the tables are in the
    page.  It appears whole or not at all (written beside, then renamed).

    Args:
      records: the runs, in the order in which they are to be shown; those that differ in seeds alone are one setting.
      folder: made if it does not exist; links to run folders are relative to it.
      title: of the page.
      notes: paragraphs of plain text to show under the findings.
      baseline: as `grouping.group` takes it.

    Returns:
      The path of report.html.

    Raises:
      InputError: there are no records, or one is given twice.
    """
    settings = group(records, baseline)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    links = {n: os.path.relpath(r.folder, folder) for n, r in zip(labels(records), records, strict=True)}
    tables = f"<h3>By run</h3>{sortable_table(rows(records, settings), links)}<p>{escaped(COLUMNS)}</p>"
    if len(settings) < len(records):
        by_setting = f"<h3>By setting</h3>{sortable_table(statistics_rows(settings))}<p>{escaped(STATISTICS)}</p>"
        tables = by_setting + tables
    figures, drawn = _figures(settings, len(records), folder / "figures", baseline)
    return write_page(
        folder,
        title,
        header=header(records),
        drawn=drawn,
        findings=bullets(findings(settings) or ["No setting is compared with another, and nothing else was measured."]),
        notes="".join(f"<p>{escaped(note)}</p>" for note in notes),
        comparison=tables,
        figures=figures,
        settings=settings_section(settings),
        events=events_section(records),
    )


def write_folder_report(folder: Path, output: Path | None = None, title: str = "") -> Path:
    """The page of a sweep's folder, or of any folder of run folders.

    Args:
      folder: of the runs.
      output: where to write; None: `folder`.
      title: of the page; empty: the sweep's, else the folder's name.

    Raises:
      InputError: no folder, or no run in it.
    """
    plan = folder / "sweep.json"
    sweep = read_json(plan) if plan.is_file() else {"title": folder.resolve().name, "baseline": None, "runs": []}
    records = find_runs(folder, sweep["runs"])
    notes = [held_runs(records, sweep["runs"])] if sweep["runs"] else []
    return write_report(records, output or folder, title or sweep["title"], notes, sweep.get("baseline") or None)


def held_runs(records: Sequence[RunRecord], grid: Sequence[str]) -> str:
    """The sentence that says which runs of a grid a page holds."""
    names = {record.name for record in records}
    missing = [name for name in grid if name not in names]
    text = f"This page holds {len(grid) - len(missing)} of the {len(grid)} runs of the grid"
    if missing:
        text += f"; not begun: {', '.join(missing[:MOST_VALUES])}{' and more' * (len(missing) > MOST_VALUES)}"
    others = len(names - set(grid))
    return f"{text}{f', and {others} runs of earlier grids' * bool(others)}."


def _figures(
    settings: Sequence[Setting], runs: int, folder: Path, baseline: Baseline | None
) -> tuple[str, dict[str, str]]:
    """Figures over seeds and settings, then those of single runs or of the means over seeds."""
    plain = len(settings) == runs and baseline is None
    over_seeds = {k: v for k, v in SWEEP_FIGURES.items() if not plain or k in ("swept", "frontier", "ladder")}
    figures, drawn = figures_section(over_seeds, settings, folder, quiet=plain)
    if len(settings) > CURVES:
        note = f"Figures of curves by setting are drawn for up to {CURVES} settings; here are {len(settings)}."
        return f"{figures}<p>{note}</p>", drawn
    single = {k: v for k, v in plots.FIGURES.items() if plain or k != "loss_gap"}
    more, also = figures_section(single, [mean_record(setting) for setting in settings], folder)
    heading = "" if len(settings) == runs else "<h3>Means over the seeds that finished</h3>"
    return figures + heading + more, drawn | also


def write_page(folder: Path, title: str, drawn: dict[str, str], **sections: str) -> Path:
    """Fill the template and write `folder`/report.html, which appears whole or not at all.

    Args:
      folder: exists.
      title: of the page.
      drawn: id of each figure to its title, for the links at the top.
      sections: HTML of header, findings, notes, comparison, figures, settings and events.
    """
    nav = [f'<a href="#{s}">{s.capitalize()}</a>' for s in ("findings", "comparison", "figures", "settings", "events")]
    nav[3:3] = [f'<a href="#{name}">{escaped(figure)}</a>' for name, figure in drawn.items()]
    template = resources.files("mhc_jax.reports").joinpath("template.html").read_text("utf-8")
    page = string.Template(template).substitute(title=escaped(title), nav="\n".join(nav), **sections)
    path = folder / "report.html"
    draft = folder / f".report.{os.getpid()}.html"
    try:
        draft.write_text(page, encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def escaped(value: Any) -> str:
    """As text of a page."""
    return html.escape(str(value))


def bullets(items: Sequence[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{escaped(item)}</li>" for item in items) + "</ul>"


def text_table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    """A table of text, first row the headings."""
    cells = "".join(f"<th>{escaped(h)}</th>" for h in head)
    lines = "".join("<tr>" + "".join(f"<td>{escaped(value)}</td>" for value in row) + "</tr>" for row in body)
    table = f'<table class="text"><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def sortable_table(table: Sequence[Mapping[str, Cell]], links: Mapping[str, str] | None = None) -> str:
    """A table with a button in each heading; cells carry the number they sort by.

    `links`: text of a cell to the address it leads to.
    """
    links = links or {}
    head = "".join(f'<th><button type="button">{escaped(h)}</button></th>' for h in table[0])
    body = ""
    for row in table:
        body += "<tr>"
        for cell in row.values():
            text = escaped(cell.text)
            if cell.text in links:
                text = f'<a href="{escaped(links[cell.text])}">{text}</a>'
            body += f'<td data-value="{escaped("" if cell.value is None else cell.value)}">{text}</td>'
        body += "</tr>"
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def header(records: Sequence[RunRecord]) -> str:
    """Number of runs, date (first to last), command, commit and device; a line a distinct value, and of many the first."""
    items = [("runs", str(len(records)))]
    for key in HEADER_KEYS:
        found = [flatten(record.env).get(key) for record in records]
        if key == "commit":
            dirty = [flatten(record.env).get("dirty") for record in records]
            found = [
                f"{commit} with uncommitted changes" if commit and changed else commit
                for commit, changed in zip(found, dirty, strict=True)
            ]
        values = list(dict.fromkeys(str(v) for v in found if v is not None))
        if key == "date" and len(values) > 1:
            values = [f"{min(values)} to {max(values)}"]
        if len(values) > MOST_VALUES:
            values = [f"{values[0]} and {len(values) - 1} more (environments, below)"]
        items += [(key, value) for value in values]
    terms = "".join(
        f"<dt>{escaped(key)}</dt><dd>{'<code>' if key == 'command' else ''}{escaped(value)}"
        f"{'</code>' if key == 'command' else ''}</dd>"
        for key, value in items
    )
    return f"<dl>{terms}</dl>"


def figures_section(
    figures: Mapping[str, plots.Plot], data: Any, folder: Path, quiet: bool = False
) -> tuple[str, dict[str, str]]:
    """HTML of every figure that `data` can fill, and id and title of those drawn.

    Args:
      figures: as `plots.FIGURES`.
      data: what their functions take.
      folder: for <name>.png and <name>.svg.
      quiet: do not list the figures that could not be drawn.
    """
    parts, drawn, missing = [], {}, []
    for name, plot in figures.items():
        try:
            figure = plot.draw(data)
        except plots.NothingToDraw as reason:
            missing.append(f"{plot.title}: {reason}")
            continue
        plots.save(figure, folder / f"{name}.png", vector=True)
        drawn[name] = plot.title
        width = f"{figure.get_figwidth() * 6.4:.0f}rem"
        parts.append(
            f'<figure id="{name}"><h3>{escaped(plot.title)}</h3>'
            f'<div role="img" aria-label="{escaped(plot.title)}" style="--width: {width}">'
            f"{plots.svg(figure)}</div><figcaption>{escaped(plot.caption)}</figcaption></figure>"
        )
    if missing and not quiet:
        parts.append("<h3>Not drawn</h3>" + bullets(missing))
    return "\n".join(parts), drawn


def settings_section(settings: Sequence[Setting]) -> str:
    """What differs between settings, what all runs share, which of it is no default, and the environments."""
    runs = [run for setting in settings for run in setting.runs.values()]
    flat = [flatten(run.config) for run in runs]
    shared = {key: value for key, value in flat[0].items() if all(other.get(key) == value for other in flat)}
    firsts = [flatten(setting.any_run.config) for setting in settings]
    keys = [key for key in dict.fromkeys(key for one in firsts for key in one) if key not in shared]
    keys = [key for key in keys if len({str(one.get(key)) for one in firsts}) > 1]
    out = ""
    if len(settings) > 1:
        body = [
            [setting.label, *(one.get(key, "–") for key in keys)] for setting, one in zip(settings, firsts, strict=True)
        ]
        out = text_table(["setting", *keys], body)
    changed = {key: value for key, value in not_defaults(runs[0].config).items() if key in shared}
    out += f"<p>{escaped(changed_settings(changed))}</p>"
    table = text_table(["setting", "value"], list(shared.items()))
    out += f"<details><summary>{len(shared)} shared settings</summary>{table}</details>"
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for key, value in flatten(run.env).items():
            found.setdefault((key, str(value)), []).append(run.name)
    body = [[key, value, f"{len(names)} of {len(runs)} runs"] for (key, value), names in found.items()]
    table = text_table(["key", "value", "runs"], body)
    return out + f"<details><summary>Environments</summary>{table}</details>"


def changed_settings(changed: Mapping[str, Any]) -> str:
    """The sentence that names shared settings other than the project's defaults."""
    if not changed:
        return "All shared settings are the project's defaults."
    return f"Shared settings that are not defaults: {', '.join(f'{key}={value}' for key, value in changed.items())}."


def events_section(records: Sequence[RunRecord]) -> str:
    """Spikes, resumptions and the like, in order of steps within a run."""
    body = []
    for name, record in zip(labels(records), records, strict=True):
        for event in record.events:
            if event.get("event") not in ROUTINE_EVENTS:
                details = {k: v for k, v in event.items() if k not in ("kind", "step", "event")}
                text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in details.items())
                body.append([name, event["step"], event.get("event", ""), text])
    if not body:
        return "<p>No spikes, no resumptions, no divergence.</p>"
    table = text_table(["run", "step", "event", "details"], body)
    return f"<details{' open' * (len(body) <= 20)}><summary>{len(body)} events</summary>{table}</details>"
