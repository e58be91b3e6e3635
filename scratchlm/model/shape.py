"""How large to make what: the lecture's rules of thumb, from a wished number of parameters to widths.

::

    wish ──► every (layers, d_model, d_ff) near the rules ──► those within 5 % of the wish ──► the one nearest to the rules

The rules are read off models that work (CS336, lecture 3; Kaplan et al. 2020, arXiv 2001.08361, figure 5: the loss hardly
changes around them). They are defaults to start from; every one can be replaced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from scratchlm.errors import UserError
from scratchlm.model import choices
from scratchlm.model.config import ModelConfig

RULES = {
    "aspect ratio": "d_model / layers = 100, in most large models 80 to 200 (Kaplan et al. 2020, figure 5)",
    "feed-forward": "d_ff = 4 · d_model; 8/3 · d_model if gated, which has as many weights (Shazeer 2020)",
    "heads": "heads · head_dim = d_model, with head_dim 64; 128 in large models, 32 in tiny ones",
    "vocabulary": "30 to 50 thousand for one language, 100 to 250 for many; less in a small model",
    "key/value heads": "as many as heads; 8 where generation must be cheap (GQA: Ainslie et al. 2023)",
    "regularisation": "weight decay 0.1 and no dropout, as text is seen about once",
}
"""What `propose` goes by, with the sources beside CS336, lecture 3."""

KNOWN = (
    "gpt2-small", "gpt2-xl", "gpt3-175b", "llama-1-7b", "llama-2-7b", "llama-3-8b", "llama-3.1-405b", "gemma-2-9b", "olmo-2-7b",
    "deepseek-v3-671b", "gemma-3-27b", "qwen3-0.6b", "qwen3-8b", "smollm3-3b",
)  # fmt: skip
"""Presets that a proposal is shown beside."""

ASPECT = 100.0
TOLERANCE = 0.05
SMALL, LARGE = 10_000_000, 2_000_000_000
"""Below the first heads are 32 wide; from the second on they are 128 wide and the head has weights of its own."""
VOCABULARIES = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 49_152)
EMBEDDING_SHARE = 1 / 3
"""Unless a vocabulary is asked for, embedding and head take at most this share of the parameters."""
RANGE = (10**6, 10**12)
_FF_STRETCH = 0.35
"""How far d_ff may leave its rule, as a share, to meet the wished number."""


@dataclass(frozen=True)
class Count:
    """Parameters of a configuration.

    Attributes:
        body: all but the embedding and the head.
        embeddings: the embedding, and the head where it is not tied; 0 while the vocabulary's size is open.
        active: what one token meets in generation, embeddings included.
        prediction: how many of `body` are modules of multi-token prediction, which generation leaves out.
    """

    body: int
    embeddings: int
    active: int
    prediction: int

    @property
    def total(self) -> int:
        return self.body + self.embeddings


def params_per_token(config: ModelConfig) -> int:
    """Parameters that the embedding and the head have for every token of the vocabulary."""
    return config.d_model * (1 if config.tied_embeddings else 2) + config.head_bias


def count(config: ModelConfig) -> Count:
    """Count the parameters exactly, by building the model without memory for its weights."""
    import torch

    from scratchlm.model.transformer import Transformer

    quick: dict[str, float] = {
        "vocab_size": 1,
        "init_linear_std": 0.0,
        "init_embedding_std": 0.0,
        "init_output_std": 0.0,
    }
    if "learned" not in config.position:
        quick["context_length"] = 1  # RoPE's tables are computed, whatever the device
    with torch.device("meta"):
        model = Transformer(config.model_copy(update=quick))
    per_token = params_per_token(config)
    embeddings = config.vocab_size * per_token
    prediction = sum(module.num_params() for module in model.predictions)  # type: ignore[operator]
    unused = sum(module.num_active_params() for module in model.predictions)  # type: ignore[operator]
    return Count(
        body=model.num_params() - per_token,
        embeddings=embeddings,
        active=int(model.num_active_params() - unused - per_token + embeddings),
        prediction=int(prediction),
    )


@dataclass(frozen=True)
class Ratios:
    """The proportions the rules speak of.

    Attributes:
        aspect: d_model / layers.
        d_ff: the width of the feed-forward (in a mixture: of all experts a token meets, together) / d_model.
        heads: heads · head_dim / d_model.
    """

    aspect: float
    d_ff: float
    heads: float


def ratios(config: ModelConfig) -> Ratios:
    """The proportions of a configuration."""
    width = config.resolved_d_ff
    if config.moe.experts:
        width = config.active_experts * config.resolved_d_expert + config.resolved_d_shared
    return Ratios(
        aspect=config.d_model / max(1, config.layers),
        d_ff=width / config.d_model,
        heads=config.heads * config.resolved_head_dim / config.d_model,
    )


def parse_params(text: str) -> int:
    """``"125M"``, ``"1.3B"``, ``"7e9"``, ``"350_000_000"`` as a number.

    Raises:
        UserError: it is no number of parameters, or not one from a million to a trillion.
    """
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?(?:e\d{1,2})?)\s*([kmbt]?)", text.strip().lower(), re.ASCII)
    if not found:
        raise UserError(f"--params {text[:40]!r} is no number of parameters; write 125M, 1.3B or 7e9")
    digits, unit = found[1].replace("_", "").replace(",", ""), found[2]
    wish = float(digits) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}[unit]
    low, high = RANGE
    if not low <= wish <= high:
        raise UserError(f"--params {text[:40]} is outside 1M to 1T; ask for a size between")
    return round(wish)


def propose(
    params: int,
    *,
    aspect: float = ASPECT,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    feedforward: str = "swiglu",
    kv_heads: int | None = None,
    context_length: int = 1024,
) -> ModelConfig:
    """A configuration of about `params` parameters that keeps the rules; widths are multiples of 32 to 256.

    Args:
        params: how many parameters are wished, embeddings included.
        aspect: d_model / layers to come near to.
        head_dim: width of a head; None: 64, below 10 million parameters 32, from 2 billion on 128.
        vocab_size: None: as many of 512 … 49,152 as leave two thirds of the parameters to the blocks.
        feedforward: name of the feed-forward; whether it is gated decides d_ff's ratio.
        kv_heads: key/value heads; None: as many as heads.
        context_length: longest sequence; no rule asks for one, and no parameter depends on it.

    Raises:
        UserError: nothing within 5 % of the wish keeps to what was asked for; the nearest number is named.
    """
    head_dim = head_dim or (32 if params < SMALL else 64 if params < LARGE else 128)
    if head_dim % 2:
        raise UserError(f"--head-dim {head_dim} is odd, and RoPE rotates pairs; choose an even one")
    tied, kind = params < LARGE, choices.FEEDFORWARD.get(feedforward)
    nearest: int | None = None
    best: tuple[float, dict[str, int]] | None = None
    for layers, d_model in _skeletons(params, aspect, head_dim, kv_heads):
        heads = d_model // head_dim
        widths = {"layers": layers, "d_model": d_model, "heads": heads, "kv_heads": kv_heads or heads}
        widths["vocab_size"] = _vocabulary(params, d_model) if vocab_size is None else vocab_size
        for d_ff in _inner_widths(params, widths, kind.default_ratio, kind.gated, head_dim, tied):
            found = _parameters(**widths, d_ff=d_ff, head_dim=head_dim, gated=kind.gated, tied=tied)
            if nearest is None or abs(found - params) < abs(nearest - params):
                nearest = found
            if abs(found / params - 1) > TOLERANCE:
                continue
            distance = (
                math.log(d_model / layers / aspect) ** 2
                + math.log(d_ff / d_model / kind.default_ratio) ** 2
                + 10 * math.log(found / params) ** 2
            )
            if best is None or distance < best[0]:
                best = distance, {**widths, "d_ff": d_ff}
    if best is None:
        near = f" (the nearest has {nearest:,})" if nearest else ""
        raise UserError(
            f"no model within 5 % of {params:,} parameters keeps to what was asked for{near}; change --params, or choose a "
            "smaller --vocab-size, --head-dim or --kv-heads"
        )
    fields = {**best[1], "kv_heads": kv_heads, "context_length": context_length}
    return ModelConfig(**fields, feedforward=feedforward, tied_embeddings=tied)


def _skeletons(params: int, aspect: float, head_dim: int, kv_heads: int | None) -> Iterator[tuple[int, int]]:
    """(layers, d_model) around the aspect ratio, d_model in steps that suit the hardware and the heads."""
    layers_at_most = max(2, round(3 * (params / 12 / min(aspect, 1000) ** 2) ** (1 / 3)) + 2)
    step = math.lcm(_step(0), head_dim * (kv_heads or 1))
    for layers in range(1, min(layers_at_most, 1000) + 1):
        around = max(1, round(aspect * layers / step))
        for d_model in range(max(1, around // 2) * step, (2 * around + 3) * step, step):
            if d_model % _step(d_model) == 0:
                yield layers, d_model


def _step(width: float) -> int:
    """What widths of this size are multiples of: the matrix units of GPUs like powers of two, the larger the matrix the more."""
    return 32 if width < 512 else 64 if width < 1024 else 128 if width < 4096 else 256


def _inner_widths(
    params: int, widths: dict[str, int], ratio: float, gated: bool, head_dim: int, tied: bool
) -> Iterator[int]:
    """Values of d_ff in steps that suit the hardware: the rule's, the one that meets the wish, and one between them."""
    d_model = widths["d_model"]
    step = _step(d_model)
    rule, reach = max(1, round(ratio * d_model / step)), int(_FF_STRETCH * ratio * d_model / step)
    none, one = (_parameters(**widths, d_ff=d_ff, head_dim=head_dim, gated=gated, tied=tied) for d_ff in (0, step))
    meeting = round((params - none) / (one - none))
    meeting = min(max(meeting, 1, rule - reach), rule + reach)
    for multiple in {rule, meeting, (rule + meeting) // 2}:
        yield multiple * step


def _vocabulary(params: int, d_model: int) -> int:
    """The largest usual vocabulary that leaves enough for the blocks."""
    matrices = 1 if params < LARGE else 2
    fitting = [size for size in VOCABULARIES if matrices * size * d_model <= EMBEDDING_SHARE * params]
    return max(fitting, default=VOCABULARIES[0])


def _parameters(
    *,
    layers: int,
    d_model: int,
    heads: int,
    kv_heads: int,
    vocab_size: int,
    d_ff: int,
    head_dim: int,
    gated: bool,
    tied: bool,
) -> int:
    """Parameters of a pre-norm Transformer with RMSNorm and no biases: what `count` counts, as a formula to search by."""
    attention = 2 * d_model * head_dim * (heads + kv_heads)
    feedforward = (3 if gated else 2) * d_model * d_ff
    embeddings = (1 if tied else 2) * vocab_size * d_model
    return embeddings + layers * (attention + feedforward + 2 * d_model) + d_model
