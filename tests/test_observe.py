"""Collectives of other libraries: counted by the formulas, told once, with spans that the ranks can match."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from ranks import on_ranks
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard

from helix import Grid
from helix.comm import collectives
from helix.comm.mesh import Mesh
from helix.comm.observe import _Observer, observe
from helix.comm.record import Call, Log, Span, record
from helix.comm.stream import Sharded
from helix.comm.transport import _all_gather_into, _reduce_scatter_into
from helix.models.experts import Experts, load_deepspeed
from helix.partition import wire

X, ITEM = 12, 4  # float32 values that each rank holds
Op = Callable[[Tensor, dist.ProcessGroup], object]

# name: (what a rank runs, the key, bytes by (ranks, own rank)); 2 and 3 ranks divide X.
OPS: dict[str, tuple[Op, str, Callable[[int, int], int]]] = {
    "all_reduce": (
        lambda x, g: dist.all_reduce(x, group=g),
        "all_reduce",
        lambda p, r: wire.all_reduce(X, p, ITEM),
    ),
    "asynchronous all_reduce": (
        lambda x, g: wait_of(dist.all_reduce(x, group=g, async_op=True)),
        "all_reduce",
        lambda p, r: wire.all_reduce(X, p, ITEM),
    ),
    "all_gather": (
        lambda x, g: _all_gather_into(x.new_empty(X * g.size()), x, group=g),
        "all_gather",
        lambda p, r: wire.all_gather(X, p, ITEM),
    ),
    "all_gather of a list": (
        lambda x, g: dist.all_gather([torch.empty_like(x) for _ in range(g.size())], x, group=g),
        "all_gather",
        lambda p, r: wire.all_gather(X, p, ITEM),
    ),
    "reduce_scatter": (
        lambda x, g: _reduce_scatter_into(x.new_empty(X // g.size()), x, group=g),
        "reduce_scatter",
        lambda p, r: wire.reduce_scatter(X, p, ITEM),
    ),
    "reduce_scatter of a list": (
        lambda x, g: dist.reduce_scatter(x.new_empty(X // g.size()), list(x.chunk(g.size())), group=g),
        "reduce_scatter",
        lambda p, r: wire.reduce_scatter(X, p, ITEM),
    ),
    "all_to_all": (
        lambda x, g: dist.all_to_all_single(torch.empty_like(x), x, group=g),
        "all_to_all",
        lambda p, r: wire.all_to_all(X, X // p, ITEM),
    ),
    "uneven all_to_all": (
        # Everything of everyone goes to rank 0, in rows of 2.
        lambda x, g: dist.all_to_all_single(
            x.new_empty(X // 2 * g.size() if g.rank() == 0 else 0, 2),
            x.view(-1, 2),
            [X // 2 if g.rank() == 0 else 0] * g.size(),
            [X // 2] + [0] * (g.size() - 1),
            group=g,
        ),
        "all_to_all",
        lambda p, r: X * ITEM if r else 0,
    ),
    "broadcast": (
        lambda x, g: dist.broadcast(x, 1, group=g),
        "broadcast",
        lambda p, r: (2 if r == 1 else 1) * (p - 1) * X // p * ITEM,
    ),
    "functional all_reduce": (
        lambda x, g: functional.all_reduce(x, "sum", g) + 1,
        "all_reduce",
        lambda p, r: wire.all_reduce(X, p, ITEM),
    ),
    "functional all_gather": (
        lambda x, g: functional.all_gather_tensor(x, 0, g) + 1,
        "all_gather",
        lambda p, r: wire.all_gather(X, p, ITEM),
    ),
    "functional reduce_scatter": (
        lambda x, g: functional.reduce_scatter_tensor(x, "sum", 0, g) + 1,
        "reduce_scatter",
        lambda p, r: wire.reduce_scatter(X, p, ITEM),
    ),
    "functional all_to_all": (
        lambda x, g: functional.all_to_all_single(x, None, None, g) + 1,
        "all_to_all",
        lambda p, r: wire.all_to_all(X, X // p, ITEM),
    ),
    "functional broadcast": (
        lambda x, g: functional.broadcast(x, 1, g) + 1,
        "broadcast",
        lambda p, r: (2 if r == 1 else 1) * (p - 1) * X // p * ITEM,
    ),
}
MODES: Sequence[Callable[[], AbstractContextManager[object]]] = (
    torch.inference_mode,
    torch.no_grad,
    torch.enable_grad,
)


def wait_of(work: dist.Work | None) -> bool:
    assert work is not None
    return work.wait()


def world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def check_formulas() -> int:
    group = world_group()
    everyone, r = tuple(range(group.size())), group.rank()
    for mode in MODES:
        for name, (op, collective, formula) in OPS.items():
            with mode():
                before = time.monotonic()
                with record() as log, observe({group.group_name: "ranks"}):
                    op(torch.ones(X), group)
                after = time.monotonic()
            key = f"{collective}/ranks"
            assert dict(log.bytes) == {key: formula(group.size(), r)}, name
            assert dict(log.calls) == {key: 1}, name
            (span,) = log.spans
            assert span[:2] == (key, everyone)
            assert before <= span.start_s == span.blocked_s < span.end_s <= after, name
    return len(OPS)


# The lists of torch.distributed's collectives and its functional ones are deprecated in turn, by version.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_and_spans_of_every_collective(ranks: int) -> None:
    assert on_ranks(ranks, check_formulas) == [len(OPS)] * ranks


def check_told_once() -> None:
    mesh = Mesh(Grid(m=2, n=1))
    x = torch.ones(4)
    with record() as log, observe({}), observe({}):
        collectives.all_reduce(x, mesh.slice, "own")
        dist.all_reduce(x)
        dist.all_reduce(x, group=mesh.device_mesh.get_group("head"))  # of one rank
    assert dict(log.calls) == {"all_reduce/own": 1, f"all_reduce/{world_group().group_desc}": 1}
    with observe({}):
        dist.all_reduce(x)  # nobody listens


def test_what_is_told_already_and_groups_of_one_are_not_counted() -> None:
    on_ranks(2, check_told_once)


def check_names() -> None:
    name = world_group().group_name
    with record() as log, observe({name: "experts", f"all_reduce/{name}": "experts.capacity"}):
        dist.all_reduce(torch.ones(1))
        dist.all_to_all_single(torch.ones(2), torch.ones(2))
    assert set(log.bytes) == {"all_reduce/experts.capacity", "all_to_all/experts"}


def test_one_collective_of_a_group_can_have_its_own_name() -> None:
    on_ranks(2, check_names)


def check_dtensor() -> None:
    mesh = Mesh(Grid(m=2, n=1)).weights["slice"]
    x = DTensor.from_local(torch.ones(X // 2), mesh, [Shard(0)])
    with torch.inference_mode(), record() as log, observe({mesh.get_group().group_name: "tp"}):
        y = (x.redistribute(mesh, [Replicate()]) + 1).to_local()
    assert torch.equal(y, torch.full((X,), 2.0))
    assert dict(log.bytes) == {"all_gather/tp": wire.all_gather(X // 2, 2, ITEM)}


def test_dtensor_is_seen_through() -> None:
    on_ranks(2, check_dtensor)


def check_backward() -> None:
    x = torch.ones(X, requires_grad=True)
    with record() as log, observe({}):
        functional.all_gather_tensor_autograd(x * 2, 0, world_group()).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((X,), 4.0))
    assert {key.partition("/")[0]: calls for key, calls in log.calls.items()} == {"all_gather": 1, "reduce_scatter": 1}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_autograd_sees_the_same_graph() -> None:
    on_ranks(2, check_backward)


def transfer_both_ways(log: Log) -> list[Span]:
    """Each rank posts a send and a receive before it waits for either: waiting in the first would hang both."""
    r = dist.get_rank()
    got = torch.empty(X)
    ops = [dist.P2POp(dist.isend, torch.full((X,), float(r)), 1 - r), dist.P2POp(dist.irecv, got, 1 - r)]
    for _ in range(2):
        for work in dist.batch_isend_irecv(ops if r else ops[::-1]):
            work.wait()
        assert torch.equal(got, torch.full((X,), 1.0 - r))
    return log.spans


def check_transfers() -> list[Span]:
    with torch.inference_mode(), record() as log, observe({world_group().group_name: "pipeline"}):
        spans = transfer_both_ways(log)
    assert dict(log.bytes) == {"send/pipeline": 2 * X * ITEM, "recv/pipeline": 0}
    assert dict(log.calls) == {"send/pipeline": 2, "recv/pipeline": 2}
    assert all(span.start_s <= span.blocked_s < span.end_s for span in spans)
    return spans


def test_the_two_ends_of_a_transfer_match() -> None:
    spans = on_ranks(2, check_transfers)
    for source in (0, 1):
        sent = [span for span in spans[source] if span.key.startswith("send")]
        received = [span for span in spans[1 - source] if span.key.startswith("recv")]
        assert [span.ranks for span in sent] == [span.ranks for span in received] == [(source, 1 - source)] * 2
        assert all(a.start_s < b.end_s for a, b in zip(sent, received, strict=True))


def check_background() -> list[Span]:
    """Rank 0 sends, computes for 50 ms, and waits; rank 1 waits at once."""
    with record() as log, observe({}):
        dist.barrier()
        if dist.get_rank() == 0:
            work = dist.isend(torch.ones(X), 1)
            time.sleep(0.05)
            wait_of(work)
        else:
            wait_of(dist.irecv(torch.ones(X), 0))
        unwaited = dist.isend(torch.ones(1), 1 - dist.get_rank())
        dist.recv(torch.ones(1), 1 - dist.get_rank())
    wait_of(unwaited)
    return log.spans


def test_a_transfer_blocks_from_when_the_rank_waits_for_it() -> None:
    (sent, *_), (received, *_) = spans = on_ranks(2, check_background)
    assert sent.blocked_s - sent.start_s >= 0.05
    assert received.blocked_s - received.start_s < 0.05
    for (unwaited,) in ([span for span in rank[1:] if span.key.startswith("send")] for rank in spans):
        assert unwaited.start_s == unwaited.blocked_s == unwaited.end_s


def test_one_work_can_stand_for_a_batch_of_transfers() -> None:
    """As NCCL gives it out; the operators of the batch then return none."""
    mode, device, batch, other = _Observer({}), torch.device("cpu"), dist.Work(), dist.Work()
    calls = [Call("send/x", (0, 1), device), Call("recv/x", (1, 0), device), Call("send/x", (0, 1), device)]
    mode._remember(calls[0], None)
    mode._remember(calls[1], None)
    mode._transfers[other] = calls[2]
    for work, ended in ((other, [2]), (batch, [0, 1]), (batch, [])):
        before = [call.span() for call in calls]
        with mode.waiting(work):
            time.sleep(0.001)
        changed = [index for index, call in enumerate(calls) if call.span() != before[index]]
        assert changed == ended
    assert all(call.span().end_s - call.span().blocked_s >= 0.001 for call in calls)


MICROBATCHES = 3


def check_pipeline() -> list[Span]:
    """PyTorch's own pipeline of two stages, forward."""
    rank = dist.get_rank()
    stage = PipelineStage(torch.nn.Linear(X, X, bias=False), rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, MICROBATCHES)
    x = torch.ones(2 * MICROBATCHES, X)
    with torch.no_grad():
        schedule.eval(*([x] if rank == 0 else []))  # the first step exchanges shapes
        with record() as log, observe({world_group().group_name: "stages"}):
            schedule.eval(*([x] if rank == 0 else []))
    key = "recv/stages" if rank else "send/stages"
    assert dict(log.bytes) == {key: 0 if rank else x.numel() * ITEM}
    assert dict(log.calls) == {key: MICROBATCHES}
    return log.spans


