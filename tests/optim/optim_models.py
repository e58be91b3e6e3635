"""Small problems for the optimizers' tests."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scratchlm.model import ModelConfig, Transformer

IMPLEMENTATIONS = ["reference", "foreach", "fused", "auto"]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    """A matrix, a stack of matrices, a transposed (not contiguous) one, a vector, a scalar, one that gets no gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 7), (2, 3, 4), (6, 3), (9,), (), (4,)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    values[2] = values[2].T
    return [nn.Parameter(value) for value in values]


def set_gradients(parameters: Iterable[Tensor], step: int) -> None:
    """The same gradients for the same step; large, small and zero ones; none for the last parameter."""
    generator = torch.Generator().manual_seed(1000 + step)
    parameters = list(parameters)
    for index, parameter in enumerate(parameters):
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = (1.0, 1e-3, 100.0)[(step + index) % 3]
        drawn = torch.where(drawn.abs() < 0.1, 0.0, drawn) * scale
        parameter.grad = drawn.to(parameter.dtype)
    parameters[-1].grad = None


def compare(
    ours: type,
    theirs: type,
    mine: dict[str, Any],
    other: dict[str, Any],
    implementation: str,
    tolerances: tuple[float, float] = (1e-6, 1e-7),
    scheduled: bool = True,
) -> None:
    """100 steps of both, in fp32 and fp64; learning rates change as `mine` says unless they are not `scheduled`."""
    for dtype, tolerance in zip((torch.float32, torch.float64), tolerances, strict=True):
        left, right = parameters(dtype), parameters(dtype)
        start = [p.detach().clone() for p in left]
        a, b = ours(left, implementation=implementation, **mine), theirs(right, **other)
        for step in range(100):
            for optimizer, group in ((a, left), (b, right)):
                set_gradients(group, step)
                for settings in optimizer.param_groups if scheduled else ():
                    settings["lr"] = mine["lr"] * (1 + math.sin(step))
                optimizer.step()
        for p, q, old in zip(left, right, start, strict=True):
            scale = max(1.0, q.abs().max().item())
            torch.testing.assert_close(p, q, rtol=0, atol=tolerance * scale)
            assert torch.equal(p, old) == (p is left[-1]), "all move but the one without a gradient"


def small_model(seed: int = 0, *, tied: bool = False) -> Transformer:
    return Transformer(
        ModelConfig(
            vocab_size=13,
            context_length=8,
            d_model=16,
            layers=2,
            heads=2,
            d_ff=24,
            qk_norm="head",
            tied_embeddings=tied,
        ),
        seed=seed,
    )


def train_step(model: nn.Module, optimizer: object, step: int) -> None:
    ids = torch.randint(13, (2, 8), generator=torch.Generator().manual_seed(step))
    logits = model(ids)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()  # type: ignore[attr-defined]
    loss.backward()
    optimizer.step()  # type: ignore[attr-defined]
