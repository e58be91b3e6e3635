"""A step of Adam or AdamW that reads gradients where they are, clips them on the way and rounds the result into a copy: as an operation of torch.

The moments' formula: :mod:`scratchlm.optim.adam`. Computed in one pass by Triton (`adam_triton.py`). An operation, so that it can be traced on tensors without memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scratchlm.kernels.triton_here import runs_on, takes

IN_TORCH = "the optimizer's step is made in several passes by torch's kernels"

# Not `torch.library.custom_op`, whose first call imports torch's compiler.
_library = torch.library.Library("scratchlm", "FRAGMENT")
_library.define(
    "adam_step_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] steps, "
    "Tensor(e!)[] copies, Tensor? factor, Tensor? skip, float lr, float beta1, float beta2, float eps, float decay, bool decoupled) -> ()"
)


def fits(parameters: list[Tensor]) -> bool:
    """Whether :func:`step_` can update them: fp32, in one piece, where Triton runs."""
    if not all(p.dtype == torch.float32 and p.is_contiguous() and takes(p.device) for p in parameters):
        return False
    return len({p.device for p in parameters}) == 1 and runs_on(parameters[0].device, IN_TORCH)


def step_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    factor: Tensor | None,
    skip: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    decoupled: bool,
) -> None:
    """One step, in place.

    Args:
        parameters: fp32, each in one piece, on one device.
        gradients: one dtype: fp32, bf16 or fp16.
        first, second: moments m and v, fp32.
        steps: fp32 scalars: how many steps were made before; one more after it.
        copies: tensors of one dtype that the new parameters are rounded into; empty: none.
        factor: every gradient is multiplied by it; a scalar in fp32 on the device.
        skip: 1 to leave everything as it is; a scalar in fp32 on the device.
        lr, betas, eps, decay: as of :class:`scratchlm.optim.adam.Adam`.
        decoupled: whether the decay is AdamW's.
    """
    torch.ops.scratchlm.adam_step_(
        parameters, gradients, first, second, steps, copies, factor, skip, lr, *betas, eps, decay, decoupled
    )


def _computed(*given: Any) -> None:
    from scratchlm.kernels import adam_triton

    adam_triton.step(*given)


_library.impl("adam_step_", _computed, "CompositeExplicitAutograd")


@torch.library.register_fake("scratchlm::adam_step_")
def _(*_: object) -> None:
    """Nothing comes of it but what is changed."""
