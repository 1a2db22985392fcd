"""What `helixify` refuses before it changes anything, what it leaves as it was, and what a step costs."""

from __future__ import annotations

import copy
import doctest
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from pretrained import batch, config, error, logits, tiny
from ranks import on_ranks
from torch import Tensor, nn

from helix import Grid, Mesh, PartitionError, helixify
from helix.comm.record import record
from helix.partition.phases import Phases
from helix.pretrained.cuts import cuts
from helix.pretrained.helixify import helixify as documented


class Adapted(nn.Linear):
    """As an adapter or a quantized layer is: a linear layer of another kind."""


def _with_adapter() -> nn.Module:
    model = tiny("llama")
    model.model.layers[1].self_attn.q_proj = Adapted(32, 32)
    return model


def _with_sinks() -> nn.Module:
    model = tiny("llama")
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    return model


def _with_other_heads() -> nn.Module:
    model = tiny("llama")
    model.model.layers[1].self_attn.k_proj = nn.Linear(32, 8, bias=False)
    return model


def _hooked() -> nn.Module:
    model = tiny("llama")
    model.model.norm._hf_hook = object()
    return model


def _on_two_devices() -> nn.Module:
    model = tiny("llama")
    model.model.norm.to("meta")
    return model


def _of_two_dtypes() -> nn.Module:
    model = tiny("llama")
    model.model.layers[0].mlp.bfloat16()
    return model


def _another() -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(
        transformers.OPTConfig(hidden_size=16, ffn_dim=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=64)
    )


def _deciding(**keys: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = tiny("llama")
        for key, value in keys.items():
            setattr(model.config, key, value)
        return model

    return make


REFUSED: list[tuple[Callable[[], Any], str | Phases, str]] = [
    (lambda: nn.Linear(2, 2), "auto", "takes transformers' own models, not a Linear; unwrap it"),
    (lambda: nn.Sequential(tiny("llama")), "auto", "not a Sequential"),
    (_another, "auto", "does not partition opt models; it partitions: bert, "),
    (_deciding(quantization_config={"quant_method": "awq"}), "auto", "quantized weights"),
    (_deciding(output_attentions=True), "auto", "no rank has whole attention weights"),
    (lambda: tiny("bert", is_decoder=True), "auto", "as encoders only"),
    (lambda: tiny("gpt2", add_cross_attention=True), "auto", "cross-attention"),
    (lambda: tiny("llama", heads=3, kv_heads=3), "auto", r"n=2 does not divide heads=3; legal .* 2 ranks: \(2, 1\)"),
    (_with_adapter, "auto", "model.layers.1.self_attn.q_proj is a Adapted, .* merge adapters"),
    (_with_sinks, "auto", "model.layers.0.self_attn.sinks is no part of the layers"),
    (_with_other_heads, "auto", "layers.1.self_attn.k_proj makes 8 features, .* 2 heads of 8 are 16"),
    (_hooked, "auto", "with a device_map, which moves its weights; load it without"),
    (_on_two_devices, "auto", "are on cpu and meta; they must all be on cpu"),
    (_of_two_dtypes, "auto", "are bfloat16 and float32; they must have one float dtype"),
    (lambda: tiny("llama"), "score", "a pretrained model has no such schedule; legal: auto, "),
    (lambda: tiny("llama"), Phases(decode="rows"), "decode=rows cannot run"),
]


def refused_all() -> list[str]:
    """Try each; what it says, once nothing has changed."""
    mesh, said = Mesh(Grid(1, 2)), []
    for make, schedule, _ in REFUSED:
        model = make()
        modules, hooks, state = _state(model)
        with pytest.raises(PartitionError) as found:
            helixify(model, mesh, schedule)
        assert _state(model)[:2] == (modules, hooks)
        for name, value in _state(model)[2].items():
            assert value is state[name]
        said.append(str(found.value))
    done = helixify(tiny("llama"), mesh)
    before = _state(done)[0]
    with pytest.raises(PartitionError) as found:
        helixify(done, mesh)
    assert _state(done)[0] == before
    return [*said, str(found.value)]


def _state(model: nn.Module) -> tuple[dict[str, int], list[int], dict[str, Tensor]]:
    modules = {name: id(module) for name, module in model.named_modules()}
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    return modules, hooks, dict(model.named_parameters())


def test_refuses_before_it_changes_anything() -> None:
    for said in on_ranks(2, refused_all):
        for found, (_, _, says) in zip(said, [*REFUSED, (None, "", "partitioned already, as helix_1x2")], strict=True):
            assert re.search(says, found), found
            assert "\n" not in found


def refused_when_called() -> tuple[list[str], Tensor]:
    model = helixify(tiny("gpt2", attn_pdrop=0.1, resid_pdrop=0.2, embd_pdrop=0.3), Mesh(Grid(2, 1)))
    said = []

    def refused(kind: type[Exception], call: Callable[[], object]) -> None:
        with pytest.raises(kind) as found:
            call()
        said.append(str(found.value))

    ids = batch(padded=0)["input_ids"]
    refused(PartitionError, lambda: model(ids, output_attentions=True))
    refused(IndexError, lambda: model(ids + 60))
    refused(PartitionError, lambda: model.save_pretrained("nowhere"))
    refused(PartitionError, lambda: model.resize_token_embeddings(100))
    refused(PartitionError, lambda: copy.deepcopy(model))
    model.train()
    torch.manual_seed(model.helix.model.rank)
    refused(PartitionError, lambda: model(ids))
    torch.manual_seed(5)
    model(ids).logits.sum().backward()
    return said, model(ids).logits.detach()


def test_refuses_calls_that_it_cannot_answer() -> None:
    (said, logits), (_, others) = on_ranks(2, refused_when_called)
    attentions, unknown, saved, resized, copied, dropout = said
    assert attentions == "no rank has whole attention weights; call the model without output_attentions"
    assert unknown.startswith("ids must be 0 to 66, and there is one of ")
    assert saved == (
        "a partitioned model does not run save_pretrained: write it with helix.pretrained.saving.save(model, folder)"
    )
    assert resized.endswith("does not run resize_token_embeddings: resize the whole model, then call helixify")
    assert copied.endswith("does not run __deepcopy__: copy the whole model, and call helixify for both")
    assert dropout.startswith("dropout needs the same random numbers on every rank; call torch.manual_seed with")
    assert logits.equal(others)  # once seeded alike, ranks drop out the same


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
