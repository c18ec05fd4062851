"""Configure a decoder of 110M parameters for one GPU: width 768, 12 blocks, sequences of 1024 BPE tokens, 98M tokens in all.

    python experiments/tokenizer.py --source=TEXT --vocab_size=16384 --output=bpe16k.json
    python experiments/train.py --config=experiments/configs/one_gpu.py:mhc --workdir=runs/one-gpu-mhc \\
        --config.data.source=TEXT --config.data.tokenizer=bpe:bpe16k.json

The argument after the colon is a connection, as in demo.py.  Branches and streams are in bfloat16.  Attention is the kernel of
cuDNN, which needs an NVIDIA GPU of the Ampere generation or newer; give --config.model.attention=xla elsewhere.  The blocks have
85M parameters, and the two vocabulary matrices have 25M.

Losses are not measured.  A run costs 5e16 FLOPs, which are some minutes on an H100.
"""

from ml_collections import ConfigDict

from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import parse


def get_config(arg: str = "mhc") -> ConfigDict:
    """Return the configuration: the settings of this size, and defaults for all other settings.  `arg` is a connection."""
    config = ConfigDict(to_mapping(ExperimentConfig()))
    config.model.connection = to_mapping(parse(arg))

    config.model.vocab_size = 16384
    config.model.num_layers = 12
    config.model.width = 768
    config.model.num_heads = 12
    config.model.num_kv_heads = 12
    config.model.mlp_width = 2048
    config.model.attention = "cudnn"
    config.model.compute_dtype = "bfloat16"
    config.model.stream_dtype = "bfloat16"

    config.data.sequence_length = 1024
    config.data.batch_size = 64

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.accumulation_steps = 2

    config.train.steps = 1500
    config.train.log_every = 5
    config.train.validate_every = 250
    config.train.validation_batches = 8
    config.train.checkpoint_every = 250
    config.train.diagnostics_every = 250
    return config
