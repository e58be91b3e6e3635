"""Routers: which experts a token goes to, and what their outputs are multiplied by.

Every expert has a centroid e, and its score for a token is u · e, in float32 or better whatever the model's dtype
(Switch Transformer: Fedus et al. 2021, arXiv 2101.03961, section 2.4)::

    softmax_topk    p = softmax(scores) ──► the k largest p + b ──► gates p
    topk_softmax    the k largest scores + b ──────────────────► gates softmax over these k
    sigmoid         p = σ(scores) ──────► the k largest p + b ──► gates p

b is the correction bias: it sways the choice and never enters a gate. Gates are then divided by their sum
(`normalise`) and multiplied by `gate_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from scratchlm.kernels import functions
from scratchlm.kernels.matmul import linear
from scratchlm.model.config import ModelConfig
from scratchlm.model.linear import Linear

SMALLEST_SUM = 1e-20
"""Gates of σ can all vanish; their sum is taken to be at least this."""


@dataclass(frozen=True)
class Routing:
    """What a router decided.

    Attributes:
        experts: the chosen experts, best first (by what the choice went by).
        gates: what their outputs are multiplied by.
        scores: u · e of all experts.
        shares: the distribution over experts that the balance loss and the entropy look at; rows add up to 1.
    """

    experts: Int[Tensor, "... k"]
    gates: Float[Tensor, "... k"]
    scores: Float[Tensor, "... experts"]
    shares: Float[Tensor, "... experts"]


class Router(nn.Module):
    """What all routers share: scores, groups, the correction bias, and gates from the chosen values.

    The correction bias is a saved buffer. It exists where `moe.bias_update` moves it, and for every sigmoid router, so
    that models that were trained with one can be loaded with the update switched off.
    """

    corrected = False
    """Whether the correction bias exists even if nothing moves it."""

    correction: Float[Tensor, " experts"] | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        self.n_experts, self.k = config.n_experts, config.active_experts
        self.groups, self.top_groups = moe.groups, moe.top_groups or moe.groups
        self.normalise, self.gate_scale = moe.normalise, moe.gate_scale
        self.jitter, self.bias_update = moe.jitter, moe.bias_update
        self.reference = config.kernels == "reference"
        # Few and unlike a hidden matrix (each row is compared with the others), centroids are AdamW's, not Muon's.
        self.score = Linear(config.d_model, self.n_experts, bias=moe.router_bias, role="router")
        has_correction = self.corrected or moe.bias_update > 0
        self.register_buffer("correction", torch.zeros(self.n_experts) if has_correction else None)

    def values(self, scores: Float[Tensor, "... experts"]) -> Float[Tensor, "... experts"]:
        """What experts are chosen by, before the correction."""
        raise NotImplementedError

    def shares(
        self, scores: Float[Tensor, "... experts"], values: Float[Tensor, "... experts"]
    ) -> Float[Tensor, "... experts"]:
        """The distribution over experts."""
        return self._softmax(scores)

    def gates(self, chosen: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
        """Gates from the chosen experts' values."""
        return chosen / chosen.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM) if self.normalise else chosen

    def group_strength(self, values: Float[Tensor, "... groups members"]) -> Float[Tensor, "... groups"]:
        """What groups are chosen by: their best expert (DeepSeek-V2, arXiv 2405.04434, section 2.2.2)."""
        return values.amax(-1)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Routing:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        # Switch Transformer, appendix C: noise, so that other experts than the first guess are tried.
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        with torch.autocast(x.device.type, enabled=False):
            scores = self._scores(x)
            values = self.values(scores)
            experts = self._choose(values.detach())
            gates = self.gates(values.gather(-1, experts)) * self.gate_scale
            return Routing(experts, gates, scores, self.shares(scores, values))

    @torch.no_grad()
    def update_bias(self, load: Float[Tensor, " experts"]) -> None:
        """b_i ← b_i + γ · sign(mean load − load_i) (Wang et al. 2024, arXiv 2408.15664, algorithm 1).

        Call it after an optimizer's step with the pairs each expert was given in that step (on all devices together).
        """
        if self.correction is not None:
            self.correction += self.bias_update * torch.sign(load.mean() - load).to(self.correction)

    def _scores(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... experts"]:
        weight, bias = self.score.weight.to(x.dtype), self.score.bias
        if self.reference:
            product = einsum(x, weight, "... d, experts d -> ... experts")
            return product if bias is None else product + bias
        return linear(x, weight, None if bias is None else bias.to(x.dtype))

    def _choose(self, values: Float[Tensor, "... experts"]) -> Int[Tensor, "... k"]:
        """The k best, from the best groups alone where there are any."""
        if self.correction is not None:
            values = values + self.correction.to(values.dtype)
        if self.top_groups < self.groups:
            grouped = values.unflatten(-1, (self.groups, -1))
            best = self.group_strength(grouped).topk(self.top_groups, dim=-1).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
            values = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
        return values.topk(self.k, dim=-1).indices

    def _softmax(self, scores: Tensor) -> Tensor:
        return functions.softmax(scores) if self.reference else F.softmax(scores, dim=-1)

    def num_params(self) -> int:
        return self.score.num_params()

    def flops_per_token(self) -> int:
        return self.score.flops_per_token()


class SoftmaxThenTopK(Router):
    """Probabilities over all experts, the k largest being the gates (Switch; GShard; DeepSeek-V2; OLMoE; Qwen-MoE).

    With `normalise` this is Mixtral's too: softmax over the chosen scores is softmax over all, divided by their sum.
    """

    def values(self, scores: Float[Tensor, "... experts"]) -> Float[Tensor, "... experts"]:
        return self._softmax(scores)

    def shares(
        self, scores: Float[Tensor, "... experts"], values: Float[Tensor, "... experts"]
    ) -> Float[Tensor, "... experts"]:
        return values


class TopKThenSoftmax(Router):
    """The k best scores, and a softmax over these: always normalised (Shazeer et al. 2017, eq. 3 and 5; gpt-oss)."""

    def values(self, scores: Float[Tensor, "... experts"]) -> Float[Tensor, "... experts"]:
        return scores

    def gates(self, chosen: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
        return self._softmax(chosen)


class Sigmoid(Router):
    """Every expert judged by itself: σ(u · e) (DeepSeek-V3, arXiv 2412.19437, eq. 12 to 16; Llama 4)."""

    corrected = True

    def values(self, scores: Float[Tensor, "... experts"]) -> Float[Tensor, "... experts"]:
        return functions.sigmoid(scores) if self.reference else torch.sigmoid(scores)

    def shares(
        self, scores: Float[Tensor, "... experts"], values: Float[Tensor, "... experts"]
    ) -> Float[Tensor, "... experts"]:
        """σ over the sum of all σ (eq. 19)."""
        return values / values.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM)

    def group_strength(self, values: Float[Tensor, "... groups members"]) -> Float[Tensor, "... groups"]:
        """The sum of a group's two best (DeepSeek-V3, section 2.1.2, with k / top_groups = 2 as in the model)."""
        return values.topk(min(2, values.shape[-1]), dim=-1).values.sum(-1)


def balance_loss(
    shares: Float[Tensor, "batch length experts"], experts: Int[Tensor, "batch length k"], over: str
) -> Float[Tensor, ""]:
    """E Σ_i f_i P_i: the product of each expert's share of the choices, f, and of the distribution, P.

    Switch Transformer (arXiv 2101.03961), eq. 4 to 6, with f the share of all tokens · k pairs. It is 1 for an even
    load, whatever k, and E when one expert gets everything. Only P has a gradient: it lowers P where f is large.

    Args:
        shares: the router's distribution.
        experts: its choices.
        over: ``batch``: f and P are means over all tokens; ``sequence``: over one sequence, and the loss is the mean
            over sequences (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20).
    """
    if over == "batch":
        shares, experts = shares.flatten(0, 1)[None], experts.flatten(0, 1)[None]
    sequences, length, n_experts = shares.shape
    pairs = experts.flatten(1)
    counts = shares.new_zeros(sequences, n_experts).scatter_add(
        1, pairs, torch.ones_like(pairs, dtype=shares.dtype)
    )
    f = counts / max(1, pairs.shape[1])
    p = shares.sum(1) / max(1, length)
    return n_experts * (f * p).sum() / max(1, sequences)


def z_loss(scores: Float[Tensor, "... experts"]) -> Float[Tensor, ""]:
    """mean (log Σ exp scores)²: keeps scores small, where float rounding is fine (ST-MoE, arXiv 2202.08906, eq. 5)."""
    squared = scores.logsumexp(-1).square()
    return squared.sum() / max(1, squared.numel())


def entropy(shares: Float[Tensor, "... experts"]) -> Float[Tensor, ""]:
    """−Σ p log p in nats, mean over tokens: log E when all experts are alike to it, 0 when it is sure."""
    each = torch.special.entr(shares).sum(-1)
    return each.sum() / max(1, each.numel())
