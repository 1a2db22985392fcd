"""`helix.verify`: every case on every rank, and the certificate."""

from __future__ import annotations

import importlib.util
import platform
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from helix.certify.answers import Answers
from helix.certify.cases import PRECISIONS, Case, Subject, cases_of, legal, subject_of
from helix.certify.certificate import Certificate, Found, Row
from helix.comm.debug import checked
from helix.comm.mesh import Mesh
from helix.config.check import check_device
from helix.config.environment import local_ranks
from helix.config.schema import PRETRAINED, ConfigError, ModelConfig, to_shape
from helix.flight.checking import Disagreement
from helix.partition.grid import Grid
from helix.partition.options import AttentionOptions
from helix.partition.shape import TransformerShape
from helix.planner import catalogue
from helix.ranks.agreement import agree_on
from helix.ranks.launch import launch
from helix.ranks.process_group import own_device
from helix.study.progress import progress_bar
from helix.study.provenance import command, git_commit, machine, now, versions

TIMEOUT_S = 120.0  # of a collective that waits for a rank which is not coming, where debug mode does not see it
LIMIT_S = 20.0  # of a rank that comes to no collective of a case: many on few cores compute at different speeds
_NO_TRANSFORMERS = "decoding, whose cache is a Hugging Face model's: the package transformers is not installed"


@dataclass(frozen=True)
class Plan:
    """What is going to be verified.

    Args:
        subject: the function, at the size that is verified.
        cases: each thing that is held against the oracle.
        seed: of weights and inputs.
        omitted: what is not verified, and why.
    """

    subject: Subject
    cases: tuple[Case, ...]
    seed: int
    omitted: tuple[str, ...]


def verify(
    grid: Grid,
    model: str | ModelConfig | TransformerShape = "dense",
    schedule: str = "auto",
    precisions: Sequence[str] = PRECISIONS,
    *,
    precision: str = "fp32",
    options: AttentionOptions | None = None,
    ep_size: int | None = None,
    device: str | None = None,
    seed: int = 0,
) -> Certificate:
    """Hold a model on a grid against a single device, on the ranks at hand: exact but for rounding, or not.

    Compared are the attention layer's output and every gradient, the whole model's, and what is decoded from a shared
    cache, in each precision against fp64; bytes against the closed forms, collective by collective, on every rank; and
    what several ranks hold between them. Bounds are those of `helix.certify.bounds`.

    Inside a function that `helix.launch`, torchrun or SLURM runs on ranks, all ranks call it and get the same
    certificate; anywhere else it forks the grid's ranks.

    Args:
        grid: m feature slices x n head groups.
        model: of conf/model by name, a Hugging Face folder's path, its configuration, or dims.
        schedule: "auto" for every one that is legal (any of them may be what it comes to), or one by name.
        precisions: of the layer and of decoding, of "fp64", "fp32", "bf16", "fp16".
        precision: of the whole model.
        options: how attention is laid over the grid; its own schedule is not read.
        ep_size: ranks that share one set of experts; None for the largest legal.
        device: "cpu" or "cuda"; None for GPUs if each rank has one.
        seed: of weights and inputs.

    Raises:
        ConfigError, PartitionError: if the grid does not fit, or ranks have not the GPUs that were asked for,
            before anything is launched.
    """
    shape, whole = _shape(model)
    subject = subject_of(shape, grid, options, ep_size, whole)
    plan = plan_of(subject, schedule, precisions, precision, seed)
    if dist.is_initialized():
        return certify(plan, Mesh(grid, device_type=device or _running_device()))
    return run(plan, check_device(device or "auto", local_ranks(grid.ranks)))


def plan_of(subject: Subject, schedule: str, precisions: Sequence[str], precision: str, seed: int = 0) -> Plan:
    """The cases of a schedule, or of every legal one.

    Raises:
        ConfigError: if a precision is none.
        PartitionError: if the schedule is not legal here.
    """
    if unknown := [each for each in (*precisions, precision) if each not in PRECISIONS]:
        raise ConfigError(f"there is no precision {unknown[0]!r}; choose of: {', '.join(PRECISIONS)}")
    if not precisions:
        raise ConfigError(f"at least one precision is needed, of: {', '.join(PRECISIONS)}")
    omitted = []
    if subject.shape.experts and precision in ("bf16", "fp16"):
        omitted.append(
            f"the whole model in {precision}, in which rounding sends tokens to other experts; it is verified in fp32"
        )
        precision = "fp32"
    if not subject.whole:
        omitted.append("the whole model, which is transformers' own: infer.py prompt=.. holds its tokens against it")
    found = cases_of(subject, legal(subject) if schedule == "auto" else [schedule], precisions, precision)
    if not subject.shape.causal:
        omitted.append("decoding, of which a model that is not causal has none")
    elif importlib.util.find_spec("transformers") is None:
        omitted.append(_NO_TRANSFORMERS)
        found = [case for case in found if case.what != "decode"]
    return Plan(subject, tuple(found), seed, tuple(omitted))


