"""Reads tests/numbers.md."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "numbers.md"


def rows() -> list[list[str]]:
    """Return the cells of every row of its tables: number, definition, unit, tests."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [cells for cells in split if cells[0] not in ("number", "---")]


def names() -> set[str]:
    """Return the names in backticks of the first column."""
    return {name.replace("\\|", "|") for cells in rows() for name in re.findall(r"`([^`]+)`", cells[0])}
