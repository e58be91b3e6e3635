"""Mixture of experts: many feed-forward networks, of which a token goes through a few.

::

           ┌── router ──► k of E experts, gates g
           │
    x ─────┼── FFN_e ── · g_e ──┐  for the k chosen e
           │                    +──►
           └── shared FFN ──────┘  for every token

(Shazeer et al. 2017, arXiv 1701.06538; split and shared experts: DeepSeekMoE, Dai et al. 2024, arXiv 2401.06066.)
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.context import Context, RouterRecord
from scratchlm.model.linear import Linear
from scratchlm.model.router import Router, Routing, balance_loss, entropy, z_loss


class ExpertLinear(nn.Module):
    """One linear layer per expert, stacked: weight (experts, d_out, d_in), bias (experts, d_out).

    `parts`, `residual_output` and the widths mean for each expert what they mean in
    :class:`~scratchlm.model.linear.Linear`.
    """

    def __init__(
        self,
        n_experts: int,
        d_in: int,
        d_out: int,
        *,
        parts: list[int] | None = None,
        bias: bool = False,
        residual_output: bool = False,
    ) -> None:
        super().__init__()
        self.n_experts, self.d_in, self.d_out = n_experts, d_in, d_out
        self.parts = parts or [d_out]
        self.residual_output = residual_output
        self.weight = nn.Parameter(torch.empty(n_experts, d_out, d_in))
        self.weight.role = "matrix"  # type: ignore[attr-defined]  # read by the optimizer's grouping
        if parts:
            self.weight.muon_split = parts  # type: ignore[attr-defined]
        self.bias = nn.Parameter(torch.zeros(n_experts, d_out)) if bias else None
        if self.bias is not None:
            self.bias.role = "bias"  # type: ignore[attr-defined]

    def num_params(self) -> int:
        """Of all experts."""
        return self.n_experts * self.params_per_expert()

    def params_per_expert(self) -> int:
        return self.d_in * self.d_out + (0 if self.bias is None else self.d_out)

    def flops_per_token(self) -> int:
        """Of one expert: a multiply and an add per weight."""
        return 2 * self.d_in * self.d_out


class MixtureOfExperts(nn.Module):
    """The feed-forward of a layer with experts, in place of :class:`~scratchlm.model.feedforward.FeedForward`.

    Experts are of the kind `feedforward` names and `resolved_d_expert` wide. The shared ones are one network of their
    added width, which computes the same. Nothing is dropped unless `moe.capacity_factor` is set, and then in training
    only; a dropped pair's gate is 0, and the token has what its other experts and the residual stream give it.

    Without drops a token's output depends on that token alone.

    Args:
        config: the architecture.
        layer: number of the layer, for its record.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        moe = config.moe
        self.layer = layer
        self.d_model, self.n_experts, self.k = config.d_model, config.n_experts, config.active_experts
        self.balance_weight, self.balance_over = moe.balance_loss, moe.balance_over
        self.z_weight, self.capacity_factor = moe.router_z_loss, moe.capacity_factor
        reference = config.kernels == "reference"
        kind = choices.FEEDFORWARD.get(config.feedforward)
        self.activate = functools.partial(kind.activate, reference=reference)
        dispatch = ("reference" if reference else "grouped") if moe.dispatch == "auto" else moe.dispatch
        self.dispatch = choices.DISPATCH.get(dispatch)

        self.router: Router = choices.ROUTER.get(moe.router)(config)
        width, bias = config.resolved_d_expert, config.feedforward_bias
        parts = [width, width] if kind.gated else None  # gate‖up, as in FeedForward
        inner = 2 * width if kind.gated else width
        self.up = ExpertLinear(self.n_experts, config.d_model, inner, parts=parts, bias=bias)
        self.down = ExpertLinear(self.n_experts, width, config.d_model, bias=bias, residual_output=True)
        self.shared = kind(config, d_ff=config.resolved_d_shared) if moe.shared else None
        gated = self.shared is not None and moe.shared_gate
        self.shared_gate = Linear(config.d_model, 1, role="router", reference=reference) if gated else None

    def forward(self, x: Float[Tensor, "... d_model"], context: Context) -> Float[Tensor, "... d_model"]:
        """The mixture; appends a :class:`~scratchlm.model.context.RouterRecord` to `context.routers`, but not in generation."""
        routing = self.router(x)
        experts, gates = routing.experts.reshape(-1, self.k), routing.gates.reshape(-1, self.k)
        load: Tensor | None = None
        dropped = torch.zeros((), device=x.device)
        if context.cache is None:
            flat = experts.detach().flatten()
            load = torch.zeros(self.n_experts, device=x.device)
            load = load.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
            if self.training and self.capacity_factor is not None:
                capacity = math.ceil(self.capacity_factor * len(flat) / self.n_experts)
                kept = within_capacity(experts, load, capacity)
                gates = gates.masked_fill(~kept, 0.0)
                dropped = (~kept).sum().float()
        y = self.dispatch(
            x.reshape(-1, self.d_model),
            experts,
            gates,
            self.up.weight,
            self.down.weight,
            self.activate,
            self.up.bias,
            self.down.bias,
        ).view(x.shape)
        if load is not None:
            spread = entropy(routing.shares.detach())
            context.routers.append(RouterRecord(self.layer, self._loss(routing), load, dropped, spread))
        if self.shared is None:
            return y
        always = self.shared(x, context)
        return y + (always if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * always)

    def _loss(self, routing: Routing) -> Float[Tensor, ""]:
        """The auxiliary losses, weighted; a leading shape without a batch is one sequence."""
        loss = routing.scores.new_zeros(())
        if self.balance_weight:
            length = routing.shares.shape[-2] if routing.shares.ndim > 1 else 1
            batch = math.prod(routing.shares.shape[:-2])
            shares = routing.shares.reshape(batch, length, self.n_experts)
            chosen = routing.experts.reshape(batch, length, self.k)
            loss = loss + self.balance_weight * balance_loss(shares, chosen, self.balance_over)
        if self.z_weight:
            loss = loss + self.z_weight * z_loss(routing.scores)
        return loss

    def update_bias(self, load: Float[Tensor, " experts"]) -> None:
        """Balance without a loss, after a step: see :meth:`~scratchlm.model.router.Router.update_bias`."""
        self.router.update_bias(load)

    def num_params(self) -> int:
        return self._always() + self.up.num_params() + self.down.num_params()

    def num_active_params(self) -> int:
        """Those one token is multiplied with: the router, its k experts, the shared ones."""
        return self._always() + self.k * (self.up.params_per_expert() + self.down.params_per_expert())

    def _always(self) -> int:
        shared = 0 if self.shared is None else self.shared.num_params()
        return (
            self.router.num_params() + shared + (0 if self.shared_gate is None else self.shared_gate.num_params())
        )

    def flops_per_token(self, length: int) -> int:
        experts = self.k * (self.up.flops_per_token() + self.down.flops_per_token())
        shared = 0 if self.shared is None else self.shared.flops_per_token(length)
        gate = 0 if self.shared_gate is None else self.shared_gate.flops_per_token()
        return self.router.flops_per_token() + experts + shared + gate


def within_capacity(
    experts: Int[Tensor, "tokens k"], load: Float[Tensor, " experts"], capacity: int
) -> Bool[Tensor, "tokens k"]:
    """Whether each pair is among the first `capacity` of its expert: earlier tokens first, then earlier choices.

    A later token never takes an earlier one's place, so that within a sequence the drops stay causal.
    """
    owner, order = experts.flatten().sort(stable=True)
    starts = load.long().cumsum(0) - load.long()
    rank = torch.arange(len(order), device=order.device) - starts[owner]
    kept = torch.empty_like(order, dtype=torch.bool).scatter_(0, order, rank < capacity)
    return kept.view_as(experts)
