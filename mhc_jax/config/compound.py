"""Read and write settings that are one text of several parts: attention_kind, experts and remat, the optimizer, and trackers.

The configuration stores the texts.  Properties of `ModelConfig` and `OptimizerConfig` return their parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from mhc_jax.errors import MOST, at_least, finite, one_of, require
from mhc_jax.settings_text import read_number, read_settings, write_settings
from mhc_jax.user_functions import is_function


@dataclass(frozen=True)
class LatentAttention:
    """Settings of DeepSeek's multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434)."""

    kv_rank: int = 512
    """Width of the latent vector from which keys and values are made, at least 1."""
    rope_width: int = 64
    """Number of columns that encode the position, in each query and in the one key that all heads share; even, at least 2."""

    def __post_init__(self) -> None:
        at_least(1, self, "model.attention_kind: ", "kv_rank")
        require(
            self.rope_width >= 2 and self.rope_width % 2 == 0,
            f"model.attention_kind: rope_width is {self.rope_width}; rotary embeddings need an even width of at least 2.",
        )


def read_attention(text: str) -> LatentAttention | None:
    """Return the settings in a text such as `mla` or `mla:kv_rank=512:rope_width=64`, or None for the text `gqa`."""
    kind = text.partition(":")[0]
    one_of("model.attention_kind", kind, ("gqa", "mla"))
    defaults = vars(LatentAttention()) if kind == "mla" else {}
    settings = read_settings("model.attention_kind", text, defaults)
    return LatentAttention(**settings) if kind == "mla" else None


def write_attention(latent: LatentAttention | None) -> str:
    """Return the shortest text from which `read_attention` makes `latent`."""
    return "gqa" if latent is None else write_settings("mla", vars(latent), vars(LatentAttention()))


@dataclass(frozen=True)
class Experts:
    """Settings of a mixture of experts (DeepSeekMoE, arXiv 2401.06066)."""

    number: int = 0
    """Number of routed experts in a feed-forward sub-layer; 0: all blocks are dense."""
    active: int = 6
    """Number of routed experts that a token is sent to, from 1 to `number`."""
    shared: int = 2
    """Number of experts that every token is sent to; 0: none."""
    width: int = 128
    """Hidden width of one expert, at least 1."""
    dense_layers: int = 1
    """Number of dense blocks before the first block with experts, fewer than model.num_layers; 0: none."""
    buffer: float = 0.0
    """Capacity of the buffer in which a device receives copies of tokens for its experts, in multiples of the even load.

    The even load is the number of copies that each device receives if all receive equally many.  Copies that do not fit are
    dropped (metric router_dropped).  The value is at least 1, or 0 for a buffer that has room for all copies that can come.  It
    has an effect only if mesh.expert is above 1."""

    def __post_init__(self) -> None:
        finite(self, "model.experts: ")
        at_least(1, self, "model.experts: ", "width")
        at_least(0, self, "model.experts: ", "shared", "dense_layers", "number", "active")
        require(
            self.number == 0 or 1 <= self.active <= self.number,
            f"model.experts: active is {self.active}; it must lie between 1 and the {self.number} experts.",
        )
        require(
            self.buffer == 0 or self.buffer >= 1,
            f"model.experts: buffer is {self.buffer}; use 0 for room for all that can come, or a multiple of the even share "
            "that is at least 1.",
        )


def read_experts(text: str) -> Experts:
    """Return the settings in a text such as `64` (experts) or `64:active=6:shared=2:width=128`.  An empty text means no experts."""
    if not text:
        return Experts()
    head = text.partition(":")[0]
    require(
        head.isdecimal() and len(head) <= 10 and int(head) >= 1,
        f"model.experts is {text!r}; it must begin with the number of experts, as '64:active=6:width=128' does, or be empty "
        "for dense blocks only.",
    )
    return Experts(int(head), **read_settings("model.experts", text, _without_number(Experts())))


def write_experts(experts: Experts) -> str:
    """Return the shortest text from which `read_experts` makes `experts`."""
    if not experts.number:
        return ""
    return write_settings(str(experts.number), _without_number(experts), vars(Experts()))


def _without_number(experts: Experts) -> dict[str, Any]:
    return {name: value for name, value in vars(experts).items() if name != "number"}


