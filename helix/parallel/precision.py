"""`HelixPrecision`: what Lightning needs to train a model of DTensor parameters in any precision.

    precision                  parameters, optimizer   forward, backward      loss scale
    64-true, 32-true           fp64, fp32              the same               none
    bf16-true, 16-true         bf16, fp16              the same               none
    bf16-mixed                 fp32                    bf16 under autocast    none
    16-mixed                   fp32                    fp16 under autocast    dynamic

With `-true` parameters are *made* in that dtype, as `configure_model` runs with it as default; what asks for
another, as the experts' fp32 router does, keeps it. With `-mixed` the layers' plain local tensors go through
`torch.autocast`: matrix products, `F.linear` and scaled dot-product attention run in the narrow type and are
what is moved between ranks; norms, softmax and losses run in fp32, and the residual stream stays fp32, since
fp32 + fp16 is fp32. Gradients reach the parameters in the parameters' dtype, and are reduced in it. 16-true is for
SGD: in fp16 AdamW's eps of 1e-8 is 0, as most squared gradients are, and 0 / 0 is no number.

Once per optimizer step, never per accumulated micro-batch: reduce the gradients, unscale them and agree on
whether any rank's are not finite, run `on_before_optimizer_step`, clip by the global norm, step. With manual
optimization the same happens in `optimizer.step()`; before it the gradients are unreduced, and clipping refuses them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from helix.comm.mesh import Mesh
from helix.parallel.gradients import clip_gradients, local_gradients, reduce_gradients
from helix.parallel.scaler import LossScaler

DTYPES = {
    "64-true": torch.float64,
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


class HelixPrecision(Precision):
    """Precision, loss scaling and the finishing of gradients.

    Args:
        precision: a key of `DTYPES`.
        scaler: the loss scaler of `16-mixed`; None without one.

    Attributes:
        mesh: the mesh that the gradients are reduced over; the strategy sets it.
        gradient_norm: global norm of the last step's gradients before they were clipped; None if they were not.

    Raises:
        ValueError: if the precision is none of `DTYPES`, or has a scaler and takes none.
    """

    def __init__(self, precision: str, scaler: LossScaler | None = None) -> None:
        check_precision(precision)
        if scaler is not None and precision != "16-mixed":
            raise ValueError(f"only 16-mixed scales the loss, not {precision}")
        self.precision: Any = precision  # Any: Lightning's own type for it is private
        self.scaler = scaler
        self.mesh: Mesh | None = None
        self.gradient_norm: Tensor | None = None
        self._dtype = DTYPES[precision]
        self._mixed = precision.endswith("mixed")
        self._converts = not self._mixed and precision != "32-true"

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Give plain parameters that were made before `configure_model` the dtype of the partitioned ones."""
        if self._converts:
            for parameter in module.parameters():
                if not isinstance(parameter, DTensor) and parameter.dtype == torch.float32:
                    parameter.data = parameter.data.to(self._dtype)
        return module

    def convert_input(self, data: Any) -> Any:
        if not self._converts:
            return data
        return apply_to_collection(data, Tensor, lambda x: x.to(self._dtype) if x.is_floating_point() else x)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return _default_dtype(self._dtype) if self._converts else nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        if not self._mixed:
            return self.tensor_init_context()
        assert self.mesh is not None
        # Its cache knows parameters; the layers hand it their local tensors.
        return torch.autocast(self.mesh.device_type, dtype=self._dtype, cache_enabled=False)

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        if self.scaler is not None:
            tensor = self.scaler.scale(tensor)
        return super().pre_backward(tensor, module)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step, unless some rank's gradients overflowed: then no rank does.

        Raises:
            ValueError: with `16-mixed` and an optimizer that calls the closure more than once.
        """
        if self.scaler is None:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("16-mixed does not go together with LBFGS, which evaluates the loss within its step")
        result = closure()
        self._after_closure(model, optimizer)
        if result is None and model.automatic_optimization:  # training_step skipped this batch
            return result
        if self.scaler.overflowed:
            # Lightning counts the step, and has the schedule of learning rates step, all the same; where it is the
            # first one, torch takes that for a wrong order.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)
            stepped = None
        else:
            stepped = optimizer.step(**kwargs)
        self.scaler.update()
        return stepped

    def _after_closure(self, model: LightningModule, optimizer: Any) -> None:
        """Between backward and step; Lightning calls `on_before_optimizer_step` in here, and then clips."""
        assert self.mesh is not None
        parameters = list(self.main_params(optimizer))
        reduce_gradients(parameters, self.mesh)
        if self.scaler is not None:
            self.scaler.unscale(local_gradients(parameters), self.mesh)
        self.gradient_norm = None
        super()._after_closure(model, optimizer)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        assert self.mesh is not None
        self.gradient_norm = clip_gradients(self.main_params(optimizer), self.mesh, clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        for shards in local_gradients(self.main_params(optimizer)).values():
            torch._foreach_clamp_min_(shards, -clip_val)
            torch._foreach_clamp_max_(shards, clip_val)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the scale that was saved; a checkpoint of another precision has none."""
        if self.scaler is not None and state_dict:
            self.scaler.load_state_dict(state_dict)


def check_precision(precision: str) -> None:
    """Refuse what is no key of `DTYPES`.

    Raises:
        ValueError: naming the legal ones.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision={precision} is not known; legal: {', '.join(DTYPES)}")


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None, None, None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
