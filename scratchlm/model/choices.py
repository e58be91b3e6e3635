"""The table of architectural choices: every axis, its allowed names, and where each one lives.

Adding a choice is a class in its file and one line here; the configuration, the command line's help, the JSON schema and
the error for a misspelt name follow from this table. It imports none of them, so that reading a recipe does not load torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from scratchlm.errors import UserError
from scratchlm.section import nearest_name


class Choices:
    """The named values of one axis, each pointing to ``module:attribute``, loaded on first use."""

    def __init__(self, axis: str, table: dict[str, str]) -> None:
        self.axis = axis
        self.table = table

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.table)

    def get(self, name: str) -> Any:
        """The class or function called `name`.

        Raises:
            UserError: no such value on this axis; the message names the nearest and lists the allowed ones.
        """
        if name not in self.table:
            hint = nearest_name(name, self.table)
            raise UserError(f"{self.axis} = {name!r} is unknown{hint}; allowed: {', '.join(self.table)}")
        module, attribute = self.table[name].split(":")
        return getattr(importlib.import_module(module), attribute)


NORM = Choices("norm", {"rmsnorm": "scratchlm.model.norm:RMSNorm"})
QK_NORM = Choices("qk_norm", {"none": "scratchlm.model.norm:NoNorm", "rmsnorm": "scratchlm.model.norm:RMSNorm"})
FEEDFORWARD = Choices(
    "feedforward",
    {"swiglu": "scratchlm.model.feedforward:SwiGLU", "relu2": "scratchlm.model.feedforward:SquaredReLU"},
)
POSITION = Choices(
    "position", {"rope": "scratchlm.model.position:RoPE", "none": "scratchlm.model.position:NoPosition"}
)
ATTENTION = Choices("attention", {"mha": "scratchlm.model.attention:MultiHeadAttention"})
MASK = Choices("mask", {"causal": "scratchlm.model.mask:Causal"})
BLOCK = Choices("block", {"pre_norm": "scratchlm.model.block:PreNormBlock"})
INIT = Choices("init", {"truncated_normal": "scratchlm.model.init:truncated_normal"})
ATTENTION_KERNEL = Choices(
    "attention_kernel",
    {
        "reference": "scratchlm.kernels.attention:reference_attention",
        "sdpa": "scratchlm.kernels.attention:sdpa_attention",
        "blocked": "scratchlm.kernels.attention:blocked_causal_attention",
    },
)

AXES = (NORM, QK_NORM, FEEDFORWARD, POSITION, ATTENTION, MASK, BLOCK, INIT, ATTENTION_KERNEL)
