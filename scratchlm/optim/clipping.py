"""Gradient clipping by the global norm (Pascanu, Mikolov & Bengio 2013)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Tensor:
    """Scale all gradients together so that their joint L2 norm is at most `max_norm`.

    The norm is summed in float32, whatever the gradients' dtype. Gradients whose norm is not finite stay as they are, and
    the caller sees it in the returned norm (and can skip the step). Nothing waits for the device.

    Args:
        parameters: tensors whose ``.grad`` (None: skipped) is scaled in place.
        max_norm: largest norm allowed; 0: measure only.

    Returns:
        The norm before clipping, a 0-dim float32 tensor on the gradients' (first) device; 0 without gradients.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = gradient_norm(gradients)
    if gradients and max_norm > 0:
        scale = clip_factor(norm, max_norm)
        for place, group in _by_device(gradients).items():
            if place.type != "cpu" or scale.device.type != "cpu" or scale < 1:  # on the host, looking is free
                torch._foreach_mul_(group, scale.to(place))
    return norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of joint norm `norm` are multiplied by so that it is at most `max_norm`; 1 where it is not finite."""
    # 1e-6 as in torch: the clipped norm stays a hair below the bound.
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(norm.isfinite(), scale, torch.ones_like(scale))


@torch.no_grad()
def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The joint L2 norm, a 0-dim float32 on the (first) device, summed in float32; 0 of nothing. Nothing waits for the device."""
    if not gradients:
        return torch.zeros((), dtype=torch.float32)
    norms = [
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(group, 2, dtype=torch.float32))).to(
            gradients[0].device
        )
        for group in _by_device(gradients).values()
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def _by_device(tensors: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return found
