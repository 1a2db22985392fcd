"""Attention of partitioned models on ranks: every way to cut it, in every phase, against transformers' one process."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pretrained
import pytest
import torch
import transformers
from ranks import on_ranks
from torch import Tensor
from transformers import PreTrainedModel

from helix import Grid, PartitionError
from helix.comm.mesh import Mesh
from helix.comm.record import record
from helix.partition.phases import Phases
from helix.pretrained.cuts import cuts
from helix.pretrained.helixify import helixify

# fp32 in another order: a few roundings of 1e-7 times sums of at most some hundred terms.
TOLERANCE = 1e-5
NEW = 7


@dataclass(frozen=True)
class Models:
    """A model, and the same one partitioned."""

    whole: PreTrainedModel
    parts: PreTrainedModel
    mesh: Mesh

    @classmethod
    def of(cls, mesh: Mesh, family: str, phases: Phases | None = None, **sizes: Any) -> Models:
        parts = helixify(pretrained.tiny(family, **sizes), mesh, phases or Phases())
        return cls(pretrained.tiny(family, **sizes), parts, mesh)

    def both(self, do: Callable[[PreTrainedModel], Any]) -> tuple[Any, Any]:
        return do(self.whole), do(self.parts)

    def generate(self, inputs: dict[str, Tensor], **how: Any) -> None:
        """The same tokens, greedily if not said otherwise."""
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | how
        expected, found = self.both(lambda model: model.generate(**inputs, **options))
        assert torch.equal(expected, found), f"{how}: {found.tolist()} instead of {expected.tolist()}"


def agree(expected: Tensor, found: Tensor, what: str = "logits") -> None:
    deviation = pretrained.error(found, expected)
    assert deviation < TOLERANCE, f"{what} are off by {deviation:.1e}"


def check_phases(mesh: Mesh, family: str, phases: Phases, batch: int, padded: int, length: int = 13) -> None:
    """A prompt's logits and the tokens after it, samples of unequal length in the batch."""
    models = Models.of(mesh, family, phases, kv_heads=4)
    inputs = pretrained.batch(batch, length, padded)
    with torch.no_grad():
        agree(*models.both(lambda model: pretrained.logits(model, inputs)))
    models.generate(inputs)


def check_gradients(mesh: Mesh, family: str, prefill: str, padded: int) -> None:
    """Of every parameter, through the prefill that is asked for, and with a cache as training by default has it."""
    models = Models.of(mesh, family, Phases(prefill), kv_heads=4)
    inputs = pretrained.batch(4, 9, padded)
    models.both(lambda model: pretrained.logits(model, inputs).square().mean().backward())
    agree_gradients(models)


def agree_gradients(models: Models) -> None:
    whole, own = dict(models.whole.named_parameters()), cuts(models.whole, models.mesh.grid, models.mesh.model.rank)
    for name, parameter in models.parts.named_parameters():
        expected = whole[name].grad
        assert expected is not None
        part = own[name].take(expected) if name in own else expected
        assert parameter.grad is not None, f"{name} has no gradient"
        scale = expected.abs().max()
        assert (parameter.grad - part).abs().max() <= TOLERANCE * scale, f"the gradient of {name}"


def check_gradients_through_a_cache(mesh: Mesh, family: str) -> None:
    """Keys of one call have a gradient from the next, as transformers' own cache lets them."""
    models = Models.of(mesh, family, Phases("rows", "kvseq"))
    inputs = pretrained.batch(2, 9, padded=0)["input_ids"]

    def run(model: PreTrainedModel) -> Tensor:
        first = model(inputs[:, :5], use_cache=True)
        second = model(inputs[:, 5:8], past_key_values=first.past_key_values)
        third = model(inputs[:, 8:], past_key_values=second.past_key_values)
        third.logits.square().mean().backward()
        logits: Tensor = third.logits.detach()
        return logits

    agree(*models.both(run))
    agree_gradients(models)


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


