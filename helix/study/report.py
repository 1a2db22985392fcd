"""`report.json`: what one run measured, and what it takes to repeat it.

Scripts and notebooks read this file, so keys are added, never renamed. Units are in the names.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from helix.planner.chosen import Chosen
from helix.study.provenance import command, git_commit, versions
from helix.study.statistics import Paired, Summary
from helix.study.traffic import BetweenHosts, HostRanks
from helix.study.traffic import Traffic as Traffic

# Keys that are there where they say something.
_SELDOM = {
    "relative_error_to_h_heads",
    "tokens_equal",
    "differing_prompts",
    "first_difference",
    "kv_cache_predicted",
    "paired_ttft",
    "chosen",
    "output_sha256",
    "between_hosts",
    "hosts",
}


NOT_VERIFIED = "not_verified"


@dataclass(frozen=True)
class Schedules:
    """The schedule of each phase, resolved (never `auto`); None for a phase that did not run, or has none."""

    prefill: str | None
    decode: str | None = None


@dataclass(frozen=True)
class MethodLabel:
    """How the model was partitioned: m slices, n head groups, `data` replicas, `stage` pipeline stages."""

    name: str
    m: int
    n: int
    schedule: Schedules
    data: int = 1
    stage: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank; `predicted` is the closed form's figure for `weights`, None where there is none.

    `kv_cache` is of generation, at an answer's end, and `activations_peak` without it.
    """

    weights: int
    activations_peak: int
    peak: int
    predicted: int | None
    kv_cache: int = 0
    kv_cache_predicted: int | None = None


@dataclass(frozen=True)
class Accuracy:
    """Relative error (Frobenius norm) of the output against a single-device FP32 oracle.

    Args:
        reference: "mha_fp32_single", or "mha_narrow_heads" for `perslice`, which computes attention with
            heads * m heads of width head_dim / m, or "own_model_single" for a peer with a model of its own, or
            NOT_VERIFIED, whose error is not a number.
        relative_error: against that reference.
        relative_error_to_h_heads: for `perslice`, against the attention with `heads` heads that the model's
            name promises; None for the exact schedules.
        tokens_equal: of generation, whose reference is "transformers_single": whether every answer has its tokens;
            `relative_error` is then of the logits after the prompts.
        differing_prompts: those whose answers differ, counted from 1.
        first_difference: of the first of them, the token at which it does, counted from 1.
        output_sha256: of the logits of the first batch, dtype and shape included: two runs with one digest gave the
            same bits, on whichever hosts. Other grids, schedules, devices or numbers of threads sum in another order.
    """

    reference: str
    relative_error: float
    relative_error_to_h_heads: float | None = None
    tokens_equal: bool | None = None
    differing_prompts: tuple[int, ...] | None = None
    first_difference: int | None = None
    output_sha256: str | None = None


@dataclass(frozen=True)
class Collectives:
    """The collectives of a decode step, on the mean rank.

    Args:
        per_step, per_layer: how many; those of embedding and head are in the former only.
        transfer_us, wait_us: of one of them, from when its last rank had come to it, and until then.
        share_of_step: of a recorded step, that a rank was in them, waiting included.
    """

    per_step: int
    per_layer: float
    transfer_us: Summary
    wait_us: Summary
    share_of_step: Summary


@dataclass(frozen=True)
class Generation:
    """What was generated: of each prompt, in order, tokens before and after, and the text of the main method.

    `settings` is the configuration's `generate` node.
    """

    prompt_tokens: Sequence[int]
    new_tokens: Sequence[int]
    prompts: Sequence[str]
    answers: Sequence[str]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Bubble:
    """Share of a step in which a rank of a pipeline waits: measured, and by the closed form.

    Measured is all of the time in which the mean rank waits to receive, transfers included, and after its own end;
    the form has equally long stages and no transfers. Where ranks share cores, others compute in it.
    """

    measured: float | None
    predicted: float


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights come from: a checkpoint's folder, and the optimizer steps behind it."""

    path: str
    step: int