def test_a_pipelines_transfers_match() -> None:
    sent, received = on_ranks(2, check_pipeline)
    for a, b in zip(sent, received, strict=True):
        assert a.ranks == b.ranks == (0, 1)
        assert a.start_s < b.end_s
        assert a.start_s <= a.blocked_s < a.end_s


def check_experts() -> None:
    mesh, width, tokens = Mesh(Grid(m=2, n=1)), 8, 6
    layer = Experts(width, 16, 4, 1, 2, mesh, Sharded(mesh.model))
    layer.init_weights(1, "experts")
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(dist.get_rank()))
    # The outer one has another name for the group: whoever knows more about it is the inner one.
    with torch.inference_mode(), record() as log, observe({}):
        layer(x, (2 * tokens, 1))
    capacity = layer.moe.deepspeed_moe.exp_counts.max()
    dist.all_reduce(capacity, dist.ReduceOp.MAX)
    own = capacity.item() * (4 // 2) * width * ITEM  # rows of the experts that this rank has
    assert dict(log.bytes) == {
        "all_to_all/experts": 2 * own,
        "all_reduce/experts.capacity": wire.all_reduce(1, 2, 8),
    }
    assert dict(log.calls) == {"all_to_all/experts": 2, "all_reduce/experts.capacity": 1}


def test_deepspeeds_routing_is_counted() -> None:
    load_deepspeed("cpu")
    on_ranks(2, check_experts)
