"""What a gradient that a kernel computes says when somebody wants to differentiate it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the ``backward`` of an autograd.Function whose gradient is computed by a kernel: who wants to differentiate it, too (``create_graph=True``), is told that it has
    none. (torch's ``once_differentiable`` notices only if what comes from above is no constant, and that of a loss is one.)"""

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this gradient is computed by a kernel and has no derivative of its own; model.kernels = reference, model.attention_kernel = "
                "reference and train.loss_kernel = reference are formulas, which have"
            )
        return backward(ctx, *upstream)

    return checked
