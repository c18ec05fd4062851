"""Make the folders `mistral` and `qwen3`: random models of Hugging Face's library, in bfloat16, with what they compute.

    python make_hugging_face.py TEXT    # transformers 5.24.0, tokenizers 0.23.3, torch 2.13.0 on a CPU

TEXT is a file of English text on which the tokenizers are trained.  `expected.npz` has `ids` [2, 24], their `logits` [2, 24, V]
with weights read as float32, and `greedy`: the tokens of PROMPT and 64 more, each the most likely one.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PROMPT = "KING HENRY: naïve, I will"
HERE = Path(__file__).parent


def byte_level(text, V):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_end|>"]
    t.train_from_iterator([text], trainers.BpeTrainer(vocab_size=V, special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>")


def sentence_piece(text, V):
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    t.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    t.train_from_iterator(text.split(), trainers.BpeTrainer(vocab_size=V, special_tokens=special))
    made = json.loads(t.to_str())
    made["added_tokens"] = made["added_tokens"][:3]  # the 256 bytes are plain entries of the vocabulary
    t = Tokenizer.from_str(json.dumps(made))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make(name, cls, config_class, tokenizer, shard, **settings):
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 128}
    model = cls(config_class(**sizes, **ends, initializer_range=0.3, **settings))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "norm" in key:
                value.add_(0.3 * torch.randn_like(value))
    model.to(torch.bfloat16).save_pretrained(HERE / name, max_shard_size=shard)
    (HERE / name / "generation_config.json").unlink()
    tokenizer.save_pretrained(HERE / name)
    model = cls.from_pretrained(HERE / name, dtype=torch.float32).eval()
    ids = torch.arange(48).reshape(2, 24) * 7 % len(tokenizer)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        logits = model(ids).logits.numpy()
        made = model.generate(prompt["input_ids"], max_new_tokens=64, do_sample=False, eos_token_id=None)
    np.savez_compressed(HERE / name / "expected.npz", ids=ids.numpy(), logits=logits, greedy=made[0].numpy())


if __name__ == "__main__":
    source = Path(sys.argv[1]).read_text()
    shards = {"shard": "20KB", "sliding_window": 100}
    make("mistral", MistralForCausalLM, MistralConfig, sentence_piece(source, 300), **shards)
    tied = {"shard": "1GB", "head_dim": 8, "tie_word_embeddings": True, "rope_theta": 1e6}
    make("qwen3", Qwen3ForCausalLM, Qwen3Config, byte_level(source, 300), **tied)
