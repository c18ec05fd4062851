"""Text, tokenizers and batches.  Only this package imports tensorflow_datasets and grain."""

from mhc_jax.data.batches import Batch, Data, load_data, resolve_tokenizer
from mhc_jax.data.cache import cache_folder
from mhc_jax.data.files import Document
from mhc_jax.data.sources import documents
from mhc_jax.data.tokenizers import ByteTokenizer, Tokenizer, from_saved, load_tokenizer
from mhc_jax.data.train_tokenizer import train_bpe

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Data",
    "Document",
    "Tokenizer",
    "cache_folder",
    "documents",
    "from_saved",
    "load_data",
    "load_tokenizer",
    "resolve_tokenizer",
    "train_bpe",
]
