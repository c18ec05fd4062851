"""Question 3, best losses and surges: the connections under AdamW and Muon at four learning rates.

    python experiments/sweep.py experiments/sweeps/muon_rates.py --workdir=runs/muon_rates --workers=2

Settings.  The connections and optimizers of muon_margin.py with clipping, at rates of 1e-3, 4e-3, 1.6e-2 and 6.4e-2.  Seeds:
four.

Rule.  Secondary to muon_margin.py, and descriptive.  The best loss of a connection and optimizer is the lowest mean over seeds of
its four rates; its difference from residual's best is given with a paired t interval, which does not count that the best of four
was chosen on both sides.  Surges are steps whose loss rises as the metric `spikes` defines, and the largest norm of a gradient
after the warm-up.

Cost: 176 runs of 10 to 25 s on 2 CPU cores, half an hour in all.
"""

import runpy
from pathlib import Path

from mhc_jax.sweeps.grid import Sweep, over, product, seeds

margin = runpy.run_path(str(Path(__file__).with_name("muon_margin.py")))


def get_sweep() -> Sweep:
    """Return the sweep: every connection and optimizer at four rates, with each of four seeds."""
    rates = over("optimizer.learning_rate", [1e-3, 4e-3, 1.6e-2, 6.4e-2])
    return Sweep(base="../configs/prototype.py", points=product(seeds(4), margin["optimizers"](), rates))
