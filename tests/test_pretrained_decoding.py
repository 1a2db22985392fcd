"""What comes after the prompt, on ranks: caches that go on as transformers' own, and its `generate`."""

from __future__ import annotations

import copy
from typing import Any

import pretrained
import pytest
import torch
import transformers
from partitioned import FOUR, NEW, SQUARE, Models, agree, run
from torch import Tensor
from transformers import PreTrainedModel

from helix import PartitionError
from helix.comm.mesh import Mesh
from helix.comm.record import record
from helix.partition.phases import Phases


def check_conversation(mesh: Mesh, family: str, phases: Phases, batch: int, padded: int) -> None:
    """A prompt in chunks, of which some are all padding, several tokens after it, and tokens taken back."""
    models = Models.of(mesh, family, phases, kv_heads=4)
    inputs = pretrained.batch(batch, 24, padded)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    records = [transformers.DynamicCache(config=models.whole.config) for _ in range(2)]
    for cache in records:
        cache.activate_past_recording()

    def run(model: PreTrainedModel) -> Tensor:
        cache, out, start = records[model is models.parts], [], 0
        for count in (3, 1, 6, 1, 1, 7):
            stop = start + count
            position_ids = (mask[:, :stop].cumsum(-1) - 1).clamp_min(0)[:, start:]
            logits = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=position_ids,
                past_key_values=cache,
            ).logits
            out.append(logits[mask[:, start:stop].bool()])
            back = 2 if count == 6 else 0
            cache.crop(-back)
            start = stop - back
            assert cache.get_seq_length() == start
        return torch.cat(out)

    with torch.no_grad():
        agree(*models.both(run))


def check_shared_prompt(mesh: Mesh) -> None:
    """A cache that is copied goes on as two; one that stays is not changed by its copy. In and out of inference."""
    models = Models.of(mesh, "gemma2", sliding_window=4)
    ids = pretrained.batch(1, 30, padded=0)["input_ids"]

    def run(model: PreTrainedModel) -> Tensor:
        cache = transformers.DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids[:, :10], past_key_values=cache)
            model(ids[:, 10:11], past_key_values=cache)
        answers = []
        for start in (11, 20):
            mine = copy.deepcopy(cache)
            for token in range(start, start + 9):
                answers.append(model(ids[:, token : token + 1], past_key_values=mine).logits)
        return torch.cat(answers)

    with torch.no_grad():
        agree(*models.both(run))


def check_balance(mesh: Mesh, window: int | None) -> None:
    """As the cache grows token by token, all ranks together hold it once, and none more than its share."""
    whole, model = Models.of(mesh, "mistral", Phases(decode="kvseq"), sliding_window=window).both(lambda model: model)
    ids = pretrained.batch(1, 20, padded=0)["input_ids"]
    cache = transformers.DynamicCache(config=model.config)
    reference = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        for start, stop in ((0, 6), *((token, token + 1) for token in range(6, 20))):
            model(ids[:, start:stop], past_key_values=cache)
            whole(ids[:, start:stop], past_key_values=reference)
            held = torch.tensor([layer.keys.shape[2] for layer in cache.layers])
            counts = [torch.empty_like(held) for _ in range(mesh.model.size)]
            torch.distributed.all_gather(counts, held, group=mesh.model.group)
            together = torch.stack(counts)
            assert (together.max(0).values - together.min(0).values).max() <= 1
            groups = together.sum(0) // mesh.grid.n
            assert groups.tolist() == [layer.keys.shape[2] for layer in reference.layers]


