"""Tiny random Hugging Face models of every family that Helix partitions, and what a rank's answers are held to."""

from __future__ import annotations

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here comes from a hub

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# With heads that may share keys; the others have as many key/value heads as heads.
GROUPED = (
    "llama mistral qwen2 qwen3 gemma2 gemma3_text phi mixtral qwen2_moe qwen3_moe".split()  # noqa: SIM905
)
CAUSAL = [*GROUPED, "gpt_neox", "gpt2"]
ENCODERS = ["bert", "roberta", "distilbert"]
FAMILIES = [*CAUSAL, *ENCODERS]
VOCAB = 67  # no grid of the tests divides it
CONTEXT = 128


def config(
    family: str,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    layers: int = 2,
    hidden: int = 44,
    **changes: Any,
) -> PretrainedConfig:
    """A tiny configuration, whose names for its sizes are the family's own.

    Args:
        kv_heads: of families with grouped heads; the others have `heads`.
        head_dim: features of a head; the width of the stream is heads * head_dim, in Qwen 3 and Gemma somewhat more.
        hidden: of the MLP and of each expert.
        changes: any other of the family's keys.
    """
    width = heads * head_dim
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
        "max_position_embeddings": CONTEXT,
    }
    if family in GROUPED:
        sizes |= {"num_key_value_heads": kv_heads, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family in ("qwen3", "qwen3_moe", "gemma2", "gemma3_text"):
        sizes |= {"head_dim": head_dim, "hidden_size": width + 2 * heads}
    sizes |= _OWN.get(family, {})
    if family in ("gemma2", "gemma3_text"):
        sizes["query_pre_attn_scalar"] = head_dim
    if family == "gpt2":
        sizes = {**_OWN["gpt2"], "n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": hidden}
    if family == "distilbert":
        sizes = {**_OWN["distilbert"], "dim": width, "n_layers": layers, "n_heads": heads, "hidden_dim": hidden}
    return _CLASSES[family][0](**(sizes | changes))


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> PreTrainedModel:
    """A random model of a family in eval mode, with transformers' plainest attention; see `config` for the sizes.

    Norms and biases are random too, so that one that is lost or added twice shows.
    """
    generator = torch.Generator().manual_seed(seed)
    cfg = config(family, **sizes)
    model: PreTrainedModel = _CLASSES[family][1]._from_config(cfg, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.3, 0.3, generator=generator)
            else:
                parameter.normal_(0.0, 0.6 * parameter.shape[-1] ** -0.5, generator=generator)
            if name.endswith("gate.weight"):
                parameter.mul_(4)  # routers that prefer some experts clearly
    return model.to(dtype).eval()


def batch(size: int = 2, length: int = 11, padded: int = 3, left: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Random ids[B, T] and their mask; the first sample is `padded` tokens shorter."""
    ids = torch.randint(3, VOCAB, (size, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        gone = slice(0, padded) if left else slice(length - padded, length)
        ids[0, gone], mask[0, gone] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def error(value: Tensor, expected: Tensor) -> float:
    """The largest deviation relative to the largest expected value; infinite if the shapes differ or one is NaN."""
    if value.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    deviation = (value.double() - expected.double()).abs().max()
    return (
        (deviation / expected.double().abs().max().clamp_min(1e-30)).item() if deviation.isfinite() else float("inf")
    )


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """logits[N, V] of the tokens that are there."""
    out: Tensor = model(**inputs).logits
    return out[inputs["attention_mask"].bool()]


# Named here, so that the ranks of a test find them imported.
_CLASSES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "phi": (transformers.PhiConfig, transformers.PhiForCausalLM),
    "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM),
    "distilbert": (transformers.DistilBertConfig, transformers.DistilBertForMaskedLM),
}

# Windows shorter than the tests' sequences, so that they cut; one layer in two has none where a family alternates.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_positions": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 36,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0},
    "distilbert": {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "dropout": 0.0, "attention_dropout": 0.0},
}