def check_dropout(mesh: Mesh, prefill: str) -> None:
    """Ranks drop different weights, are in step afterwards, and the average over many draws is the whole answer."""
    models = Models.of(mesh, "llama", Phases(prefill), kv_heads=4, attention_dropout=0.2, layers=1)
    ids = pretrained.batch(4, 6, padded=0)["input_ids"].repeat(40, 1)
    torch.manual_seed(3)
    with torch.no_grad():
        models.parts.train()
        dropped = models.parts(ids).logits
        draws = torch.rand(4)
        expected = models.whole(ids[:4]).logits
    assert torch.equal(draws, everywhere(draws, mesh)[0]), "the ranks' generators are out of step"
    assert torch.equal(dropped, everywhere(dropped, mesh)[0])
    samples = dropped.view(40, 4, *dropped.shape[1:])
    assert samples.std(0).max() > 1e-3
    assert pretrained.error(samples.mean(0), expected) < 0.2
    plain = Models.of(mesh, "llama", Phases(prefill), kv_heads=4, layers=1)
    agree(plain.whole(ids[:4]).logits, plain.parts(ids[:4]).logits)


def everywhere(x: Tensor, mesh: Mesh) -> list[Tensor]:
    found = [torch.empty_like(x) for _ in range(mesh.model.size)]
    torch.distributed.all_gather(found, x.contiguous(), group=mesh.model.group)
    return found


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


def check_other_masks_and_calls(mesh: Mesh) -> None:
    """A mask that is ready, boolean or to be added; a cache given by its place; the base model alone; no cache."""
    models = Models.of(mesh, "llama")
    ids = pretrained.batch(2, 8, padded=0)["input_ids"]
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[:, 2] = False
    mask[2, 2] = True
    ready = mask.expand(2, 1, 8, 8)
    added = torch.zeros(2, 1, 8, 8).masked_fill(~ready, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = models.whole(ids, attention_mask=added).logits
        for form in (ready, added):
            agree(expected, models.parts(ids, attention_mask=form).logits)
        agree(*models.both(lambda model: model.base_model(ids).last_hidden_state))
        agree(*models.both(lambda model: model(ids, use_cache=False).logits))
        models.generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False)

        def positional(model: PreTrainedModel) -> Tensor:
            cache = transformers.DynamicCache()
            model(ids[:, :5], None, None, cache)
            return model(ids[:, 5:], None, None, cache).logits

        agree(*models.both(positional))


def _all(*checks: tuple[Any, ...]) -> list[str]:
    """What failed; the ranks go through the checks together."""
    meshes = {grid: Mesh(grid, data=4 // grid.ranks) for grid in (Grid(4, 1), Grid(2, 2), Grid(1, 4))}
    failures = []
    for check, grid, *arguments in checks:
        try:
            check(meshes[grid], *arguments)
        except Exception:
            failures.append(f"{check.__name__}({grid}, {arguments}): {traceback.format_exc(limit=-3)}")
    return failures


def run(*checks: tuple[Any, ...]) -> None:
    transformers.utils.logging.set_verbosity_error()
    for failures in on_ranks(4, _all, *checks, timeout_s=60):
        assert not failures, "\n".join(failures)


FOUR, SQUARE, FLAT = Grid(4, 1), Grid(2, 2), Grid(1, 4)


def test_every_prefill_with_every_way_to_decode() -> None:
    """On one head group of four ranks and on 2 x 2, in a batch with padding."""
    pairs = [
        Phases(prefill, decode) for prefill in ("rows", "batch", "heads") for decode in ("kvseq", "batch", "heads")
    ]
    run(
        *((check_phases, FOUR, "llama", phases, 4, 3) for phases in pairs),
        *((check_phases, SQUARE, "gemma2", phases, 2, 3) for phases in pairs[::4]),
        (check_phases, FOUR, "llama", Phases(), 1, 0),
        (check_phases, FOUR, "gemma2", Phases(), 1, 0, 1),  # fewer rows than ranks
        (check_phases, FOUR, "mistral", Phases(), 3, 12),  # longer padding than a window
        (check_phases, FLAT, "gemma3_text", Phases(), 3, 3),
        (check_phases, SQUARE, "gpt2", Phases("rows", "kvseq"), 3, 3),
    )


def test_gradients_of_every_prefill() -> None:
    run(
        *((check_gradients, FOUR, "llama", prefill, 3) for prefill in ("rows", "batch", "heads")),
        *((check_gradients, SQUARE, "gemma2", prefill, 0) for prefill in ("rows", "batch", "heads")),
        (check_gradients_through_a_cache, FOUR, "llama"),
        (check_gradients_through_a_cache, SQUARE, "gemma2"),
        (check_dropout, FOUR, "rows"),
        (check_dropout, SQUARE, "heads"),
    )


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
        (check_other_masks_and_calls, FOUR),
        (check_other_masks_and_calls, SQUARE),
    )
