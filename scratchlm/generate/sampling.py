"""From logits to the next token: temperature, top-k, top-p, one draw."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scratchlm.errors import UserError


def apply_temperature(logits: Float[Tensor, "... vocab"], temperature: float) -> Float[Tensor, "... vocab"]:
    """Divide by the temperature (> 0): below 1 the distribution sharpens, above 1 it flattens."""
    return logits / temperature


def apply_top_k(logits: Float[Tensor, "... vocab"], k: int) -> Float[Tensor, "... vocab"]:
    """−inf for all but the k largest (Fan et al. 2018); what equals the k-th stays. k ≥ vocab keeps all."""
    k = min(k, logits.shape[-1])
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def apply_top_p(logits: Float[Tensor, "... vocab"], p: float) -> Float[Tensor, "... vocab"]:
    """−inf outside the nucleus (Holtzman et al. 2020): the smallest set of likeliest tokens with probability ≥ p.

    The likeliest token always stays; p = 1 keeps all.
    """
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of all likelier tokens together
    outside = before >= p
    outside[..., 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))


def row_generator(seed: int, row: int) -> torch.Generator:
    """A random stream of its own for each (seed, row), so that a row's draws do not depend on its neighbours."""
    digest = hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def sample(
    logits: Float[Tensor, "batch vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generators: list[torch.Generator] | None = None,
) -> Int[Tensor, " batch"]:
    """Draw one token per row.

    Temperature, top-k and top-p apply in this order. The draw inverts the cumulative distribution at one uniform number per
    row, taken on the host: the same seed gives the same number on every device.

    Args:
        logits: any floating dtype; computed in float32. −inf means impossible.
        temperature: 0 takes the largest logit (the first, if several are equal); nothing is drawn then.
        top_k: see :func:`apply_top_k`; None: off.
        top_p: see :func:`apply_top_p`; 1: off.
        generators: a CPU generator per row; None: torch's global one.

    Returns:
        Token ids, int64, on the device of `logits`.

    Raises:
        UserError: a parameter out of range, or logits that are NaN.
    """
    if not temperature >= 0:
        raise UserError(f"generate.temperature = {temperature} must be at least 0")
    if top_k is not None and top_k < 1:
        raise UserError(f"generate.top_k = {top_k} must be at least 1 (leave it out to keep all tokens)")
    if not 0 < top_p <= 1:
        raise UserError(f"generate.top_p = {top_p} must be above 0 and at most 1")
    if bool(logits.isnan().any()):
        raise UserError(
            "the model's logits are NaN: its weights are not finite; generate from an earlier checkpoint"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    device = logits.device
    # Float64 sums keep the tail of a large vocabulary reachable; Apple's GPUs have none.
    logits = (logits.cpu() if device.type == "mps" else logits).float()
    # The largest logit to 0 first: a tiny temperature then sends the others to −inf and overflows nowhere.
    logits = apply_temperature(logits - logits.amax(dim=-1, keepdim=True), temperature)
    if top_k is not None:
        logits = apply_top_k(logits, top_k)
    cumulative = apply_top_p(logits, top_p).double().softmax(dim=-1).cumsum(dim=-1)
    rows = range(logits.shape[0])
    # Uniforms have 24 bits: below 1 by so much that the product stays below the total, and the id below the vocabulary.
    uniforms = torch.stack([torch.rand((), generator=generators[row] if generators else None) for row in rows])
    threshold = uniforms.to(logits.device).double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].to(device)
