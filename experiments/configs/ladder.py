"""Configure four sizes of model between the demo and the paper's 3B, with the proportions of the models in mHC Table 5.

    python experiments/train.py --config=experiments/configs/ladder.py:w320:hc --workdir=runs/w320-hc

The argument after the colon is a size, called a rung, and a connection as in paper.py.  A rung is named by its width: `w160`,
`w320`, `w640`, `w960`.  The rungs share with Table 5: 80 channels of width for each head; heads of 128 + 64 channels (multi-head
latent attention); 64 routed experts with hidden widths of 0.7 times the width, of which a token sees 6, and 2 shared experts; a
dense first block as wide as 8 experts; 64 training tokens for each active parameter.  The latent is 0.4 times as wide as a stream
(512 at 3B).  The learning rate is 8.6e-4 (active / 612M)^-0.4, at most 3e-3, where `active` is the number of active parameters.
The formula gives the rates of the table's 3B and 27B models.  Active parameters are counted without the vocabulary, whose size
is that of the tokenizer (`mhc_jax.cost.counts.model_cost`).

Losses are not measured.
"""

from ml_collections import ConfigDict

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import from_mapping, to_mapping
from mhc_jax.connections import parse
from mhc_jax.cost.counts import model_cost
from mhc_jax.errors import one_of

# Each rung gives the numbers of blocks, heads, tokens in a sequence and sequences in a step.
RUNGS = {"w160": (4, 2, 512, 32), "w320": (6, 4, 1024, 32), "w640": (8, 8, 2048, 64), "w960": (10, 12, 4096, 128)}


def get_config(arg: str = "w160:mhc") -> ConfigDict:
    """Return the configuration of a rung and a connection (`arg`), with defaults for all settings that the rung leaves open."""
    rung, _, connection = arg.partition(":")
    one_of("The rung in the argument of ladder.py", rung, RUNGS)
    layers, heads, length, sequences = RUNGS[rung]
    width = 80 * heads
    expert_width = 7 * width // 10
    config = ConfigDict(to_mapping(ExperimentConfig()))

    config.model.num_layers = layers
    config.model.width = width
    config.model.attention_kind = f"mla:kv_rank={2 * width // 5}"
    config.model.num_heads = heads
    config.model.num_kv_heads = heads
    config.model.head_width = 128
    config.model.experts = f"64:width={expert_width}:dense_layers=1"
    config.model.mlp_width = 8 * expert_width

    # Parameters are counted with the residual connection, so that all connections have equal numbers of steps and learning rates.
    config.model.connection = to_mapping(parse("residual"))
    active = model_cost(from_mapping(config.to_dict()).model, length).active
    config.model.connection = to_mapping(parse(connection or "mhc"))

    config.data.sequence_length = length
    config.data.batch_size = sequences

    config.optimizer.learning_rate = min(8.6e-4 * (active / 612e6) ** -0.4, 3e-3)
    config.optimizer.schedule = "step"

    config.train.steps = round(64 * active / (length * sequences))
    # The warm-up has the share of the steps that it has in mHC Table 5: 2000 of 30,000 steps for the 3B model.
    config.optimizer.warmup_steps = config.train.steps // 15
    config.train.validate_every = 500
    config.train.checkpoint_every = 500
    config.train.diagnostics_every = 500
    return config
