"""The attention function that transformers calls in a partitioned model, and its masks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from helix.pretrained.kernel import Scoring
from helix.pretrained.sharing import Place, own_draws

NAME = "helix"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T) v of the rank's head group.

    Args:
        query: [B, H@head, T, D], whole heads; key, value: [B, K@head, S, D], or this rank's part of it, of a cache.
        attention_mask: [B, 1, T, S], True where a query sees a key, or numbers to add to the scores; None if a query
            sees all keys, or in a causal module all up to its own.
        softcap: bound of the scores, as Gemma 2 has it.
        is_causal: instead of the module's own.

    Returns:
        [B, T, H@head, D@slice], and no weights.

    Raises:
        ValueError: for a mask that differs from head to head, or keys that were changed since the cache gave them.
    """
    place: Place = module.helix  # type: ignore[assignment]
    held, place.held = place.held, None
    mask = attention_mask
    if mask is not None and mask.shape[1] != 1:
        raise ValueError(f"a partitioned model takes masks that all heads share, not one of {mask.shape[1]} heads")
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, dropout)
    if held is not None:
        if held.keys is not key:
            raise ValueError(
                "attention got other keys than the partitioned cache handed out; nothing may change them between"
            )
        mask = None if mask is None else mask[..., held.columns]
        with own_draws(scoring, query.device):
            return held.sharing.decode(query, key, value, mask, scoring).transpose(1, 2), None
    causal = mask is None and _is_causal(module, is_causal)
    with own_draws(scoring, query.device):
        out = place.prefill(key).prefill(query, key, value, mask, causal, scoring)
    return out.transpose(1, 2), None


def _is_causal(module: nn.Module, asked: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True)) if asked is None else asked


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' boolean mask, or None where it would hide nothing, or only what comes after a query."""
    window, keys = kwargs.get("local_size"), kwargs["kv_length"]
    if window is not None and kwargs["q_length"] == 1 and keys <= window:
        kwargs["local_size"] = None  # the cache has handed out no more than the one query sees
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)
