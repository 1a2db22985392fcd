"""From what every rank found to the figures of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from helix.config.generation import to_phases
from helix.config.methods import to_name
from helix.config.schema import ParallelConfig, to_grid
from helix.generation.measure import Found, phases
from helix.generation.passes import Moment
from helix.generation.tokens import Prompts
from helix.partition.decoding import GenerationCost
from helix.partition.families import PretrainedShape
from helix.partition.phases import resolve
from helix.study.report import Accuracy, Collectives, Measurement, Memory, MethodLabel, Rival, Schedules, Traffic
from helix.study.split import Parts, Step, split
from helix.study.statistics import Summary, paired, summarize

# Collectives of the whole model, that no layer has.
_ENDS = ("embedding", "positions", "head")
# Of a recorded answer: the prompt, and one decode step that warms up.
_UNCOUNTED = 2


@dataclass(frozen=True)
class Model:
    """What closed forms need to know of the model and of what it is given."""

    shape: PretrainedShape
    prompts: Prompts
    itemsize: int

    def cost(self, parallel: ParallelConfig) -> GenerationCost | None:
        """The closed forms of the first batch; None for a method without."""
        if parallel.method != "helix":
            return None
        grid, batch = to_grid(parallel), len(self.prompts.batches[0])
        chosen = resolve(to_phases(parallel), grid.m, self.shape.kv_heads // grid.n, batch)
        return GenerationCost(self.shape, grid, chosen, batch, self.itemsize)

    @property
    def length(self) -> int:
        """Tokens of the first batch's prompts, padding included."""
        return max(len(self.prompts.ids[index]) for index in self.prompts.batches[0])


def label(parallel: ParallelConfig, model: Model) -> MethodLabel:
    """A method as reports name it; schedules are those of the first batch."""
    cost = None
    if parallel.method == "helix" and model.shape.kv_heads % parallel.n == 0:  # else it will refuse
        cost = model.cost(parallel)
    schedules = Schedules(cost.phases.prefill, cost.phases.decode) if cost else Schedules(None)
    return MethodLabel(to_name(parallel), parallel.m, parallel.n, schedules)


def measurement(parallel: ParallelConfig, ranks: Sequence[Found], model: Model, accuracy: Accuracy) -> Measurement:
    """The figures of one method from those of all ranks.

    Args:
        ranks: in their order; rank 0 has a part of every method's model.
    """
    cost = model.cost(parallel)
    first = ranks[0]
    times = [phases(run) for run in first.timed]
    ttft = [each[0] for each in times]
    tpot = [each[1] for each in times if each[1] is not None]
    step = tpot or ttft  # one token: no step but the prompt's
    parts = _parts(ranks)
    comm, wait, compute = (None, None, None) if parts is None else _per_step(parts)
    return Measurement(
        method=label(parallel, model),
        tokens_per_s=summarize(_rates(first)),
        step_ms=_ms(step),
        comm_ms_per_token=comm,
        wait_ms_per_token=wait,
        compute_ms_per_token=compute,
        memory_bytes_per_rank=_memory(ranks, cost, model),
        comm_bytes_per_rank_per_step=_traffic(ranks, None if cost is None else [cost.step_bytes()] * len(ranks), -1),
        accuracy=accuracy,
        idle_ranks=first.idle_ranks,
        ttft_ms=_ms(ttft),
        tpot_ms=_ms(tpot) if tpot else None,
        prefill_bytes_per_rank=_traffic(
            ranks, None if cost is None else [cost.prefill_bytes(model.length, rank) for rank in range(len(ranks))], 0
        ),
        collectives=None if parts is None else _collectives(first, parts, model.shape.layers),
    )


def rival(found: Measurement, main: Measurement) -> Rival:
    """A baseline's figures with the comparisons to the main method, paired by run."""
    own = {name: getattr(found, name) for name in Measurement.__dataclass_fields__}
    assert found.ttft_ms is not None
    assert main.ttft_ms is not None
    return Rival(
        **own,
        paired=paired(found.step_ms.runs, main.step_ms.runs),
        paired_ttft=paired(found.ttft_ms.runs, main.ttft_ms.runs),
    )


def _ms(seconds: Sequence[float]) -> Summary:
    return summarize([each * 1e3 for each in seconds])


