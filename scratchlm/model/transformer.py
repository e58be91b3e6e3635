"""The decoder-only Transformer: embedding, blocks, final norm, head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scratchlm.errors import UserError
from scratchlm.kernels.functions import soft_cap
from scratchlm.kernels.visibility import Visibility
from scratchlm.model import choices
from scratchlm.model.checkpointing import checkpointed
from scratchlm.model.config import ModelConfig
from scratchlm.model.context import Cache, Context, RouterRecord
from scratchlm.model.linear import Embedding, Linear
from scratchlm.model.mask import visibility
from scratchlm.model.norm import NoNorm, norm_of
from scratchlm.model.position import Positions
from scratchlm.model.prediction import PredictionModule

Body = Callable[[Tensor, Context], tuple[Tensor, list[RouterRecord]]]


class Transformer(nn.Module):
    """ids ─► embedding ─► block × layers ─► norm ─► head ─► logits

    Args:
        config: the architecture; `vocab_size` must be set.
        seed: initial weights; None takes torch's global generator.

    Raises:
        UserError: the vocabulary size is not set.
    """

    def __init__(self, config: ModelConfig, seed: int | None = None) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise UserError("model.vocab_size is 0: set it, or build the model from a recipe with a tokenizer")
        self.config = config
        reference = config.kernels == "reference"
        self.embedding = Embedding(config.vocab_size, config.d_model, reference=reference)
        self.embedding_norm = norm_of(config, config.d_model) if config.embedding_norm else NoNorm(config.d_model)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        scale = config.embedding_scale
        self.embedding_scale = math.sqrt(config.d_model) if scale == "sqrt_d_model" else float(scale)
        positions = Positions(config)
        self.embedding_positions = nn.ModuleList(positions.at_embedding())
        block = choices.BLOCK.get(config.block)
        self.blocks = nn.ModuleList(block(config, layer, positions) for layer in range(config.layers))
        self.norm = norm_of(config, config.d_model) if config.resolved_final_norm else NoNorm(config.d_model)
        self.head = Linear(
            config.d_model,
            config.vocab_size,
            bias=config.head_bias,
            residual_output=True,
            role="head",
            reference=reference,
        )
        self.predictions = nn.ModuleList(
            PredictionModule(config, depth, positions) for depth in range(config.mtp_depth)
        )
        self.rules = {name: choices.MASK.get(name).of(config) for name in dict.fromkeys(config.mask)}
        self._needs_distances = "alibi" in config.position
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        choices.INIT.get(config.init)(self, config, generator)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight

    def embed(
        self, ids: Int[Tensor, "... length"], positions: Int[Tensor, "... length"] | None = None
    ) -> Float[Tensor, "... length d_model"]:
        """The bottom of the residual stream: embedding, scale, positions that are added, norm, dropout."""
        x = self.embedding(ids)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        for position in self.embedding_positions:
            x = position.embed(x, positions)  # type: ignore[operator]
        embedded: Tensor = self.embedding_dropout(self.embedding_norm(x))
        return embedded

    def context(
        self,
        ids: Int[Tensor, "... length"],
        positions: Int[Tensor, "... length"] | None = None,
        documents: Int[Tensor, "... length"] | None = None,
        cache: Cache | None = None,
        prefix: int | Int[Tensor, " ..."] | None = None,
    ) -> Context:
        """What all layers need to know about a forward pass over `ids`; arguments and errors as :meth:`forward`."""
        length = ids.shape[-1]
        past = 0 if cache is None else cache.length
        if past + length > self.config.context_length:
            raise UserError(
                f"a sequence of {past + length} tokens is longer than the model's context of "
                f"{self.config.context_length}; cut it, or set model.context_length"
            )
        if cache is not None and positions is None:
            positions = torch.arange(past, past + length, device=ids.device)
        if documents is not None and past:
            raise UserError(
                "documents cannot be told apart behind a cache that holds tokens: it does not keep which document those "
                "belong to; give whole sequences without a cache, or leave documents out"
            )
        if prefix is None:  # with a cache the first piece is the prompt, and the prompt is the prefix
            first = length if past == 0 else 0
            prefix = self.config.prefix_length if cache is None else first
        key_mask = None if cache is None else cache.key_mask(ids.shape[0], past + length)

        def seen(name: str) -> Visibility | None:
            return visibility(
                self.rules[name],
                length,
                positions=None if cache is not None and key_mask is None else positions,
                documents=documents,
                past=past,
                padding=None if key_mask is None else (~key_mask).sum(dim=-1),
                key_mask=key_mask,
                prefix=prefix,
                distances=self._needs_distances,
                device=ids.device,
            )

        return Context(
            positions=positions,
            visible={name: seen(name) for name in self.rules},
            cache=cache,
            documents=documents,
            valid=None if key_mask is None else key_mask[:, past:],
        )

    def run(
        self, ids: Int[Tensor, "... length"], context: Context, body: Body | None = None
    ) -> tuple[Float[Tensor, "... length d_model"], list[RouterRecord]]:
        """Everything but the head, and what the routers did: for a task that computes its own loss.

        Args:
            ids: token ids.
            context: from :meth:`context`.
            body: what runs the blocks, such as a compiled :meth:`body`; None: :meth:`body`.
        """
        return (body or self.body)(self.embed(ids, context.positions), context)

    def body(
        self, x: Float[Tensor, "... length d_model"], context: Context
    ) -> tuple[Float[Tensor, "... length d_model"], list[RouterRecord]]:
        """The blocks and the last norm. This is what gets compiled: the compiler's embedding backward adds rows of equal
        ids in whatever order its threads come, so that two equal runs would differ in the last digit."""
        context = replace(context, routers=[])
        for block in self.blocks:
            x = block(x, context) if context.checkpointing == "none" else checkpointed(block, x, context)
        return self.norm(x), context.routers

    def hidden(
        self,
        ids: Int[Tensor, "... length"],
        positions: Int[Tensor, "... length"] | None = None,
        documents: Int[Tensor, "... length"] | None = None,
        cache: Cache | None = None,
        prefix: int | Int[Tensor, " ..."] | None = None,
    ) -> Float[Tensor, "... length d_model"]:
        """Everything but the head; arguments as :meth:`forward`."""
        return self.run(ids, self.context(ids, positions, documents, cache, prefix))[0]

    def logits(self, hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """The head with its scale and soft cap."""
        logits = self.head(hidden)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        return soft_cap(logits, self.config.logit_soft_cap)

    def forward(
        self,
        ids: Int[Tensor, "... length"],
        positions: Int[Tensor, "... length"] | None = None,
        documents: Int[Tensor, "... length"] | None = None,
        cache: Cache | None = None,
        prefix: int | Int[Tensor, " ..."] | None = None,
    ) -> Float[Tensor, "... length vocab"]:
        """Logits of the next token at every position.

        Args:
            ids: token ids, int64, any leading batch dimensions.
            positions: position of each token; None counts from 0, or from the cache's end.
            documents: document number of each token; attention stays within a document. None: one document. Not together
                with a cache that already holds tokens.
            cache: what earlier tokens left; the new ones are appended.
            prefix: how many first positions see each other under ``mask = prefix_lm``, a number or one per row; None:
                `prefix_length`, or with a cache all of its first piece.

        Raises:
            UserError: the sequence, with what the cache holds, is longer than `context_length`, or `documents` are given
                beside a cache that holds tokens.
        """
        return self.logits(self.hidden(ids, positions, documents, cache, prefix))

    def multiply_in_fp8(self) -> None:
        """Have the linear layers of the blocks (not the head, no router) multiply in 8 bits while training."""
        for block in [*self.blocks, *self.predictions]:
            for module in block.modules():
                if isinstance(module, Linear) and module.role != "router":
                    module.fp8 = True

    def num_params(self) -> int:
        """Distinct parameters: a tied head's weight is counted once."""
        return self._count("num_params")

    def num_active_params(self) -> int:
        """Parameters that one token meets: of a mixture's experts only those it goes to."""
        return self._count("num_active_params")

    def head_params(self) -> int:
        """Parameters of the head beside those it shares with the embedding."""
        return self.head.num_params() - (self.embedding.num_params() if self.config.tied_embeddings else 0)

    def _count(self, how: str) -> int:
        layers = [*self.blocks, *self.predictions]
        around = [self.embedding, self.embedding_norm, *self.embedding_positions, self.norm]
        inside = sum(getattr(layer, how)() for layer in layers)
        return int(self.head_params() + inside + sum(piece.num_params() for piece in around))

    def training_flops_per_token(self, length: int) -> float:
        """FLOPs of a training step, per token: forward once and backward twice, multi-token predictions included."""
        further = sum(module.flops_per_token(length) for module in self.predictions)  # type: ignore[operator]
        return 3 * (self.flops_per_token(length) + further + len(self.predictions) * self.head.flops_per_token())

    def flops_per_token(self, length: int) -> float:
        """FLOPs of the matrix products of a forward pass over sequences of `length`, per token; backward costs twice.

        The modules of multi-token prediction work in training alone and are not in it: :meth:`training_flops_per_token`.
        """
        blocks = sum(block.flops_per_token(length) for block in self.blocks)  # type: ignore[operator]
        total: float = blocks + self.head.flops_per_token()
        return int(total) if total == int(total) else total
