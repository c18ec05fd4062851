"""Configure the comparison of `make demo`: a decoder of 16 blocks on the plays of Shakespeare, byte by byte.

    python experiments/compare.py --config=experiments/configs/demo.py --workdir=runs/demo
    python experiments/train.py --config=experiments/configs/demo.py:mhc --workdir=runs/mhc

The argument after the colon is a connection, followed by its settings if they differ from the defaults: `residual`,
`hc:dynamic=False`, `mhc:init=home:num_streams=8`.

The learning rate, 7e-3, is high on purpose.  The gain of HC's mixing matrices grows with learning rate, steps and depth.  With this
rate it grows within minutes, as it does within weeks in a model of 27B parameters.
"""

from ml_collections import ConfigDict

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import parse


def get_config(arg: str = "mhc") -> ConfigDict:
    """Return the configuration: the settings of the demo, and defaults for all other settings.  `arg` is a connection."""
    config = ConfigDict(to_mapping(ExperimentConfig()))
    config.model.connection = to_mapping(parse(arg))

    config.model.num_layers = 16
    config.model.width = 64
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.mlp_width = 256
    config.model.depth_scaled_init = False

    config.data.sequence_length = 64
    config.data.batch_size = 8

    config.optimizer.learning_rate = 7e-3
    config.optimizer.warmup_steps = 20

    config.train.steps = 200
    config.train.log_every = 1
    config.train.validate_every = 50
    config.train.validation_batches = 16
    config.train.checkpoint_every = 100
    config.train.diagnostics_every = 50
    return config
