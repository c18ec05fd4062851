"""Question 1 at a larger size: does the answer of which_map move in a model with 6 times the parameters?

    python experiments/sweep.py experiments/sweeps/which_map_large.py --workdir=runs/which_map_large --workers=2

Settings.  The dynamic cells of the arm `scaled` of which_map.py, at width 120 in place of 48: 2.14M parameters in place of 0.36M,
with the same depth, text, steps and tokens.  Seeds: three, 0 to 2.

Rule.  The three main effects of this design, by paired t intervals over three seeds.  With three seeds only effects above about
2.5 standard deviations are resolved.  The answer has moved if the interval of an effect excludes the mean effect of which_map in
the same design, and has kept its order if the three effects have the same order.  Else it is "not told".

Cost: 24 runs of 60 to 150 s on 2 CPU cores, half an hour in all.
"""

import itertools
import runpy
from pathlib import Path

from mhc_jax.sweeps.grid import Sweep, over, product, seeds

which_map = runpy.run_path(str(Path(__file__).with_name("which_map.py")))


def get_sweep() -> Sweep:
    """Return the sweep: the eight cells of one design, with each of three seeds."""
    subsets = [subset for size in range(4) for subset in itertools.combinations(which_map["MAPS"], size)]
    cells = [which_map["cell"]("scaled", "dynamic", subset) for subset in subsets]
    return Sweep(
        base="../configs/board.py",
        points=product(seeds(3), over("connection", cells)),
        settings={"model.width": 120, "model.mlp_width": 320},
        baseline={"connection": cells[0]},
    )