def _rates(first: Found) -> list[float]:
    """Tokens/s of each run: those after the first of each answer, in the time after the first."""
    rates = []
    passes = len(first.timed[0]) // len(first.counts)
    new = passes * sum(count - 1 for batch in first.counts for count in batch)
    every = passes * sum(count for batch in first.counts for count in batch)
    for run in first.timed:
        spent = sum(tokens[-1] - tokens[0] for _, tokens in run)
        rates.append(new / spent if new else every / sum(tokens[-1] - begin for begin, tokens in run))
    return rates


def _steps(ranks: Sequence[Found], run: int) -> list[list[Moment]]:
    """The decode steps of a run that count, each as all ranks saw it; those without a part of the model have none."""
    seen = [rank.moments[run][_UNCOUNTED:] for rank in ranks if rank.moments[run]]
    return [list(step) for step in zip(*seen, strict=True)]


def _parts(ranks: Sequence[Found]) -> list[Parts] | None:
    """Of each run, the mean decode step on the mean rank, in parts; None without steps or a common clock."""
    out = []
    hosts = [rank.host for rank in ranks if rank.moments[0]]
    for run in range(len(ranks[0].moments)):
        found = []
        for step in _steps(ranks, run):
            both = zip(step, hosts, strict=True)
            parts = split([Step(each.start_s, each.end_s, each.spans, host) for each, host in both])
            if parts is None:
                return None
            found.append(parts.mean)
        if not found:
            return None
        count = len(found)
        names = ("compute_s", "transfer_s", "wait_s")
        out.append(Parts(*(sum(getattr(each, name) for each in found) / count for name in names)))
    return out


def _per_step(parts: Sequence[Parts]) -> tuple[Summary, Summary, Summary]:
    """Transfer, wait and compute in ms of a decode step: as the time per output token is, a token of each answer."""
    return (
        _ms([each.transfer_s for each in parts]),
        _ms([each.wait_s for each in parts]),
        _ms([each.compute_s for each in parts]),
    )


def _collectives(first: Found, parts: Sequence[Parts], layers: int) -> Collectives | None:
    calls = first.moments[0][-1].calls
    count = sum(calls.values())
    if not count:
        return None
    inside = sum(number for key, number in calls.items() if not key.partition("/")[2].startswith(_ENDS))
    whole = [each.transfer_s + each.wait_s + each.compute_s for each in parts]
    return Collectives(
        per_step=count,
        per_layer=inside / layers,
        transfer_us=summarize([each.transfer_s / count * 1e6 for each in parts]),
        wait_us=summarize([each.wait_s / count * 1e6 for each in parts]),
        share_of_step=summarize(
            [(each.transfer_s + each.wait_s) / step for each, step in zip(parts, whole, strict=True)]
        ),
    )


def _memory(ranks: Sequence[Found], cost: GenerationCost | None, model: Model) -> Memory:
    """Of the rank that needs the most."""
    number, heaviest = max(enumerate(ranks), key=lambda each: each[1].weight_bytes + each[1].growth_bytes)
    cached = None
    if cost is not None and len(model.prompts.batches) == 1:
        steps = max(map(max, ranks[0].counts)) - 1  # the last token is not fed in again
        cached = cost.cache_bytes(model.length + steps, number)
    return Memory(
        weights=heaviest.weight_bytes,
        activations_peak=max(0, heaviest.growth_bytes - heaviest.cache_bytes),
        peak=heaviest.weight_bytes + heaviest.growth_bytes,
        predicted=None if cost is None else cost.weight_bytes(),
        kv_cache=heaviest.cache_bytes,
        kv_cache_predicted=cached,
    )


def _traffic(ranks: Sequence[Found], predicted: Sequence[Counter[str]] | None, step: int) -> Traffic:
    """One rank's bytes stand for all: one that disagrees with its closed form if there is any, else the busiest."""
    if step and len(ranks[0].moments[0]) == 1:  # no decode step was made
        return Traffic({}, None if predicted is None else {})
    executed = [dict(+rank.moments[0][step].moved) if rank.moments[0] else {} for rank in ranks]
    expected = [None] * len(ranks) if predicted is None else [dict(each) for each in predicted]
    both = list(zip(executed, expected, strict=True))
    worst = max(both, key=lambda pair: (pair[1] is not None and pair[0] != pair[1], sum(pair[0].values())))
    return Traffic(*worst)
