"""Write tables and lists as HTML and Markdown."""

from __future__ import annotations

import html
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhc_jax.analysis.comparison import Cell


def escaped(value: Any) -> str:
    """Return a value as text with the special characters of HTML escaped."""
    return html.escape(str(value))


def relative_link(target: Path, folder: Path) -> str:
    """Return the address of a folder or file for a link in a page of `folder`, quoted, and always that of a file.

    >>> relative_link(Path("runs/javascript:alert(3)"), Path("runs"))
    './javascript%3Aalert%283%29'
    """
    return "./" + urllib.parse.quote(os.fsencode(os.path.relpath(target, folder)))


def bullets(sentences: Sequence[str]) -> str:
    """Return an HTML list with one item for each sentence."""
    return "<ul>" + "".join(f"<li>{escaped(sentence)}</li>" for sentence in sentences) + "</ul>"


def fold(summary: str, content: str, is_open: bool = False) -> str:
    """Return an HTML element that shows `summary` and, if `is_open` or after a click of the reader, the HTML `content`."""
    return f"<details{' open' * is_open}><summary>{escaped(summary)}</summary>{content}</details>"


def text_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return an HTML table with the given headings and rows, every value as plain text."""
    head = "".join(f"<th>{escaped(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escaped(value)}</td>" for value in row) + "</tr>" for row in rows)
    return _scrolling("text", head, body)


def sortable_table(table: Sequence[Mapping[str, Cell]], links: Mapping[str, str] | None = None) -> str:
    """Return an HTML table that the reader of the page can sort with the button in each heading.

    Args:
      table: rows that share their headings, each a mapping from heading to cell.
      links: addresses to which cells link, by the text of the cell.
    """
    head = "".join(f'<th><button type="button">{escaped(heading)}</button></th>' for heading in table[0])
    body = ""
    for row in table:
        body += "<tr>"
        for cell in row.values():
            text, address = escaped(cell.text), (links or {}).get(cell.text)
            if address is not None:
                text = f'<a href="{escaped(address)}">{text}</a>'
            body += f'<td data-value="{escaped("" if cell.value is None else cell.value)}">{text}</td>'
        body += "</tr>"
    return _scrolling("sortable", head, body)


def _scrolling(kind: str, head: str, body: str) -> str:
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def markdown_table(table: Sequence[Mapping[str, Cell]]) -> str:
    """Return a Markdown table of rows that share their headings, each a mapping from heading to cell."""
    lines = [list(table[0]), ["---"] + ["---:"] * (len(table[0]) - 1)]
    lines += [[cell.text for cell in row.values()] for row in table]
    cells = [[" ".join(text.splitlines()).replace("|", "\\|") for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
