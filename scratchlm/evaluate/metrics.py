"""Loss, perplexity and bits per byte on held-out text.

Over the N target tokens of a held-out text, with natural logarithms::

    loss            L  = −1/N · Σᵢ ln p(xᵢ | x₍<ᵢ₎)         nats per token
    perplexity         = e^L
    bits per token     = L / ln 2
    bits per byte      = N·L / (ln 2 · B)                  B: bytes of the text

Loss and perplexity depend on the tokenizer: larger tokens are fewer and harder. Bits per byte does not, so it is the
figure that compares models, and compressors, on the same text (Shannon 1951; Gao et al. 2020, "The Pile", §3.1).

What counts, here and in every report: the model pays for **every** target token, the separators between documents
included, while B counts the UTF-8 bytes of the documents **without** separators. The figure is thus never flattered.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from scratchlm.evaluate.compressors import CompressorResult
from scratchlm.files import read_json, write_text
from scratchlm.kernels.cross_entropy import IGNORE_INDEX
from scratchlm.progress import progress
from scratchlm.section import Section, validate

_CHUNK_ELEMENTS = 1 << 24
"""Logits turned into losses at once: 16 Mi, 64 MiB in fp32, whatever the batch and the vocabulary."""


class Batch(Protocol):
    """What a batch has to have: int64 tensors of shape (batch, length), on any device.

    It may also have `positions` and `documents`, tensors of the same shape or None, as the loaders give with document
    boundaries (:class:`scratchlm.data.Batch`).
    """

    @property
    def inputs(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...


class LossSum(BaseModel):
    """Cross-entropy summed over target tokens. Sums add up; averages of averages do not."""

    model_config = ConfigDict(frozen=True)

    nats: float = 0.0
    """Σ −ln p(target), in nats."""
    tokens: int = 0
    """Number of targets, ignored ones left out."""

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(nats=self.nats + other.nats, tokens=self.tokens + other.tokens)

    @property
    def loss(self) -> float:
        """Nats per token; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """e^loss; infinite where that is beyond a float."""
        return perplexity(self.loss)

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits per byte of a text of `text_bytes` UTF-8 bytes; NaN for an empty text."""
        return bits_per_byte(self.nats, text_bytes)


def perplexity(loss: float) -> float:
    """e^loss, for a loss in nats per token; infinite from about 709.8 nats on, where floats end."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Total `nats` in bits, per byte of the text; NaN for an empty text."""
    return nats / (math.log(2) * text_bytes) if text_bytes else math.nan


