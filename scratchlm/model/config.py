"""ModelConfig: one field per architectural choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from scratchlm.model import choices
from scratchlm.model.legality import check
from scratchlm.model.parts import LatentConfig, LinearAttentionConfig, MoEConfig, Names, Pattern, RopeConfig
from scratchlm.section import Section

if TYPE_CHECKING:  # a type checker wants literals spelled out; pydantic and tyro read the table
    NormName = str
    NormPlacementName = str
    QKNormName = str
    BlockName = str
    ResidualName = str
    FeedForwardName = str
    PositionName = str
    AttentionName = str
    MaskName = str
    InitName = str
    AttentionKernelName = str
else:
    NormName = Literal[choices.NORM.names]
    NormPlacementName = Literal[choices.NORM_PLACEMENT.names]
    QKNormName = Literal[choices.QK_NORM.names]
    BlockName = Literal[choices.BLOCK.names]
    ResidualName = Literal[choices.RESIDUAL.names]
    FeedForwardName = Literal[choices.FEEDFORWARD.names]
    PositionName = Literal[choices.POSITION.names]
    AttentionName = Literal[choices.ATTENTION.names]
    MaskName = Literal[choices.MASK.names]
    InitName = Literal[choices.INIT.names]
    AttentionKernelName = Literal[("auto", *choices.ATTENTION_KERNEL.names)]

Projection = Literal["q", "k", "v", "o"]


class ModelConfig(Section):
    """The architecture. ``ModelConfig.model_json_schema()`` lists every axis with its allowed values.

    `attention`, `mask`, `position`, `rope.theta` and `rope.scaling` may differ between layers: several names are a pattern
    that is repeated, so ``mask = "sliding_window sliding_window causal"`` makes every third layer global.
    """

    # widths
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

    # norms and the residual stream
    norm: NormName = Field(default="rmsnorm", description="Normalisation layer.")
    norm_eps: float = Field(default=1e-5, gt=0, le=1, description="Added to the mean square before its root.")
    norm_placement: NormPlacementName = Field(
        default="pre", description="Where a block's norms stand: before or after a branch, both, or on the stream."
    )
    final_norm: bool | None = Field(
        default=None, description="A norm before the head; None: yes, except where norm_placement is post or none."
    )
    embedding_norm: bool = Field(default=False, description="A norm right after the embedding (BLOOM).")
    qk_norm: QKNormName = Field(
        default="none",
        description="Normalisation of queries and keys: per head with one gain or one each, or over the full width.",
    )
    qk_norm_kind: NormName | None = Field(
        default=None, description="The norm of qk_norm; None: that of `norm`, or rmsnorm where that is none."
    )
    qk_norm_eps: float | None = Field(default=None, gt=0, le=1, description="ε of qk_norm; None: norm_eps.")
    block: BlockName = Field(default="serial", description="Attention and feed-forward in a row or side by side.")
    residual: ResidualName = Field(default="plain", description="What a branch is multiplied by when it is added.")
    residual_init: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="The residual scale: fixed, or where the learned ones start (scalar, vector).",
    )

    # feed-forward
    feedforward: FeedForwardName = Field(default="swiglu", description="Position-wise feed-forward network.")
    feedforward_bias: bool = Field(default=False, description="Biases in the feed-forward.")
    moe: MoEConfig = Field(default_factory=MoEConfig, description="Mixture of experts.")

    # positions
    position: Pattern[PositionName] = Field(
        default=("rope",), description="How positions enter; several: per layer, repeated."
    )
    rope: RopeConfig = Field(default_factory=RopeConfig, description="Rotary positions.")

    # attention
    attention: Pattern[AttentionName] = Field(
        default=("mha",), description="Attention mechanism; several: per layer, repeated."
    )
    attention_bias: Names[Projection] = Field(
        default=(), description="Which projections have a bias, such as q k v."
    )
    attention_scale: float | None = Field(
        default=None, gt=0, le=1e6, description="Scores are multiplied by this; None: 1 / sqrt(head_dim)."
    )
    attention_soft_cap: float | None = Field(
        default=None, gt=0, le=1e6, description="c: scores become c · tanh(score / c) (Gemma 2); None: off."
    )
    attention_sinks: bool = Field(
        default=False, description="A learned score per head that takes weight and gives nothing (gpt-oss)."
    )
    qkv_clip: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="c: queries, keys and values are cut to ±c, before RoPE (DBRX); None: off.",
    )
    latent: LatentConfig = Field(default_factory=LatentConfig, description="Latent attention (MLA).")
    linear: LinearAttentionConfig = Field(default_factory=LinearAttentionConfig, description="Linear attention.")

    # masks
    mask: Pattern[MaskName] = Field(
        default=("causal",), description="Which positions may be attended to; several: per layer, repeated."
    )
    window: int = Field(
        default=128, ge=1, le=2**24, description="sliding_window: positions a query reads, itself included."
    )
    stride: int = Field(
        default=16, ge=1, le=2**24, description="strided, fixed: length of a stretch (ℓ in the paper)."
    )
    stride_summary: int = Field(
        default=1,
        ge=1,
        le=2**24,
        description="fixed: how many of a stretch's last positions everyone later reads (c).",
    )
    mask_block: int = Field(default=64, ge=1, le=2**20, description="block_sparse: side of a block.")
    mask_local_blocks: int = Field(
        default=2,
        ge=1,
        le=2**20,
        description="block_sparse: blocks a query reads up to its own, that one included.",
    )
    global_tokens: int = Field(
        default=0, ge=0, le=2**24, description="block_sparse: how many first positions everyone reads."
    )
    prefix_length: int = Field(
        default=0, ge=0, le=2**24, description="prefix_lm: how many first positions see each other in training."
    )

    # output
    tied_embeddings: bool = Field(
        default=False,
        description="Output projection shares the embedding's weights; trained from scratch, it learns faster with embedding_scale = sqrt_d_model.",
    )
    head_bias: bool = Field(default=False, description="A bias on the logits, also with tied embeddings (GPT-J).")
    embedding_scale: Annotated[float, Field(gt=0, le=1e6)] | Literal["sqrt_d_model"] = Field(
        default=1.0, description="Embeddings times this; sqrt_d_model in the first Transformer and Gemma."
    )
    logit_scale: float = Field(default=1.0, gt=0, le=1e6, description="Logits times this (Cohere).")
    logit_soft_cap: float | None = Field(
        default=None, gt=0, le=1e6, description="c: logits become c · tanh(logit / c) (Gemma 2); None: off."
    )
    mtp_depth: int = Field(
        default=0, ge=0, le=64, description="Modules that predict the tokens after the next one (DeepSeek-V3)."
    )

    # regularisation and initial weights
    embedding_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout of the embeddings.")
    attention_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout of attention's weights.")
    residual_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout of each branch before it is added."
    )
    init: InitName = Field(default="truncated_normal", description="Initialisation scheme.")
    init_linear_std: float | None = Field(
        default=None, ge=0, le=1000, description="σ of linear weights; None: the scheme's own."
    )
    init_embedding_std: float | None = Field(
        default=None, ge=0, le=1000, description="σ of the embedding weights; None: the scheme's own."
    )
    init_output_std: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="σ of each residual branch's last linear and of the head; None: the scheme's own.",
    )

    # implementation: changes the speed, not the function
    attention_kernel: AttentionKernelName = Field(
        default="auto", description="Implementation of attention; auto picks the fastest for the device."
    )
    kernels: Literal["fast", "reference"] = Field(
        default="fast", description="reference: every operation as the lecture's formula; fast: torch's fused ones."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        check(self)
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

    @property
    def rotated_dims(self) -> int:
        """How many of a head's dimensions RoPE turns (outside latent attention)."""
        return int(self.resolved_head_dim * self.rope.fraction + 1e-6)

    @property
    def resolved_final_norm(self) -> bool:
        return self.norm_placement not in ("post", "none") if self.final_norm is None else self.final_norm

    @property
    def resolved_qk_norm_kind(self) -> str:
        return self.qk_norm_kind or ("rmsnorm" if self.norm == "none" else self.norm)

    @property
    def resolved_value_dim(self) -> int:
        """Width of one head's values in latent attention."""
        return self.latent.value_dim or self.resolved_head_dim

    @property
    def n_experts(self) -> int:
        """Routed experts of a layer that has some, after the fine-grained split."""
        return self.moe.experts * self.moe.fine_grained

    @property
    def idle_router(self) -> bool:
        """Whether a token has one expert whose gate, normalised, is always 1, so that a router learns nothing from the task."""
        return self.moe.experts > 0 and self.active_experts == 1 and self.moe.normalise

    @property
    def active_experts(self) -> int:
        """Routed experts that one token goes to."""
        return self.moe.top_k * self.moe.fine_grained

    @property
    def resolved_d_expert(self) -> int:
        """Inner width of one expert."""
        return self.moe.d_expert or max(1, self.resolved_d_ff // self.moe.fine_grained)

    @property
    def resolved_d_shared(self) -> int:
        """Inner width of the shared experts together; 0 without any."""
        return self.moe.d_shared or self.moe.shared * self.resolved_d_expert

    def attention_at(self, layer: int) -> str:
        """Name of the attention mechanism of one layer."""
        return self.attention[layer % len(self.attention)]

    def mask_at(self, layer: int) -> str:
        """Name of the mask of one layer."""
        return self.mask[layer % len(self.mask)]

    def position_at(self, layer: int) -> str:
        """Name of the position encoding of one layer."""
        return self.position[layer % len(self.position)]

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward of this layer is a mixture of experts."""
        after = layer - self.moe.first_dense
        return self.moe.experts > 0 and after >= 0 and (after + 1) % self.moe.every == 0
