"""Turns a committed notebook with its outputs into Markdown and pictures.  Nothing is executed."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of a notebook, and its pictures by the file names that the Markdown uses.

    The first line of the cell behind a picture, in which notebooks here explain it, becomes the picture's alternative text.
    """
    cells = json.loads(path.read_text())["cells"]
    parts, pictures = [], {}
    for cell, after in zip(cells, [*cells[1:], {}], strict=True):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{_caption(after)}]({name})")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            elif text := "".join(output.get("text", data.get("text/plain", ""))).strip("\n"):
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n", pictures


def _caption(cell: dict[str, Any]) -> str:
    text = " ".join("".join(cell.get("source", "")).split()).strip("*")
    sentence = re.split(r"(?<=[.;]) ", text)[0] if cell.get("cell_type") == "markdown" else ""
    return re.sub(r"[\[\]`$#*]", "", sentence) or "The figure that the code above draws"
