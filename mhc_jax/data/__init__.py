"""Text, tokenizers and batches.  This package alone imports tensorflow_datasets and grain."""

from mhc_jax.data.cache import cache_folder
from mhc_jax.data.files import Document
from mhc_jax.data.pipeline import Batch, Data, load_data, resolve_vocabulary
from mhc_jax.data.sources import documents
from mhc_jax.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    from_saved,
    gpt2_tokenizer,
    load_tokenizer,
    train_bpe,
)

__all__ = [
    "BPETokenizer",
    "Batch",
    "ByteTokenizer",
    "Data",
    "Document",
    "Tokenizer",
    "cache_folder",
    "documents",
    "from_saved",
    "gpt2_tokenizer",
    "load_data",
    "load_tokenizer",
    "resolve_vocabulary",
    "train_bpe",
]
