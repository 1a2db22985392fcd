"""What each family of Hugging Face models calls the modules and the sizes that Helix needs. Names only; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Projections:
    """The linear layers of one attention module, by their paths inside a decoder or encoder layer.

    Args:
        module: the attention module, which calls transformers' attention function.
        columns: the query, key and value projections, or the one that makes all three.
        row: the output projection.
        heads: how the rows of `columns` lie: "separate" layers, "stacked" (all q, all k, all v), or "interleaved"
            (q, k, v of head 0, then of head 1, ..).
        norms: of a head's features, before the attention function; they see the rank's own heads only. A model may
            lack them.
    """

    module: str
    columns: tuple[str, ...]
    row: str
    heads: str = "separate"
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Feedforward:
    """An MLP: `columns` are cut by their outputs, `row` by its inputs."""

    columns: tuple[str, ...]
    row: str


@dataclass(frozen=True)
class Experts:
    """A mixture of experts whose stacked weights are cut inside every expert.

    Args:
        block: the module whose output is the sum of all experts'.
        module: called with tokens, and with each token's experts and their weights.
        gate_up: its parameter [experts, 2 F, E], gates first.
        down: its parameter [experts, E, F].
        router: chooses the experts; every rank holds it whole.
        shared: an MLP beside the experts, whose output `shared_gate` scales.
    """

    block: str
    module: str
    gate_up: str
    down: str
    router: str
    shared: Feedforward | None = None
    shared_gate: str | None = None


@dataclass(frozen=True)
class Keys:
    """What a family's configuration calls its sizes, where that is not what most call it."""

    layers: str = "num_hidden_layers"
    width: str = "hidden_size"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    mlp_hidden: str = "intermediate_size"
    context: str = "max_position_embeddings"
    experts: str = "num_experts"
    expert_hidden: str = "moe_intermediate_size"


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        layers: path of the list of layers in the model.
        attention, mlp: of each layer; of experts' layers that have them instead, `experts`.
        embeddings: cut over their rows, the vocabulary's first.
        heads: linear layers outside the layers, cut by their outputs, which every rank then gathers. A model may
            lack some.
        causal: whether it generates text.
        keys: its configuration's names.
        defaults: transformers' own, of keys that a config.json may leave out.
    """

    layers: str
    attention: Projections
    mlp: Feedforward
    embeddings: tuple[str, ...]
    heads: tuple[str, ...]
    experts: Experts | None = None
    causal: bool = True
    keys: Keys = Keys()
    defaults: Mapping[str, int] = field(default_factory=dict)


def _projections(module: str, columns: str, row: str, heads: str = "separate", norms: str = "") -> Projections:
    inside = [f"{module}.{name}" for name in columns.split()]
    return Projections(module, tuple(inside), row, heads, tuple(f"{module}.{name}" for name in norms.split()))


def _feedforward(module: str, columns: str, row: str) -> Feedforward:
    return Feedforward(tuple(f"{module}.{name}" for name in columns.split()), row)


_LLAMA = Family(
    "model.layers",
    _projections("self_attn", "q_proj k_proj v_proj", "self_attn.o_proj"),
    _feedforward("mlp", "gate_proj up_proj", "mlp.down_proj"),
    ("model.embed_tokens",),
    ("lm_head",),
)
_NORMED = replace(
    _LLAMA, attention=_projections("self_attn", "q_proj k_proj v_proj", "self_attn.o_proj", norms="q_norm k_norm")
)
_EXPERTS = Experts("mlp", "mlp.experts", "gate_up_proj", "down_proj", "mlp.gate")
_SHARED = replace(
    _EXPERTS,
    shared=_feedforward("mlp.shared_expert", "gate_proj up_proj", "mlp.shared_expert.down_proj"),
    shared_gate="mlp.shared_expert_gate",
)
_BERT = Family(
    "bert.encoder.layer",
    _projections("attention.self", "query key value", "attention.output.dense"),
    _feedforward("intermediate", "dense", "output.dense"),
    ("bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"),
    ("cls.predictions.decoder", "cls.predictions.transform.dense", "bert.pooler.dense"),
    causal=False,
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, defaults={"num_key_value_heads": 8}),
    "qwen2": replace(_LLAMA, defaults={"num_key_value_heads": 32}),
    "qwen3": replace(_NORMED, defaults={"num_key_value_heads": 32, "head_dim": 128}),
    "gemma2": replace(_LLAMA, defaults={"num_key_value_heads": 4, "head_dim": 256}),
    "gemma3_text": replace(_NORMED, defaults={"num_key_value_heads": 4, "head_dim": 256}),
    "phi": replace(
        _LLAMA,
        attention=_projections(
            "self_attn", "q_proj k_proj v_proj", "self_attn.dense", norms="q_layernorm k_layernorm"
        ),
        mlp=_feedforward("mlp", "fc1", "mlp.fc2"),
    ),
    "gpt_neox": Family(
        "gpt_neox.layers",
        _projections("attention", "query_key_value", "attention.dense", heads="interleaved"),
        _feedforward("mlp", "dense_h_to_4h", "mlp.dense_4h_to_h"),
        ("gpt_neox.embed_in",),
        ("lm_head",),
    ),
    "gpt2": Family(
        "transformer.h",
        _projections("attn", "c_attn", "attn.c_proj", heads="stacked"),
        _feedforward("mlp", "c_fc", "mlp.c_proj"),
        ("transformer.wte", "transformer.wpe"),
        ("lm_head",),
        keys=Keys("n_layer", "n_embd", "n_head", mlp_hidden="n_inner", context="n_positions"),
    ),
    "mixtral": replace(
        _LLAMA,
        experts=_EXPERTS,
        keys=Keys(experts="num_local_experts", expert_hidden="intermediate_size"),
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": replace(_LLAMA, experts=_SHARED, defaults={"num_key_value_heads": 16}),
    "qwen3_moe": replace(_NORMED, experts=_EXPERTS, defaults={"num_key_value_heads": 4, "head_dim": 128}),
    "bert": _BERT,
    "roberta": replace(
        _BERT,
        layers="roberta.encoder.layer",
        embeddings=("roberta.embeddings.word_embeddings", "roberta.embeddings.position_embeddings"),
        heads=("lm_head.decoder", "lm_head.dense", "roberta.pooler.dense"),
    ),
    "distilbert": Family(
        "distilbert.transformer.layer",
        _projections("attention", "q_lin k_lin v_lin", "attention.out_lin"),
        _feedforward("ffn", "lin1", "ffn.lin2"),
        ("distilbert.embeddings.word_embeddings", "distilbert.embeddings.position_embeddings"),
        ("vocab_projector", "vocab_transform"),
        causal=False,
        keys=Keys("n_layers", "dim", "n_heads", mlp_hidden="hidden_dim"),
    ),
}
