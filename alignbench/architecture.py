"""Shapes of models: the typed schema, and what a plan counts by them.

Of the families named here the number of weights is exact. Another family is counted as Llama's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from alignbench.errors import ConfigError
from alignbench.jsonio import LATER

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from alignbench.config import LoraConfig

LLAMA, GPT_NEOX, QWEN2 = FAMILIES = ("llama", "gpt_neox", "qwen2")
#: Bytes, end and pad: a byte-level BPE has no smaller vocabulary.
MIN_VOCABULARY = 258


@dataclass
class ArchitectureConfig:
    """Shape of a Llama that is built from nothing, or the published shape that a plan counts with."""

    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    layers: int = MISSING
    heads: int = MISSING
    kv_heads: int = MISSING
    max_positions: int = MISSING
    tied_embeddings: bool = True
    initializer_range: float = 0.02
    family: str = field(default=LLAMA, metadata={LATER: True})


def check_architecture(shape: ArchitectureConfig, where: str, *, built: bool) -> None:
    """Refuse a shape that no model has (`where` is its configuration key), or that is not `built` from nothing."""
    known = FAMILIES[:1] if built else FAMILIES
    if shape.family not in known:
        raise ConfigError(
            f"a model that is built from nothing is a Llama, not {shape.family!r}"
            if shape.family in FAMILIES
            else f"{where}.family = {shape.family!r} is unknown",
            where=f"{where}.family",
            mend=f"one of: {', '.join(known)}",
        )
    if shape.heads < 1 or shape.kv_heads < 1 or shape.hidden_size % shape.heads or shape.heads % shape.kv_heads:
        raise ConfigError(
            f"{shape.heads} heads and {shape.kv_heads} key-value heads do not divide a width of {shape.hidden_size}",
            where=where,
            mend="hidden_size is a multiple of heads, and heads a multiple of kv_heads",
        )
    if built and shape.vocab_size < MIN_VOCABULARY:
        raise ConfigError(
            f"a vocabulary of {shape.vocab_size} cannot hold the byte alphabet and two special tokens",
            where=f"{where}.vocab_size",
            mend=f"at least {MIN_VOCABULARY}",
        )


def matrices(shape: ArchitectureConfig) -> dict[str, tuple[int, int]]:
    """The linear modules of one block: name -> (width of its input, width of its output)."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    if shape.family == GPT_NEOX:
        return {
            "query_key_value": (hidden, 3 * hidden),
            "dense": (hidden, hidden),
            "dense_h_to_4h": (hidden, inner),
            "dense_4h_to_h": (inner, hidden),
        }
    keys = hidden // shape.heads * shape.kv_heads
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def block_weights(shape: ArchitectureConfig) -> float:
    """Weights of a block's matrices, which its FLOPs are counted by."""
    return float(sum(map(math.prod, matrices(shape).values())))


def parameter_count(shape: ArchitectureConfig) -> float:
    """Weights of a model, biases and norms included."""
    found, hidden = matrices(shape), shape.hidden_size
    # GPT-NeoX: every matrix and norm has a bias; Qwen2: what makes queries, keys and values
    biased = {GPT_NEOX: tuple(found), QWEN2: ("q_proj", "k_proj", "v_proj")}.get(shape.family, ())
    norm = 2 * hidden if shape.family == GPT_NEOX else hidden
    layer = block_weights(shape) + sum(found[name][1] for name in biased) + 2 * norm
    embeddings = shape.vocab_size * hidden * (1 if shape.tied_embeddings else 2)
    return float(shape.layers * layer + embeddings + norm)


def lora_parameter_count(shape: ArchitectureConfig, lora: LoraConfig) -> float:
    """Weights of the adapters; a module that the family has not got counts as hidden x hidden."""
    widths, unknown = matrices(shape), (shape.hidden_size, shape.hidden_size)
    return float(sum(sum(widths.get(target, unknown)) for target in lora.targets) * lora.rank * shape.layers)


def family_of(model_type: str | None) -> str:
    """The family that a config.json's `model_type` is counted as."""
    return model_type if model_type in FAMILIES else LLAMA


def transformers_config(shape: ArchitectureConfig, **special: int | None) -> PreTrainedConfig:
    """Transformers' configuration of a causal language model of that shape.

    Args:
        shape: Its family and widths.
        special: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """
    from transformers import GPTNeoXConfig, LlamaConfig, Qwen2Config

    kind: Any = {LLAMA: LlamaConfig, GPT_NEOX: GPTNeoXConfig, QWEN2: Qwen2Config}[shape.family]
    grouped = {} if shape.family == GPT_NEOX else {"num_key_value_heads": shape.kv_heads}
    config: PreTrainedConfig = kind(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied_embeddings,
        initializer_range=shape.initializer_range,
        **grouped,
        **special,
    )
    return config
