"""Which checkpoint is meant, whether it fits a module and its optimizers, and where each of its tensors goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from helix.checkpoint import manifest as files
from helix.checkpoint.agree import from_rank_0, rank, together
from helix.checkpoint.content import CheckpointError, Manifest
from helix.checkpoint.storage import DTYPES, read_alone
from helix.checkpoint.trained import Trained, check_same, trained
from helix.checkpoint.whole import STATE, Whole, elsewhere, names, trained_in, wholes


def prefix_of(found: dict[str, Whole], manifest: Manifest, path: Path) -> str:
    """Under which prefix the checkpoint has the module's names: "", or "model." if the module is that part of it.

    Raises:
        CheckpointError: if there are several such parts, or the module lacks what the checkpoint's whole has.
    """
    saved = {name for name in manifest.tensors if not name.startswith(STATE)}
    if not found or found.keys() & saved:
        return ""
    first = next(iter(found))
    heads = {name.removesuffix(first) for name in saved if name.endswith(f".{first}")}
    fitting = sorted(head for head in heads if all(head + name in saved for name in found))
    if len(fitting) > 1:
        raise CheckpointError(f"{path} has these weights under more than one prefix: {', '.join(fitting)}")
    return fitting[0] if fitting else ""


def check_models(here: dict[str, Trained], prefix: str, manifest: Manifest, path: Path) -> None:
    """Check that the module's transformers are those that were trained, where the checkpoint tells of them.

    Raises:
        CheckpointError: with what differs.
    """
    there = trained(manifest.about)
    for name, own in here.items():
        if (saved := there.get((prefix + name).removesuffix("."))) is not None:
            check_same(saved, own, path)


def check(
    found: dict[str, Whole],
    prefix: str,
    manifest: Manifest,
    path: Path,
    optimizers: Sequence[Optimizer],
    elsewhere: tuple[str, ...] = (),
) -> None:
    """Check names and shapes, and the optimizers' types and groups.

    Args:
        elsewhere: how the names begin of what other ranks have of the module.

    Raises:
        CheckpointError: naming the first that differs, and both sides.
    """
    for name, whole in found.items():
        entry = manifest.tensors.get(prefix + name)
        if entry is None:
            raise CheckpointError(f"the model's {name} is not in the checkpoint {path}")
        if entry.shape != whole.shape:
            raise CheckpointError(
                f"{name} is {list(entry.shape)} in the checkpoint {path}, and {list(whole.shape)} in the model"
            )
    if not prefix:
        for name in manifest.tensors:
            if name not in found and not name.startswith((STATE, *elsewhere)):
                raise CheckpointError(f"{name} of the checkpoint {path} is not in the model")
    saved = manifest.about.optimizers
    if optimizers and len(saved) != len(optimizers):
        raise CheckpointError(f"the checkpoint {path} has {len(saved)} optimizers' state, not {len(optimizers)}'s")
    for index, (optimizer, own) in enumerate(zip(optimizers, saved, strict=False)):
        which = f"optimizer {index} of the checkpoint {path}"
        _check_optimizer(which, optimizer, own, found, prefix, tuple(prefix + each for each in elsewhere))


def _check_optimizer(
    which: str,
    optimizer: Optimizer,
    own: dict[str, Any],
    found: dict[str, Whole],
    prefix: str,
    elsewhere: tuple[str, ...],
) -> None:
    if own["type"] != type(optimizer).__name__:
        raise CheckpointError(f"{which} is {own['type']}, not {type(optimizer).__name__}")
    if len(own["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(f"{which} has {len(own['groups'])} parameter groups, not {len(optimizer.param_groups)}")
    for number, (group, there) in enumerate(zip(optimizer.param_groups, own["groups"], strict=True)):
        here = {prefix + name for name in names(found, group["params"])}
        if differing := sorted(here ^ {name for name in there["params"] if not name.startswith(elsewhere)}):
            raise CheckpointError(
                f"{which} has other parameters in group {number}: {differing[0]} is in one of the two only"
            )


class Target:
    """The tensors that a checkpoint is read into: the module's own, its optimizers' new ones, and copies of experts.

    Attributes:
        tensors: by the checkpoint's names.
    """

    def __init__(
        self, found: dict[str, Whole], prefix: str, manifest: Manifest, optimizers: Sequence[Optimizer]
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._scattered: list[tuple[Whole, Tensor, tuple[Tensor, ...]]] = []
        self._singles: list[tuple[Tensor, list[Tensor]]] = []
        self._states: list[tuple[Optimizer, Tensor, dict[str, Tensor]]] = []
        self._options = list(zip(optimizers, manifest.about.optimizers, strict=False))
        for name, whole in found.items():
            self._add(prefix + name, whole, whole.parts)
        state: dict[str, list[str]] = {}
        for name in manifest.tensors:
            if name.startswith(STATE):
                key, _, parameter = name.removeprefix(STATE).partition("/")
                state.setdefault(parameter, []).append(key)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for name in names(found, group["params"]):
                    for key in state.get(prefix + name, []):
                        self._add_state(f"{STATE}{key}/{prefix}{name}", key, found[name], manifest, optimizer, group)

    def _add(self, name: str, whole: Whole, parts: tuple[Tensor, ...]) -> None:
        gathered = whole.gather(parts)
        self.tensors[name] = gathered
        self._scattered.append((whole, gathered, parts))

    def _add_state(
        self, name: str, key: str, whole: Whole, manifest: Manifest, optimizer: Optimizer, group: dict[str, Any]
    ) -> None:
        entry = manifest.tensors[name]
        dtype = DTYPES[entry.dtype]
        if entry.shape == whole.shape:
            # As an optimizer makes it, whose kernels take no other dtype than the parameter's: the precision may be
            # another than the saved one's.
            own = None if dtype.is_floating_point else dtype
            made = [torch.zeros_like(part, dtype=own, requires_grad=False) for part in whole.parts]
            self._add(name, whole, tuple(made))
        elif entry.shape == ():
            # As torch's own optimizers keep it: with the parameter where a kernel reads it, else on the CPU.
            there = group.get("capturable") or group.get("fused")
            made = [torch.zeros((), dtype=dtype, device=part.device if there else "cpu") for part in whole.parts]
            single = torch.zeros((), dtype=dtype)
            self.tensors[name] = single
            self._singles.append((single, made))
        else:
            raise CheckpointError(f"{name} is {list(entry.shape)} in the checkpoint, and {list(whole.shape)} here")
        self._states += [(optimizer, part, {key: value}) for part, value in zip(whole.parts, made, strict=True)]

    def finish(self) -> None:
        """Once `tensors` are filled: hand them on to the experts and the optimizers."""
        for whole, gathered, parts in self._scattered:
            whole.scatter(gathered, parts)
        for single, made in self._singles:
            for each in made:
                each.copy_(single)
        for optimizer, _ in self._options:
            optimizer.state.clear()
        for optimizer, part, state in self._states:
            optimizer.state.setdefault(part, {}).update(state)
        for optimizer, own in self._options:
            for group, there in zip(optimizer.param_groups, own["groups"], strict=True):
                for key, value in there["options"].items():
                    _set_option(group, key, value)


def _set_option(group: dict[str, Any], key: str, value: Any) -> None:
    now = group.get(key)
    if isinstance(now, Tensor):  # a learning rate that a captured graph reads
        now.fill_(value)
    else:
        group[key] = tuple(value) if isinstance(now, tuple) else value


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose files have been checked, to be read by each process for itself."""

    path: Path
    manifest: Manifest

    def fill(self, module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Load it into a module and its optimizers; see `restore`. Moves nothing between ranks.

        Raises:
            CheckpointError: if it does not fit the module or the optimizers, or cannot be read any more.
        """
        found = wholes(module)
        prefix = prefix_of(found, self.manifest, self.path)
        check_models(trained_in(module), prefix, self.manifest, self.path)
        check(found, prefix, self.manifest, self.path, optimizers, elsewhere(module))
        target = Target(found, prefix, self.manifest, optimizers)
        read_alone(self.path, self.manifest, target.tensors)
        target.finish()


def open_checked(checkpoint: Path | str) -> Opened:
    """A checkpoint that this run has verified already, or chosen by `latest`: its files are not read again here.

    Raises:
        CheckpointError: if there is none, or its manifest is not as it was written.
    """
    return Opened(Path(checkpoint), files.read(Path(checkpoint)))


def choose(checkpoint: Path) -> Opened:
    """The checkpoint that is meant, its files checked by all ranks together.

    Args:
        checkpoint: one, or a folder of them: its newest whole one. Of newer ones rank 0 warns (CheckpointWarning).

    Raises:
        CheckpointError: on every rank, if there is no whole one.
    """
    candidates, one = from_rank_0(lambda: _candidates(checkpoint))
    refused: list[str] = []
    for path in candidates:
        try:
            # Parsed once: on 16 ranks of 2 cores that was half of a load's time.
            manifest = from_rank_0(partial(files.read, path))
            together(partial(_check_share, path, manifest))
        except CheckpointError as error:
            refused.append(str(error))
            continue
        if rank() == 0:
            files.warn_refused(refused, path)
        return Opened(path, manifest)
    if one:
        raise CheckpointError(refused[0])
    raise CheckpointError(
        files.none_whole(checkpoint, refused) if refused else f"{checkpoint} is no checkpoint, and holds none"
    )


def _candidates(checkpoint: Path) -> tuple[list[Path], bool]:
    """The newest first; and whether it is the one that was asked for."""
    inside = files.checkpoints(checkpoint)
    return (list(reversed(inside)), False) if inside or not checkpoint.exists() else ([checkpoint], True)


def _check_share(path: Path, manifest: Manifest) -> None:
    """Check this rank's share of the files."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    files.check_files(path, manifest, sorted(manifest.files)[rank() :: ranks])
