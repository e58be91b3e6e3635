"""A ScratchLM model for `transformers`: feed-forwards, mixtures of experts, the block, and the model with all its choices.

::

    ids ─► embedding ─► block × layers ─► norm ─► head ─► logits

What differs from ScratchLM: experts run one after the other, modules of multi-token prediction are kept with their weights and
not used, and the routers' auxiliary losses, jitter and capacity, which are training's, are not here. Dropout is, and acts in
training mode alone. A sequence longer than `context_length` is refused by learned positions and by nothing else.
"""

# mypy: disable-error-code="assignment, misc, override"

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_scratchlm import (
    LatentAttention,
    Learned,
    LinearAttention,
    MultiHeadAttention,
    Pass,
    ShortConvolution,
    Sinusoidal,
    StateCache,
)
from .configuration_scratchlm import GATED, SOFTMAX, ScratchLMConfig
from .layers_scratchlm import at, linear, norm, soft_cap, widened

# ----------------------------------------------------------------------------------------- feed-forwards and mixtures


def activate(kind: str, x: Tensor) -> Tensor:
    """f(up), or f(gate) ⊙ up of the two halves gate‖up."""
    f = {
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "glu": torch.sigmoid,
        "reglu": F.relu,
        "geglu": F.gelu,
        "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "swiglu": F.silu,
        "swiglu_clamped": lambda x: x * torch.sigmoid(1.702 * x),
    }[kind]
    if kind not in GATED:
        return f(x)
    gate, up = x.chunk(2, dim=-1)
    if kind == "swiglu_clamped":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
    return f(gate) * up


