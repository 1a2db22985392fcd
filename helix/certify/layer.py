"""One case of the attention layer on one rank: output, every gradient, every byte."""

from __future__ import annotations

import torch
from torch import Tensor

from helix.attention import HelixAttention
from helix.certify import predicted
from helix.certify.answers import DTYPES, Answer, Answers, deviation, own_part
from helix.certify.bounds import layer_bounds
from helix.certify.cases import Case, Subject
from helix.certify.certificate import Check, Copy, Found
from helix.certify.comparing import copies, copy, local_gradient, traffic
from helix.comm.mesh import Mesh
from helix.comm.parameters import local
from helix.comm.record import record
from helix.comm.stream import make_stream
from helix.parallel.gradients import reduce_gradients
from helix.partition.function import function_of
from helix.partition.options import AttentionOptions
from helix.ranks.process_group import own_device


def check_layer(subject: Subject, case: Case, mesh: Mesh, answers: Answers) -> Found:
    options = AttentionOptions(
        case.schedule,
        subject.options.aggregate,
        subject.options.concat,
        subject.options.projection,
        subject.options.residual,
    )
    function = function_of(options, subject.grid)
    answer = answers.of(function)
    layer = build(subject, options, mesh, DTYPES[case.precision], answer)
    mine, padding = _own_tokens(subject, mesh)
    x = _shard(answer.x, mine, padding, float("nan")).to(DTYPES[case.precision]).requires_grad_()
    grad = _shard(answer.grad, mine, padding, 1e3).to(x.dtype)  # of padding rows, which must reach nothing
    with record() as forward:
        y = layer(x, (subject.batch, subject.length))
    with record() as back:
        y.backward(grad)
    with record() as sync:
        reduce_gradients(layer, mesh)
    bounds = layer_bounds(subject, case.precision, function.slices)
    checks = _checks(subject, bounds, layer, answer, y.detach(), x, mine, mesh.model.rank)
    sent = [predicted.layer_forward(subject, case, rank) for rank in _group(subject, mesh.model.rank)]
    back_sent = predicted.backward(subject, case, sent, mesh.model.rank, ["attention"])
    counted = [
        *traffic("forward", forward, sent[mesh.slice.rank]),
        *traffic("backward", back, back_sent),
        *traffic("gradient sync", sync, predicted.gradient_sync(subject, case)),
    ]
    return Found(tuple(checks), tuple(counted), tuple(_copies(layer, y, x, len(mine) == len(answer.x))))


def build(
    subject: Subject, options: AttentionOptions, mesh: Mesh, dtype: torch.dtype, answer: Answer
) -> HelixAttention:
    """The layer with this rank's part of the answer's weights, as `Grid` deals them out."""
    shape = subject.shape
    with own_device(mesh.device_type):
        layer = HelixAttention(
            shape.width,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            mesh=mesh,
            schedule=options.schedule,
            causal=shape.causal,
            rope=shape.rope,
            qk_norm=shape.qk_norm,
            aggregate=options.aggregate,
            concat=options.concat,
            projection=options.projection,
            stream=make_stream(options.residual, mesh.model),
            dtype=dtype,
            initialize=False,
        )
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            local(parameter).copy_(own_part(name, answer.weights[name], subject, mesh.model.rank))
    return layer


def _group(subject: Subject, rank: int) -> list[int]:
    """The ranks of a rank's m-group."""
    group, _ = subject.grid.coordinates(rank)
    return [subject.grid.rank(group, j) for j in range(subject.grid.m)]


def _own_tokens(subject: Subject, mesh: Mesh) -> tuple[range, int]:
    """The tokens that this rank's part of the residual stream holds, and its number of padding rows."""
    tokens = subject.batch * subject.length
    if subject.options.residual == "replicated":
        return range(tokens), 0
    size = -(-tokens // mesh.model.size)
    start = mesh.model.rank * size
    mine = range(min(start, tokens), min(start + size, tokens))
    return mine, size - len(mine)


def _shard(whole: Tensor, mine: range, padding: int, filler: float) -> Tensor:
    rows = whole[mine.start : mine.stop]
    return torch.cat([rows, rows.new_full((padding, whole.shape[1]), filler)])


def _checks(
    subject: Subject,
    bounds: dict[str, float],
    layer: HelixAttention,
    answer: Answer,
    y: Tensor,
    x: Tensor,
    mine: range,
    rank: int,
) -> list[Check]:
    own = slice(mine.start, mine.stop)
    assert x.grad is not None
    scale = float(answer.y.abs().max())
    checks = [Check("output", deviation(y[: len(mine)], answer.y[own], scale), bounds["y"])]
    gradient = deviation(x.grad[: len(mine)], answer.gradients["x"][own], answer.scales["x"])
    checks.append(Check("gradient of the input", gradient, bounds["x"]))
    for name, parameter in layer.named_parameters():
        expected = own_part(name, answer.gradients[name], subject, rank)
        error = deviation(local_gradient(parameter), expected, answer.scales[name])
        checks.append(Check(f"gradient of {name}", error, bounds[name]))
    return checks


def _copies(layer: HelixAttention, y: Tensor, x: Tensor, whole: bool) -> list[Copy]:
    """What several ranks hold: with a replicated stream also the output, and the gradient of the input."""
    found = [each for name, parameter in layer.named_parameters() for each in copies(name, parameter)]
    if whole:
        assert x.grad is not None
        found += [copy("output", "the grid", y), copy("gradient of the input", "the grid", x.grad)]
    return found
