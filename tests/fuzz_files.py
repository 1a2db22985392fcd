"""Small files as they should be, one or more of each kind that Helix reads."""

from __future__ import annotations

import json
import struct

SHA = 64 * "0"


def safetensors(header: dict, nbytes: int) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(nbytes)


def gguf_file() -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    fields = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    fields += text(b"a.list") + struct.pack("<IIQII", 9, 4, 2, 1, 2)
    tensor = text(b"x") + struct.pack("<IQIQ", 1, 2, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + fields + tensor
    return head + bytes(-len(head) % 32) + bytes(32)


MANIFEST = {
    "format": "helix-checkpoint-2",
    "tensors": {"x": {"dtype": "float32", "shape": [2], "chunks": [["a.safetensors", [0], [2]]]}},
    "files": {"a.safetensors": {"sha256": SHA, "nbytes": 80}},
    "about": {"step": 1, "extra": {"__items__": [[1, 2]]}, "optimizers": [], "models": {}},
}
CLAIMS = b"""papers: {full: {title: A title, setting: of it}}
claims:
  - id: one
    paper: full
    section: "1"
    quote: "It is exact."
    verdict: reproduced
    why: It is.
    value: {figure: 2, unit: times}
    ours: [{label: ours, kind: measured, unit: times, file: run.json, path: "a[1].b", interval: "(low,high)"}]
    evidence: [{run: run.json}, {source: a book}]
"""
REPORT = b"""{"settings": "DIGEST", "started_at": "2026-01-02T03:04:05+00:00", "tokens_per_s": {"mean": 2.5},
"wandb": {"id": "abc"}, "reason": "none", "method": {"name": "x", "sizes": [1, 2]}, "validation_bpb": NaN}"""
CONFIG = b"""{"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
"vocab_size": 64, "num_key_value_heads": 1, "intermediate_size": 96, "max_position_embeddings": 128,
"rope_scaling": null}"""
JOB = (
    b"parallel: {method: helix, m: 1, n: 2}\nmodel: {name: x, layers: 1, width: 48, heads: 2, head_dim: 24, "
    b"mlp_hidden: 64, vocab: 256}\nseed: 1",
    b"hydra: {job: {num: 3}}",
    b"[seed=1, parallel.n=2]",
)
WEIGHTS = safetensors(
    {"__metadata__": {"helix": "{}"}, "x": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}, 8
)
