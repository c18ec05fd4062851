"""Write the tables and figures of three questions from the records of their sweeps.

    python experiments/answers.py
    python experiments/answers.py --freeze=runs/mixing_needed

The first command reads the newest records of which_map, which_map_large, mixing_needed, muon_margin, muon_rates and
residual_longer, as far as they exist, and writes experiments/records/ANSWERS.md and docs/figures/answers_*.pdf, .svg and .png.
The second one replaces H_res by I in every trained mHC model of a folder of mixing_needed, and writes the rise of the validation
loss to frozen.json in the newest record of this sweep.
"""

import runpy
from pathlib import Path

from absl import flags

from mhc_jax import cli
from mhc_jax.analysis import answers
from mhc_jax.analysis.run_reader import RunRecord, read_run
from mhc_jax.errors import InputError, require
from mhc_jax.reports import answers as tables
from mhc_jax.reports.record import newest_record, read_record
from mhc_jax.runs.folder import read_json, write_json
from mhc_jax.runs.metrics import plain

FREEZE = flags.DEFINE_string("freeze", "", "Folder of the runs of mixing_needed whose mHC models are frozen.")
HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
FIGURES = HERE.parent / "docs" / "figures"


def runs_of(name: str) -> list[RunRecord]:
    """Return the runs of the newest record of a sweep, or none if there is no record."""
    folder = newest_record(RECORDS, name)
    return read_record(folder) if folder else []


def beside(name: str, file: str) -> dict:
    """Return the content of a JSON file in the newest record of a sweep, or nothing."""
    folder = newest_record(RECORDS, name)
    return read_json(folder / file) if folder and (folder / file).is_file() else {}


def freeze(folder: Path) -> Path:
    """Measure the rise of every trained mHC model in `folder`, and write it to the newest record of mixing_needed."""
    from mhc_jax.analysis.freezing import rise_when_frozen

    record = newest_record(RECORDS, "mixing_needed")
    if record is None:
        raise InputError("There is no record of mixing_needed; make it with experiments/record.py first.")
    places = sorted(place.parent for place in folder.glob("mhc-*/summary.json"))
    require(bool(places), f"{str(folder)!r} holds no trained run of mHC; give the folder of the sweep mixing_needed.")
    rises: dict[str, dict[str, float]] = {}
    for place in places:
        run = read_run(place)
        before, after = rise_when_frozen(place)
        rises.setdefault(run.connection, {})[str(run.seed[0])] = after - before
        print(f"{place.name}: {before:.4f}, with H_res = I {after:.4f}", flush=True)
    write_json(record / "frozen.json", plain(rises))
    return record / "frozen.json"


def main() -> int:
    """Write the tables and figures, or frozen.json, and print where they are."""
    if FREEZE.value:
        print(f"Rise of the loss: {freeze(Path(FREEZE.value))}")
        return 0
    from mhc_jax.plots import answers as figures
    from mhc_jax.plots.style import save

    longer = runs_of("residual_longer")
    ratios = {name: row["ratio"] for name, row in beside("residual_longer", "step_times.json").get("steps", {}).items()}
    parts, drawn = [], {}
    if runs := runs_of("which_map"):
        parts.append(tables.which_map_part(runs, runs_of("which_map_large"), longer, ratios))
        drawn["which_map"] = figures.which_map_figure(answers.which_map(runs))
    if runs := runs_of("mixing_needed"):
        frozen = beside("mixing_needed", "frozen.json")
        rises = {name: {int(seed): rise for seed, rise in of.items()} for name, of in frozen.items()}
        parts.append(tables.mixing_needed_part(runs, rises, longer, ratios))
        drawn["mixing_needed"] = figures.mixing_needed_figure(answers.mixing_needed(runs))
    if runs := runs_of("muon_margin"):
        sweep = runpy.run_path(str(HERE / "sweeps" / "muon_margin.py"))
        rule = sweep["LOSS_BELOW"], sweep["RATES"]
        parts.append(tables.muon_margin_part(runs, *rule, runs_of("muon_rates")))
        drawn["muon_margin"] = figures.muon_margin_figure(answers.muon_margin(runs, *rule))
    require(
        bool(parts), f"{RECORDS} has no record of which_map, mixing_needed or muon_margin yet; train and record one."
    )
    (RECORDS / "ANSWERS.md").write_text(tables.page(parts))
    for name, figure in drawn.items():
        save(figure, FIGURES / f"answers_{name}", vector=True)
    print(f"Tables: {RECORDS / 'ANSWERS.md'}")
    print(f"Figures: {FIGURES}/answers_*")
    return 0


if __name__ == "__main__":
    cli.main(main)
