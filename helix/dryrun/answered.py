"""Tracing a pretrained model's pass over its prompts, and the one that gives the next token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from helix.comm.mesh import Mesh
from helix.config.folder import shape_of
from helix.config.generation import to_phases
from helix.config.methods import to_name
from helix.config.schema import ITEMSIZE, InferConfig, ParallelConfig, to_grid
from helix.dryrun.assess import assess
from helix.dryrun.figures import Pair, Traced
from helix.dryrun.tracer import Trace, Tracer
from helix.dryrun.world import DEVICE
from helix.generation.asked import folder_of
from helix.generation.run import be_quiet, read
from helix.parallel.methods.configured import DTYPES
from helix.partition.architectures import FAMILIES
from helix.partition.decoding import GenerationCost
from helix.partition.families import PretrainedShape
from helix.partition.options import AttentionOptions
from helix.partition.phases import Phases, resolve
from helix.partition.transformer_cost import TransformerCost
from helix.planner.answering import planned
from helix.planner.estimate import Estimator
from helix.planner.layout import Layout
from helix.planner.machine import Machine
from helix.planner.seconds import Seconds
from helix.planner.work import Work
from helix.pretrained.helixify import helixify
from helix.pretrained.loading import empty
from helix.study.report import MethodLabel, Schedules

PROMPT, TOKEN = "prompt", "token"


@dataclass(frozen=True)
class Question:
    """What a pretrained model is asked.

    Args:
        folder: of which config.json is read.
        shape: what that says.
        batch, length: prompts that are answered at once, and tokens of each.
    """

    folder: Path
    shape: PretrainedShape
    batch: int
    length: int


def question(settings: InferConfig) -> Question:
    """What the configuration asks, its prompts as long as the tokenizer makes them.

    Raises:
        ConfigError, CheckpointError: if the folder or a prompt will not do.
    """
    if settings.prompt is not None:
        given = read(settings)
        return Question(given.folder, given.model.shape, len(given.prompts.batches[0]), given.model.length)
    be_quiet()
    folder = folder_of(settings)
    return Question(folder, shape_of(folder), settings.workload.batch_size, settings.workload.seq_len)


def trace_answer(
    settings: InferConfig, parallel: ParallelConfig, machine: Machine | None, asked: Question, gpu: bool = True
) -> tuple[Traced, list[tuple[str, Trace]]]:
    """Partition a model without weights as rank 0 of the group that is there, and trace a prompt and a token.

    Args:
        gpu: see `Tracer`.

    Raises:
        PartitionError, CheckpointError: if it cannot be made.
    """
    tracer = Tracer(gpu=gpu)
    with tracer, torch.no_grad():
        model = _built(settings, parallel, asked)
        weights = sum(each.nbytes for each in model.parameters())
        ids = torch.zeros(asked.batch, asked.length + 1, dtype=torch.long, device=DEVICE)
        prompt, first = _pass(tracer, model, ids[:, :-1], ids[:, :-1], None)
        token, last = _pass(tracer, model, ids[:, -1:], ids, first.cache)
    forms = _Forms(settings, parallel, machine, asked)
    cost = forms.cost
    passes = [
        assess(
            PROMPT,
            replace(prompt, peak=prompt.peak - first.reserved),
            machine,
            predicted=cost.prefill_bytes(asked.length),
            flops=forms.prompt_flops(),
            activations=forms.one(asked.length, 1).activation_bytes(),
            seconds=forms.prompt_seconds(),
        ),
        assess(
            TOKEN,
            replace(token, peak=token.peak - (last.reserved - first.reserved)),
            machine,
            predicted=cost.step_bytes(),
            flops=None,
            activations=None,
            seconds=forms.token_seconds(),
        ),
    ]
    return Traced(
        method=MethodLabel(to_name(parallel), parallel.m, parallel.n, forms.schedules),
        ranks=parallel.ranks,
        weights=Pair(weights, cost.weight_bytes()),
        passes=passes,
        cache=Pair(last.held, cost.cache_bytes(asked.length + 1)),
        idle_ranks=dist.get_world_size() - parallel.ranks,
    ), [(PROMPT, prompt), (TOKEN, token)]


@dataclass(frozen=True)
class _Cached:
    """A cache after a pass; bytes that are held of keys and values, and that are reserved for them."""

    cache: Any
    held: int
    reserved: int


def _built(settings: InferConfig, parallel: ParallelConfig, asked: Question) -> PreTrainedModel:
    model = empty(asked.folder, DTYPES[settings.precision])
    for module in model.modules():
        for name, buffer in module._buffers.items():  # which have numbers: a configuration's own
            module._buffers[name] = None if buffer is None else buffer.to(DEVICE)
    if parallel.method == "helix":
        helixify(model, Mesh(to_grid(parallel), device_type=DEVICE.type), to_phases(parallel))
    return model.eval()


def _pass(tracer: Tracer, model: PreTrainedModel, ids: Tensor, seen: Tensor, cache: Any) -> tuple[Trace, _Cached]:
    """One call of the model, as `generate` makes it.

    Args:
        seen: [B, S], all tokens so far.
    """
    places = torch.arange(seen.shape[1] - ids.shape[1], seen.shape[1], device=DEVICE)
    with tracer.passing(model) as trace:
        out = model(
            input_ids=ids,
            attention_mask=torch.ones_like(seen),
            position_ids=places.repeat(len(ids), 1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    found = out.past_key_values
    held = sum(_bytes(layer, "held_bytes") for layer in found.layers)
    return trace, _Cached(found, held, sum(_bytes(layer, "reserved_bytes") for layer in found.layers))


def _bytes(layer: Any, name: str) -> int:
    """Of a layer's keys and values; transformers' own has exactly what it holds."""
    return int(getattr(layer, name, layer.keys.nbytes + layer.values.nbytes))


class _Forms:
    """Closed forms of a question, and the planner's times."""

    def __init__(
        self, settings: InferConfig, parallel: ParallelConfig, machine: Machine | None, asked: Question
    ) -> None:
        self.asked, self.machine, self.grid = asked, machine, to_grid(parallel)
        self.itemsize = ITEMSIZE[settings.precision]
        self.phases = Phases("batch", "batch")
        if parallel.method == "helix":
            self.phases = resolve(to_phases(parallel), parallel.m, asked.shape.kv_heads // parallel.n, asked.batch)
        self.schedules = Schedules(self.phases.prefill, self.phases.decode)
        if parallel.method != "helix":
            self.schedules = Schedules(None)
        self.cost = GenerationCost(asked.shape, self.grid, self.phases, asked.batch, self.itemsize)
        self.shape = planned(asked.shape, gated=len(FAMILIES[asked.shape.family].mlp.columns) == 2)
        kind = "helix" if parallel.method == "helix" else "data"
        self._layout = Layout(kind, parallel.m, parallel.n, prefill=self.phases.prefill, decode=self.phases.decode)
        self._work = Work("generate", asked.batch, asked.length, 1, settings.precision)

    def one(self, length: int, vocab: int) -> TransformerCost:
        """A pass over whole sequences, with a head for `vocab` words."""
        options = AttentionOptions(self.phases.prefill, residual="replicated")
        shape = replace(self.shape, vocab=vocab)
        return TransformerCost(shape, self.grid, options, self.asked.batch, length, self.itemsize)

    def prompt_flops(self) -> int | None:
        """With the head of each prompt's last token; experts are cut otherwise than in the form."""
        if self.shape.experts:
            return None
        tokens, width = self.asked.batch * self.asked.length, self.shape.width
        layers = self.one(self.asked.length, 1).flops(0) - 2 * tokens * width  # whose word is rank 0's
        return layers + 2 * self.asked.batch * width * -(-self.shape.vocab // self.grid.ranks)

    def prompt_seconds(self) -> Seconds | None:
        if self.machine is None:
            return None
        answering = Estimator(self.shape, self.machine, self._work).answering
        layer, ends = answering.prefill(self._layout, self.asked.batch, self.asked.length, 1)
        return layer.forward * self.shape.layers + ends

    def token_seconds(self) -> Seconds | None:
        if self.machine is None:
            return None
        answering = Estimator(self.shape, self.machine, self._work).answering
        layer, ends = answering.step(self._layout, self.asked.batch, self.asked.length + 1, 1)
        return layer * self.shape.layers + ends
