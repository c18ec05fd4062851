"""The documentation without mkdocs: pages of the navigation exist, links lead somewhere, settings and commands are documented."""

import ast
import dataclasses
import re
import subprocess
import sys
import urllib.parse

import formulas
import notebook_pages
import pytest
import reference_pages
import yaml
from support.synthetic_runs import write_run
from support.tiny_runs import ROOT

from mhc_jax import connections
from mhc_jax.cli.settings import main as print_settings
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.described import PARTS, settings
from mhc_jax.config.mapping import to_mapping

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
GENERATED = {"settings.md", "records.md", *(f"commands/{name}.md" for name in ("index", *reference_pages.COMMANDS))}
BESIDE = ["CONTRIBUTING.md", "CHANGELOG.md", "README.md"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def slug(heading):
    """The anchor that Python-Markdown gives to a heading."""
    plain = re.sub(r"[^\w\s-]", "", re.sub(r"[`*$]|\]\([^)]*\)", "", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)


def anchors(text):
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return {slug(line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def nav_pages(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for below in (entry.values() if isinstance(entry, dict) else entry) for page in nav_pages(below)]


def test_every_page_of_the_navigation_exists_and_every_page_is_in_it():
    listed = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    for page in listed:
        source = ROOT / page.replace(".md", ".ipynb") if page.startswith("notebooks/") else ROOT / page
        there = (DOCS / page).is_file() or source.is_file() or page in GENERATED or page == "api/index.md"
        assert there, page
    assert len(set(listed)) == len(listed)
    assert {path.name for path in PAGES} <= set(listed)


@pytest.mark.parametrize("path", [*PAGES, *(ROOT / name for name in BESIDE)], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = urllib.parse.unquote(target).partition("#")
        page = (path.parent / name).resolve() if name else path
        inside = page.relative_to(DOCS).as_posix() if page.is_relative_to(DOCS) else ""
        if inside in GENERATED or inside.startswith("api/"):
            continue
        assert page.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(page.read_text()), f"{path.name}: {target}"


def test_every_setting_has_a_text_and_its_default():
    """Every leaf of the configuration of every kind of connection, and every part of a text of parts."""
    described = {setting.name: setting for setting in settings()}
    assert [setting.name for setting in settings() if len(setting.meaning) < 15 or not setting.type] == []
    whole = to_mapping(ExperimentConfig())
    named = {f"{section}.{name}" for section, values in whole.items() for name in values}
    for kind in connections.KINDS:
        named |= {f"model.connection.{field.name}" for field in dataclasses.fields(connections.config_class(kind))}
    for name, (head, cls) in PARTS.items():
        named |= {f"{name}={head}:{field.name}" for field in dataclasses.fields(cls)} - {f"{name}={head}:number"}
    assert set(described) == named
    assert described["optimizer.learning_rate"].default == "0.003"
    assert described["model.connection.t_max"].kinds == ("mhc", "identity_mix", "single_pass")
    epsilon = {kind: row.default for row in settings("eps_norm") for kind in row.kinds}
    assert (epsilon["hc"], epsilon["mudd"]) == ("1e-20; 1e-06 (gated)", "1e-20; 1e-06 (mudd)")


def test_the_page_of_settings_has_every_setting():
    page = reference_pages.settings_page()
    assert set(re.findall(r"^### `([^`]+)`", page, re.MULTILINE)) == {setting.name for setting in settings()}
    assert "`float` · default `0.003`" in page


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["settings", "optimizer.b"], 0, "optimizer.b1  (float, default 0.9)"),
        (["settings", "fsdp"], 0, "mesh.fsdp"),
        (["settings", "fsdp"], 0, "These are the defaults.  A config file may set other values"),
        (["settings", "optimizer.lr"], 2, "Did you mean 'optimizer.learning_rate'?"),
        (["settings", "learnin_rate"], 2, "Did you mean 'optimizer.learning_rate'?"),
        (["settings", "optimizer.learning_raet"], 2, "Did you mean 'optimizer.learning_rate'?"),
        (["setings"], 2, "There is no command 'setings'"),
        (["settings", "a", "b"], 2, "Unexpected argument 'b'"),
        ([], 0, "usage: python -m mhc_jax settings"),
    ],
)
def test_settings_are_printed(words, status, said, capsys):
    assert print_settings(words) == status
    printed = capsys.readouterr()
    assert said in (printed.err if status else printed.out)


def test_every_script_is_a_command_with_an_example():
    scripts = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"steptime_worker"}
    assert set(reference_pages.COMMANDS) == scripts | {"bench"}
    for path in reference_pages.COMMANDS.values():
        assert f"\n    python {path.relative_to(ROOT)} " in path.read_text().replace("PYTHONPATH=.venv/aot ", ""), path


def run_help(path):
    command = [sys.executable, path, "--help"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_help_shows_flags_and_settings_and_ends_well():
    done = run_help("experiments/sweep.py")
    assert (done.returncode, done.stderr) == (0, "")
    for said in ("usage: python experiments/sweep.py SWEEP.py", "--slurm_minutes=INT  (default 60)"):
        assert said in done.stdout
    assert "--config.NAME=VALUE\n      A setting of the run; `python -m mhc_jax settings`" in done.stdout


@pytest.mark.parametrize("words", ["figure.py --list", "train.py --help"])
def test_a_command_whose_output_nobody_reads_ends_silently(words):
    script = f"{sys.executable} experiments/{words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


@pytest.mark.full
@pytest.mark.parametrize("path", reference_pages.COMMANDS.values(), ids=lambda path: path.stem)
def test_help_of_every_command(path):
    done = run_help(path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python {path.relative_to(ROOT)}" in done.stdout
    if "define_config()" in path.read_text():
        assert "--config=FILE.py[:ARGUMENT]" in done.stdout
        assert "python -m mhc_jax settings" in done.stdout


@pytest.mark.full
def test_the_pages_of_commands_have_their_flags():
    """In a process of its own, because absl knows the flags of a script once."""
    code = "import reference_pages; pages = reference_pages.pages(); print(pages['commands/train.md']); print(sorted(pages))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=DOCS / "hooks", check=True, timeout=600
    )
    assert "| `--workdir=TEXT` | `required` |" in done.stdout
    assert all(f"'{page}'" in done.stdout for page in GENERATED)


def drawn(*lines):
    """What a page of the API shows of indented lines of a docstring."""
    text = "\n".join(lines)
    content = f'<p>Then</p><div class="highlight"><pre><span></span><code>{text}\n</code></pre></div>'
    return formulas.with_formulas(content, lambda formula, display: f"[{display} {formula}]").removeprefix(
        "<p>Then</p>"
    )


def test_formulas_of_indented_lines_are_drawn():
    line = '<div class="formula">{}</div>'.format
    assert drawn("$a = b$", "$c$.") == line("[block a = b]") + line("[block c.]")
    assert drawn(r"$\bar r = r'^2$,  $c$,  $K$.") == line(r"[inline \bar r = r'^2],  [inline c],  [inline K].")
    assert drawn(r"$s = 1, \qquad", "g = 2$ (`bias`)") == line(r"[inline s = 1, \qquad g = 2] (<code>bias</code>)")
    assert drawn("gain $= 1$, the largest sum") == line("gain [inline = 1], the largest sum")
    columns = drawn("message      $nC$ elements", "in all       $2nC$")
    assert columns.endswith("<code>message      [inline nC] elements\nin all       [inline 2nC]\n</code></pre></div>")
    assert drawn("$a$.", "", "$b$.") == line("[block a.]") + line("[block b.]")
    for code in (
        "echo $HOME",
        "cp $HOME/a $TMP/b",
        "cp $HOME $TMP",
        "x=$A/$(date)",
        "PATH=$PATH:$",
        "x = 1",
        "make demo",
    ):
        assert drawn(code) == f'<div class="highlight"><pre><span></span><code>{code}\n</code></pre></div>'


def test_no_formula_in_a_docstring_is_left_half_open():
    """Such a line would stand on its page as LaTeX."""
    for path in sorted([*ROOT.glob("mhc_jax/**/*.py"), *ROOT.glob("kernels/mhc_kernels/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                    if re.search(r"\$[^$]*\\", block):
                        assert block.count("$") % 2 == 0, f"{path}: {block}"


def test_a_notebook_becomes_a_page():
    text, pictures = notebook_pages.notebook_page(ROOT / "notebooks" / "01_gain_curves.ipynb")
    assert text.startswith("# Gain curves")
    assert len(pictures) == 4
    assert all(data.startswith(b"\x89PNG") and f"]({name})" in text for name, data in pictures.items())
    assert all(len(alt) > 15 for alt in re.findall(r"!\[(.*?)\]", text))


def test_the_examples_of_gains_and_of_a_papers_figure_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("gains", "demo"):
        for name, kind in (("hc", "hc"), ("mhc-init-paper", "mhc")):
            write_run(tmp_path / "runs" / folder, name, kind)
    for page in ("gain_curves.md", "paper_figure.md"):
        for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
            exec(compile(code, page, "exec"), {})
    assert (tmp_path / "gain_depth.svg").is_file()
    assert (tmp_path / "figures" / "gain.pdf").is_file()
