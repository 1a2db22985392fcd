"""Listening to a model's code while it runs: operators, collectives, phases, and the memory that they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from helix.comm.record import Call, Log, being_told, record, watch
from helix.dryrun.live import Live
from helix.dryrun.operators import EXCHANGE, MEMORY, Operator, fused_attention, operator, storage_of, tensors, touched

# Parts of the model by a word in the names of its modules, or of its collectives; the first that is there.
_PARTS = {
    "attention_norm": "norms and sums",
    "mlp_norm": "norms and sums",
    "layernorm": "norms and sums",
    "attention": "attention",
    "attn": "attention",
    "rotary": "attention",
    "mlp": "mlp",
    "experts": "mlp",
    "feed_forward": "mlp",
    "embed": "embedding",
    "wte": "embedding",
    "wpe": "embedding",
    "positions": "embedding",
    "head": "head",
}
PARTS = ("embedding", "attention", "mlp", "head", "norms and sums")


def part_of(name: str) -> str:
    """The part of the model that a module's path, or a collective's name, belongs to."""
    return next((part for word, part in _PARTS.items() if word in name), PARTS[-1])


@dataclass(frozen=True)
class Begin:
    """A phase of the model begins; the next `End` that is not another's ends it."""

    name: str


@dataclass(frozen=True)
class End:
    """The phase ends that began last."""


@dataclass
class Trace:
    """What was heard of one pass.

    Args:
        entries: operators, collectives and phases, in their order.
        bytes, calls: that left this rank, and collectives, by "collective/name".
        held: bytes that were alive before; peak: above them, the most that were alive together in it, and `buffers`
            how many of those collectives had made.
    """

    entries: list[Operator | Begin | End] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    held: int = 0
    peak: int = 0
    buffers: int = 0

    @property
    def operators(self) -> list[Operator]:
        return [entry for entry in self.entries if isinstance(entry, Operator)]

    @property
    def flops(self) -> int:
        return sum(each.flops for each in self.operators)


class Tracer(TorchDispatchMode):
    """Watches what runs on the meta device.

    Args:
        rows: what stands for numbers that decide over shapes, as here no tensor has any: of a tensor's `item()`, the
            rows of the fullest expert, on which ranks agree before they exchange tokens; of `nonzero()`, those of
            each expert. Truths are taken to be true: checks pass.
        gpu: whether RMS norm is one kernel, as there; else it is the operators that it is made of.
    """

    def __init__(self, rows: int = 1, gpu: bool = True) -> None:
        super().__init__()
        self.rows, self.gpu, self.live = rows, gpu, Live()
        self._trace = Trace()
        self._modules: list[str] = []
        self._awaited: tuple[str, int, tuple[int, ...]] | None = None

    @contextmanager
    def passing(self, model: nn.Module) -> Iterator[Trace]:
        """What runs in the body is one pass of the model."""
        self._trace = trace = Trace(held=self.live.begin())
        before = self.live.now[EXCHANGE]
        with ExitStack() as stack:
            log = stack.enter_context(record(_Listener(self)))
            stack.enter_context(watch(self._phase))
            for path, module in model.named_modules():
                for handle in self._named(module, path):
                    stack.callback(handle.remove)
            stack.enter_context(_Kernels(self))
            yield trace
        trace.bytes, trace.calls = dict(log.bytes), dict(log.calls)
        trace.peak = self.live.peak - trace.held
        trace.buffers = self.live.at_peak[EXCHANGE] - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it turns into collectives and plain operators, which come here again
        if any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **kwargs)  # DTensor asks for a shape
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else self.rows
        out = self._shaped(func, args)
        out = func(*args, **kwargs) if out is None else out
        if func.namespace in ("c10d", "_c10d_functional"):
            self._exchange()
        results = list(tensors(out))
        if not any(each.is_meta for each in results):
            return out
        held = {storage_of(each) for each in tensors((args, kwargs))}
        for each in results:
            if storage_of(each) not in held:
                self.live.see(each, EXCHANGE if being_told() else "activations")
        if func.namespace == "aten" and (found := operator(func, args, kwargs, out, self.part)) is not None:
            self.add(found)
        return out

    def _shaped(self, func: Any, args: Any) -> Tensor | None:
        """The result of an operator that the meta device does not have, or has for some dtypes only."""
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return args[0].new_empty(self.rows, args[0].dim(), dtype=torch.long)
        if func is torch.ops.aten._grouped_mm.default and args[0].is_meta:
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        return None

    @property
    def part(self) -> str:
        return part_of(self._modules[-1] if self._modules else "")

    def add(self, found: Operator) -> None:
        self._trace.entries.append(found)

    def told(self, call: Call, nbytes: int) -> None:
        """A collective is about to run."""
        self._awaited = call.key, nbytes, call.ranks

    def _exchange(self) -> None:
        """It runs. What it copies before and after is this rank's own work."""
        if self._awaited is not None:
            (key, nbytes, ranks), self._awaited = self._awaited, None
            own = part_of(key)
            part = own if own != PARTS[-1] else self.part  # a library's goes by the name of its axis
            self.add(Operator(key, EXCHANGE, part, 0, nbytes, ranks))

    def _phase(self, name: str) -> AbstractContextManager[object]:
        return nullcontext() if "/" in name else self.phase(name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._trace.entries.append(Begin(name))
        try:
            yield
        finally:
            self._trace.entries.append(End())

    def _named(self, module: nn.Module, path: str) -> list[RemovableHandle]:
        """Have a module's operators be known as its own, those of its hooks included."""

        def enter(*_: Any) -> None:
            self._modules.append(path)

        def leave(*_: Any) -> None:
            self._modules.pop()

        return [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        ]


class _Listener(Log):
    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def add(self, call: Call, nbytes: int) -> None:
        super().add(call, nbytes)
        self._tracer.told(call, nbytes)


class _Kernels(TorchFunctionMode):
    """Takes fused attention, and on a GPU RMS norm, for the one kernel that it is: the meta device has none."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.rms_norm and self._tracer.gpu and not any(issubclass(kind, DTensor) for kind in types):
            return self._normed(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """[B, H, T, D'], laid out [B, T, H, D'] as kernels do; and for a moment each row's log-sum-exp, in fp32."""
        batch, heads, rows, _ = query.shape
        out = query.new_empty(batch, rows, heads, value.shape[3]).transpose(1, 2)
        sums = query.new_empty(batch, heads, rows, dtype=torch.promote_types(query.dtype, torch.float32))
        self._tracer.add(fused_attention(query, key, value, out, attn_mask, is_causal, self._tracer.part))
        del sums
        return out

    def _normed(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        out = torch.empty_like(x)
        read = [x, out, *([] if weight is None else [weight])]
        self._tracer.add(Operator("aten::rms_norm", MEMORY, self._tracer.part, 0, sum(map(touched, read))))
        return out