class Remat(NamedTuple):
    """The remat policy: what the backward pass computes again instead of keeping it from the forward pass."""

    policy: str
    """Name of the policy, `none`, `connection`, `full` or `auto`.  `ModelConfig.remat` explains them."""
    block: int = 0
    """L_r, the number of sub-layers that `connection` recomputes at a time; 0: the L_r with the least memory (mHC Eq. 20)."""
    budget_gb: float = 0.0
    """Memory of one device in GB (1e9 bytes) that `auto` may use; 0: the limit is not known, and `auto` means `connection`."""


def read_remat(text: str) -> Remat:
    """Return the policy in the text `none`, `connection`, `connection:6` (L_r), `full`, `auto` or `auto:80` (GB of a device)."""
    policies = ("none", "connection", "full", "auto")
    policy, number = read_number("model.remat", text, policies, {"connection": int, "auto": float})
    if number is None:
        return Remat(policy)
    if policy == "connection":
        require(1 <= number <= MOST, f"model.remat is {text!r}; the number of sub-layers must be at least 1.")
        return Remat(policy, block=number)
    require(0 < number < float("inf"), f"model.remat is {text!r}; the memory of a device in GB must be above 0.")
    return Remat(policy, budget_gb=number)


def write_remat(remat: Remat) -> str:
    """Return the shortest text from which `read_remat` makes `remat`."""
    number = remat.block or remat.budget_gb
    return f"{remat.policy}:{str(number).removesuffix('.0')}" if number else remat.policy


OPTIMIZERS = ("adamw", "muon", "lion", "sgd")


@dataclass(frozen=True)
class Muon:
    """Settings of Muon (https://kellerjordan.github.io/posts/muon), with the values of DeepSeek-V4 as defaults."""

    momentum: float = 0.95
    """Decay of the running mean of gradients, in [0, 1)."""
    rms: float = 0.18
    """Root mean square of the entries of a direction, above 0.  AdamW's directions have about this one, so that one learning rate
    serves both.  Another one scales the steps of Muon's matrices, but not their weight decay."""

    def __post_init__(self) -> None:
        finite(self, "optimizer.name: ")
        require(0 <= self.momentum < 1, f"optimizer.name: momentum of muon is {self.momentum}; it must lie in [0, 1).")
        require(self.rms > 0, f"optimizer.name: rms of muon is {self.rms}; it must be above 0.")


def read_optimizer(text: str) -> tuple[str, Muon]:
    """Return the rule and the settings of Muon in a text such as `adamw`, `muon:rms=0.2` or `my_optimizers.py:adan`.

    The rule is one of `OPTIMIZERS`, or the whole text if it names a function.
    """
    if is_function(text):
        return text, Muon()
    rule = text.partition(":")[0]
    require(not rule.endswith(".py"), f"optimizer.name is {text!r}; name its function too: 'FILE.py:FUNCTION'.")
    one_of("optimizer.name", rule, OPTIMIZERS)
    return rule, Muon(**read_settings("optimizer.name", text, vars(Muon()) if rule == "muon" else {}))


TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Wandb:
    """Settings of the tracker wandb (Weights & Biases).  An empty one is left to wandb and its environment variables."""

    project: str = ""
    """Name of the project that the run belongs to."""
    group: str = ""
    """Name of the group of runs; empty: the name of the sweep's folder if the run belongs to a sweep."""
    tags: tuple[str, ...] = ()
    """Tags of the run, none of them empty."""
    name: str = ""
    """Name of the run; empty: the name of the run folder."""
    mode: str = ""
    """`online`, or `offline`: the run is kept in the run folder until `wandb sync` sends it."""

    def __post_init__(self) -> None:
        require(all(self.tags), f"train.trackers: wandb has the tags {'+'.join(self.tags)!r}, one of them empty.")
        if self.mode:
            one_of("train.trackers: mode of wandb", self.mode, ("online", "offline"))


def read_tracker(text: str) -> Wandb | None:
    """Return the settings in a text such as `wandb` or `wandb:project=demo:tags=a+b`, or None for the text `tensorboard`."""
    kind = text.partition(":")[0]
    one_of("An entry of train.trackers", kind, TRACKERS)
    settings = read_settings("train.trackers", text, vars(Wandb()) if kind == "wandb" else {})
    return Wandb(**settings) if kind == "wandb" else None
