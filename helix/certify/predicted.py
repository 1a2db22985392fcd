"""What a rank sends, by the closed forms: forward from `helix.partition`, backward and gradients derived from it.

The backward of each collective is in `helix.comm.collectives`; by bytes of one rank:

    forward                                    backward
    all-gather, sharded work                   reduce-scatter of as much
    reduce-scatter                             all-gather of as much
    all-reduce, sharded work                   all-reduce of as much
    all-reduce leaving a replicated stream     nothing
    entering a replicated stream: nothing      all-reduce of the stream
    all-gather of the papers' concatenation    nothing, but the split after it gathers a sharded stream
    all-to-all                                 all-to-all, by the transposed shares

Of shares s_j, S together, that the m ranks of a group are dealt, rank j sends S - s_j when it deals and gets back what
it was dealt, so that it sends (m - 1) s_j when it collects: each is the other's backward. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from helix.certify.bounds import ITEMSIZE
from helix.certify.cases import Case, Subject
from helix.partition import wire
from helix.partition.decoding import GenerationCost
from helix.partition.families import PretrainedShape
from helix.partition.phases import Phases
from helix.partition.transformer_cost import ROUTER_ITEMSIZE, TransformerCost

_DEALT = ("attention.qkv", "attention.q")
_SAME = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather", "all_reduce": "all_reduce"}


def cost(subject: Subject, case: Case) -> TransformerCost:
    """Closed forms of the model in this case; of its first layer, in which the layer's own are."""
    return TransformerCost(
        subject.shape if case.what == "model" else replace(subject.shape, layers=1, experts=0),
        subject.grid,
        replace(subject.options, schedule=case.schedule),
        subject.batch,
        subject.length,
        ITEMSIZE[case.precision],
        subject.ep_size,
    )


def layer_forward(subject: Subject, case: Case, rank: int) -> Counter[str]:
    found = cost(subject, case).bytes(rank)
    return Counter({key: count for key, count in found.items() if "/attention." in key})


def model_forward(subject: Subject, case: Case, rank: int, capacities: Sequence[int]) -> Counter[str]:
    return cost(subject, case).bytes(rank, capacities)


def backward(
    subject: Subject, case: Case, forward: Sequence[Counter[str]], rank: int, blocks: list[str]
) -> Counter[str]:
    """What a rank sends in the backward pass.

    Args:
        forward: what each rank of its m-group sends in the forward pass, by slice.
        blocks: that sharded work enters, "attention" and so on, as often as it does.
    """
    _, j = subject.grid.coordinates(rank)
    itemsize, p = ITEMSIZE[case.precision], subject.grid.ranks
    tokens, width = subject.batch * subject.length, subject.shape.width
    sharded = subject.options.residual == "sharded"
    out: Counter[str] = Counter()
    for key in forward[j]:
        collective, name = key.split("/", 1)
        count, everyone = forward[j][key], sum(each[key] for each in forward)
        if collective == "all_to_all" and name in _DEALT:
            out[f"{key}.grad"] += everyone - (subject.grid.m - 1) * count
        elif collective == "all_to_all" and name == "attention.out":
            out[f"{key}.grad"] += (everyone - count) // (subject.grid.m - 1)
        elif name.startswith(("attention.concat", "experts")) or (not sharded and name.endswith(".leave")):
            continue
        else:
            out[f"{_SAME[collective]}/{name}.grad"] += count
    if p > 1:
        for block in blocks:
            if not sharded:
                out[f"all_reduce/{block}.enter.grad"] += wire.all_reduce(tokens * width, p, itemsize)
        shard = wire.all_gather(-(-tokens // p) * width, p, itemsize)
        if sharded and subject.options.aggregate == "concat":
            out["all_gather/attention.leave.grad"] += blocks.count("attention") * shard
        if not sharded and subject.shape.experts and case.what == "model":
            out["all_gather/experts.leave.grad"] += subject.shape.layers * shard
    return +out


def gradient_sync(subject: Subject, case: Case) -> Counter[str]:
    """What reducing the gradients sends: norms over the axes that hold them, experts over their replicas."""
    shape, grid, itemsize = subject.shape, subject.grid, ITEMSIZE[case.precision]
    model = case.what == "model"
    layers = shape.layers if model else 1
    out: Counter[str] = Counter()
    qk_norms = 2 * layers * shape.head_dim // grid.m if shape.qk_norm else 0
    norms = (2 * shape.layers + 1) * shape.width if model and subject.options.residual == "sharded" else 0
    routers = shape.layers * shape.experts * shape.width if model else 0
    for axis, size, numbers in (("slice", grid.m, norms), ("head", grid.n, norms + qk_norms)):
        if size > 1:
            out[f"all_reduce/gradient.{axis}"] = _summed(size, [(numbers, itemsize), (routers, ROUTER_ITEMSIZE)])
    replicas = grid.ranks // subject.ep_size
    if model and shape.experts and replicas > 1:
        own = shape.layers * shape.experts // subject.ep_size * shape.expert_parameters
        out["all_reduce/gradient.replica"] = wire.all_reduce(own, replicas, itemsize)
    return +out


def _summed(size: int, parts: list[tuple[int, int]]) -> int:
    """One all-reduce for each dtype."""
    sizes: Counter[int] = Counter()
    for numbers, itemsize in parts:
        sizes[itemsize] += numbers
    return sum(wire.all_reduce(numbers, size, itemsize) for itemsize, numbers in sizes.items())


def generation(subject: Subject, case: Case) -> GenerationCost:
    """Closed forms of one layer that generates."""
    shape = subject.shape
    assert case.decode is not None
    one = PretrainedShape(
        "llama", 1, shape.width, shape.heads, shape.kv_heads, shape.head_dim, 1, 1, context=subject.length
    )
    return GenerationCost(
        one, subject.grid, Phases(case.schedule, case.decode), subject.grid.m, ITEMSIZE[case.precision]
    )


def of_attention(found: Counter[str]) -> Counter[str]:
    """Those of the layer's attention among a model's collectives."""
    return Counter({key: count for key, count in found.items() if "/attention." in key})
