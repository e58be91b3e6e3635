"""Every choice learns: a token at the start must be told at every later position, which no position knows by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from model_variants import VARIANTS, changed
from torch import Tensor, nn

from scratchlm.config import OptimConfig
from scratchlm.model import ModelConfig, Transformer
from scratchlm.optim import build_optimizers
from scratchlm.train.loss import NextTokenLoss

MARKS, FILLERS, LENGTH, STEPS = 4, 6, 8, 150
BOUND = 0.35 * math.log(MARKS)
"""Nats per token. Guessing costs ln 4; knowing only one's own token leaves 7/8 of it."""


@dataclass
class Batch:
    inputs: Tensor
    targets: Tensor
    positions: Tensor | None = None
    documents: Tensor | None = None


def batch(generator: torch.Generator) -> Batch:
    """mark, filler, filler, … and at every position the mark is asked for."""
    marks = torch.randint(MARKS, (32, 1), generator=generator)
    fillers = MARKS + torch.randint(FILLERS, (32, LENGTH - 1), generator=generator)
    return Batch(torch.cat([marks, fillers], dim=1), marks.expand(32, LENGTH).contiguous())


def renamed(generator: torch.Generator) -> Batch:
    """Every token is asked for another one: (7 id + 3) mod 10."""
    ids = torch.randint(MARKS + FILLERS, (32, LENGTH), generator=generator)
    return Batch(ids, (7 * ids + 3) % (MARKS + FILLERS))


def best_loss(model: Transformer, steps: int = STEPS, batch: Callable[[torch.Generator], Batch] = batch) -> float:
    """Mean loss per token of the last steps, or of the first eight in a row below the bound."""
    loss = NextTokenLoss(model)
    optimizers = build_optimizers(model, OptimConfig(lr=1e-2, weight_decay=0.0))
    generator = torch.Generator().manual_seed(1)
    asked = 32 * LENGTH - 32 * max(0, loss._prefix - 1)
    recent: list[float] = []
    for _ in range(steps):
        optimizers.zero_grad()
        objective = loss(batch(generator))
        (objective / asked).backward()
        extra = loss.extra()
        assert extra is not None
        recent = [*recent[-7:], float(objective.detach() - extra) / asked]
        loss.after_step()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        if len(recent) == 8 and max(recent) < BOUND:
            break
    return max(recent)


def narrow(config: ModelConfig) -> ModelConfig:
    return changed(config, vocab_size=MARKS + FILLERS, context_length=24)


@pytest.mark.parametrize(
    "config", [c for c in VARIANTS.values() if c.layers], ids=[n for n, c in VARIANTS.items() if c.layers]
)
def test_it_learns_to_look_back(config: ModelConfig) -> None:
    assert best_loss(Transformer(narrow(config), seed=0)) < BOUND


class Silent(nn.Module):
    """Attention that says nothing."""

    def forward(self, x: Tensor, context: object) -> Tensor:
        return torch.zeros_like(x)


def test_what_cannot_look_back_does_not_reach_the_bound() -> None:
    model = Transformer(narrow(VARIANTS["gqa"]), seed=0)
    for block in model.blocks:
        block.attention = Silent()
    assert best_loss(model) > 0.8 * math.log(MARKS)
    blind = Transformer(changed(narrow(VARIANTS["gqa"]), mask="sliding_window", window=1), seed=0)
    assert best_loss(blind) > 0.8 * math.log(MARKS)


FEEDS = [n for n, c in VARIANTS.items() if c.layers and (n.startswith(("feedforward", "moe")) or "biases" in n)]


def only_feedforwards(model: Transformer) -> Transformer:
    """Everything but the feed-forwards stays as it began."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".feedforward." in name)
    return model


@pytest.mark.parametrize("name", FEEDS)
def test_the_feedforward_alone_learns_other_names(name: str) -> None:
    """With embedding, attention and head fixed, what a token becomes is the feed-forward's, its experts' and router's work."""
    model = only_feedforwards(Transformer(narrow(VARIANTS[name]), seed=0))
    assert best_loss(model, 600, renamed) < BOUND


def test_a_feedforward_that_says_nothing_learns_nothing() -> None:
    model = Transformer(narrow(VARIANTS["gqa"]), seed=0)
    with torch.no_grad():
        before = [block.feedforward.down.weight.zero_() for block in model.blocks]
    for name, parameter in only_feedforwards(model).named_parameters():
        parameter.requires_grad_(name.endswith("gate_up.weight"))  # behind a dead output nothing reaches it
    assert best_loss(model, 100, renamed) > 2.0 and before
