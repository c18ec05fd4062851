"""Sizes of figures: those of a screen, of a phone, and of a column or a page of a paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

TEXT = 9.0
"""Size of text on a screen, in points."""


class Size(NamedTuple):
    """How large a figure is drawn, and which of its panels."""

    width: float | int | None = None
    """Width in inches.  None: as wide as its panels need on a screen."""
    text: float | int = TEXT
    """Size of text in points.  Titles are a little larger, numbers of axes a little smaller."""
    panel: str = ""
    """The only panel to draw: its number from 1, or words of its title.  Empty: all panels."""


SIZES = {"column": Size(3.3, 7.0), "page": Size(6.8, 8.0), "screen": Size()}
"""Sizes by name: one column and the full width of a page with two columns, and a screen."""
NARROW = Size(3.6, 8.0)
"""Size for a screen of 390 pixels: the 345 pixels (3.6 inches) beside the margins of a page."""
LEAST_PANEL = 25.0
"""Least width of a panel that shares a row with others, in units of the text size."""
LEAST_HEIGHT = 15.0
"""Least height of a panel, in units of the text size."""

_size: ContextVar[Size] = ContextVar("size", default=SIZES["screen"])


@contextmanager
def drawn_at(size: Size) -> Iterator[None]:
    """Draw the figures of the functions that are called within this context at `size`."""
    token = _size.set(size)
    try:
        yield
    finally:
        _size.reset(token)


def current_size() -> Size:
    """Return the size at which figures are drawn here."""
    return _size.get()


def scaled(points: float | int) -> float:
    """Return a size in points for the text size of the figure, given the one for text of `TEXT` points."""
    return points * current_size().text / TEXT
