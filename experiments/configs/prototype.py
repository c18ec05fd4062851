"""Configure the runs of most sweeps: width 48, 12 blocks (24 sub-layers), 200 steps of 8 sequences of 48 bytes.

    python experiments/train.py --config=experiments/configs/prototype.py:hc --workdir=runs/hc

The argument after the colon is a connection, as in demo.py.  The optimizer is AdamW (b1 0.9, b2 0.95) with a peak learning rate of
3e-3, weight decay 0.1, 20 steps of warm-up, a cosine to 10 % of the peak, and clipping of the gradient at a norm of 1.  HC's gain
grows visibly within seconds on two CPU cores.
"""

from ml_collections import ConfigDict

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import parse


def get_config(arg: str = "mhc") -> ConfigDict:
    """Return the configuration: the settings of this small size, and defaults for all other settings.  `arg` is a connection."""
    config = ConfigDict(to_mapping(ExperimentConfig()))
    config.model.connection = to_mapping(parse(arg))

    config.model.num_layers = 12
    config.model.width = 48
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.mlp_width = 128
    config.model.depth_scaled_init = False

    config.data.sequence_length = 48
    config.data.batch_size = 8

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20

    config.train.steps = 200
    config.train.log_every = 1
    config.train.validate_every = 100
    config.train.validation_batches = 32
    config.train.checkpoint_every = 100
    config.train.diagnostics_every = 50
    return config
