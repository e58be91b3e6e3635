"""x / RMS(x) · g on a CPU in one pass over each row (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

``torch.nn.functional.rms_norm`` is a chain of eight operations on a CPU. :func:`rms_norm` is for reading and writing text: no gradient; :func:`trained` for
training without a compiler, its kernel and its gradient's in `rows.cpp`. When they are used: :func:`fits`, :func:`fits_training`. The formula
they are held equal to: :class:`scratchlm.model.norm.RMSNorm`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.kernels import rows_cpp
from scratchlm.kernels.cpp_here import is_watched
from scratchlm.kernels.matmul import nobody_watches


def fits(x: Tensor, gain: Tensor | None) -> bool:
    """Whether :func:`rms_norm` may be called: fp32 or bf16 on the CPU, and nobody watches."""
    return (
        not torch.is_grad_enabled()
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.device.type == "cpu"
        and x.numel() > 0
        and (gain is None or (gain.dtype == x.dtype and gain.shape == x.shape[-1:]))
        and nobody_watches(x, gain)
    )


def rms_norm(
    x: Float[Tensor, "... width"], gain: Float[Tensor, " width"] | None, eps: float, offset: float = 0.0
) -> Float[Tensor, "... width"]:
    """x / sqrt(mean(x²) + ε) · (offset + gain) over the last dimension, in fp32; returned in x's dtype. Without gradient.

    Args:
        x: fp32 or bf16, on the CPU.
        gain: of x's dtype; None: nothing is multiplied, and `offset` is not used.
        eps: ε.
        offset: added to the gain.
    """
    from scratchlm.kernels import compiled_rows

    x = x.contiguous()
    gain = gain if gain is None else gain.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    compiled_rows.call(
        compiled_rows.RMS_NORM,
        x.data_ptr(),
        0 if gain is None else gain.data_ptr(),
        float(offset),
        float(eps),
        y.data_ptr(),
        x.numel() // width,
        width,
        dtype=x.dtype,
        numbers=x.numel(),
    )
    return y


def fits_training(x: Tensor, gain: Tensor | None) -> bool:
    """Whether :func:`trained` is the way: where the kernels for CPUs run, a gradient is wanted or there are many numbers, and nobody compiles."""
    return (gain is None or gain.dtype in rows_cpp.DTYPES) and rows_cpp.is_offered(x)


def trained(
    x: Float[Tensor, "... width"], gain: Float[Tensor, " width"] | None, eps: float, offset: float = 0.0
) -> Float[Tensor, "... width"]:
    """As :func:`rms_norm`, with gradients; x and gain each fp32 or bf16.

    Raises:
        ValueError: the gain is of another width than x, or on another device.
    """
    check_gain(x, gain)
    wide = None if gain is None else (gain.float() + offset if offset else gain.float()).contiguous()
    out: Tensor
    if is_watched(x) or type(gain) not in (
        Tensor,
        nn.Parameter,
        type(None),
    ):  # a tensor of a kind of its own beside plain ones
        from scratchlm.kernels import rms_norm_op

        out = rms_norm_op.rms_norm(x, wide, eps)[0]
        return out
    out = rows_cpp.RMSNorm.apply(x, wide, eps)
    return out


def check_gain(x: Tensor, gain: Tensor | None) -> None:
    """A kernel would read beyond a smaller one.

    Raises:
        ValueError: it is of another width than x, or on another device.
    """
    if gain is not None and (gain.shape != x.shape[-1:] or gain.device != x.device):
        raise ValueError(
            f"a gain of {tuple(gain.shape)} on {gain.device} is none for rows of {tuple(x.shape)} on {x.device}"
        )
