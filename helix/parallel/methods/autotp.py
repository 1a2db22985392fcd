"""DeepSpeed's automatic tensor parallelism for inference."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from helix.models.experts import load_deepspeed, start_deepspeed
from helix.models.plain import PlainBlock, PlainTransformer
from helix.parallel.methods.library import LibraryTensorParallel
from helix.parallel.methods.method import Job, Layout
from helix.partition.shape import TransformerShape


class AutoTensorParallel(LibraryTensorParallel):
    """`autotp16`: `deepspeed.init_inference` with tp_size=16, without kernel injection.

    It cuts the blocks and the head and keeps the embedding whole. Heads that n does not divide are dealt unevenly,
    by key/value heads.

    Raises:
        PartitionError: if there are experts, whose router it would cut like any other layer; or if n is not the
            number of ranks of the launch.
    """

    def __init__(self, job: Job, layout: Layout) -> None:
        super().__init__(job, layout, "DeepSpeed's AutoTP")
        with job.device:
            model = _Named(job.shape, job.dtype).eval()
            job.fill(model)
        self.model: PlainTransformer = model
        group = _cut(model, layout.grid.n, job.dtype, job.device.type)
        self.axes = {group.group_name: "tensor"} if group is not None else {}

    @classmethod
    def load(cls, device_type: str) -> None:
        """Import what the ranks will need; whoever forks them calls it first, so that they share it."""
        load_deepspeed(device_type)
        if importlib.util.find_spec("transformers"):
            # AutoTP looks for GPT-2's layers, and would import them, for seconds, on every rank.
            importlib.import_module("transformers.models.gpt2.modeling_gpt2")

    def step(self, tokens: Tensor) -> Tensor:
        # Not the engine's own forward: all it adds is an assertion about CUDA graphs.
        return self.model(tokens)

    def predicted(self, routes: list[Tensor]) -> Counter[str]:
        """An all-reduce after each half block, and one of the logits, since the head is cut over its inputs."""
        shape = self.job.shape
        stream, logits = self.all_reduce_bytes(shape.width), self.all_reduce_bytes(shape.vocab)
        return +Counter({"all_reduce/tensor": 2 * shape.layers * stream + logits})

    def predicted_weight_bytes(self) -> int:
        shape, n = self.job.shape, self.layout.grid.n

        def own(count: int) -> int:
            return count // n + (dist.get_rank() < count % n)

        attention = (2 * shape.layout.queries_per_kv + 2) * own(shape.kv_heads) * shape.head_dim * shape.width
        mlp = 2 * own(shape.mlp_hidden) * shape.width
        norms = 2 * shape.width + (2 * shape.head_dim if shape.qk_norm else 0)
        ends = shape.vocab * (shape.width + own(shape.width)) + shape.width
        return (shape.layers * (attention + mlp + norms) + ends) * self.job.dtype.itemsize


class _Named(PlainTransformer):
    """The plain transformer with the names that AutoTP looks for: a Hugging Face config, and `lm_head`."""

    def __init__(self, shape: TransformerShape, dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.config = SimpleNamespace(
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, hidden_size=shape.width
        )
        self.lm_head = self.head


def _cut(model: _Named, n: int, dtype: torch.dtype, device_type: str) -> dist.ProcessGroup | None:
    """Cut the model in place over the ranks that are running, and return DeepSpeed's own group of them, if any."""
    AutoTensorParallel.load(device_type)
    import deepspeed

    start_deepspeed(device_type)
    engine = deepspeed.init_inference(
        model,
        tensor_parallel={"tp_size": n, "tp_grain_size": 1},  # 64 by default, so that 16 ranks would not share 512
        dtype=dtype,
        replace_with_kernel_inject=False,
        # The layers that end in a sum over the ranks; all others of a block are cut over their outputs.
        injection_policy={PlainBlock: ("attention.o", "mlp.down")},
    )
    model.head = model.lm_head
    group: dist.ProcessGroup | None = engine.mp_group
    return group