@dataclass(frozen=True)
class Tracked:
    """Where the W&B run is; `path` is relative to the report's folder."""

    mode: str
    path: str | None
    id: str | None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of one method. Every figure in `Summary` form holds one value for each independent run.

    Args:
        comm_ms_per_token: time in collectives a token, on the mean rank (the papers' "TPOT"), without
            `wait_ms_per_token`: from when the last rank of a collective had come to it.
        wait_ms_per_token: time a token that the mean rank waited for others to come to a collective.
        compute_ms_per_token: the rest of the step. The three are of recorded steps and None where ranks have no
            common clock; where more ranks than cores share a machine, all three hold time in which another rank
            had the core. For methods whose collectives are another library's (tp, pp, cp, ulysses, autotp, hf_tp)
            it holds the cost of watching every operator too: compare step times, not this. Of generation the three
            are of a decode step, as `tpot_ms` is: one token of each of the batch's answers.
        idle_ranks: ranks of the launch that the method left without work.
        bubble: of a pipeline.
        ttft_ms, tpot_ms: of generation: from the prompt handed over to the first token, and mean time of a token
            after it. A step is then one of these, of all prompts at once.
        prefill_bytes_per_rank: as `comm_bytes_per_rank_per_step`, of the prompts.
        collectives: of generation.
        between_hosts: of a step, where there are several.
    """

    method: MethodLabel
    tokens_per_s: Summary
    step_ms: Summary
    comm_ms_per_token: Summary | None
    wait_ms_per_token: Summary | None = None
    compute_ms_per_token: Summary | None = None
    memory_bytes_per_rank: Memory
    comm_bytes_per_rank_per_step: Traffic
    accuracy: Accuracy
    idle_ranks: int = 0
    bubble: Bubble | None = None
    ttft_ms: Summary | None = None
    tpot_ms: Summary | None = None
    prefill_bytes_per_rank: Traffic | None = None
    collectives: Collectives | None = None
    between_hosts: BetweenHosts | None = None


@dataclass(frozen=True, kw_only=True)
class Rival(Measurement):
    """A method that took turns with the main one; in `paired` it is the baseline.

    `paired` is of step times, `paired_ttft` of times to the first token.
    """

    paired: Paired
    paired_ttft: Paired | None = None


@dataclass(frozen=True)
class Refusal:
    """A method that did not run, and what it said."""

    method: MethodLabel
    error: str


@dataclass(frozen=True, kw_only=True)
class Report(Measurement):
    """One run, whose main method's figures stand at the top.

    Args:
        started_at: `now()`, taken when the run began.
        parallel, model, hardware, workload: the composed config's groups as plain dicts.
        checkpoint: whose weights all methods ran with; None for weights drawn from the seed.
        baselines: the methods measured beside this one, in the order in which they were named.
        settings: `helix.config.schema.digest` of the configuration.
        chosen: what `parallel=auto` chose the layout for, and what was predicted of it.
        hosts: where there are several.
    """

    started_at: str
    world_size: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any]
    hardware: dict[str, Any]
    workload: dict[str, Any]
    precision: str
    seed: int
    checkpoint: Checkpoint | None = None
    generation: Generation | None = None
    baselines: Sequence[Rival | Refusal] = ()
    wandb: Tracked | None = None
    settings: str | None = None
    chosen: Chosen | None = None
    hosts: HostRanks | None = None
    versions: dict[str, str] = field(default_factory=versions)
    command: str = field(default_factory=command)
    git_commit: str | None = field(default_factory=git_commit)


def to_json(report: Report) -> str:
    """The report as JSON. What is not finite becomes null: JSON has neither NaN nor infinity."""
    content = plain(report)
    for measured in (content, *content["baselines"]):
        for part in (measured, measured.get("accuracy", {}), measured.get("memory_bytes_per_rank", {})):
            for key in _SELDOM & part.keys():
                if part[key] is None:
                    del part[key]
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write(report: Report, path: Path | str) -> Path:
    """Write `report.json`."""
    return write_whole(to_json(report), path)


def write_whole(text: str, path: Path | str) -> Path:
    """Write a file whole or not at all: a reader never meets half of it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def plain(value: Any) -> Any:
    """A dataclass and what it holds as JSON's own types (`asdict` fails on a defaultdict before Python 3.12)."""
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
