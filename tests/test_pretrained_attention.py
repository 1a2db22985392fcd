"""Attention of partitioned models on ranks: every way to cut it, in every phase, against transformers' one process."""

from __future__ import annotations

from functools import partial

import pretrained
import torch
import transformers
from partitioned import FLAT, FOUR, SQUARE, Models, agree, agree_gradients, run
from torch import Tensor
from transformers import PreTrainedModel

from helix.comm.mesh import Mesh
from helix.partition.phases import Phases


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


def check_gradients_through_a_cache(mesh: Mesh, family: str) -> None:
    """Keys of one call have a gradient from the next, as transformers' own cache lets them."""
    models = Models.of(mesh, family, Phases("rows", "kvseq"))
    inputs = pretrained.batch(2, 9, padded=0)["input_ids"]

    def run(model: PreTrainedModel, sizes: list[int]) -> Tensor:
        model.zero_grad()
        cache = model(inputs[:, :1], use_cache=True).past_key_values
        for tokens in inputs[:, 1 : 1 + sum(sizes)].split(sizes, 1):
            logits: Tensor = model(tokens, past_key_values=cache).logits
        logits.square().mean().backward()
        return logits.detach()

    for sizes in ([1], [1, 4, 3]):  # at first fewer tokens than ranks, of which some have no keys
        agree(*models.both(partial(run, sizes=sizes)))
        agree_gradients(models)


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
        (check_other_masks_and_calls, FOUR),
        (check_other_masks_and_calls, SQUARE),
    )
