"""The decoder-only Transformer: embedding, blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scratchlm.errors import UserError
from scratchlm.model import choices
from scratchlm.model.attention import Cache, Context
from scratchlm.model.config import ModelConfig
from scratchlm.model.linear import Embedding, Linear
from scratchlm.model.mask import attention_mask


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
        block = choices.BLOCK.get(config.block)
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.layers))
        self.norm = choices.NORM.get(config.norm)(config.d_model, config.norm_eps, reference=reference)
        self.head = Linear(
            config.d_model, config.vocab_size, residual_output=True, role="head", reference=reference
        )
        self.mask = choices.MASK.get(config.mask)(config)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        choices.INIT.get(config.init)(self, config, generator)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight

    def hidden(
        self,
        ids: Int[Tensor, "... length"],
        positions: Int[Tensor, "... length"] | None = None,
        documents: Int[Tensor, "... length"] | None = None,
        cache: Cache | None = None,
        body: Callable[[Tensor, Context], Tensor] | None = None,
    ) -> Float[Tensor, "... length d_model"]:
        """Everything but the head: what the chunked loss multiplies by the head's weight itself.

        Args:
            ids, positions, documents, cache: as in :meth:`forward`.
            body: what runs the blocks, such as a compiled :meth:`body`; None: :meth:`body`.
        """
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
        key_mask = None if cache is None else cache.key_mask(ids.shape[0], past + length)
        mask = attention_mask(
            self.mask, length, documents=documents, past=past, key_mask=key_mask, device=ids.device
        )
        context = Context(positions=positions, mask=mask, cache=cache)
        return (body or self.body)(self.embedding(ids), context)

    def body(self, x: Float[Tensor, "... length d_model"], context: Context) -> Float[Tensor, "... length d_model"]:
        """The blocks and the last norm. This is what gets compiled: the compiler's embedding backward adds rows of equal
        ids in whatever order its threads come, so that two equal runs would differ in the last digit."""
        for block in self.blocks:
            x = block(x, context)
        return self.norm(x)

    def forward(
        self,
        ids: Int[Tensor, "... length"],
        positions: Int[Tensor, "... length"] | None = None,
        documents: Int[Tensor, "... length"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "... length vocab"]:
        """Logits of the next token at every position.

        Args:
            ids: token ids, int64, any leading batch dimensions.
            positions: position of each token; None counts from 0, or from the cache's end.
            documents: document number of each token; attention stays within a document. None: one document. Not together
                with a cache that already holds tokens.
            cache: keys and values of earlier tokens; the new ones are appended.

        Raises:
            UserError: the sequence, with what the cache holds, is longer than `context_length`, or `documents` are given
                beside a cache that holds tokens.
        """
        return self.head(self.hidden(ids, positions, documents, cache))

    def num_params(self) -> int:
        """Distinct parameters: a tied head is counted once."""
        head = 0 if self.config.tied_embeddings else self.head.num_params()
        blocks = sum(block.num_params() for block in self.blocks)  # type: ignore[operator]
        return self.embedding.num_params() + blocks + self.norm.num_params() + head

    def flops_per_token(self, length: int) -> int:
        """FLOPs of the matrix products of a forward pass over sequences of `length`, per token; backward costs twice."""
        blocks = sum(block.flops_per_token(length) for block in self.blocks)  # type: ignore[operator]
        return blocks + self.head.flops_per_token()
