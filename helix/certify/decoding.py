"""One case of decoding on one rank: a prompt, then tokens one by one from the cache that the ranks share.

The layer's own projections make queries, keys and values of all tokens; what is verified is what generating adds: the
gather of whole heads, the cut of the prompt, the cache that each rank keeps its part of, and the merge (`decode`). The
oracle's cache is its whole sequence: row t of causal attention is what a cache of t tokens gives to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helix.attention import HelixAttention
from helix.certify import predicted
from helix.certify.answers import DTYPES, Answers, deviation
from helix.certify.bounds import decode_bound
from helix.certify.cases import Case, Subject
from helix.certify.certificate import Check, Found, Traffic
from helix.certify.comparing import copy, traffic
from helix.certify.layer import build
from helix.comm import collectives
from helix.comm.mesh import Mesh
from helix.comm.record import record
from helix.partition.function import Function
from helix.partition.options import AttentionOptions
from helix.partition.phases import Phases
from helix.pretrained.attention import attend
from helix.pretrained.cache import DealtLayer
from helix.pretrained.sharing import Place


class _Module(nn.Module):
    """What transformers' attention modules are to `attend`."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.helix = place
        self.is_causal = True


class _Generating:
    """One layer that goes on from token to token.

    Args:
        layer: whose projections and ends are used.
        mesh: its ranks.
        phases: how the prompt and the cache are cut.
    """

    def __init__(self, layer: HelixAttention, mesh: Mesh, phases: Phases) -> None:
        self.layer, self.mesh = layer, mesh
        self.place = Place(mesh.slice, phases)
        self.module, self.cache = _Module(self.place), DealtLayer(self.place)

    def call(self, qkv: Tensor) -> Tensor:
        """The next tokens' qkv[B, T, (H + 2K)@head, D@slice] -> [B, T, E] on every rank."""
        parts = collectives.all_gather(qkv.unsqueeze(0), self.mesh.slice, "attention.qkv")
        whole = parts.movedim(0, -2).flatten(-2) if self.mesh.grid.m > 1 else qkv
        heads, kv_heads = (
            count // self.mesh.grid.n for count in (self.layer.layout.heads, self.layer.layout.kv_heads)
        )
        q, k, v = whole.transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
        keys, values = self.cache.update(k, v)
        out, _ = attend(self.module, q, keys, values, None)
        return self.layer.project_out(out).view(*qkv.shape[:2], -1)


@torch.no_grad()
def check_decode(subject: Subject, case: Case, mesh: Mesh, answers: Answers) -> Found:
    assert case.decode is not None
    options = AttentionOptions(residual="replicated")
    answer, dtype = answers.of(Function(), case.queries), DTYPES[case.precision]
    layer = build(subject, options, mesh, dtype, answer)
    batch, length = subject.grid.m, subject.length  # samples are dealt out evenly
    x, y = (z.unflatten(0, (subject.batch, length))[:batch] for z in (answer.x, answer.y))
    qkv = layer.project_in(x.flatten(0, 1).to(dtype), (batch, length), exact=True)
    one, first = _Generating(layer, mesh, Phases(case.schedule, case.decode)), length - subject.steps
    with record() as prompt:
        outs = [one.call(qkv[:, :first])]
    with record() as steps:
        outs += [one.call(qkv[:, token : token + 1]) for token in range(first, length)]
    bound, scale = decode_bound(subject, case.precision, case.queries), float(answer.y.abs().max())
    checks = [Check("output of the prompt", deviation(outs[0], y[:, :first], scale), bound)]
    for number, out in enumerate(outs[1:]):
        token = slice(first + number, first + number + 1)
        checks.append(Check(f"output of step {number + 1}", deviation(out, y[:, token], scale), bound))
    counted = _counted(subject, case, mesh.model.rank, first)
    found = [*traffic("prompt", prompt, counted[0]), *traffic("step", steps, counted[1])]
    held = predicted.generation(subject, case).cache_bytes(length, mesh.model.rank)
    found.append(Traffic("cache", "keys and values", one.cache.held_bytes, held))
    return Found(tuple(checks), tuple(found), (copy("output", "the grid", torch.cat(outs, 1)),))


def _counted(subject: Subject, case: Case, rank: int, first: int) -> tuple[dict[str, int], dict[str, int]]:
    """By the closed forms, what a prompt of so many tokens and all steps after it send."""
    cost = predicted.generation(subject, case)
    prompt, step = (predicted.of_attention(each) for each in (cost.prefill_bytes(first, rank), cost.step_bytes()))
    return dict(prompt), {key: subject.steps * count for key, count in step.items()}
