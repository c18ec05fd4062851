"""The report of a comparison: one self-contained HTML page, and the same table in Markdown."""

from __future__ import annotations

import html
import os
import string
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mhc_jax import plots
from mhc_jax.comparison import Cell, findings, rows
from mhc_jax.errors import require
from mhc_jax.records import RunRecord, config_differences, flatten, labels

HEADER_KEYS = ("date", "command", "commit", "device")
"""Keys of env.json shown at the top; the others are in a fold below the settings."""
MOST_VALUES = 3
"""Lines of one of them."""
COLUMNS = (
    "Losses are in nats/token. Gap: validation loss minus that of the residual run at the last step that both have; below zero "
    "is better. Gain: largest composite gain seen during the run. Headings sort."
)
ROUTINE_EVENTS = ("saved",)
"""Events of no interest to a reader of results."""


def comparison_table(records: Sequence[RunRecord]) -> str:
    """Markdown table, one line a run, for a README or a terminal."""
    require(bool(records), "There are no runs to compare; give at least one run folder.")
    table = rows(records)
    lines = ["| " + " | ".join(table[0]) + " |", "| --- |" + " ---: |" * (len(table[0]) - 1)]
    for row in table:
        cells = [cell.text.replace("|", "\\|") for cell in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_report(records: Sequence[RunRecord], folder: str | Path, title: str, notes: Sequence[str] = ()) -> Path:
    """Write `folder`/report.html and `folder`/figures/<name>.png.

    The page needs no network and no other file: figures are inline SVG, styles and the script
    that sorts the table are in the page.  It appears whole or not at all (written beside, then
    renamed).

    Args:
      records: the runs, in the order in which they are to be shown.
      folder: made if it does not exist.
      title: of the page.
      notes: paragraphs of plain text to show under the findings.

    Returns:
      The path of report.html.

    Raises:
      InputError: there are no records.
    """
    require(bool(records), "There are no runs to report; give at least one run folder.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures, drawn = figures_section(plots.FIGURES, records, folder / "figures")
    return write_page(
        folder,
        title,
        header=header(records),
        drawn=drawn,
        findings=bullets(findings(records)),
        notes="".join(f"<p>{escaped(note)}</p>" for note in notes),
        comparison=sortable_table(rows(records)) + f"<p>{COLUMNS}</p>",
        figures=figures,
        settings=settings_section(records),
        events=events_section(records),
    )


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
    template = resources.files("mhc_jax").joinpath("report_template.html").read_text("utf-8")
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
    """Date (first to last), command, commit and device; a line a distinct value, and of many the first."""
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
            values = [f"{values[0]} and {len(values) - 1} more (environment of each run, below)"]
        items += [(key, value) for value in values]
    terms = "".join(
        f"<dt>{escaped(key)}</dt><dd>{'<code>' if key == 'command' else ''}{escaped(value)}"
        f"{'</code>' if key == 'command' else ''}</dd>"
        for key, value in items
    )
    return f"<dl>{terms}</dl>"


def figures_section(
    figures: Mapping[str, plots.Plot], data: Any, folder: Path, vector: bool = False
) -> tuple[str, dict[str, str]]:
    """HTML of every figure that `data` can fill, and id and title of those drawn.

    Args:
      figures: as `plots.FIGURES`.
      data: what their functions take.
      folder: for <name>.png, and <name>.svg if `vector`.
    """
    parts, drawn, missing = [], {}, []
    for name, plot in figures.items():
        try:
            figure = plot.draw(data)
        except plots.NothingToDraw as reason:
            missing.append(f"{plot.title}: {reason}")
            continue
        plots.save(figure, folder / f"{name}.png", vector=vector)
        drawn[name] = plot.title
        width = f"{figure.get_figwidth() * 6.4:.0f}rem"
        parts.append(
            f'<figure id="{name}"><h3>{escaped(plot.title)}</h3>'
            f'<div role="img" aria-label="{escaped(plot.title)}" style="--width: {width}">'
            f"{plots.svg(figure)}</div><figcaption>{escaped(plot.caption)}</figcaption></figure>"
        )
    if missing:
        parts.append("<h3>Not drawn</h3>" + bullets(missing))
    return "\n".join(parts), drawn


def settings_section(records: Sequence[RunRecord]) -> str:
    """What differs between the runs, what they share, and their environments."""
    names = labels(records)
    differences = config_differences(records)
    if len(records) == 1:
        out = "<p>One run: all its settings are below.</p>"
    elif differences:
        out = text_table(["setting", *names], [[key, *column] for key, column in differences.items()])
    else:
        out = "<p>The runs have the same settings.</p>"
    shared = {k: v for k, v in flatten(records[0].config).items() if k not in differences}
    out += (
        f"<details><summary>{len(shared)} shared settings</summary>"
        f"{text_table(['setting', 'value'], list(shared.items()))}</details>"
    )
    env = [(n, k, v) for n, r in zip(names, records, strict=True) for k, v in flatten(r.env).items()]
    table = text_table(["run", "key", "value"], env)
    return out + f"<details><summary>Environment of each run</summary>{table}</details>"


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
    return text_table(["run", "step", "event", "details"], body)
