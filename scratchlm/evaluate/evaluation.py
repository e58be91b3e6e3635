"""One evaluation of a model: text to tokens, tokens to windows, windows to figures."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from scratchlm.config import EvaluateConfig
from scratchlm.data.corpus import Corpus
from scratchlm.data.loader import count_windows, evaluation_windows
from scratchlm.data.tokens import Tokens
from scratchlm.errors import UserError
from scratchlm.evaluate.compressors import CompressorResult
from scratchlm.evaluate.metrics import Evaluation, evaluate_loss
from scratchlm.model.transformer import Transformer
from scratchlm.progress import progress
from scratchlm.tokenizer import Tokenizer
from scratchlm.train.precision import choose_precision

if TYPE_CHECKING:
    from collections.abc import Mapping


@contextlib.contextmanager
def tokenise(
    corpus: Corpus, tokenizer: Tokenizer, show_progress: bool = True, *, separator_id: int | None = None
) -> Iterator[Tokens]:
    """The tokens of all documents of a corpus that holds nothing out, for as long as the context lasts.

    They lie in a temporary file, as a corpus may be larger than memory.

    Args:
        corpus: its training split is read.
        tokenizer: the one the model was trained with.
        show_progress: show a bar.
        separator_id: the id that ends each document: the one the model was trained with, or its figures suffer. None: the
            tokenizer's first special token.

    Raises:
        UserError: the corpus is empty or cannot be read, the tokenizer has no special token to end documents with, or
            `separator_id` is no id of it.
    """
    if separator_id is None:
        if not tokenizer.special_tokens:
            raise UserError(
                "the tokenizer has no special token to end documents with; add one, such as <|endoftext|>"
            )
        separator_id = next(iter(tokenizer.special_tokens.values()))
    if separator_id not in tokenizer.vocab:
        raise UserError(f"the separator {separator_id} is no id of the tokenizer; give that of a special token")
    end = np.array([separator_id], tokenizer.dtype).tobytes()
    documents = text_bytes = 0
    with tempfile.TemporaryFile() as file:
        with progress(description="tokenise", total=corpus.total_bytes(), bytes_=True, show=show_progress) as bar:
            for document in corpus.documents("train"):
                ids = tokenizer.encode_array(document.utf8, allowed_special=())
                file.write(ids.astype(tokenizer.dtype, copy=False).tobytes() + end)
                size = len(document.utf8)
                documents, text_bytes = documents + 1, text_bytes + size
                bar.update(size)
        file.flush()
        array = np.memmap(file, dtype=tokenizer.dtype, mode="r")
        yield Tokens([array], separator_id=separator_id, documents=documents, bytes=text_bytes)


def count_batches(tokens: int, context_length: int, stride: int | None, batch_size: int) -> int:
    """How many batches :func:`scratchlm.data.loader.evaluation_windows` gives for so many tokens (for a bar's total)."""
    return -(-count_windows(tokens, context_length, stride) // batch_size)


def evaluate_tokens(
    model: Transformer,
    tokens: Tokens,
    config: EvaluateConfig,
    *,
    compressors: Mapping[str, CompressorResult] | None = None,
    precision: str = "auto",
    document_boundaries: bool = False,
    show_progress: bool = True,
) -> Evaluation:
    """Loss, perplexity and bits per byte of `model` on `tokens`, on the device the model is on.

    Args:
        model: a trained model.
        tokens: held-out text; every token is predicted exactly once.
        config: window length, stride and batch size.
        compressors: figures of general compressors on the same bytes, kept in the result.
        precision: ``fp32``, ``bf16`` (autocast) or ``auto``, as in ``train.precision``.
        document_boundaries: attention stays within a document and positions restart in each; give the
            ``train.document_boundaries`` that the model was trained with.
        show_progress: show a bar.

    Raises:
        UserError: the window is longer than the model's context, the stride longer than the window, or there are no tokens.
    """
    started = time.perf_counter()
    context = config.context_length or model.config.context_length
    if context > model.config.context_length:
        raise UserError(
            f"evaluate.context_length = {context} is longer than the model's context of {model.config.context_length}; "
            "choose at most that"
        )
    stride = context if config.stride is None else config.stride
    device = next(model.parameters()).device
    autocast = torch.bfloat16 if choose_precision(precision, device).value == "bf16" else None
    batches = evaluation_windows(
        tokens, context, stride, config.batch_size, document_boundaries=document_boundaries
    )
    total = count_batches(len(tokens), context, stride, config.batch_size)
    bar = progress(batches, description="evaluate", total=total, unit="batch", show=show_progress)
    summed = evaluate_loss(model, bar, device=device, autocast=autocast)
    return Evaluation.from_sum(
        summed,
        text_bytes=tokens.bytes,
        documents=tokens.documents,
        context_length=context,
        stride=stride,
        seconds=time.perf_counter() - started,
        compressors=dict(compressors or {}),
    )
