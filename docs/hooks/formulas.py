"""Finds the formulas of indented lines in docstrings, which Markdown takes for code.  Nothing here imports mkdocs."""

from __future__ import annotations

import re
from collections.abc import Callable

BLOCK = re.compile(r'(?:<div class="highlight">)?<pre>(?:<span></span>)?<code>([^<]*)</code></pre>(?:</div>)?')
"""A block of code without colours, as mkdocs writes it."""
_FORMULA = re.compile(r"\$(?! )([^$]+)(?<![ /:=])\$(?![\w({*])")
"""A formula.  Two variables of a shell on one line, as in `$A/$B` or `$A:$(date)`, are none."""


def with_formulas(content: str, mathml: Callable[[str, str], str]) -> str:
    r"""Return a page in which formulas of indented lines are drawn.  Blocks of code without a pair of `$` stay as they are.

    A line of one formula is shown as a formula of its own, with the punctuation after it.  Words and further formulas stay on their
    line.  Where words are set in columns, by two spaces or more, the block keeps its form.

    Args:
      content: HTML.
      mathml: function that returns the drawing of a formula, shown as `block` or `inline`.

    >>> with_formulas("<pre><code>$a$,  $b = 1$.\n</code></pre>", lambda formula, display: f"[{formula} {display}]")
    '<div class="formula">[a inline],  [b = 1 inline].</div>'
    """
    return BLOCK.sub(lambda match: _block(match[0], match[1], mathml), content)


def _block(whole: str, text: str, mathml: Callable[[str, str], str]) -> str:
    parts = text.split("$")
    if len(parts) < 3 or len(_FORMULA.findall(text)) * 2 + 1 != len(parts):
        return whole
    if re.search(r"\w {2,}\S", "$".join(parts[::2])):
        return _FORMULA.sub(lambda match: mathml(match[1], "inline"), whole)
    # A formula may go over several lines.
    parts[1::2] = [" ".join(formula.split()) for formula in parts[1::2]]
    lines = [line for line in "$".join(parts).split("\n") if line.strip()]
    return "".join(f'<div class="formula">{_line(line, mathml)}</div>' for line in lines)


def _line(line: str, mathml: Callable[[str, str], str]) -> str:
    if alone := re.fullmatch(r"\s*\$([^$]+)\$([.,;]?)\s*", line):
        return mathml(alone[1] + alone[2], "block")
    line = re.sub(r"`([^`$]+)`", r"<code>\1</code>", line.strip())
    return _FORMULA.sub(lambda match: mathml(match[1], "inline"), line)
