"""One evaluation of a model on tokens: the figures, made from windows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from scratchlm.config import EvaluateConfig
from scratchlm.data.loader import evaluation_windows
from scratchlm.data.tokens import Tokens
from scratchlm.evaluate.compressors import CompressorResult
from scratchlm.evaluate.metrics import Evaluation, evaluate_loss
from scratchlm.model.transformer import Transformer
from scratchlm.progress import progress
from scratchlm.train.precision import choose_precision

if TYPE_CHECKING:
    from collections.abc import Mapping


def evaluate_tokens(
    model: Transformer,
    tokens: Tokens,
    config: EvaluateConfig,
    *,
    compressors: Mapping[str, CompressorResult] | None = None,
    show_progress: bool = True,
) -> Evaluation:
    """Loss, perplexity and bits per byte of `model` on `tokens`, on the device the model is on.

    Args:
        model: a trained model.
        tokens: held-out text; every token is predicted exactly once.
        config: window length, stride and batch size.
        compressors: figures of general compressors on the same bytes, kept in the result.
        show_progress: show a bar.

    Raises:
        UserError: the stride is longer than the window, or there are no tokens.
    """
    started = time.perf_counter()
    context = config.context_length or model.config.context_length
    stride = context if config.stride is None else config.stride
    device = next(model.parameters()).device
    precision = choose_precision("auto", device).value
    batches = evaluation_windows(tokens, context, stride, config.batch_size)
    windows = 1 + -(-max(0, len(tokens) - context) // stride)
    bar = progress(
        batches, description="evaluate", total=-(-windows // config.batch_size), unit="batch", show=show_progress
    )
    summed = evaluate_loss(model, bar, device=device, autocast=torch.bfloat16 if precision == "bf16" else None)
    return Evaluation.from_sum(
        summed,
        text_bytes=tokens.bytes,
        documents=tokens.documents,
        context_length=context,
        stride=stride,
        seconds=time.perf_counter() - started,
        compressors=dict(compressors or {}),
    )
