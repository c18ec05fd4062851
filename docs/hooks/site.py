"""Adds to the site what does not lie in docs/: the generated reference, notebooks, records and the pages of the repository's root.

mkdocs calls the functions `on_...` (mkdocs.yml, `hooks`).  Links are those of the repository: a page of docs/ names a record as
../experiments/records/NAME/README.md, and the site has it at experiments/records/NAME/README.
"""

from __future__ import annotations

import html
import posixpath
import re
import sys
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

import formulas
import notebook_pages
import reference_pages

ROOT = reference_pages.ROOT
PICTURES = {".png", ".svg"}
FORMULA = r'<span class="arithmatex">\\\(([^<]*?)\\\)</span>'
BOOSTS = {
    "api/": 0.003,  # a match in a title counts a thousand times as much as one in a text
    "experiments/": 0.003,
    "tests/": 0.2,
    "mhc_jax/": 0.1,
    "CHANGELOG": 0.1,
    "records": 0.2,
    "notebooks/": 0.2,
    "glossary": 3.0,
}
BOOSTS |= dict.fromkeys(["your_", "clusters", "run_folders", "generate", "first_sweep"], 5.0)
BOOSTS |= {"settings": 0.7, "commands/": 0.3, "": 2.0}
"""By how much the search prefers pages whose path begins so: explanations before records and code."""
MODULES = {
    module: page.replace(".md", ".html")
    for page, text in reference_pages.api_pages().items()
    for module in re.findall(r"^::: (.*)$", text, re.MULTILINE)
}
"""The address of the page that describes a module."""
BESIDE = ["CONTRIBUTING.md", "CHANGELOG.md", "tests/numbers.md", "experiments/LOG.md", "experiments/records/BOARD.md"]
BESIDE += ["experiments/records/ANSWERS.md", "mhc_jax/data/corpus/README.md"]
"""Pages that lie outside of docs/, as far as they exist.  The README.md of each record belongs to them, too."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of commands and modules into the navigation, where mkdocs.yml names their first pages."""
    if config.nav:
        pages = {"commands": sorted(reference_pages.COMMANDS)}
        package = ROOT / "mhc_jax"
        pages["api"] = ["mhc_jax", *sorted(path.parent.name for path in package.glob("*/__init__.py")), "mhc_kernels"]
        config.nav = _expanded(config.nav, pages)
    return config


def _expanded(nav, pages):
    if isinstance(nav, dict):
        return {title: _expanded(below, pages) for title, below in nav.items()}
    if isinstance(nav, str):
        return nav
    folder = posixpath.dirname(nav[0]) if isinstance(nav[0], str) else ""
    return [
        *[_expanded(entry, pages) for entry in nav],
        *[{name: f"{folder}/{name}.md"} for name in pages.get(folder, ())],
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add generated pages, notebooks, records with their figures, and pages of the repository."""
    for path, text in reference_pages.pages().items():
        files.append(File.generated(config, path, content=text))
    paths = [ROOT / name for name in BESIDE]
    paths += ROOT.glob("experiments/records/*/README.md")
    paths += [path for path in ROOT.glob("experiments/records/*/*") if path.suffix in PICTURES]
    for path in paths:
        if path.is_file():
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in ROOT.glob("notebooks/*.ipynb"):
        text, pictures = notebook_pages.notebook_page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site.  A link to a file that the site does not have becomes its name."""
    here = posixpath.dirname(page.file.src_uri)
    page.meta.setdefault(
        "search", {"boost": next(boost for start, boost in BOOSTS.items() if page.file.src_uri.startswith(start))}
    )
    # Where the page lies in the repository: pages of docs/ are one folder deeper there.
    outside = (ROOT / page.file.src_uri).is_file()
    folder = here if outside else posixpath.join("docs", here)

    def link(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if (ROOT / path).is_dir() and (ROOT / path / "README.md").is_file():
            path = f"{path}/README.md"
        inside = path.removeprefix("docs/")
        inside = re.sub(r"^(notebooks/\w+)\.(?:ipynb|py)$", r"\1.md", inside)
        if files.get_file_from_path(inside) is None:
            return match[0] if path.startswith("docs/") else text.strip("[]!")
        return f"{text}({posixpath.relpath(inside, here or '.')}{hash_}{anchor})"

    blocks = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    blocks[::2] = [re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", link, block) for block in blocks[::2]]
    if outside:  # shapes such as [t, C][t, k] are no links
        blocks[::2] = [re.sub(r"\](\s?)\[", r"]\1\\[", block) for block in blocks[::2]]
    return "".join(blocks)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, which browsers draw without a script, and names of files into links to their place in the API."""
    alone = r'<p>((?:\s*<span class="arithmatex">[^<]*</span>[\s,.;]*)+)</p>'
    content = re.sub(alone, lambda match: re.sub(FORMULA, _display, match[1]), content)
    content = re.sub(FORMULA, _inline, content)
    content = re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', _display, content, flags=re.DOTALL)
    content = _with_links(content, page, files)
    # A line may end before a flag, but not after its hyphens.
    content = re.sub(r"(?<=[\s>])--[\w.\[\]]+(?=[^<>]*</code>)", r'<span class="flag">\g<0></span>', content)
    return formulas.with_formulas(content, mathml) if page.file.src_uri.startswith("api/") else content


def _with_links(content: str, page: Page, files: Files) -> str:
    """Link the names of files outside of links to the modules and pages that they are."""
    up = "../" * page.url.count("/")

    def link(match: re.Match[str]) -> str:
        there = files.get_file_from_path(match[1].removeprefix("docs/")) if match[1].startswith("docs/") else None
        if there is not None:
            return f'<a href="{up}{there.url}">{match[0]}</a>' if there.url != page.url else match[0]
        module = match[1].removeprefix("kernels/").removesuffix(".py").replace("/", ".")
        place = MODULES.get(module)
        return f'<a href="{up}{place}#{module}">{match[0]}</a>' if place and place != page.url else match[0]

    parts = re.split(r"(<a\b.*?</a>|<h\d.*?</h\d>)", content, flags=re.DOTALL)
    parts[::2] = [
        re.sub(r"<code>((?:mhc_jax|kernels/mhc_kernels)/[\w/]+\.py|docs/\w+\.md)</code>", link, part)
        for part in parts[::2]
    ]
    return "".join(parts)


def _inline(match: re.Match[str]) -> str:
    return mathml(match[1], "inline")


def _display(match: re.Match[str]) -> str:
    return f'<div class="formula">{mathml(match[1], "block")}</div>'


def mathml(formula: str, display: str) -> str:
    """Return the MathML of a formula in LaTeX that stands in HTML."""
    formula = " ".join(html.unescape(formula).split())
    formula = re.sub(r"([A-Za-z])'", r"{\1^{\\prime}}", formula)
    formula = re.sub(r"([_^])\{(pre|post|res)\}", r"\1{\\mathrm{\2}}", formula)
    return latex2mathml.converter.convert(formula, display=display)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Name the search dialog for readers of screens, and let their keys reach boxes that scroll."""
    dialog = 'data-md-component="search" role="dialog"'
    output = output.replace(dialog, f'{dialog} aria-label="Search"')
    return re.sub(r"(<pre[^>]*>(?:<span></span>)?)<code>", r'\1<code tabindex="0">', output)
