"""What each family of Hugging Face models calls the modules that Helix partitions. Names only; no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Projections:
    """The linear layers of one attention module, by their paths inside a decoder or encoder layer.

    Args:
        module: the attention module, which calls transformers' attention function.
        columns: the query, key and value projections, or the one that makes all three.
        row: the output projection.
        heads: how the rows of `columns` lie: "separate" layers, "stacked" (all q, all k, all v), or "interleaved"
            (q, k, v of head 0, then of head 1, ..).
        norms: of a head's features, before the attention function; they see the rank's own heads only.
    """

    module: str
    columns: tuple[str, ...]
    row: str
    heads: str = "separate"
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Feedforward:
    """An MLP: its input enters at `module`; `columns` are cut by their outputs, `row` by its inputs."""

    module: str
    columns: tuple[str, ...]
    row: str


@dataclass(frozen=True)
class Experts:
    """A mixture of experts whose stacked weights are cut inside every expert.

    Args:
        module: called with tokens, and with each token's experts and their weights.
        gate_up: its parameter [experts, 2 F, E], gates first.
        down: its parameter [experts, E, F].
        shared: MLPs beside the experts.
    """

    module: str
    gate_up: str
    down: str
    shared: tuple[Feedforward, ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        layers: path of the list of layers in the model.
        attention, mlp: of each layer; of experts' layers that have them instead, `experts`.
        embedding: cut over the vocabulary.
        head: the output layer, cut over the vocabulary; often tied to the embedding.
    """

    layers: str
    attention: Projections
    mlp: Feedforward
    embedding: str
    head: str | None
    experts: Experts | None = None


def _projections(module: str, columns: str, row: str, heads: str = "separate", norms: str = "") -> Projections:
    inside = [f"{module}.{name}" for name in columns.split()]
    return Projections(module, tuple(inside), row, heads, tuple(f"{module}.{name}" for name in norms.split()))


def _feedforward(module: str, columns: str, row: str) -> Feedforward:
    return Feedforward(module, tuple(f"{module}.{name}" for name in columns.split()), row)


_ATTENTION = _projections("self_attn", "q_proj k_proj v_proj", "self_attn.o_proj")
_NORMED = _projections("self_attn", "q_proj k_proj v_proj", "self_attn.o_proj", norms="q_norm k_norm")
_GATED = _feedforward("mlp", "gate_proj up_proj", "mlp.down_proj")
_LLAMA = Family("model.layers", _ATTENTION, _GATED, "model.embed_tokens", "lm_head")
_NORMED_LLAMA = replace(_LLAMA, attention=_NORMED)
_EXPERTS = Experts("mlp.experts", "gate_up_proj", "down_proj")
_SHARED = _feedforward("mlp.shared_expert", "gate_proj up_proj", "mlp.shared_expert.down_proj")

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _NORMED_LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _NORMED_LLAMA,
    "phi": Family(
        "model.layers",
        _projections("self_attn", "q_proj k_proj v_proj", "self_attn.dense"),
        _feedforward("mlp", "fc1", "mlp.fc2"),
        "model.embed_tokens",
        "lm_head",
    ),
    "gpt_neox": Family(
        "gpt_neox.layers",
        _projections("attention", "query_key_value", "attention.dense", heads="interleaved"),
        _feedforward("mlp", "dense_h_to_4h", "mlp.dense_4h_to_h"),
        "gpt_neox.embed_in",
        "lm_head",
    ),
    "gpt2": Family(
        "transformer.h",
        _projections("attn", "c_attn", "attn.c_proj", heads="stacked"),
        _feedforward("mlp", "c_fc", "mlp.c_proj"),
        "transformer.wte",
        "lm_head",
    ),
    "mixtral": replace(_LLAMA, experts=_EXPERTS),
    "qwen2_moe": replace(_LLAMA, experts=replace(_EXPERTS, shared=(_SHARED,))),
    "bert": Family(
        "bert.encoder.layer",
        _projections("attention.self", "query key value", "attention.output.dense"),
        _feedforward("intermediate", "dense", "output.dense"),
        "bert.embeddings.word_embeddings",
        "cls.predictions.decoder",
    ),
}
