"""Other libraries' methods on gloo ranks: the same function as on one device, the bytes, and their own refusals."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel._attention import _templated_ring_attention

from helix.comm.observe import observe
from helix.comm.parameters import local
from helix.comm.record import record
from helix.models.experts import load_deepspeed
from helix.models.plain import PlainBlock, PlainTransformer
from helix.parallel.methods.build import build
from helix.parallel.methods.context import ContextParallel
from helix.parallel.methods.method import Job, Layout, Method
from helix.partition.grid import Grid, PartitionError
from helix.partition.shape import TransformerShape

BOUND = 1e-5  # fp32 keeps 7 digits; sums in another order lose a few of them
BATCH, LENGTH, SEED = 2, 16, 7
SHAPE = TransformerShape(2, 32, 4, 4, 8, mlp_hidden=48, vocab=40)
THREE = replace(SHAPE, width=24, heads=3, kv_heads=3)
EXPERTS = replace(SHAPE, experts=4, top_k=2)
CPU = torch.device("cpu")


@dataclass
class Outcome:
    """What one rank saw: the error of the logits (rank 0 only), and what was sent and held, found and predicted."""

    error: float | None
    sent: dict[str, int]
    predicted: dict[str, int]
    weight_bytes: int
    predicted_weight_bytes: int | None


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Imported once, not on every rank."""
    from helix.parallel.methods.autotp import AutoTensorParallel
    from helix.parallel.methods.hugging_face import HuggingFace

    load_deepspeed("cpu")
    AutoTensorParallel.load("cpu")
    HuggingFace.load("cpu")
    gc.freeze()  # as in conftest.py


def job_of(shape: TransformerShape, length: int = LENGTH) -> Job:
    return Job(shape, BATCH, length, torch.float32, CPU, SEED)


def tokens_of(job: Job) -> Tensor:
    return torch.randint(0, job.shape.vocab, (job.batch, job.length), generator=torch.Generator().manual_seed(SEED))


def expected_of(method: Method, tokens: Tensor) -> Tensor:
    own = method.expected_logits(tokens)
    if own is not None:
        return own
    single = PlainTransformer(method.job.shape, torch.float32)
    single.init_weights(SEED)
    return single(tokens).flatten(0, 1)


def routes_of(method: Method, tokens: Tensor) -> list[Tensor]:
    """The experts of each token, by layer, of the model on one device."""
    routes: list[Tensor] = []
    if not method.job.shape.experts:
        return routes
    single = PlainTransformer(method.job.shape, torch.float32)
    single.init_weights(SEED)
    for block in single.blocks.values():
        block.mlp.router.register_forward_hook(lambda _, args, out: routes.append(out.topk(2, dim=-1)[1]))
    single(tokens)
    return routes


@torch.inference_mode()
def outcome(method: Method) -> Outcome:
    tokens = tokens_of(method.job)
    with record() as log, observe(method.axes):
        output = method.step(tokens)
    logits = method.whole_logits(output)
    error = None
    if dist.get_rank() == 0:
        assert logits is not None
        expected = expected_of(method, tokens)
        error = ((logits - expected).norm() / expected.norm()).item()
    assert method.model is not None
    held = sum(local(parameter).nbytes for parameter in method.model.parameters())
    predicted = method.predicted(routes_of(method, tokens)) or Counter()
    return Outcome(error, dict(log.bytes), dict(predicted), held, method.predicted_weight_bytes())


def run(name: str, shape: TransformerShape, ranks: int, length: int = LENGTH) -> Outcome:
    return outcome(build(name, job_of(shape, length), Layout(Grid(1, ranks), ep_size=min(2, ranks))))


@torch.inference_mode()
def refusal(name: str, shape: TransformerShape, ranks: int, length: int = LENGTH) -> tuple[str, str]:
    """The kind and the text of the error that this rank got."""
    job = job_of(shape, length)
    try:
        build(name, job, Layout(Grid(1, ranks))).step(tokens_of(job))
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def check(outcomes: Sequence[Outcome], name: str = "") -> None:
    assert outcomes[0].error is not None
    assert outcomes[0].error < BOUND, name
    for each in outcomes:
        assert each.sent == each.predicted, name
        assert each.weight_bytes == each.predicted_weight_bytes, name


def run_each(names: Sequence[str], shape: TransformerShape, ranks: int) -> list[Outcome]:
    return [run(name, shape, ranks) for name in names]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_peer_is_the_same_function(ranks: int) -> None:
    names = ("ulysses", "autotp", "transformers")
    for name, outcomes in zip(names, zip(*on_ranks(ranks, run_each, names, SHAPE, ranks), strict=True), strict=True):
        check(outcomes, name)


def test_heads_that_the_ranks_do_not_divide() -> None:
    """DeepSpeed deals two heads to rank 0 and one to rank 1."""
    ulysses, autotp = zip(*on_ranks(2, run_each, ("ulysses", "autotp"), THREE, 2), strict=True)
    check(ulysses, "ulysses")
    check(autotp, "autotp")
    assert ulysses[0].sent != ulysses[1].sent
    assert autotp[0].weight_bytes > autotp[1].weight_bytes