def _summed_nats(logits: Tensor, targets: Tensor, chunk_elements: int) -> Tensor:
    """Σ −ln softmax(logits)[target] as a 0-d float64 tensor.

    Each token's loss is computed in fp32 (fp64 for fp64 logits) and added in fp64: a sum over a million tokens in fp32
    would lose the digits in which two models differ.
    """
    logits, targets = logits.flatten(0, -2), targets.flatten()
    rows = max(1, chunk_elements // max(1, logits.shape[-1]))
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # Apple's GPUs have no float64.
    summing = torch.device("cpu") if logits.device.type == "mps" else logits.device
    total = torch.zeros((), dtype=torch.float64, device=summing)
    for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        losses = F.cross_entropy(part.to(wide), wanted, reduction="none", ignore_index=IGNORE_INDEX)
        total += losses.to(summing).double().sum()
    return total


def _boundaries(batch: Batch, device: torch.device) -> dict[str, Tensor | None]:
    """`positions` and `documents` of a batch for the model; nothing where it has neither, so that any callable will do."""
    found = {name: getattr(batch, name, None) for name in ("positions", "documents")}
    if all(value is None for value in found.values()):
        return {}
    return {name: None if value is None else value.to(device, non_blocking=True) for name, value in found.items()}


def _shown(batches: Iterable[Batch], total: int | None, show: bool) -> Iterable[Batch]:
    if not show:
        return batches
    known = len(batches) if total is None and isinstance(batches, Sized) else total
    return progress(batches, description="validate", total=known, unit="batch", leave=False)


def evaluate_loss(
    model: Callable[..., Tensor],
    batches: Iterable[Batch],
    *,
    device: str | torch.device,
    autocast: torch.dtype | None = None,
    chunk_elements: int = _CHUNK_ELEMENTS,
    show_progress: bool = False,
    total: int | None = None,
) -> LossSum:
    """Sum the cross-entropy of `model` over `batches`.

    A module is put into evaluation mode for the time and put back, and no gradient is recorded. Beside the logits that
    the model returns, memory holds `chunk_elements` of them in fp32 and no more.

    Args:
        model: ``model(inputs) -> logits``, int64 (batch, length) to float (batch, length, vocab). It is called as
            ``model(inputs, positions=…, documents=…)`` for a batch that has one of them, so that a model trained with
            document boundaries is evaluated with them.
        batches: objects with ``inputs`` and ``targets``, int64 (batch, length), and perhaps ``positions`` and
            ``documents``; targets of −100 are ignored.
        device: where the model lies; batches are moved there.
        autocast: dtype for torch.autocast around the model (``torch.bfloat16``); None: no autocast.
        chunk_elements: logits (rows · vocab) turned into losses at once.
        show_progress: show a bar while it lasts, which vanishes afterwards: for a validation within training.
        total: number of batches for the bar; None: ``len(batches)`` where they have one.

    Returns:
        The sum in nats (float64) and the number of tokens; (0, 0) where there are no batches.

    Raises:
        ValueError: logits do not have the shape of targets plus one dimension.
    """
    device = torch.device(device)
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    # A prefix that sees itself has seen the answers: under that mask every token is judged causally.
    causal = {"prefix": 0} if "prefix_lm" in getattr(getattr(model, "config", None), "mask", ()) else {}
    nats: Tensor | None = None
    tokens = 0
    try:
        with torch.no_grad():
            for batch in _shown(batches, total, show_progress):
                tokens += int((batch.targets != IGNORE_INDEX).sum())
                inputs = batch.inputs.to(device, non_blocking=True)
                targets = batch.targets.to(device, non_blocking=True)
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    logits = model(inputs, **_boundaries(batch, device), **causal)
                if logits.shape[:-1] != targets.shape:
                    raise ValueError(f"logits {tuple(logits.shape)} do not fit targets {tuple(targets.shape)}")
                summed = _summed_nats(logits, targets, chunk_elements)
                del logits  # before the next batch makes its own: one set of logits at a time
                # Stays on the device: reading it here would make the host wait for every batch.
                nats = summed if nats is None else nats + summed
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)
    return LossSum(nats=0.0 if nats is None else float(nats), tokens=tokens)


class Evaluation(Section):
    """Everything an evaluation found; saved as ``evaluation.json``.

    Non-finite figures are written as the strings ``"NaN"`` and ``"Infinity"``, so that the file is plain JSON.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings", allow_inf_nan=True)

    loss: float
    """Nats per token."""
    perplexity: float
    """e^loss."""
    bits_per_byte: float
    """All nats, in bits, over `text_bytes`."""
    bits_per_token: float
    """loss / ln 2."""
    tokens: int
    """Target tokens paid for, separators included."""
    text_bytes: int
    """UTF-8 bytes of the documents, without separators."""
    documents: int
    """Held-out documents."""
    context_length: int
    """Window length, in tokens."""
    stride: int
    """Tokens from one window's beginning to the next one's; context_length: no overlap."""
    seconds: float
    """Wall-clock of the evaluation, compressors not included."""
    compressors: dict[str, CompressorResult] = Field(default={})
    """What general compressors make of the same bytes, by name."""

    @classmethod
    def from_sum(cls, summed: LossSum, *, text_bytes: int, **fields: Any) -> Evaluation:
        """Derive every figure from a sum. `fields`: documents, context_length, stride, seconds, compressors."""
        return cls(
            loss=summed.loss,
            perplexity=summed.perplexity,
            bits_per_byte=summed.bits_per_byte(text_bytes),
            bits_per_token=summed.loss / math.log(2),
            tokens=summed.tokens,
            text_bytes=text_bytes,
            **fields,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, atomically."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the file is missing, not JSON, or lacks a field.
        """
        return validate(cls, read_json(path, "evaluation"), str(Path(path)))
