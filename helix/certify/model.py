"""One case of the whole model on one rank: logits, every parameter's gradient, every byte."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from helix.certify import predicted
from helix.certify.answers import DTYPES, deviation, exact, own_part
from helix.certify.bounds import model_bounds, scales
from helix.certify.cases import Case, Subject
from helix.certify.certificate import Check, Found
from helix.certify.comparing import copies, local_gradient, traffic
from helix.comm.mesh import Mesh
from helix.comm.record import record
from helix.models.reference import Reference
from helix.models.transformer import Transformer
from helix.parallel.gradients import reduce_gradients
from helix.partition.function import Function, function_of
from helix.partition.transformer_cost import expert_capacity
from helix.ranks.process_group import own_device

_EXPERT = re.compile(
    r"(?P<block>.*mlp)\.moe\.deepspeed_moe\.experts\.deepspeed_experts\.(?P<number>\d+)\.(?P<key>\w+)"
)
_ROUTER = re.compile(r"(?P<block>.*mlp)\.moe\.deepspeed_moe\.gate\.wg\..*")
_DRAWS = 20
_CLEAR = 2.0**-18  # of logits of size 1 in fp32, 64 roundings


class Model:
    """The single device's model, in fp64 from the weights that the run has, with its tokens and its answer.

    Args:
        narrow: whether attention has narrow heads, as `perslice` computes.
    """

    def __init__(self, subject: Subject, narrow: bool, dtype: torch.dtype, seed: int, device: torch.device) -> None:
        self.reference = Reference(subject.shape, subject.grid, subject.options, narrow, torch.float64).to(device)
        self.reference.init_weights(seed)
        with torch.no_grad():
            for name, weight in self.reference.named_weights().items():
                if not name.endswith("router"):  # which is fp32 in any run
                    weight.copy_(weight.to(dtype))
        self.tokens = self._tokens(subject, seed).to(device)
        self.logits = self.reference(self.tokens)
        generator = torch.Generator().manual_seed(seed)
        self.grad = exact(torch.randn(self.logits.shape, generator=generator)).to(device)
        weights = self.reference.named_weights()
        found = torch.autograd.grad(self.logits, list(weights.values()), self.grad, materialize_grads=True)
        self.gradients = {name: each.double() for name, each in zip(weights, found, strict=True)}
        self.scales = scales(
            {name: float(each.abs().max()) for name, each in self.gradients.items()}, subject.shape.heads
        )
        self.logits = self.logits.detach()

    def _tokens(self, subject: Subject, seed: int) -> Tensor:
        """Tokens[B, T] whose experts are clear: rounding sends others to another expert, which is no small error."""
        tokens = torch.zeros(subject.batch, subject.length, dtype=torch.long)
        for draw in range(_DRAWS):
            generator = torch.Generator().manual_seed(seed + draw)
            tokens = torch.randint(subject.shape.vocab, tokens.shape, generator=generator)
            if not subject.shape.experts or self._margin(tokens) > _CLEAR:
                break
        return tokens

    @torch.no_grad()
    def _margin(self, tokens: Tensor) -> float:
        """The least difference of logits between the last expert that a token is sent to and the next."""
        top_k, experts = self.reference.shape.top_k, self.reference.shape.experts
        if top_k == experts:
            return float("inf")
        self.reference(tokens)
        ranked = [gates.log().topk(top_k + 1).values for gates in self.reference.gates]
        return min(float((each[:, -2] - each[:, -1]).min()) for each in ranked)


class Models:
    """Each when it is first asked for."""

    def __init__(self, subject: Subject, seed: int, device: torch.device) -> None:
        self.subject, self.seed, self.device = subject, seed, device
        self._known: dict[tuple[Function, str], Model] = {}

    def of(self, case: Case) -> Model:
        function = function_of(replace(self.subject.options, schedule=case.schedule), self.subject.grid)
        key = function, case.precision
        if key not in self._known:
            dtype = DTYPES[case.precision]
            self._known[key] = Model(self.subject, function.slices > 1, dtype, self.seed, self.device)
        return self._known[key]


def check_model(subject: Subject, case: Case, mesh: Mesh, models: Models) -> Found:
    """The model on this rank against the single device's."""
    expected, shape, rank = models.of(case), subject.shape, mesh.model.rank
    options = replace(subject.options, schedule=case.schedule)
    with own_device(mesh.device_type):
        model = Transformer(shape, mesh, options, subject.ep_size, DTYPES[case.precision])
    model.init_weights(models.seed)
    columns = slice(
        model.embedding.owned.start, model.embedding.owned.stop
    )  # of the vocabulary, as `shard_range` cuts
    with record() as forward:
        logits = model(expected.tokens)
    with record() as back:
        logits.backward(expected.grad[:, columns].to(logits.dtype))
    with record() as sync:
        reduce_gradients(model, mesh)
    bound, gradient_bound = model_bounds(subject, case.precision, expected.reference.slices)
    error = deviation(logits, expected.logits[:, columns], float(expected.logits.abs().max()))
    checks = [Check("logits", error, bound)]
    for name, parameter in model.named_parameters():
        whole_name, part = _own(name, parameter, expected.gradients, model, subject, rank)
        error = deviation(local_gradient(parameter), part, expected.scales[whole_name])
        checks.append(Check(f"gradient of {whole_name}", error, gradient_bound))
    group, _ = subject.grid.coordinates(rank)
    routes = [each.tolist() for each in expected.reference.routes]
    sent = [
        predicted.model_forward(subject, case, each, _capacities(subject, routes, each))
        for each in (subject.grid.rank(group, j) for j in range(subject.grid.m))
    ]
    blocks = shape.layers * (["attention"] if shape.experts else ["attention", "mlp"]) + ["head"]
    counted = [
        *traffic("forward", forward, sent[mesh.slice.rank]),
        *traffic("backward", back, predicted.backward(subject, case, sent, rank, blocks)),
        *traffic("gradient sync", sync, predicted.gradient_sync(subject, case)),
    ]
    held = [each for name, parameter in model.named_parameters() for each in copies(name, parameter)]
    return Found(tuple(checks), tuple(counted), tuple(held))


def _capacities(subject: Subject, routes: list[list[list[int]]], rank: int) -> list[int]:
    """Rows of the fullest expert in a rank's expert group, of each layer."""
    p = subject.grid.ranks
    tokens = -(-subject.batch * subject.length // p)
    found = (expert_capacity(each, subject.shape.experts, p, subject.ep_size, tokens) for each in routes)
    return [each[rank // subject.ep_size] for each in found]


def _own(
    name: str, parameter: Tensor, wholes: dict[str, Tensor], model: Transformer, subject: Subject, rank: int
) -> tuple[str, Tensor]:
    """A parameter's name in the single device's model, and this rank's part of its gradient there."""
    if expert := _EXPERT.fullmatch(name):
        block = model.get_submodule(expert["block"])
        assert isinstance(block.first_expert, int)
        whole = f"{expert['block']}.experts.{block.first_expert + int(expert['number'])}.{expert['key']}"
        return whole, wholes[whole][None]
    if router := _ROUTER.fullmatch(name):
        return f"{router['block']}.router", wholes[f"{router['block']}.router"]
    if ".attention." in name:
        return name, own_part(name.rpartition(".")[2], wholes[name], subject, rank)
    assert isinstance(parameter, DTensor)
    part = distribute_tensor(wholes[name], parameter.device_mesh, parameter.placements, src_data_rank=None)
    return name, part.to_local()
