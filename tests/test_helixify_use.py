"""What a step of a partitioned model costs, what a rank of it holds, what stays as it was, and other models."""

from __future__ import annotations

import copy
import doctest
import weakref
from typing import Any

import pytest
import torch
import transformers
from pretrained import batch, config, error, logits, tiny
from ranks import on_ranks

from helix import Grid, Mesh, helixify
from helix.comm.record import record
from helix.partition.phases import Phases
from helix.pretrained.cuts import cuts
from helix.pretrained.helixify import helixify as documented

# Several questions to one launch of four ranks.

Found = list[dict[str, Any]]


def all_of() -> dict[str, Any]:
    mesh = Mesh(Grid(2, 2))
    return {ask.__name__: ask(mesh) for ask in (counted, kept, on_meta, others, in_bf16)}


@pytest.fixture(scope="module")
def on_four() -> Found:
    return on_ranks(4, all_of, timeout_s=40)


# What a decode step costs: four small collectives a layer, one for the embedding, one for the head.

COSTS = ["llama", "qwen3", "gpt2", "gpt_neox", "mixtral", "qwen2_moe"]


def counted(mesh: Mesh) -> dict[str, dict[str, int]]:
    out = {}
    for family in COSTS:
        model = helixify(tiny(family, layers=3), mesh, Phases(decode="kvseq"))
        with torch.no_grad():
            cache = model(**batch(padded=0), use_cache=True).past_key_values
            with record() as log:
                model(torch.tensor([[5], [6]]), past_key_values=cache)
        out[family] = dict(log.calls)
    return out


def test_a_decode_step_takes_four_collectives_a_layer(on_four: Found) -> None:
    each = {
        "all_gather/attention.qkv": 3,
        "all_to_all/attention.merge": 3,
        "all_reduce/attention.leave": 3,
        "all_reduce/mlp.leave": 3,
        "all_reduce/embedding.leave": 1,
        "all_gather/head.leave": 1,
    }
    for family, calls in on_four[0]["counted"].items():
        assert calls == each | ({"all_reduce/positions.leave": 1} if family == "gpt2" else {}), family


# What a rank holds: an even part, of a model of ordinary proportions.


def held(grid: Grid) -> dict[str, tuple[int, int, int]]:
    out = {}
    for family, sizes in (("llama", {}), ("gpt2", {}), ("qwen2_moe", {"moe_intermediate_size": 1440})):
        with torch.device("meta"):
            made = type(tiny(family))
            model = made(config(family, heads=9, kv_heads=3, head_dim=64, hidden=1536, vocab_size=49152, **sizes))
        total = sum(p.numel() for p in model.parameters())
        helixify(model, Mesh(grid))
        names = cuts(made(config(family)), Grid(1, 1), 0)
        whole = sum(p.numel() for name, p in model.named_parameters() if name not in names)
        out[family] = total, sum(p.numel() for p in model.parameters()), whole
    return out


def test_a_rank_holds_its_share_of_all_but_norms_and_routers() -> None:
    for found in on_ranks(6, held, Grid(2, 3)):
        for family, (total, own, whole) in found.items():
            assert own - whole == pytest.approx((total - whole) / 6, rel=0.01), family
            assert whole < 0.002 * total, family


# What stays as it was.


def kept(mesh: Mesh) -> dict[str, Any]:
    shared = config("qwen3")
    one, other = (transformers.AutoModelForCausalLM.from_config(shared).eval() for _ in range(2))
    other.load_state_dict(one.state_dict())
    other.config = one.config  # as of two models that a user makes of one configuration
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = one.config
    one.model.layers[0].requires_grad_(False)
    expected = one(**batch()).logits
    helixify(one, mesh)
    names = [name for name, _ in one.named_parameters()]
    assert names == [name for name, _ in other.named_parameters()]
    frozen = [name for name, p in one.named_parameters() if not p.requires_grad]
    one(**batch()).logits.sum().backward()
    assert all((p.grad is None) == (name in frozen) for name, p in one.named_parameters())
    states = one(**batch(), output_hidden_states=True).hidden_states
    alive = list(map(weakref.ref, states))
    del states
    assert not any(state() is not None for state in alive), "a step's activations stay after it"
    return {"frozen": frozen, "other": error(other(**batch()).logits.detach(), expected.detach())}


def test_keeps_names_frozen_weights_and_other_models_configurations(on_four: Found) -> None:
    for found in (rank["kept"] for rank in on_four):
        assert len(found["frozen"]) == 11
        assert all(name.startswith("model.layers.0.") for name in found["frozen"])
        assert found["other"] == 0


