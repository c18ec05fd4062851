"""Write the tables and figures of three questions from the records of their sweeps.

    python experiments/answers.py
    python experiments/answers.py --freeze=runs/mixing_needed

The first command reads the newest records of which_map, which_map_home, which_map_large, mixing_needed, muon_margin, muon_rates
and residual_longer, as far as they exist, and writes experiments/records/ANSWERS.md and docs/figures/answers_*.pdf, .svg and
.png.
The second one reads the run folders of mixing_needed, and writes into h_res.json of the newest record of this sweep how far H_res
mixes at the start and at the end, and the rise of the validation loss if I replaces H_res of a trained mHC model.
"""

import math
from pathlib import Path

from absl import flags

from mhc_jax import cli
from mhc_jax.analysis.run_reader import read_run
from mhc_jax.errors import InputError, require
from mhc_jax.files.json_files import write_json
from mhc_jax.reports.record import newest_record, read_record
from mhc_jax.runs.metrics import plain

FREEZE = flags.DEFINE_string("freeze", "", "Folder of the runs of mixing_needed whose H_res is measured and frozen.")
HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
FIGURES = HERE.parent / "docs" / "figures"


def freeze(folder: Path) -> Path:
    """Measure how far H_res mixes in every run in `folder`, and the rise of every trained mHC model; return the file."""
    from mhc_jax.analysis.freezing import off_diagonal, rise_when_frozen

    record = newest_record(RECORDS, "mixing_needed")
    if record is None:
        raise InputError("There is no record of mixing_needed; make it with experiments/record.py first.")
    ended = [run for run in read_record(record) if run.status == "finished"]
    runs = [run for run in ended if run.kind == "mhc"]
    places = [folder / run.name for run in runs]
    missing = [place.name for place in places if not (place / "checkpoints").is_dir()]
    require(
        bool(runs), f"{record} has no run of mHC that finished; make it with experiments/record.py of the whole sweep."
    )
    require(
        not missing,
        f"{str(folder)!r} has no trained model of {len(missing)} of the {len(runs)} runs of mHC, such as {''.join(missing[:1])}; "
        "give the folder of mixing_needed's runs.",
    )
    shares: dict[str, dict[str, tuple[float, float]]] = {}
    for run in ended:
        shares.setdefault(run.connection, {})[str(run.seed[0])] = off_diagonal(read_run(folder / run.name))
    rises: dict[str, dict[str, float]] = {}
    for run, place in zip(runs, places, strict=True):
        before, after = rise_when_frozen(place)
        if not math.isfinite(after):
            print(f"{place.name}: the loss with H_res = I is not finite, and is left out")
            continue
        rises.setdefault(run.connection, {})[str(run.seed[0])] = after - before
        print(f"{place.name}: {before:.4f}, with H_res = I {after:.4f}", flush=True)
    write_json(record / "h_res.json", {"off_diagonal": shares, "rise": plain(rises)})
    return record / "h_res.json"


def main() -> int:
    """Write the tables and figures, or the file of --freeze, and print where they are."""
    if FREEZE.value:
        print(f"H_res: {freeze(Path(FREEZE.value))}")
        return 0
    from mhc_jax.plots import NARROW, drawn_at
    from mhc_jax.plots.style import save
    from mhc_jax.reports.answers import page
    from mhc_jax.reports.questions import questions

    found = questions(HERE)
    require(
        bool(found), f"{RECORDS} has no record of which_map, mixing_needed or muon_margin yet; train and record one."
    )
    (RECORDS / "ANSWERS.md").write_text(page([question.text for question in found.values()]))
    for name, question in found.items():
        with drawn_at(NARROW):
            save(question.draw(), FIGURES / f"answers_{name}", vector=True)
    print(f"Tables: {RECORDS / 'ANSWERS.md'}")
    print(f"Figures: {FIGURES}/answers_*")
    return 0


if __name__ == "__main__":
    cli.main(main)
