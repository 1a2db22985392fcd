"""What `helixify` refuses before it changes anything, and what a partitioned model refuses when it is called."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from pretrained import batch, tiny
from ranks import on_ranks
from torch import Tensor, nn
from transformers import GenerationConfig, MaxTimeCriteria

from helix import Grid, Mesh, PartitionError, helixify
from helix.partition.phases import Phases


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
    for again in (done, done.model):
        with pytest.raises(PartitionError) as found:
            helixify(again, mesh)
        said.append(str(found.value))
    assert _state(done)[0] == before
    return said


def _state(model: nn.Module) -> tuple[dict[str, int], list[int], dict[str, Tensor]]:
    modules = {name: id(module) for name, module in model.named_modules()}
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    return modules, hooks, dict(model.named_parameters())


def test_refuses_before_it_changes_anything() -> None:
    for said in on_ranks(2, refused_all):
        for found, (_, _, says) in zip(said, [*REFUSED, *[(None, "", "is partitioned already")] * 2], strict=True):
            assert re.search(says, found), found
            assert "\n" not in found


def refused_when_called() -> tuple[list[str], Tensor, Tensor]:
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
    rank, sampled = model.helix.model.rank, GenerationConfig(do_sample=True, max_new_tokens=6, eos_token_id=None)
    refused(PartitionError, lambda: model.generate(ids, max_time=60.0))
    refused(PartitionError, lambda: model.generate(ids, stopping_criteria=[MaxTimeCriteria(60.0)]))
    refused(PartitionError, lambda: model.generate(ids[:, : 5 + rank], max_new_tokens=2))
    refused(PartitionError, lambda: model.generate(input_ids=ids + rank, max_new_tokens=2))
    torch.manual_seed(rank)
    model.generate(ids, do_sample=False, max_new_tokens=2)
    refused(PartitionError, lambda: model.generate(ids, do_sample=True))
    refused(PartitionError, lambda: model.generate(ids, sampled))
    model.generation_config.do_sample = True
    refused(PartitionError, lambda: model.generate(ids))
    torch.manual_seed(5)
    text = model.generate(ids, sampled)
    model.train()
    torch.manual_seed(rank)
    refused(PartitionError, lambda: model(ids))
    torch.manual_seed(5)
    model(ids).logits.sum().backward()
    return said, model(ids).logits.detach(), text


def test_refuses_calls_that_it_cannot_answer() -> None:
    (said, logits, text), (again, others, same) = on_ranks(2, refused_when_called)
    assert said == again
    attentions, unknown, saved, resized, copied, *generating, dropout = said
    assert attentions == "no rank has whole attention weights; call the model without output_attentions"
    assert unknown.startswith("ids must be 0 to 66, and there is one of ")
    assert saved == (
        "a partitioned model does not run save_pretrained: write it with helix.pretrained.saving.save(model, folder)"
    )
    assert resized.endswith("does not run resize_token_embeddings: resize the whole model, then call helixify")
    assert copied.endswith("does not run __deepcopy__: copy the whole model, and call helixify for both")
    for found, begins in zip(
        generating,
        ["a partitioned model does not stop by max_time, "] * 2
        + ["generate got other inputs on another rank; "] * 2
        + ["sampling needs the same random numbers on every rank; call torch.manual_seed "] * 3,
        strict=True,
    ):
        assert found.startswith(begins), found
    assert text.equal(same)
    assert dropout.startswith("dropout needs the same random numbers on every rank; call torch.manual_seed with")
    assert logits.equal(others)  # once seeded alike, ranks drop out the same
