"""The public function ``multi_gate_mix`` and its registration as a PyTorch operator."""

from typing import Any

import torch
from torch import Tensor

from core_gates.ops._select import definition, register, use_kernel
from core_gates.ops.multi_gate_mix import reference


def multi_gate_mix(
    experts: Tensor,
    logits: Tensor,
    mask: Tensor,
    self_logits: Tensor | None = None,
    self_mask: Tensor | None = None,
) -> Tensor:
    """Mix one set of experts by several gates, each over the experts that it sees.

    ``y_s = Σ_e (softmax(logits_s)_e + self_se) x_e``: a gate normalizes over its visible experts;
    a self gate does the same over its own, or is their sigmoid if there is exactly one. As weights
    of self gates simply add, all mixtures read the experts once (HoME, MMoE and CGC).

    Args:
        experts: Outputs of the experts (..., E, D).
        logits: Logits of the gates (..., S, E); what they hold at hidden experts does not matter.
        mask: True where a gate sees an expert (S, E). A gate that sees none gives zero.
        self_logits: Logits of the self gates (..., S, E), or None for no self gates.
        self_mask: True where a self gate sees an expert (S, E).

    Returns:
        Mixtures (..., S, D) in the dtype of ``experts``. Under autocast the definition takes the
        matmuls in its dtype; the weights are normalized in float32 nevertheless.

    Raises:
        ValueError: The shapes do not fit, a mask is not boolean, or one of the two arguments of
            the self gates is missing.
    """
    if (self_logits is None) != (self_mask is None):
        raise ValueError("self gates need both self_logits and self_mask; one of them is missing")
    _check(experts, logits, mask)
    leading, (num_experts, dim) = experts.shape[:-2], experts.shape[-2:]
    kinds, masks = logits.unsqueeze(-3), mask.unsqueeze(0)
    if self_logits is not None and self_mask is not None:
        _check(experts, self_logits, self_mask)
        kinds = torch.stack([logits, self_logits.to(logits.dtype)], -3)
        masks = torch.stack([mask, self_mask])
    flat = kinds.reshape(-1, *kinds.shape[-3:])
    function = _forward if use_kernel(experts, logits) else definition(reference.forward)
    mixed = function(experts.reshape(-1, num_experts, dim), flat, masks)
    return mixed.view(*leading, mask.shape[0], dim)


def _check(experts: Tensor, logits: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(
            f"a mask must be a boolean table (gates, experts), got {mask.dtype} {tuple(mask.shape)}"
        )
    if experts.ndim < 2 or logits.shape != (*experts.shape[:-2], *mask.shape):
        raise ValueError(
            f"logits {tuple(logits.shape)} must have the leading shape of experts"
            f" {tuple(experts.shape)} and end in the {tuple(mask.shape)} of the mask"
        )
    if experts.shape[-2] != mask.shape[1]:
        raise ValueError(f"the mask is for {mask.shape[1]} experts, found {experts.shape[-2]}")


def _fake(experts: Tensor, _logits: Tensor, mask: Tensor) -> Tensor:
    return experts.new_empty(experts.shape[0], mask.shape[1], experts.shape[2])


def _fake_backward(_grad: Tensor, experts: Tensor, logits: Tensor, _mask: Tensor) -> Any:
    return torch.empty_like(experts), torch.empty_like(logits)


_forward = register(reference, _fake, _fake_backward, saved=3)