def on_meta(mesh: Mesh) -> list[str]:
    wrong = []
    for family in ("llama", "gpt2", "gpt_neox", "qwen2_moe", "bert"):
        with torch.device("meta"):
            empty = type(tiny(family))(config(family))
        own, real = helixify(empty, mesh), helixify(tiny(family), mesh)
        shapes = {name: p.shape for name, p in real.named_parameters(remove_duplicate=False)}
        found = {name: p.shape for name, p in own.named_parameters(remove_duplicate=False)}
        wrong += [family] if found != shapes or not all(p.is_meta for p in own.parameters()) else []
    return wrong


def test_a_model_on_the_meta_device_gets_the_same_shapes(on_four: Found) -> None:
    assert [rank["on_meta"] for rank in on_four] == [[]] * 4


def others(mesh: Mesh) -> dict[str, float]:
    """Models of known families with other heads, or none; with other expert code; checkpointing; two replicas."""
    out = {}
    for kind, family in (
        (transformers.LlamaModel, "llama"),
        (transformers.BertModel, "bert"),
        (transformers.LlamaForSequenceClassification, "llama"),
        (transformers.BertForSequenceClassification, "bert"),
        (transformers.GPT2ForTokenClassification, "gpt2"),
        (transformers.LlamaForQuestionAnswering, "llama"),
    ):
        torch.manual_seed(0)
        whole = kind(config(family)).eval()
        part = helixify(copy.deepcopy(whole), mesh)
        inputs = batch(padded=0)
        with torch.no_grad():
            out[kind.__name__] = error(part(**inputs)[0], whole(**inputs)[0])
    for way in ("eager", "batched_mm"):
        whole, part = tiny("qwen2_moe"), tiny("qwen2_moe")
        for model in (whole, part):
            model.config._experts_implementation = way
        helixify(part, mesh)
        with torch.no_grad():
            out[f"experts {way}"] = error(logits(part, batch()), logits(whole, batch()))
    out["checkpointing"] = _checkpointed(mesh)
    out["filled later"] = _filled(mesh)
    replicas = Mesh(Grid(2, 1), data=2)
    own = batch(seed=replicas.data.rank)
    out["replicas"] = error(
        logits(helixify(tiny("llama"), replicas), own).detach(), logits(tiny("llama"), own).detach()
    )
    return out


def _checkpointed(mesh: Mesh) -> float:
    grads = []
    for checkpoints in (False, True):
        model = helixify(tiny("qwen3"), mesh).train()
        if checkpoints:
            model.activation_checkpointing_enable()
        model(**batch(left=False)).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    return max(error(a, b) for a, b in zip(*grads, strict=True))


def _filled(mesh: Mesh) -> float:
    """A model of the meta device, filled after it was partitioned: its parameters are others than helixify saw."""
    full = helixify(tiny("qwen3", tie_word_embeddings=True), mesh)
    with torch.device("meta"):
        later = helixify(type(full)(full.config), mesh)
    later.load_state_dict(full.state_dict(), assign=True)
    later.tie_weights()
    later.model.rotary_emb = full.model.rotary_emb  # computed, and in no state_dict
    grads = []
    for model in (full, later.eval()):
        model(**batch(left=False)).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    return max(error(a, b) for a, b in zip(*grads, strict=True))


def test_other_heads_of_known_families_and_other_ways_to_run_them(on_four: Found) -> None:
    for found in (rank["others"] for rank in on_four):
        for name, off in found.items():
            assert off <= 1e-5, f"{name} is off by {off:.1e}"


def in_bf16(mesh: Mesh) -> tuple[float, float]:
    exact = logits(tiny("gemma2"), batch()).detach()
    whole = tiny("gemma2", dtype=torch.bfloat16)
    part = helixify(tiny("gemma2", dtype=torch.bfloat16), mesh)
    found = logits(part, batch()).detach()
    assert found.dtype == torch.bfloat16
    return error(found, exact), error(logits(whole, batch()).detach(), exact)


def test_bf16_is_as_near_to_fp32_as_the_whole_model_in_bf16(on_four: Found) -> None:
    """Both round each sum once, though different parts of it; within a factor of two of each other."""
    for part, whole in (rank["in_bf16"] for rank in on_four):
        assert part <= 2 * whole


def test_the_example_of_the_documentation() -> None:
    found = doctest.DocTestFinder(recurse=False).find(documented, "helixify", globs={"torch": torch})
    assert doctest.DocTestRunner().run(found[0]).attempted == 5
