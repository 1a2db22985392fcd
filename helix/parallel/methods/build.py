"""The method of a layout by its name in configs."""

from __future__ import annotations

from collections.abc import Set
from contextlib import suppress

from helix.comm.mesh import Mesh
from helix.parallel.methods.method import Job, Layout, Method


def load(methods: Set[str], experts: bool, device_type: str) -> None:
    """Import what these methods need. Whoever forks ranks calls it first: one import serves all of them.

    Args:
        methods: names of `helix.config.parallel.METHODS` or `PEERS`.
        experts: whether the model has any.
    """
    with suppress(ImportError):  # building says it again: a package that is not installed is a peer's result too
        if experts or methods & {"ulysses", "autotp"}:
            from helix.models.experts import load_deepspeed

            load_deepspeed(device_type)
        if "autotp" in methods:
            from helix.parallel.methods.autotp import AutoTensorParallel

            AutoTensorParallel.load(device_type)
        if "transformers" in methods:
            from helix.parallel.methods.hugging_face import HuggingFace

            HuggingFace.load(device_type)


def build(method: str, job: Job, layout: Layout, mesh: Mesh | None = None) -> Method:
    """Construct a method's model on all ranks of the launch. Each method's libraries are imported only with it.

    Args:
        method: a name of `helix.config.parallel.METHODS` or `PEERS`.
        mesh: of the layout's axes, if there is one already (Helix only).

    Raises:
        PartitionError, or an error of the method's own: if it cannot run this job.
    """
    if method == "helix":
        from helix.parallel.methods.partitioned import Partitioned

        return Partitioned(job, layout, mesh)
    if method == "single":
        from helix.parallel.methods.single import Single

        return Single(job, layout)
    if method == "data":
        from helix.parallel.methods.data import DataParallel

        return DataParallel(job, layout)
    if method == "tensor" and layout.stage == 1:
        from helix.parallel.methods.tensor import TensorParallel

        return TensorParallel(job, layout)
    if method == "tensor":
        from helix.parallel.methods.pipeline import TensorPipeline

        return TensorPipeline(job, layout)
    if method == "context":
        from helix.parallel.methods.context import ContextParallel

        return ContextParallel(job, layout)
    if method == "ulysses":
        from helix.parallel.methods.ulysses import Ulysses

        return Ulysses(job, layout)
    if method == "autotp":
        from helix.parallel.methods.autotp import AutoTensorParallel

        return AutoTensorParallel(job, layout)
    assert method == "transformers", method
    from helix.parallel.methods.hugging_face import HuggingFace

    return HuggingFace(job, layout)