class FeedForward(nn.Module):
    """Position-wise network, plain or gated."""

    def __init__(self, c: SimpleNamespace, d_ff: int) -> None:
        super().__init__()
        self.kind, gated = c.feedforward, c.feedforward in GATED
        inner = linear(c.d_model, 2 * d_ff if gated else d_ff, bias=c.feedforward_bias)
        if gated:
            self.gate_up = inner
        else:
            self.up = inner
        self.down = linear(d_ff, c.d_model, bias=c.feedforward_bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.gate_up if self.kind in GATED else self.up
        return self.down(activate(self.kind, inner(x)))


class Router(nn.Module):
    """A token's experts and their gates, from scores in fp32 at least."""

    correction: Tensor | None

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.moe = c.moe
        self.score = linear(c.d_model, c.moe.n_experts, bias=c.moe.router_bias)
        corrected = c.moe.router == "sigmoid" or c.moe.bias_update > 0
        self.register_buffer("correction", torch.zeros(c.moe.n_experts) if corrected else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moe, x = self.moe, widened(x)
        with torch.autocast(x.device.type, enabled=False):
            bias = self.score.bias
            values = F.linear(x, self.score.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            if moe.router != "topk_softmax":
                values = values.softmax(dim=-1) if moe.router == "softmax_topk" else values.sigmoid()
            experts = self.choose(values.detach())
            gates = values.gather(-1, experts)
            if moe.router == "topk_softmax":
                gates = gates.softmax(dim=-1)
            elif moe.normalise:
                gates = gates / gates.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return experts, gates * moe.gate_scale

    def choose(self, values: Tensor) -> Tensor:
        """The k largest values plus correction, from the best groups alone."""
        moe = self.moe
        if self.correction is not None:
            values = values + self.correction.to(values.dtype)
        if moe.top_groups < moe.groups:
            grouped = values.unflatten(-1, (moe.groups, -1))
            best_few = min(2, grouped.shape[-1]) if moe.router == "sigmoid" else 1
            strength = grouped.topk(best_few, dim=-1).values.sum(dim=-1)
            best = strength.topk(moe.top_groups, dim=-1).indices
            closed = torch.ones_like(strength, dtype=torch.bool).scatter(-1, best, False)
            values = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
        return values.topk(moe.active, dim=-1).indices


class Experts(nn.Module):
    """One linear layer per expert, stacked."""

    def __init__(self, n: int, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(n, d_out)) if bias else None

    def apply_one(self, expert: int, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])


class MixtureOfExperts(nn.Module):
    """Σ gate_e · FFN_e(x) over a token's experts, and the shared experts for every token; none is dropped."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        moe, self.kind = c.moe, c.feedforward
        inner = 2 * moe.d_expert if self.kind in GATED else moe.d_expert
        self.router = Router(c)
        self.up = Experts(moe.n_experts, c.d_model, inner, c.feedforward_bias)
        self.down = Experts(moe.n_experts, moe.d_expert, c.d_model, c.feedforward_bias)
        self.shared = FeedForward(c, moe.d_shared) if moe.shared else None
        self.shared_gate = linear(c.d_model, 1) if moe.shared and moe.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        experts, gates = (part.flatten(0, 1) for part in self.router(x))
        tokens = x.flatten(0, 1)
        y = torch.zeros_like(tokens, dtype=gates.dtype)
        for expert in range(len(self.up.weight)):
            token, choice = (experts == expert).nonzero(as_tuple=True)
            one = self.down.apply_one(expert, activate(self.kind, self.up.apply_one(expert, tokens[token])))
            y = y.index_add(0, token, gates[token, choice, None] * one.to(y.dtype))
        y = y.to(x.dtype).view_as(x)
        if self.shared is None:
            return y
        always = self.shared(x)
        return y + (always if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * always)


# ------------------------------------------------------------------------------------------------- block and whole model


class Residual(nn.Module):
    """What a branch is multiplied by when it is added to the stream: a number, or learned."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.start = c.residual_init
        learned = {"scalar": 1, "vector": c.d_model}.get(c.residual)
        fixed = {"depth": (2 * max(1, c.layers)) ** -0.5, "fixed": c.residual_init}
        self.scale = fixed.get(c.residual, 1.0)
        if learned:
            self.scale = nn.Parameter(torch.full((learned,), c.residual_init))

    def forward(self, branch: Tensor) -> Tensor:
        return branch * (self.scale.to(branch.dtype) if isinstance(self.scale, Tensor) else self.scale)


class Block(nn.Module):
    """Attention and feed-forward, in a row or side by side.

    ::

        x ──┬───────────────────(+)───►      before = pre, double; after = reordered, double;
            └─ before ─ f ─ after ┘          on the stream, after the sum = post
    """

    def __init__(self, c: SimpleNamespace, layer: int) -> None:
        super().__init__()
        self.layout, placement, self.dropout = c.block, c.norm_placement, c.residual_dropout
        self.on_stream = placement == "post"
        before, after = placement in ("pre", "double"), placement in ("post", "reordered", "double")
        kind = {"mha": MultiHeadAttention, "mla": LatentAttention}.get(at(c.attention, layer), LinearAttention)
        self.attention = kind(c, layer)
        since = layer - c.moe.first_dense
        has_experts = c.moe.experts > 0 and since >= 0 and (since + 1) % c.moe.every == 0
        self.feedforward = MixtureOfExperts(c) if has_experts else FeedForward(c, c.d_ff)
        self.attention_scale, self.feedforward_scale = Residual(c), Residual(c)

        def norm_if(wanted: bool) -> nn.Module:
            return norm(c, c.d_model) if wanted else nn.Identity()

        self.attention_norm, self.attention_post_norm = norm_if(before), norm_if(after)
        self.feedforward_norm = norm_if(before and self.layout != "parallel_shared")
        once = self.on_stream and self.layout != "serial"  # the stream is normed after both branches
        self.feedforward_post_norm = norm_if(after and not once)

    def join(self, x: Tensor, branch: Tensor, post_norm: nn.Module, scale: nn.Module) -> Tensor:
        branch = branch if self.on_stream else post_norm(branch)
        x = x + scale(F.dropout(branch, self.dropout, self.training))
        return post_norm(x) if self.on_stream else x

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        attended = self.attention_norm(x)
        if self.layout == "parallel_shared":
            fed = self.feedforward(attended)
        elif self.layout == "parallel":
            fed = self.feedforward(self.feedforward_norm(x))
        attended = self.attention(attended, run)
        if self.layout == "serial":
            x = self.join(x, attended, self.attention_post_norm, self.attention_scale)
            fed = self.feedforward(self.feedforward_norm(x))
            return self.join(x, fed, self.feedforward_post_norm, self.feedforward_scale)
        x = self.join(x, fed, self.feedforward_post_norm, self.feedforward_scale)
        return self.join(x, attended, self.attention_post_norm, self.attention_scale)


class PredictionModule(nn.Module):
    """The weights of a module of multi-token prediction: kept, so that nothing is lost in saving, and not used."""

    def __init__(self, c: SimpleNamespace, depth: int) -> None:
        super().__init__()
        self.hidden_norm, self.token_norm, self.norm = (norm(c, c.d_model) for _ in range(3))
        self.project = linear(2 * c.d_model, c.d_model)
        self.block = Block(c, c.layers + depth)


class ScratchLMForCausalLM(PreTrainedModel, GenerationMixin):
    """Any ScratchLM architecture; the names of its weights are ScratchLM's own.

    Every architecture generates with a cache: keys and values of softmax attention (all of them, also under a window; of mla the
    latent vectors) in transformers' `DynamicCache`, the states of linear attention in a :class:`StateCache`.
    """

    config_class = ScratchLMConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_cache_class = True
    _tied_weights_keys = (  # a list of names before transformers 5
        {"head.weight": "embedding.weight"} if int(transformers.__version__.split(".")[0]) >= 5 else ["head.weight"]
    )

    def __init__(self, config: ScratchLMConfig) -> None:
        super().__init__(config)
        c = self.architecture = config.resolved()
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.embedding_norm = norm(c, c.d_model) if c.embedding_norm else nn.Identity()
        kinds = {"learned": Learned, "sinusoidal": Sinusoidal}
        names = dict.fromkeys(at(c.position, layer) for layer in range(max(1, c.layers)))
        self.embedding_positions = nn.ModuleList(kinds[name](c) for name in names if name in kinds)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.layers))
        self.norm = norm(c, c.d_model) if c.final_norm else nn.Identity()
        self.head = linear(c.d_model, c.vocab_size, bias=c.head_bias)
        self.predictions = nn.ModuleList(PredictionModule(c, depth) for depth in range(c.mtp_depth))
        self.predictions.requires_grad_(False)
        # What keeps a state cannot be wound back, and transformers' own cache, which asks its first layer for the length,
        # does not do for it; nor for a model without layers.
        self._is_stateful = not c.layers or any(at(c.attention, layer) not in SOFTMAX for layer in range(c.layers))
        # A correction moves in steps that bf16 cannot tell apart; scores are computed in fp32 in any case.
        self._keep_in_fp32_modules_strict = ["router"] if c.moe.experts else []
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """For a model from nothing: σ = 0.02, gains 1, biases 0. ScratchLM's own schemes are not here."""
        start = getattr(module, "start", None)  # of norms and residual scales
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("weight", "scale") and start is not None:
                nn.init.constant_(parameter, start)
            elif isinstance(module, ShortConvolution):
                nn.init.uniform_(parameter, -(parameter.shape[1] ** -0.5), parameter.shape[1] ** -0.5)
            elif name == "decay_bias":  # a token forgets about a hundredth
                nn.init.constant_(parameter, -4.6)
            elif parameter.ndim > 1 and name != "bias":
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        prompt_length: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits of the next token at every position.

        Args:
            input_ids: token ids (b, t), those after what the cache holds.
            attention_mask: 0 for padding, (b, n), the columns of the cache included; positions count from the first 1.
            position_ids: positions for RoPE and for those added to the embedding, instead; masks and ALiBi go by places.
            past_key_values: what an earlier pass returned.
            inputs_embeds: rows of the embedding in place of `input_ids`.
            labels: ids (b, t), −100 where none is asked for: the loss is the mean cross-entropy of the next one.
            use_cache: return a cache; None: the configuration's, but not in training mode.
            output_hidden_states: return the stream before every block, and what the head reads.
            return_dict: False: a tuple.
            logits_to_keep: compute the last few logits only; 0: all.
            prompt_length: under the mask prefix_lm how many first columns see each other, padding included; None: the
                configuration's `prefix_length` tokens. `generate` sets it: the prompt is the prefix.
            num_items_in_batch: divisor of the loss, from a trainer that accumulates gradients; None: the labels asked for.
            kwargs: ignored.
        """
        c = self.architecture
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if past_key_values is None and use_cache:
            past_key_values = StateCache() if self._is_stateful else DynamicCache()
        if self._is_stateful and past_key_values is not None and not isinstance(past_key_values, StateCache):
            raise ValueError(
                "this model keeps states beside keys and values: give the cache that its first pass returned"
            )
        length = x.shape[1]
        run = Pass(c, length, x.device, past_key_values, attention_mask, position_ids, prompt_length)
        x = x * c.embedding_scale
        for position in self.embedding_positions:
            x = position(x, run.positions.to(x.device))
        x = F.dropout(self.embedding_norm(x), c.embedding_dropout, self.training)
        streams = [x]
        for block in self.blocks:
            x = block(x, run)
            streams.append(x)
        x = streams[-1] = self.norm(x)
        if isinstance(past_key_values, StateCache):
            past_key_values.tokens += length
        logits = soft_cap(
            self.head(x[:, -logits_to_keep:] if logits_to_keep else x) * c.logit_scale, c.logit_soft_cap
        )
        loss = None
        if labels is not None:
            predicted, wanted = widened(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
            if num_items_in_batch is None:
                loss = F.cross_entropy(predicted, wanted)
            else:
                loss = F.cross_entropy(predicted, wanted, reduction="sum") / num_items_in_batch
        hidden = tuple(streams) if output_hidden_states else None
        output = CausalLMOutputWithPast(loss, logits, past_key_values if use_cache else None, hidden)
        return output.to_tuple() if return_dict is False else output

    # ------------------------------------------------------------------------------------------------------- generation

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; under the mask prefix_lm the prompt is the prefix."""
        if "prefix_lm" in self.architecture.mask:
            prompt = kwargs.get("input_ids") if inputs is None else inputs
            kwargs.setdefault("prompt_length", 1 if prompt is None else prompt.shape[1])
        return super().generate(inputs, *args, **kwargs)

    def _supports_default_dynamic_cache(self) -> bool:
        """Where not, the first pass makes the cache."""
        return not self._is_stateful

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: DynamicCache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens the cache has not seen; positions follow from the attention mask."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        passed: dict[str, Any] = {
            name: kwargs[name] for name in ("use_cache", "prompt_length", "logits_to_keep") if name in kwargs
        }
        return {
            "input_ids": input_ids[:, past:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            **passed,
        }


ScratchLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