@pytest.mark.parametrize(("kv_heads", "ranks"), [(2, 2), (2, 4), (1, 2)])
def test_fewer_key_value_heads(kv_heads: int, ranks: int) -> None:
    names, shape = ("ulysses", "autotp"), replace(SHAPE, kv_heads=kv_heads, qk_norm=True)
    for name, outcomes in zip(names, zip(*on_ranks(ranks, run_each, names, shape, ranks), strict=True), strict=True):
        check(outcomes, name)


def test_autotp_leaves_ranks_without_a_head() -> None:
    """With two heads on four ranks two of them have no part in attention; the result is right."""
    outcomes = on_ranks(4, run, "autotp", replace(SHAPE, heads=2, kv_heads=2), 4)
    check(outcomes)
    least = min(each.weight_bytes for each in outcomes)
    assert [each.weight_bytes > least for each in outcomes] == [True, True, False, False]  # N - h = 2 without a head


def test_ulysses_refuses_more_ranks_than_heads() -> None:
    refusals = on_ranks(4, refusal, "ulysses", replace(SHAPE, heads=2, kv_heads=2), 4)
    reason = "Number of key-value heads (2) must be at least the sequence parallel size (4)"
    assert all(kind == "AssertionError" and reason in text for kind, text in refusals)


@pytest.mark.parametrize(("shape", "ranks"), [(THREE, 2), (replace(SHAPE, kv_heads=2), 4)], ids=["3 heads", "2 kv"])
def test_transformers_refuses_heads_that_the_ranks_do_not_divide(shape: TransformerShape, ranks: int) -> None:
    refusals = on_ranks(ranks, refusal, "transformers", shape, ranks)
    assert all(kind == "RuntimeError" and "is invalid for input of size" in text for kind, text in refusals)


def test_context_parallelism_has_no_kernel_on_a_cpu() -> None:
    refusals = on_ranks(2, refusal, "context", SHAPE, 2)
    reason = "_scaled_dot_product_flash_attention_for_cpu.default does not have a sharding strategy registered"
    assert all(kind == "NotImplementedError" and reason in text for kind, text in refusals)


def run_ring(shape: TransformerShape, ranks: int, length: int) -> Outcome:
    """Context parallelism with the CPU's flash kernel put into PyTorch's ring, which knows only CUDA's kernels."""
    method = ContextParallel(job_of(shape, length), Layout(Grid(1, ranks)))
    group, kernel = method.sequence.get_group(), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for block in method.model.blocks.values():
        assert isinstance(block, PlainBlock)
        block.attention.core = lambda q, k, v: _templated_ring_attention(group, 2, kernel, q, k, v, is_causal=True)[0]
    return outcome(method)


@pytest.mark.parametrize(("ranks", "length"), [(2, 16), (4, 16), (4, 12)])
def test_context_parallelism_shards_positions_and_undoes_its_order(ranks: int, length: int) -> None:
    """12 tokens on 4 ranks cannot be dealt from both ends, and are cut in order."""
    check(on_ranks(ranks, run_ring, SHAPE, ranks, length))


def run_all() -> list[Outcome | tuple[str, str]]:
    """Every peer in turn, on heads that two ranks do not divide, and then one that should know nothing of them."""
    peers: list[Outcome | tuple[str, str]] = [refusal("context", THREE, 2), run("ulysses", THREE, 2)]
    peers += [run("autotp", THREE, 2), refusal("transformers", THREE, 2)]
    return [*peers, run("autotp", SHAPE, 2), run("transformers", SHAPE, 2), run("ulysses", EXPERTS, 2)]


def test_peers_of_one_launch_leave_each_other_alone() -> None:
    """Libraries keep process groups and switches in globals, and a refusal may come in the middle of a step."""
    by_rank = on_ranks(2, run_all)
    for number in (1, 2, 4, 5, 6):
        check([rank[number] for rank in by_rank])


def test_ulysses_with_experts() -> None:
    """DeepSpeed's experts for both, so the bytes of their exchange, which routing decides, are foretold as well."""
    outcomes = on_ranks(4, run, "ulysses", EXPERTS, 4)
    check(outcomes)
    assert outcomes[0].sent["all_to_all/experts"] > 0


def run_refusals() -> None:
    for name, library in (("autotp", "DeepSpeed's AutoTP"), ("transformers", "transformers' tensor parallelism")):
        sentence = f"{library} runs the dense model only; use model=dense or another method"
        assert refusal(name, EXPERTS, 2) == (PartitionError.__name__, sentence)
        assert refusal(name, SHAPE, 3) == (
            PartitionError.__name__,
            f"{library} over 3 ranks needs a launch of 3, not of 2",
        )
    for name, method in (("ulysses", "Ulysses"), ("context", "context parallelism")):
        sentence = f"{method} over 2 ranks needs a length that they divide, not 15"
        assert refusal(name, SHAPE, 2, 15) == (PartitionError.__name__, sentence)


def test_what_a_peer_cannot_do_it_says() -> None:
    """Experts, another number of ranks than the launch's, and a length that the ranks do not divide."""
    on_ranks(2, run_refusals)