def check_ways_to_generate(mesh: Mesh, family: str, phases: Phases, **sizes: Any) -> None:
    """What transformers' `generate` does with a cache: beams, chunks, guesses from the prompt, several answers."""
    models = Models.of(mesh, family, phases, **{"kv_heads": 4, **sizes})
    one, several = pretrained.batch(1, 11, padded=0), pretrained.batch(4, 11, padded=3)
    repeating = {key: value.repeat(1, 3) for key, value in one.items()}
    models.generate(several, num_beams=2)
    models.generate(one, num_beams=4, num_return_sequences=2)
    models.generate(several, prefill_chunk_size=4)
    if phases.decode != "batch":
        models.generate(repeating, prompt_lookup_num_tokens=3)
    expected, found = models.both(lambda model: chat(model, one["input_ids"]))
    assert torch.equal(expected, found)

    def sampled(model: PreTrainedModel) -> Tensor:
        torch.manual_seed(1)
        out: Tensor = model.generate(**several, do_sample=True, top_k=20, max_new_tokens=NEW, pad_token_id=0)
        return out

    expected, found = models.both(sampled)
    assert torch.equal(expected, found)


def chat(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """Three turns with one cache, to each of which `generate` gets the whole text so far."""
    cache, text = transformers.DynamicCache(config=model.config), prompt
    for turn in range(3):
        text = model.generate(text, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert cache.get_seq_length() == text.shape[1] - 1
        text = torch.cat([text, prompt[:, turn : turn + 3]], 1)
    return text


def check_beams_cross_ranks(mesh: Mesh) -> None:
    """By samples, each rank has one beam: what changes places is exchanged, and only then is anything sent."""
    models = Models.of(mesh, "llama", Phases(decode="batch"))
    with record() as log:
        models.generate(pretrained.batch(1, 7, padded=0), num_beams=mesh.grid.m, num_return_sequences=1)
    assert log.calls["all_to_all/cache.select"] > 0
    cache = models.parts(**pretrained.batch(mesh.grid.m, 7)).past_key_values
    with pytest.raises(ValueError, match=r"^m=4 ranks share this cache by samples and cannot share 3; use decode="):
        cache.batch_select_indices(torch.tensor([0, 1, 2]))


def check_refusals(mesh: Mesh) -> None:
    """In one sentence, before anything is computed or sent."""
    whole, model = Models.of(mesh, "llama", Phases("batch", "kvseq")).both(lambda model: model)
    inputs = pretrained.batch(4, 6, padded=0)
    static = transformers.StaticCache(config=model.config, max_cache_len=20)
    filled = whole(**inputs).past_key_values
    other = Models.of(mesh, "llama").parts(**inputs).past_key_values
    caches = {
        r"keeps its keys in a DynamicCache without offloading, not in a StaticCache": static,
        r"not in a EncoderDecoderCache": transformers.EncoderDecoderCache(
            transformers.DynamicCache(), transformers.DynamicCache()
        ),
        r"another model's tokens in it cannot be dealt out; start from a new one": filled,
        r"this one is of another partitioned model": other,
    }
    with record() as log:
        for sentence, cache in caches.items():
            with pytest.raises(ValueError, match=sentence):
                model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="without offloading, not in a StaticCache"):
            model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
        with pytest.raises(
            PartitionError, match=r"^prefill=batch cannot run on m=4: .* batch of 3; legal: auto, rows$"
        ):
            model(**pretrained.batch(3, 6))
    assert not log.calls
    with pytest.raises(ValueError, match="takes masks that all heads share, not one of 4 heads"):
        model(inputs["input_ids"], attention_mask=torch.ones(4, 4, 6, 6, dtype=torch.bool))


def test_a_cache_goes_on_as_transformers_own_does() -> None:
    run(
        (check_conversation, FOUR, "llama", Phases(), 1, 0),
        (check_conversation, FOUR, "gemma2", Phases("rows", "kvseq"), 2, 5),
        (check_conversation, SQUARE, "mistral", Phases("rows", "kvseq"), 3, 5),
        (check_conversation, SQUARE, "gemma3_text", Phases("batch", "batch"), 2, 5),
        (check_conversation, SQUARE, "llama", Phases("rows", "heads"), 1, 0),
        (check_shared_prompt, FOUR),
        (check_shared_prompt, SQUARE),
        (check_balance, FOUR, None),
        (check_balance, SQUARE, 6),
    )


def test_transformers_ways_to_generate() -> None:
    run(
        (check_ways_to_generate, FOUR, "gemma2", Phases("auto", "kvseq")),
        (check_beams_cross_ranks, FOUR),
        (check_refusals, FOUR),
    )
