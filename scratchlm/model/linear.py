"""The two layers that hold nearly all weights: Linear and Embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from scratchlm.kernels import fp8_matmul
from scratchlm.kernels.matmul import linear


class Linear(nn.Module):
    """y = W x, or W x + b.

    Weight shape (d_out, d_in): a row is what one output reads from the input. `parts` are the heights of row blocks
    that are projections of their own, stored as one matrix so that one matmul computes them (q‖k‖v, gate‖up):
    initialisation and Muon treat each part as the separate matrix it is.

    Args:
        d_in, d_out: widths.
        parts: see above; None: one part.
        bias: which parts have a bias (True: all). Only their rows are stored.
        residual_output: this is the last linear of a residual branch (or the head): initialisation may treat it apart.
        role: how the optimizer groups the weight.
        reference: compute by the formula.

    Attributes:
        fp8: while training, multiply in 8 bits where the sizes allow it (:mod:`scratchlm.kernels.fp8_matmul`).
    """

    fp8 = False

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        parts: list[int] | None = None,
        bias: bool | list[bool] = False,
        residual_output: bool = False,
        role: str = "matrix",
        reference: bool = False,
    ) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.parts = parts or [d_out]
        self.residual_output = residual_output
        self.reference = reference
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.role = role
        self.weight.role = role  # type: ignore[attr-defined]  # read by the optimizer's grouping
        if parts:
            self.weight.muon_split = parts  # type: ignore[attr-defined]
        self.biased = [bias] * len(self.parts) if isinstance(bias, bool) else bias
        sizes = [size for size, has in zip(self.parts, self.biased, strict=True) if has]
        self.bias = nn.Parameter(torch.zeros(sum(sizes))) if sizes else None
        self.unbiased = not sizes
        if self.bias is not None:
            self.bias.role = "bias"  # type: ignore[attr-defined]

    def full_bias(self) -> Float[Tensor, " d_out"] | None:
        """The bias of every row: zero where a part has none."""
        if self.bias is None or all(self.biased):
            return self.bias
        given = iter(self.bias.split([size for size, has in zip(self.parts, self.biased, strict=True) if has]))
        rows = [
            next(given) if has else self.bias.new_zeros(size)
            for size, has in zip(self.parts, self.biased, strict=True)
        ]
        return torch.cat(rows)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        bias = None if self.unbiased else self.full_bias()
        if self.reference:
            product = einsum(x, self.weight, "... d_in, d_out d_in -> ... d_out")
            return product if bias is None else product + bias
        if self.fp8 and self.training and fp8_matmul.fits(x, self.weight):
            product = fp8_matmul.fp8_linear(x, self.weight)
            return product if bias is None else product + bias.to(product.dtype)
        if x.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.weight.dtype)  # of a model whose file mixes dtypes, such as a head in fp32
        return linear(x, self.weight, bias)

    def num_params(self) -> int:
        biases = sum(size for size, has in zip(self.parts, self.biased, strict=True) if has)
        return self.d_in * self.d_out + biases

    def flops_per_token(self) -> int:
        """A multiply and an add per weight; a bias is not a product."""
        return 2 * self.d_in * self.d_out


class Embedding(nn.Module):
    """A table with one row of width d_model per token id."""

    def __init__(self, vocab_size: int, d_model: int, *, reference: bool = False) -> None:
        super().__init__()
        self.vocab_size, self.d_model = vocab_size, d_model
        self.reference = reference
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.weight.role = "embedding"  # type: ignore[attr-defined]

    def forward(self, ids: Int[Tensor, " ..."]) -> Float[Tensor, "... d_model"]:
        if self.reference:
            return self.weight[ids]
        return F.embedding(ids, self.weight)

    def num_params(self) -> int:
        return self.vocab_size * self.d_model

    def flops_per_token(self) -> int:
        """A look-up multiplies nothing."""
        return 0
