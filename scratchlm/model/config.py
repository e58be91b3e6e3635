"""ModelConfig: one field per architectural choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from scratchlm.model import choices
from scratchlm.section import Section

if TYPE_CHECKING:  # a type checker wants literals spelled out; pydantic and tyro read the table
    NormName = str
    QKNormName = str
    FeedForwardName = str
    PositionName = str
    AttentionName = str
    MaskName = str
    BlockName = str
    InitName = str
    AttentionKernelName = str
else:
    NormName = Literal[choices.NORM.names]
    QKNormName = Literal[choices.QK_NORM.names]
    FeedForwardName = Literal[choices.FEEDFORWARD.names]
    PositionName = Literal[choices.POSITION.names]
    AttentionName = Literal[choices.ATTENTION.names]
    MaskName = Literal[choices.MASK.names]
    BlockName = Literal[choices.BLOCK.names]
    InitName = Literal[choices.INIT.names]
    AttentionKernelName = Literal[("auto", *choices.ATTENTION_KERNEL.names)]


class ModelConfig(Section):
    """The architecture. ``ModelConfig.model_json_schema()`` lists every axis with its allowed values."""

    vocab_size: int = Field(
        default=0, ge=0, le=2**31 - 1, description="Number of token ids; 0: taken from the tokenizer."
    )
    context_length: int = Field(
        default=256, ge=1, le=2**24, description="Longest sequence the model is trained on, in tokens."
    )
    d_model: int = Field(default=256, ge=1, le=2**20, description="Width of the residual stream.")
    layers: int = Field(default=4, ge=0, le=10_000, description="Number of blocks.")
    heads: int = Field(default=8, ge=1, le=2**16, description="Number of query heads.")
    kv_heads: int | None = Field(
        default=None,
        ge=1,
        le=2**16,
        description="Number of key/value heads (GQA); None: as many as `heads`; 1 is MQA.",
    )
    head_dim: int | None = Field(
        default=None, ge=1, le=2**16, description="Width of one head; None: d_model / heads."
    )
    d_ff: int | None = Field(
        default=None,
        ge=1,
        le=2**24,
        description="Inner width of the feed-forward; None: d_ff_ratio · d_model, rounded.",
    )
    d_ff_ratio: float | None = Field(
        default=None,
        gt=0,
        le=10_000,
        description="d_ff / d_model; None: 8/3 for gated feed-forwards, 4 for plain ones.",
    )
    d_ff_multiple: int = Field(
        default=64, ge=1, le=2**20, description="A derived d_ff is rounded to a multiple of this."
    )
    norm: NormName = Field(default="rmsnorm", description="Normalisation layer.")
    norm_eps: float = Field(default=1e-5, gt=0, le=1, description="Added to the mean square before its root.")
    qk_norm: QKNormName = Field(default="none", description="Normalisation of queries and keys, per head.")
    block: BlockName = Field(default="pre_norm", description="Layout of a block and placement of its norms.")
    feedforward: FeedForwardName = Field(default="swiglu", description="Position-wise feed-forward network.")
    position: PositionName = Field(default="rope", description="How positions enter.")
    rope_theta: float = Field(default=10_000.0, gt=0, le=1e15, description="Base of RoPE's wavelengths.")
    attention: AttentionName = Field(default="mha", description="Attention mechanism.")
    mask: MaskName = Field(default="causal", description="Which positions may be attended to.")
    tied_embeddings: bool = Field(default=False, description="Output projection shares the embedding's weights.")
    init: InitName = Field(default="truncated_normal", description="Initialisation scheme.")
    init_linear_std: float | None = Field(
        default=None, ge=0, le=1000, description="σ of linear weights; None: sqrt(2 / (d_in + d_out))."
    )
    init_embedding_std: float = Field(default=1.0, ge=0, le=1000, description="σ of the embedding weights.")
    init_output_std: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="σ of each residual branch's last linear and of the head; None: as any linear.",
    )
    attention_kernel: AttentionKernelName = Field(
        default="auto", description="Implementation of attention; auto picks the fastest for the device."
    )
    kernels: Literal["fast", "reference"] = Field(
        default="fast", description="reference: every operation as the lecture's formula; fast: torch's fused ones."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.head_dim is None and self.d_model % self.heads:
            raise ValueError(
                f"heads = {self.heads} does not divide d_model = {self.d_model}; "
                "change one of them or set head_dim explicitly"
            )
        if self.heads % self.resolved_kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}")
        if self.position == "rope" and self.resolved_head_dim % 2:
            raise ValueError(f"RoPE rotates pairs: head_dim = {self.resolved_head_dim} must be even")
        return self

    @property
    def resolved_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def resolved_head_dim(self) -> int:
        return self.d_model // self.heads if self.head_dim is None else self.head_dim

    @property
    def resolved_d_ff(self) -> int:
        """d_ff, or the ratio's width rounded to the nearest multiple of `d_ff_multiple` (at least one of it)."""
        if self.d_ff is not None:
            return self.d_ff
        ratio = self.d_ff_ratio or choices.FEEDFORWARD.get(self.feedforward).default_ratio
        return max(1, round(ratio * self.d_model / self.d_ff_multiple)) * self.d_ff_multiple
