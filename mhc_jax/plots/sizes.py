"""Sizes of figures: those of a screen, of a phone, and of a column or a page of a paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from mhc_jax.errors import InputError

TEXT = 9.0
"""Size of text on a screen, in points."""


class Size(NamedTuple):
    """How large a figure is drawn, and which of its panels."""

    width: float | int | None = None
    """Width in inches.  None: as wide as its panels need on a screen."""
    text: float | int = TEXT
    """Size of text in points.  Titles are a little larger, numbers of axes a little smaller."""
    panel: str = ""
    """What to draw: numbers of panels from 1, joined with commas, or words of the title of one.  Empty: all panels."""

    @property
    def numbers(self) -> list[int]:
        """The numbers of panels that `panel` names, each once.  Empty if it names none or has words."""
        parts = [part.strip() for part in self.panel.split(",")]
        return list(dict.fromkeys(map(int, parts))) if all(part.isdecimal() for part in parts) else []


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


def chosen_panels(names: Sequence[str], size: Size) -> list[int]:
    """Return the indices of the panels with these names that `size.panel` names: by numbers, or the one whose name has all words.

    Raises:
      InputError: there is no such panel, or several have the words.
    """
    words, numbers = size.panel.lower().split(), size.numbers
    found = [k for k, name in enumerate(names) if all(word in name.lower() for word in words)]
    whole = [k for k, name in enumerate(names) if name.lower().split() == words]
    if numbers:
        found = [number - 1 for number in numbers if 1 <= number <= len(names)]
    elif len(whole) == 1:
        found = whole
    listed = ", ".join(f"{k} ({name})" for k, name in enumerate(names, 1) if not found or numbers or k - 1 in found)
    if not found or len(found) < len(numbers):
        raise InputError(f"There is no panel {size.panel!r}; the panels of this figure are {listed}.")
    if not numbers and len(found) > 1:
        every = ",".join(str(k + 1) for k in found)
        raise InputError(
            f"{len(found)} panels match {size.panel!r}: {listed}. Give the number of one, or --panel={every} for all of them."
        )
    return found
