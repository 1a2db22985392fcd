"""transformers' own tensor parallelism (tp_plan="auto") on its Llama of the same size."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helix.models.experts import load_deepspeed
from helix.parallel.methods.library import LibraryTensorParallel
from helix.parallel.methods.method import Job, Layout
from helix.partition import wire
from helix.partition.grid import PartitionError, shard_range
from helix.partition.shape import TransformerShape
from helix.ranks.process_group import hosts


class HuggingFace(LibraryTensorParallel):
    """`hf_tp16`: a Llama with random weights, loaded with the tensor parallel plan that transformers has for it.

    Llama's MLP has three matrices, so its hidden width is 2/3 of the shape's: the same parameters and FLOPs, up to
    rounding to a multiple of n. It is another function, so its logits are compared with its own on one device.

    Raises:
        PartitionError: if the shape is no Llama's, or its weights are to be a checkpoint's, or n is not the number
            of ranks of the launch.
    """

    def __init__(self, job: Job, layout: Layout) -> None:
        super().__init__(job, layout, "transformers' tensor parallelism")
        n = layout.grid.n
        if not (job.shape.causal and job.shape.rope) or job.shape.qk_norm:
            raise PartitionError("transformers' Llama is causal, with rotary embeddings and without QK-norm")
        if job.weights is not None:
            raise PartitionError("transformers' Llama has an MLP of three matrices, and the checkpoint's have two")
        self.load(job.device.type)
        from transformers import LlamaForCausalLM
        from transformers.distributed import DistributedConfig

        self.config = llama_config(job, n)
        plan = DistributedConfig(tp_size=n, tp_plan="auto")
        with self.saved() as folder:
            # Not with `state_dict=`: shards stay views, which would keep whole weights alive; a file is mapped.
            self.model: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=job.dtype, distributed_config=plan)
        mesh: Any = self.model._device_mesh
        self.axes = {mesh.get_group("tp").group_name: "tensor"} if n > 1 else {}

    @classmethod
    def load(cls, device_type: str) -> None:
        """Import what the ranks will need; whoever forks them calls it first, so that they share it."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if importlib.util.find_spec("deepspeed"):
            load_deepspeed(device_type)  # accelerate would import it, without saying for which device
        importlib.import_module("transformers.models.llama.modeling_llama")
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def whole(self) -> Any:
        """The model on one device, with its weights, a `LlamaForCausalLM`."""
        from transformers import LlamaForCausalLM

        with torch.random.fork_rng(), self.job.device:
            torch.manual_seed(self.job.seed)
            model: nn.Module = LlamaForCausalLM(self.config)
        return model.to(self.job.dtype).eval()

    @contextmanager
    def saved(self) -> Iterator[str]:
        """The folder with the weights, written by one rank of each host, as long as any rank is in the body."""
        rank, of = dist.get_rank(), hosts().of
        first = of.index(of[rank])  # of this host
        folders: list[str | OSError | None] = [None] * len(of)
        with ExitStack() as stack:
            own = self._save(stack) if rank == first else None
            dist.all_gather_object(folders, own)
            if errors := [each for each in folders if isinstance(each, OSError)]:
                raise errors[0]  # on every rank
            found = folders[first]
            assert isinstance(found, str)
            yield found
            dist.barrier()

    def _save(self, stack: ExitStack) -> str | OSError:
        """The folder with the weights; a full disk is an answer too, which the other ranks wait for."""
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="helix-llama-"))
            self.whole().save_pretrained(folder)
        except OSError as error:
            return error
        return folder

    def step(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits

    def predicted(self, routes: list[Tensor]) -> Counter[str]:
        """An all-reduce after the embedding and each half block, and an all-gather of the logits."""
        job, n = self.job, self.layout.grid.n
        sums = (2 * job.shape.layers + 1) * self.all_reduce_bytes(job.shape.width)
        # The last ranks' shares of an uneven vocabulary are padded.
        logits = wire.all_gather(job.batch * job.length * -(-job.shape.vocab // n), n, job.dtype.itemsize)
        return +Counter({"all_reduce/tensor": sums, "all_gather/tensor": logits})

    def predicted_weight_bytes(self) -> int:
        shape, n = self.job.shape, self.layout.grid.n
        attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.width // n
        mlp = 3 * shape.width * self.config.intermediate_size // n
        vocabulary = len(shard_range(shape.vocab, n, dist.get_rank()))
        ends = (2 * vocabulary + 1) * shape.width
        return (shape.layers * (attention + mlp + 2 * shape.width) + ends) * self.job.dtype.itemsize

    def expected_logits(self, tokens: Tensor) -> Tensor | None:
        if dist.get_rank() > 0:
            return None
        logits: Tensor = self.whole()(tokens, use_cache=False).logits
        return logits.flatten(0, 1)


def llama_config(job: Job, n: int) -> Any:
    """The Llama of a shape, a `transformers.LlamaConfig`, with an MLP that n ranks can share."""
    from transformers import LlamaConfig

    shape: TransformerShape = job.shape
    return LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=max(1, round(2 * shape.mlp_hidden / (3 * n))) * n,
        vocab_size=shape.vocab,
        max_position_embeddings=job.length,
        tie_word_embeddings=False,
    )
