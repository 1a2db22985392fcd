"""What a Hugging Face configuration says of a model, as integers, and which models Helix partitions; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helix.partition.architectures import FAMILIES as FAMILIES
from helix.partition.architectures import Family, Keys
from helix.partition.grid import Grid, HeadLayout, PartitionError

# Why well-known architectures are not among the families, where one knows.
_REASONS = {
    "gemma3": "they read images too (their text part alone, gemma3_text, is known)",
    "gemma3n": "their layers are of different kinds",
    "gpt_oss": "their attention has sinks",
    "deepseek_v2": "they cache a compression of keys and values, not heads",
    "deepseek_v3": "they cache a compression of keys and values, not heads",
    "bloom": "their attention is biased by distance, head by head",
    "mpt": "their attention is biased by distance, head by head",
    "t5": "they are encoder and decoder",
    "bart": "they are encoder and decoder",
}


@dataclass(frozen=True)
class PretrainedShape:
    """The sizes of a Hugging Face model.

    Args:
        family: its architecture, transformers' `model_type`.
        layers, width, heads, kv_heads, head_dim: as everywhere; heads * head_dim need not equal width.
        mlp_hidden: of the MLP; in a mixture, of each expert.
        vocab: entries of the embedding.
        context: the positions that it was made for.
        experts, top_k: in a layer, and of a token; 0 without experts.
        shared_hidden: of the MLP beside the experts; 0 if there is none.
        tied: whether the head is the embedding.
        causal: whether it generates text.
    """

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_hidden: int
    vocab: int
    context: int
    experts: int = 0
    top_k: int = 0
    shared_hidden: int = 0
    tied: bool = False
    causal: bool = True

    def __post_init__(self) -> None:
        _ = self.layout  # refuses KV heads that do not divide the heads

    @property
    def layout(self) -> HeadLayout:
        """Without RoPE's pairs: heads are whole again before it turns them."""
        return HeadLayout(self.heads, self.kv_heads, self.head_dim)

    def check(self, grid: Grid) -> None:
        """Check that a grid divides the heads; MLP, experts and vocabulary are padded where it does not divide them.

        Raises:
            PartitionError: naming what does not divide, with the legal (m, n) of this many ranks.
        """
        grid.check(self.heads, self.kv_heads, self.head_dim)


def expert_share(hidden: int, ranks: int, itemsize: int) -> int:
    """How many of an expert's hidden features a rank has, with zeros to the multiple of 16 bytes that torch wants.

    Its grouped matrix product does, which transformers calls for experts.

    Args:
        itemsize: bytes of one number of the weights.
    """
    multiple = max(1, 16 // itemsize)
    return -(-hidden // ranks // multiple) * multiple


def describe(config: Mapping[str, Any]) -> PretrainedShape:
    """The sizes that a configuration states.

    Args:
        config: a `config.json`, or a configuration's `to_dict()`.

    Raises:
        PartitionError: if Helix cannot partition such a model, or the configuration lacks a size.

    >>> describe({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
    ...           "n_positions": 1024}).mlp_hidden
    3072
    """
    kind = config.get("model_type")
    family = family_named(kind)
    _refuse_features(config, str(kind), family)
    keys = family.keys
    read = _Reader(config, str(kind), family)
    heads, width = read.size("heads"), read.size("width")
    head_dim = read.optional(keys.head_dim) or _divided(width, heads, str(kind))
    experts = read.size("experts") if family.experts is not None else 0
    wide = "expert_hidden" if experts else "mlp_hidden"
    shared = family.experts is not None and family.experts.shared is not None
    return PretrainedShape(
        family=str(kind),
        layers=read.size("layers"),
        width=width,
        heads=heads,
        kv_heads=read.optional(keys.kv_heads) or heads,
        head_dim=head_dim,
        mlp_hidden=4 * width if kind == "gpt2" and read.optional(keys.mlp_hidden) is None else read.size(wide),
        vocab=read.number("vocab_size"),
        context=read.size("context"),
        experts=experts,
        top_k=read.number("num_experts_per_tok") if experts else 0,
        shared_hidden=read.number("shared_expert_intermediate_size") if shared else 0,
        tied=bool(config.get("tie_word_embeddings", kind in _TIED)),
        causal=family.causal,
    )


# transformers' default where a config.json does not say.
_TIED = ("gemma2", "gemma3_text", "gpt2", "bert", "roberta", "distilbert")


def family_named(kind: object) -> Family:
    """A family by transformers' `model_type`.

    Raises:
        PartitionError: if Helix does not know it, naming those that it knows.
    """
    known = ", ".join(sorted(FAMILIES))
    if not isinstance(kind, str) or not kind:
        raise PartitionError(f"the configuration names no model_type; Helix partitions: {known}")
    if kind not in FAMILIES:
        reason = f": {_REASONS[kind]}" if kind in _REASONS else ""
        raise PartitionError(f"Helix does not partition {kind} models{reason}; it partitions: {known}")
    return FAMILIES[kind]


def _refuse_features(config: Mapping[str, Any], kind: str, family: Family) -> None:
    if config.get("quantization_config"):
        raise PartitionError(
            f"Helix does not partition quantized weights, as this {kind} model's are; "
            "load it in float32, bfloat16 or float16"
        )
    if config.get("is_encoder_decoder") or config.get("add_cross_attention"):
        raise PartitionError(f"Helix does not partition cross-attention, which this {kind} model has")
    if not family.causal and config.get("is_decoder"):
        raise PartitionError(f"Helix partitions {kind} models as encoders only, not with is_decoder=True")
    if config.get("pruned_heads"):
        raise PartitionError(f"Helix cuts the same heads in every layer, and this {kind} model's are pruned")


@dataclass(frozen=True)
class _Reader:
    config: Mapping[str, Any]
    kind: str
    family: Family

    def optional(self, key: str) -> int | None:
        value = self.config.get(key, self.family.defaults.get(key))
        return None if value is None else self._whole(key, value)

    def number(self, key: str) -> int:
        value = self.optional(key)
        if value is None:
            raise PartitionError(f"the configuration of this {self.kind} model lacks {key}")
        return value

    def size(self, name: str) -> int:
        """A size by our name, under the family's own key or the usual one; transformers takes and writes both."""
        own: str = getattr(self.family.keys, name)
        others = (getattr(Keys(), name), "num_local_experts" if name == "experts" else own)
        return self.number(next((key for key in (own, *others) if key in self.config), own))

    def _whole(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PartitionError(f"{key} of this {self.kind} model must be a whole number above 0, not {value!r}")
        return value


def _divided(width: int, heads: int, kind: str) -> int:
    if width % heads:
        raise PartitionError(f"the {heads} heads of this {kind} model do not divide its width {width}")
    return width // heads
