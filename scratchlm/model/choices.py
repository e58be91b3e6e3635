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
    """The named values of one axis, each pointing to ``module:attribute`` of ``scratchlm``, loaded on first use.

    Args:
        axis: the field of :class:`~scratchlm.model.ModelConfig`, dotted where it lies in a section of it.
        table: name → where its class is.
    """

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
        return getattr(importlib.import_module(f"scratchlm.{module}"), attribute)


NORM = Choices(
    "norm",
    {
        "rmsnorm": "model.norm:RMSNorm",
        "rmsnorm_noscale": "model.norm:RMSNormNoScale",
        "rmsnorm_unit_offset": "model.norm:RMSNormUnitOffset",
        "layernorm": "model.norm:LayerNorm",
        "layernorm_nobias": "model.norm:LayerNormNoBias",
        "layernorm_noparams": "model.norm:LayerNormNoParameters",
        "none": "model.norm:NoNorm",
    },
)
NORM_PLACEMENT = Choices(
    "norm_placement",
    {
        "pre": "model.block:PRE",
        "post": "model.block:POST",
        "reordered": "model.block:REORDERED",
        "double": "model.block:DOUBLE",
        "none": "model.block:NOWHERE",
    },
)
QK_NORM = Choices(
    "qk_norm",
    {
        "none": "model.norm:NoQKNorm",
        "head": "model.norm:HeadQKNorm",
        "each": "model.norm:EachHeadQKNorm",
        "full": "model.norm:FullWidthQKNorm",
    },
)
BLOCK = Choices(
    "block",
    {
        "serial": "model.block:SerialBlock",
        "parallel": "model.block:ParallelBlock",
        "parallel_shared": "model.block:ParallelSharedBlock",
    },
)
RESIDUAL = Choices(
    "residual",
    {
        "plain": "model.residual:PlainResidual",
        "depth": "model.residual:DepthScaledResidual",
        "fixed": "model.residual:FixedResidual",
        "scalar": "model.residual:ScalarResidual",
        "vector": "model.residual:VectorResidual",
    },
)
FEEDFORWARD = Choices(
    "feedforward",
    {
        "relu": "model.feedforward:ReLU",
        "relu2": "model.feedforward:SquaredReLU",
        "gelu": "model.feedforward:GELU",
        "gelu_tanh": "model.feedforward:GELUTanh",
        "silu": "model.feedforward:SiLU",
        "glu": "model.feedforward:GLU",
        "reglu": "model.feedforward:ReGLU",
        "geglu": "model.feedforward:GeGLU",
        "geglu_tanh": "model.feedforward:GeGLUTanh",
        "swiglu": "model.feedforward:SwiGLU",
        "swiglu_clamped": "model.feedforward:ClampedSwiGLU",
    },
)
POSITION = Choices(
    "position",
    {
        "rope": "model.rope:RoPE",
        "alibi": "model.position:ALiBi",
        "sinusoidal": "model.position:Sinusoidal",
        "learned": "model.position:Learned",
        "none": "model.position:NoPosition",
    },
)
ROPE_PAIRS = Choices(
    "rope.pairs", {"half": "model.rope:half_split_pairs", "interleaved": "model.rope:interleaved_pairs"}
)
ROPE_SCALING = Choices(
    "rope.scaling",
    {
        "none": "model.rope_scaling:unscaled",
        "linear": "model.rope_scaling:linear",
        "ntk": "model.rope_scaling:ntk",
        "yarn": "model.rope_scaling:yarn",
        "llama3": "model.rope_scaling:llama3",
    },
)
ATTENTION = Choices(
    "attention",
    {
        "mha": "model.attention:MultiHeadAttention",
        "mla": "model.latent_attention:LatentAttention",
        "linear": "model.linear_attention:LinearAttention",
        "retention": "model.linear_attention:Retention",
        "gla": "model.linear_attention:GatedLinearAttention",
        "gated_delta": "model.linear_attention:GatedDeltaNet",
    },
)
FEATURE_MAP = Choices(
    "linear.feature_map",
    {
        "elu1": "model.linear_attention:elu_plus_one",
        "relu": "model.linear_attention:relu",
        "identity": "model.linear_attention:identity",
    },
)
MASK = Choices(
    "mask",
    {
        "causal": "model.mask:Causal",
        "sliding_window": "model.mask:SlidingWindow",
        "strided": "model.mask:Strided",
        "fixed": "model.mask:Fixed",
        "block_sparse": "model.mask:BlockSparse",
        "prefix_lm": "model.mask:PrefixLM",
    },
)
ROUTER = Choices(
    "moe.router",
    {
        "softmax_topk": "model.router:SoftmaxThenTopK",
        "topk_softmax": "model.router:TopKThenSoftmax",
        "sigmoid": "model.router:Sigmoid",
    },
)
DISPATCH = Choices(
    "moe.dispatch", {"grouped": "kernels.moe:grouped_experts", "reference": "kernels.moe:reference_experts"}
)
INIT = Choices(
    "init",
    {
        "truncated_normal": "model.init:truncated_normal",
        "normal": "model.init:normal",
        "gpt2": "model.init:gpt2",
        "depth_scaled": "model.init:depth_scaled",
    },
)
ATTENTION_KERNEL = Choices(
    "attention_kernel",
    {
        "reference": "kernels.attention:reference_attention",
        "sdpa": "kernels.attention:sdpa_attention",
        "blocked": "kernels.blocked_attention:blocked_attention",
        "flex": "kernels.flex_attention:flex_attention",
        "flash": "kernels.flash_attention:flash_attention",
    },
)

AXES = (
    NORM,
    NORM_PLACEMENT,
    QK_NORM,
    BLOCK,
    RESIDUAL,
    FEEDFORWARD,
    POSITION,
    ROPE_PAIRS,
    ROPE_SCALING,
    ATTENTION,
    FEATURE_MAP,
    MASK,
    ROUTER,
    DISPATCH,
    INIT,
    ATTENTION_KERNEL,
)
