"""What a Hugging Face configuration is read as, and which models are refused, by name."""

from __future__ import annotations

from typing import Any

import pytest

from helix import Grid, PartitionError
from helix.partition.families import FAMILIES, PretrainedShape, describe

# As the hub has them, shortened.
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}
GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "sliding_window": 512,
    "vocab_size": 262144,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "sliding_window": None,
    "vocab_size": 32000,
}
QWEN2_MOE = {
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 768,
    "hidden_dim": 3072,
    "max_position_embeddings": 512,
    "n_heads": 12,
    "n_layers": 6,
    "vocab_size": 30522,
}


def test_reads_each_familys_own_names() -> None:
    assert describe(SMOLLM2) == PretrainedShape("llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, tied=True)
    assert describe(GPT2) == PretrainedShape("gpt2", 12, 768, 12, 12, 64, 3072, 50257, 1024, tied=True)
    assert describe(GEMMA3) == PretrainedShape("gemma3_text", 26, 1152, 4, 1, 256, 6912, 262144, 32768, tied=True)
    assert describe(MIXTRAL) == PretrainedShape(
        "mixtral", 32, 4096, 32, 8, 128, 14336, 32000, 32768, experts=8, top_k=2
    )
    assert describe(QWEN2_MOE) == PretrainedShape(
        "qwen2_moe", 24, 2048, 16, 16, 128, 1408, 151936, 8192, experts=60, top_k=4, shared_hidden=5632
    )
    assert describe(DISTILBERT) == PretrainedShape(
        "distilbert", 6, 768, 12, 12, 64, 3072, 30522, 512, tied=True, causal=False
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "names no model_type; Helix partitions: bert, distilbert, "),
        ({"model_type": "rwkv"}, "does not partition rwkv models; it partitions: bert, .*qwen3_moe, roberta"),
        ({"model_type": "gemma3"}, r"gemma3 models: they read images too \(their text part alone, gemma3_text"),
        ({"model_type": "gpt_oss"}, "gpt_oss models: their attention has sinks; it partitions: "),
        ({"model_type": "t5"}, "t5 models: they are encoder and decoder; it partitions: "),
        ({**SMOLLM2, "quantization_config": {"quant_method": "gptq"}}, "quantized weights, as this llama model's are"),
        ({**GPT2, "add_cross_attention": True}, "cross-attention, which this gpt2 model has"),
        ({**SMOLLM2, "model_type": "bert", "is_decoder": True}, "bert models as encoders only, not with is_decoder"),
        ({**SMOLLM2, "model_type": "bert", "pruned_heads": {"0": [1]}}, "same heads in every layer, and this bert"),
        ({key: SMOLLM2[key] for key in SMOLLM2 if key != "num_hidden_layers"}, "lacks num_hidden_layers"),
        ({**SMOLLM2, "num_attention_heads": "9"}, "num_attention_heads of this llama model must be a whole number"),
        ({**SMOLLM2, "num_attention_heads": 10}, "the 10 heads of this llama model do not divide its width 576"),
        ({**SMOLLM2, "num_key_value_heads": 2}, r"kv_heads=2 does not divide heads=9; legal kv_heads: \[1, 3, 9\]"),
    ],
)
def test_refuses_in_one_sentence(config: dict[str, Any], says: str) -> None:
    with pytest.raises(PartitionError, match=says) as refused:
        describe(config)
    assert "\n" not in str(refused.value)


def test_a_grid_that_does_not_fit_is_refused_with_those_that_do() -> None:
    with pytest.raises(PartitionError, match=r"n=4 does not divide kv_heads=3; legal .* on 12 ranks: \(4, 3\)"):
        describe(SMOLLM2).check(Grid(3, 4))
    describe(SMOLLM2).check(Grid(4, 3))
    describe(GEMMA3).check(Grid(256, 1))  # one KV head on 256 ranks


def test_knows_the_families_that_the_documentation_names() -> None:
    asked = "llama mistral qwen2 qwen3 gemma2 gemma3_text phi gpt_neox gpt2 bert mixtral qwen2_moe"
    assert set(asked.split()) <= set(FAMILIES)
