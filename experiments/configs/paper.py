"""Configure the models of mHC Table 5: DeepSeekMoE with multi-head latent attention, 3B, 9B and 27B.

    python experiments/train.py --config=experiments/configs/paper.py:27b:mhc --workdir=runs/27b-mhc

The argument after the colon is a size and a connection: `3b:residual`, `9b:hc`, `27b:mhc:init=home`, `3b_1t:mhc` (3B on one
trillion tokens).  `mhc` without settings is the mHC of the paper: n = 4 streams, gates of 0.01, 20 Sinkhorn iterations and the
static logits of its appendix A.6 (`init=paper`).  No text is chosen here: set --config.data.source, and with
--config.data.tokenizer a tokenizer of at most 129,280 tokens.

With `residual`, `mhc_jax.cost.counts.model_cost` counts 2.970 / 9.172 / 27.033 B parameters, of which 0.609 / 1.654 / 4.124 B are
active (tests/cost/test_cost.py).  Table 5 has 2.97 / 9.18 / 27.0 and 0.612 / 1.66 / 4.14.  The table leaves some settings open.
They are chosen here: untied embeddings, queries without a low-rank projection, a dense first block as wide as 8 experts.

Losses are not measured.  A run costs thousands of accelerator days.  `experiments/compile.py` estimates memory and time of a step
on a slice of TPUs.
"""

from ml_collections import ConfigDict

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import parse
from mhc_jax.errors import one_of

# Each size gives: blocks, width, heads, routed experts, width of an expert, sequences per step, steps, largest learning rate.
SIZES = {
    "3b": (12, 1280, 16, 64, 896, 320, 30_000, 8.6e-4),
    "9b": (18, 1920, 24, 64, 1280, 512, 50_000, 5.9e-4),
    "27b": (30, 2560, 32, 72, 1536, 1280, 50_000, 4.0e-4),
    "3b_1t": (12, 1280, 16, 64, 896, 2560, 100_000, 9.0e-4),
}


def get_config(arg: str = "3b:mhc") -> ConfigDict:
    """Return the configuration of a size and a connection (`arg`): the settings of Table 5, and defaults for all others."""
    size, _, connection = arg.partition(":")
    one_of("The size in the argument of paper.py", size, SIZES)
    layers, width, heads, experts, expert_width, sequences, steps, rate = SIZES[size]
    config = ConfigDict(to_mapping(ExperimentConfig()))
    config.model.connection = to_mapping(parse(connection or "mhc"))

    config.model.vocab_size = 129280
    config.model.num_layers = layers
    config.model.width = width
    config.model.attention_kind = "mla:kv_rank=512:rope_width=64"
    config.model.num_heads = heads
    config.model.num_kv_heads = heads
    config.model.head_width = 128
    config.model.experts = f"{experts}:active=6:shared=2:width={expert_width}:dense_layers=1"
    config.model.mlp_width = 8 * expert_width
    config.model.compute_dtype = "bfloat16"
    config.model.stream_dtype = "bfloat16"
    config.model.remat = "full"

    config.data.sequence_length = 4096
    config.data.batch_size = sequences

    config.optimizer.learning_rate = rate
    config.optimizer.schedule = "step"
    config.optimizer.warmup_steps = 2000

    config.train.steps = steps
    config.train.validate_every = 1000
    config.train.checkpoint_every = 1000
    config.train.diagnostics_every = 1000
    return config
