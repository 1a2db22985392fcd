"""Processes that say they are on other hosts are renumbered, and send between them what is predicted."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import Queue
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helix.comm.record import record
from helix.parallel.methods.method import Job, Layout
from helix.parallel.methods.partitioned import Partitioned
from helix.parallel.strategy import RunningRanks
from helix.partition.grid import Grid, PartitionError
from helix.partition.options import AttentionOptions
from helix.partition.placement import ACROSS, AUTO, INSIDE, RANK_ORDER
from helix.partition.shape import TransformerShape
from helix.ranks import process_group
from helix.ranks.hosts import Hosts
from helix.ranks.launch import launch
from helix.ranks.process_group import hosts
from helix.study.destinations import Destinations
from helix.study.trial import digest_of

CYCLIC = ("a", "b", "a", "b")  # SLURM's: the host of each of its processes
UNEVEN = ("a", "b", "b", "b")


def _process(names: tuple[str, ...], number: int, port: int, answers: Queue[Any], fn: Callable[[], Any]) -> None:
    os.environ |= {
        "RANK": str(number),
        "WORLD_SIZE": str(len(names)),
        "LOCAL_RANK": str(names[:number].count(names[number])),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    process_group.own_host = lambda: names[number]
    try:
        answers.put((number, fn()))
    except Exception as error:
        answers.put((number, error))


def on_hosts(names: tuple[str, ...], fn: Callable[[], Any]) -> list[Any]:
    """What `fn` returns, or raises, in each of a launcher's processes, which say that their hosts are these."""
    context = get_context("fork")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers = context.Queue()
    processes = [
        context.Process(target=_process, args=(names, number, port, answers, fn)) for number in range(len(names))
    ]
    for each in processes:
        each.start()
    try:
        found = dict(answers.get(timeout=60) for _ in names)
        for each in processes:
            each.join(10)
    finally:
        for each in processes:
            each.kill()
    return [found[number] for number in range(len(names))]


@dataclass(frozen=True)
class Seen:
    """What one process saw of itself in the ranks' work."""

    launchers: int
    rank: int
    variable: str
    lightnings: int
    hosts: Hosts
    sent: dict[str, dict[str, Counter[int]]]
    predicted: dict[str, dict[str, Counter[tuple[int, int]]]]
    digests: dict[str, str | None]


SCHEDULES = {
    # 3 samples and 7 tokens: m=2 divides neither.
    "batch": AttentionOptions("batch"),
    "rows": AttentionOptions("rows", residual="replicated"),
    "heads": AttentionOptions("heads", aggregate="concat"),
    "gather": AttentionOptions("gather", aggregate="concat", concat="flat"),
    "score": AttentionOptions("score"),
}


def see(number: int) -> Seen:
    """Run each schedule once, and note where its bytes went."""
    torch.set_num_threads(1)
    sent, predicted, digests = {}, {}, {}
    shape = TransformerShape(
        layers=1, width=48, heads=4, kv_heads=4, head_dim=12, mlp_hidden=64, vocab=64, qk_norm=True
    )
    job = Job(shape, 3, 7, torch.float32, torch.device("cpu"), 0)
    tokens = torch.zeros(3, 7, dtype=torch.long)
    for name, options in SCHEDULES.items():
        method = Partitioned(job, Layout(Grid(2, 2), options=options))
        log = Destinations()
        with torch.inference_mode(), record(log):
            output = method.step(tokens)
        whole = method.whole_logits(output)
        digests[name] = None if whole is None else digest_of(whole)
        sent[name], predicted[name] = log.between(hosts()), method.predicted_between([], hosts().of)
    return Seen(
        number, dist.get_rank(), os.environ["RANK"], RunningRanks().global_rank(), hosts(), sent, predicted, digests
    )  # fmt: skip


def crossing(seen: list[Seen], name: str) -> dict[str, Counter[tuple[int, int]]]:
    """What was executed, by collective and pair of hosts."""
    out: dict[str, Counter[tuple[int, int]]] = {}
    for each in seen:
        for key, to in each.sent[name].items():
            for host, nbytes in to.items():
                out.setdefault(key, Counter())[each.hosts.of[each.rank], host] += nbytes
    return out


def test_ranks_are_renumbered_and_send_what_is_predicted() -> None:
    def both() -> list[list[Seen]]:
        number = int(os.environ["RANK"])
        found = [launch(lambda: see(number), ranks=4, slices=2, placement=each) for each in (AUTO, ACROSS)]
        assert os.environ["RANK"] == str(number)
        return found

    answers = on_hosts(CYCLIC, both)
    assert not any(isinstance(each, Exception) for each in answers), answers
    for launchs, wanted, order, taken in (
        (0, (0, 0, 1, 1), [0, 2, 1, 3], INSIDE),
        (1, (0, 1, 0, 1), [0, 1, 2, 3], ACROSS),
    ):
        seen: list[Seen] = answers[0][launchs]
        assert [each.launchers for each in seen] == order
        assert [each.rank for each in seen] == [0, 1, 2, 3]
        assert all(int(each.variable) == each.lightnings == each.rank for each in seen)
        assert {each.hosts for each in seen} == {Hosts(("a", "b"), wanted, taken)}
        for name in SCHEDULES:
            executed = crossing(seen, name)
            assert executed == seen[0].predicted[name]
            in_slices = [key for key in executed if key.startswith("all_to_all") or "scores" in key or "qk" in key]
            assert bool(in_slices) == (taken == ACROSS), name
    # What torch keeps of a process's parts is not what it has as another rank.
    inside, across = (answers[0][launchs][0].digests for launchs in (0, 1))
    assert inside == across
    assert None not in inside.values()


def test_unequal_hosts_keep_the_launchers_order_or_are_refused_on_every_rank() -> None:
    def ask() -> tuple[Hosts, str]:
        kept = launch(hosts, ranks=4, slices=2)[0]
        with pytest.raises(PartitionError) as refused:
            launch(hosts, ranks=4, slices=2, placement=INSIDE)
        return kept, str(refused.value)

    answers = on_hosts(UNEVEN, ask)
    assert len(set(answers)) == 1, answers
    kept, refused = answers[0]
    assert kept == Hosts(("a", "b"), (0, 1, 1, 1), RANK_ORDER)
    assert refused.startswith("parallel.placement=slices_inside needs whole slice groups on every host, and m=2 does")


def test_one_host_has_nothing_to_spread_slices_over() -> None:
    with pytest.raises(
        PartitionError, match="slices_across spreads slice groups over hosts, and all ranks are on one"
    ):
        launch(hosts, ranks=2, slices=2, placement=ACROSS)
