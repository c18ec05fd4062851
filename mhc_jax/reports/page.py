"""Write the page of a comparison or a sweep: one HTML file that needs no other file."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mhc_jax import plots
from mhc_jax.analysis.comparison import COLUMNS, STATISTICS, findings, rows, statistics_rows
from mhc_jax.analysis.grouping import Baseline, Variant, group, mean_record
from mhc_jax.analysis.run_reader import RunRecord, flatten, labels, not_defaults, read_run
from mhc_jax.errors import require
from mhc_jax.files.json_files import replacing
from mhc_jax.plots.sweeps import SWEEP_FIGURES
from mhc_jax.reports.markup import bullets, escaped, fold, relative_link, sortable_table, text_table
from mhc_jax.runs.folder import read_summary
from mhc_jax.sweeps.grid import read_sweep_json

HEADER_KEYS = ("date", "command", "commit", "device")
"""Keys of env.json that the top of the page shows.  The section of settings shows all keys, in a table that the reader opens."""
MOST_VALUES = 3
"""Largest number of values of one key of env.json that the top of the page shows.  `held_runs` names at most this many runs."""
CURVES = 8
"""Largest number of variants with which the page draws the figures of `plots.FIGURES`, where each variant has its own curves.

If there are more variants, the page leaves these figures out.
"""
FOR_PAPERS = (
    "<p><code>python experiments/figure.py NAME RUNS --size=column</code> draws one of these figures as wide as a column of a "
    "paper. <code>--list</code> shows their names.</p>"
)
"""HTML that stands before the figures."""
OPEN_EVENTS = 20
"""Largest number of events for which the table of events is open from the start.  The reader opens a longer table by a click."""


# -- the runs of a page


def find_runs(folder: Path, order: Sequence[str] = ()) -> list[RunRecord]:
    """Read the run folders in `folder`, or `folder` itself if it is a run folder.  Runs that have not begun are left out.

    Args:
      folder: folder of a sweep, of runs, or of one run.
      order: names of runs that come first, in this order.  All other runs follow by name.

    Raises:
      InputError: there is no such folder, no run in it, or a run has ended and its folder cannot be read.
    """
    require(folder.is_dir(), f"There is no folder {str(folder)!r}; give the folder of a sweep or of runs.")
    places = [folder] if (folder / "config.json").is_file() else sorted(folder.iterdir())
    rank = {name: k for k, name in enumerate(order)}
    places.sort(key=lambda place: rank.get(place.name, len(rank)))
    begun = [place for place in places if (place / "metrics.jsonl").is_file()]
    ended = [place for place in places if (place / "summary.json").is_file() and read_summary(place)]
    bare = [place.name for place in places if (place / "config.json").is_file()]
    require(
        bool(begun) or not bare,
        f"{str(folder)!r} has no metrics of its runs ({', '.join(bare[:MOST_VALUES])}); a record keeps them if "
        "experiments/record.py is given --metrics.",
    )
    require(bool(begun), f"{str(folder)!r} holds no run folder; give the folder of a sweep or of runs.")
    return [read_run(place) for place in places if place in begun or place in ended]


def held_runs(records: Sequence[RunRecord], grid: Sequence[str]) -> str:
    """Return a sentence that says how many runs of a sweep's grid a page shows, and which of them have not begun.

    Args:
      records: the runs on the page.
      grid: names of the runs of the grid.
    """
    names = {record.name for record in records}
    missing = [name for name in grid if name not in names]
    text = f"This page holds {len(grid) - len(missing)} of the {len(grid)} runs of the grid"
    if missing:
        text += f"; not begun: {', '.join(missing[:MOST_VALUES])}{' and more' * (len(missing) > MOST_VALUES)}"
    earlier = len(names - set(grid))
    return f"{text}{f', and {earlier} runs of earlier grids' * bool(earlier)}."


# -- the page


def write_folder_report(folder: Path, output: Path | None = None, title: str = "") -> Path:
    """Write the page of a sweep's folder, or of any folder of run folders.

    Args:
      folder: folder of the runs.
      output: folder of the page.  None means `folder`.
      title: title of the page.  If it is empty, the title is that of the sweep or, if there is no sweep, the folder's name.

    Raises:
      InputError: there is no such folder, or no run in it.
    """
    plan = folder / "sweep.json"
    sweep = (
        read_sweep_json(folder) if plan.is_file() else {"title": folder.resolve().name, "baseline": None, "runs": []}
    )
    records = find_runs(folder, sweep["runs"])
    notes = [held_runs(records, sweep["runs"])] if sweep["runs"] else []
    return write_report(records, output or folder, title or sweep["title"], notes, sweep["baseline"] or None)


def write_report(
    records: Sequence[RunRecord],
    folder: str | Path,
    title: str,
    notes: Sequence[str] = (),
    baseline: Baseline | None = None,
) -> Path:
    """Write the page `folder`/report.html, and its figures as `folder`/figures/<name>.png, .svg and .pdf, which it links.

    The page needs no network and no other file, because it contains its figures as SVG, its styles and the script that sorts its
    tables.

    Args:
      records: the runs, in the order in which the page shows them.
      folder: folder of the page, made if it does not exist.  Links to run folders are relative to it.
      title: title of the page.
      notes: paragraphs of plain text under the findings.
      baseline: settings of the baseline, as `grouping.group` takes them.

    Returns:
      The path of report.html.

    Raises:
      InputError: there are no runs, or two runs have the same configuration.
    """
    variants = group(records, baseline)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures, drawn = _figures(variants, len(records), folder / "figures", baseline)
    return _write_page(
        folder,
        drawn,
        title=escaped(title),
        header=header(records),
        findings=bullets(findings(variants) or ["No variant is compared with another, and nothing else was measured."]),
        notes="".join(f"<p>{escaped(note)}</p>" for note in notes),
        comparison=_tables(records, variants, folder),
        figures=FOR_PAPERS + figures,
        settings=_settings(variants),
        events=_events(records),
    )


def _write_page(folder: Path, drawn: Mapping[str, str], **sections: str) -> Path:
    """Fill the template of the page, write it as `folder`/report.html atomically, and return its path.

    Args:
      folder: an existing folder.
      drawn: titles of the figures by their HTML ids, for the links at the top.
      sections: HTML of the title, header, findings, notes, comparison, figures, settings and events.
    """
    links = {name: name.capitalize() for name in ("findings", "comparison", "figures")} | dict(drawn)
    links |= {name: name.capitalize() for name in ("settings", "events")}
    nav = "\n".join(f'<a href="#{name}">{escaped(text)}</a>' for name, text in links.items())
    template = resources.files("mhc_jax.reports").joinpath("template.html").read_text("utf-8")
    page = string.Template(template).substitute(nav=nav, **sections)
    path = folder / "report.html"
    with replacing(path) as draft:
        # A file name that is not UTF-8 is shown with backslashes.
        draft.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


# -- sections


def header(records: Sequence[RunRecord]) -> str:
    """Return the top of the page as HTML: number of runs, dates (first to last), commands, commits and devices.

    A value that several runs share is shown once.
    """
    items = [("runs", str(len(records)))]
    for key in HEADER_KEYS:
        values = list(dict.fromkeys(value for record in records if (value := _header_value(record.env, key))))
        if key == "date" and len(values) > 1:
            values = [f"{min(values)} to {max(values)}"]
        if len(values) > MOST_VALUES:
            values = [f"{values[0]} and {len(values) - 1} more (environments, below)"]
        items += [(key, value) for value in values]
    terms = []
    for key, value in items:
        text = f"<code>{escaped(value)}</code>" if key == "command" else escaped(value)
        terms.append(f"<dt>{key}</dt><dd>{text}</dd>")
    return f"<dl>{''.join(terms)}</dl>"


def _header_value(env: Mapping[str, Any], key: str) -> str | None:
    changed = key == "commit" and env.get("commit") and env.get("dirty")
    return f"{env[key]} with uncommitted changes" if changed else env.get(key)


def _tables(records: Sequence[RunRecord], variants: Sequence[Variant], folder: Path) -> str:
    """Return the table of runs as HTML, below the table of variants if a variant has several runs."""
    links = {
        label: relative_link(record.folder, folder) for label, record in zip(labels(records), records, strict=True)
    }
    by_run = f"<h3>By run</h3>{sortable_table(rows(records, variants), links)}<p>{escaped(COLUMNS)}</p>"
    if len(variants) == len(records):
        return by_run
    return f"<h3>By variant</h3>{sortable_table(statistics_rows(variants))}<p>{escaped(STATISTICS)}</p>" + by_run


def _figures(
    variants: Sequence[Variant], runs: int, folder: Path, baseline: Baseline | None
) -> tuple[str, dict[str, str]]:
    """Draw `SWEEP_FIGURES` of the variants, and `plots.FIGURES` of means over seeds or, of matrices, one seed of each variant.

    Return the same as `_draw`.
    """
    plain = len(variants) == runs and baseline is None
    over_seeds = {k: v for k, v in SWEEP_FIGURES.items() if not plain or k in ("swept", "frontier", "ladder")}
    figures, drawn = _draw(over_seeds, variants, folder, quiet=plain)
    if len(variants) > CURVES:
        note = f"Figures of curves by variant are drawn for up to {CURVES} variants; here are {len(variants)}."
        return f"{figures}<p>{note}</p>", drawn
    single = {k: v for k, v in plots.FIGURES.items() if plain or k != "loss_gap"}
    curves = {k: v for k, v in single.items() if not v.matrices}
    matrices = {k: v for k, v in single.items() if v.matrices}
    for heading, of, data in (
        ("Means over the seeds that finished", curves, [mean_record(variant) for variant in variants]),
        ("Of each variant the run with the lowest seed", matrices, [variant.shown_run for variant in variants]),
    ):
        more, also_drawn = _draw(of, data, folder)
        figures += more if len(variants) == runs else f"<h3>{heading}</h3>{more}"
        drawn |= also_drawn
    return figures, drawn


def _draw(
    figures: Mapping[str, plots.Plot], data: Any, folder: Path, quiet: bool = False
) -> tuple[str, dict[str, str]]:
    """Draw every figure for which `data` has numbers.  Return the HTML, and the titles of the drawn figures by their HTML ids.

    The page shows each figure twice: as wide as its panels need, and for screens of a phone with panels below each other.

    Args:
      figures: figures by name, such as `plots.FIGURES`.
      data: runs or variants, the argument of the functions that draw the figures.
      folder: folder beside the page, to which <name>.png, <name>.svg and <name>.pdf are written.
      quiet: whether to leave out the list of the figures that could not be drawn.
    """
    parts, drawn, missing = [], {}, []
    for name, plot in figures.items():
        try:
            figure = plot.draw(data)
        except plots.NothingToDraw as reason:
            missing.append(f"{plot.title}: {reason}")
            continue
        plots.save(figure, folder / f"{name}.png", vector=True)
        with plots.drawn_at(plots.NARROW):
            narrow = plots.svg(plot.draw(data))
        drawn[name] = plot.title
        width, title = f"{figure.get_figwidth() * 6.4:.0f}rem", escaped(plot.title)
        files = " · ".join(
            f'<a href="./{folder.name}/{name}.{suffix}">{suffix.upper()}</a>' for suffix in ("pdf", "svg", "png")
        )
        parts.append(
            f'<figure id="{name}"><h3>{title}</h3><div role="img" aria-label="{title}" style="--width: {width}">'
            f'<div class="wide">{plots.svg(figure)}</div><div class="narrow">{narrow}</div></div>'
            f"<figcaption>{escaped(plot.caption_of(plots.panel_names(figure)))} {files}</figcaption></figure>"
        )
    if missing and not quiet:
        parts.append("<h3>Not drawn</h3>" + bullets(missing))
    return "\n".join(parts), drawn


def _settings(variants: Sequence[Variant]) -> str:
    """Return, as HTML, the settings in which variants differ, the settings that all runs share, and the content of env.json."""
    runs = [run for variant in variants for run in variant.runs.values()]
    shared = shared_settings(runs)
    out = ""
    if len(variants) > 1:
        configs = [flatten(variant.any_run.config) for variant in variants]
        keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in shared]
        keys = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
        named = zip(variants, configs, strict=True)
        out = text_table(
            ["variant", *keys], [[variant.label, *(config.get(key, "–") for key in keys)] for variant, config in named]
        )
    out += f"<p>{escaped(changed_settings(runs))}</p>"
    out += fold(f"{len(shared)} shared settings", text_table(["setting", "value"], list(shared.items())))
    counts: dict[tuple[str, str], int] = {}
    for run in runs:
        for key, value in flatten(run.env).items():
            counts[key, str(value)] = counts.get((key, str(value)), 0) + 1
    environments = [[key, value, f"{count} of {len(runs)} runs"] for (key, value), count in counts.items()]
    return out + fold("Environments", text_table(["key", "value", "runs"], environments))


def shared_settings(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the settings, by dotted key, that have the same value in all runs."""
    configs = [flatten(record.config) for record in records]
    return {key: value for key, value in configs[0].items() if all(config.get(key) == value for config in configs)}


def changed_settings(records: Sequence[RunRecord]) -> str:
    """Return a sentence that names the settings that all runs share and that differ from the project's defaults."""
    shared = shared_settings(records)
    changed = [f"{key}={value}" for key, value in not_defaults(records[0].config).items() if key in shared]
    if not changed:
        return "All shared settings are the project's defaults."
    return f"Shared settings that are not defaults: {', '.join(changed)}."


def _events(records: Sequence[RunRecord]) -> str:
    """Return the table of the events of all runs (spikes, resumptions and others) as HTML, run by run in the order of steps."""
    events = []
    for label, record in zip(labels(records), records, strict=True):
        for event in record.events:
            details = {key: value for key, value in event.items() if key not in ("kind", "step", "event")}
            text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in details.items())
            events.append([label, event["step"], event["event"], text])
    if not events:
        return "<p>No spikes, no resumptions, no divergence.</p>"
    table = text_table(["run", "step", "event", "details"], events)
    return fold(f"{len(events)} events", table, is_open=len(events) <= OPEN_EVENTS)