def run(plan: Plan, device: str) -> Certificate:
    """The certificate, from ranks that are forked, or those that torchrun or SLURM started."""
    _load(plan, device)

    asked = {"plan": asdict(plan)} | {"device": device}

    def on_rank() -> Certificate | None:
        agree_on(asked)
        found = certify(plan, Mesh(plan.subject.grid, device_type=device))
        return found if dist.get_rank() == 0 else None

    grid = plan.subject.grid
    certificate = launch(on_rank, ranks=grid.ranks, device=device, timeout_s=TIMEOUT_S, slices=grid.m)[0]
    assert certificate is not None
    return certificate


def certify(plan: Plan, mesh: Mesh) -> Certificate:
    """All cases on the ranks of a mesh, which all call it; the same certificate on each."""
    device = own_device(mesh.device_type)
    mine: list[Found] = []
    progress = progress_bar(stderr=True)
    with progress:
        task = progress.add_task("verify", total=len(plan.cases))
        check = _Checks(plan, mesh, device)
        with checked(LIMIT_S):
            for case in plan.cases:
                progress.update(task, description=case.name)
                progress.refresh()
                try:
                    mine.append(check.check(case))
                except Disagreement as error:
                    raise Disagreement(f"{case.name}: {error}") from None
                progress.advance(task)
    about = _about() | {"made_at": now()} if dist.get_rank() == 0 else {}
    ours = (mine, socket.gethostname(), _name(device), about)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    rows = tuple(Row(case, tuple(each[0][number] for each in everyone)) for number, case in enumerate(plan.cases))
    hosts, devices = (tuple(each[place] for each in everyone) for place in (1, 2))
    return Certificate(plan.subject, rows, dist.get_backend(), hosts, devices, everyone[0][3], plan.omitted)


class _Checks:
    """What a rank needs to check any case; oracles are shared between cases."""

    def __init__(self, plan: Plan, mesh: Mesh, device: torch.device) -> None:
        self.plan, self.mesh, self.device = plan, mesh, device
        self.answers = Answers(plan.subject, plan.seed, device)
        self._models: Any = None

    def check(self, case: Case) -> Found:
        subject = self.plan.subject
        if case.what == "layer":
            from helix.certify.layer import check_layer

            return check_layer(subject, case, self.mesh, self.answers)
        if case.what == "decode":
            from helix.certify.decoding import check_decode  # brings transformers

            return check_decode(subject, case, self.mesh, self.answers)
        from helix.certify.model import Models, check_model

        self._models = self._models or Models(subject, self.plan.seed, self.device)
        return check_model(subject, case, self.mesh, self._models)


def _load(plan: Plan, device: str) -> None:
    """Import what the ranks need before they are forked, so that they share it."""
    kinds = {case.what for case in plan.cases}
    if "decode" in kinds:
        import helix.certify.decoding
    if "model" in kinds and plan.subject.shape.experts:
        from helix.models.experts import load_deepspeed

        load_deepspeed(device)
    import helix.certify.layer
    import helix.certify.model  # noqa: F401


def _shape(model: str | ModelConfig | TransformerShape) -> tuple[TransformerShape, bool]:
    """The dims, and whether Helix's own transformer is built of them."""
    if isinstance(model, TransformerShape):
        return model, True
    config = catalogue.model(model) if isinstance(model, str) else model
    return to_shape(config), builds(config)


def builds(model: ModelConfig) -> bool:
    """Whether Helix's own transformer has what the model has."""
    return model.kind != PRETRAINED and not (model.gated or model.tied or model.shared_hidden) and model.top_k <= 2


def _running_device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


@cache
def _about() -> dict[str, Any]:
    return {"versions": versions(), "machine": machine(), "command": command(), "git_commit": git_commit()}
