"""How RoPE's frequencies are changed so that a model reads longer contexts than it was trained on.

Each function takes the frequencies θ^(−2i/d) in radians per position (fp64) and returns the changed ones and a factor for
queries and keys. With factor s and the original context C:

    none       f
    linear     f / s                                   positions squeezed into C (Chen et al. 2023, arXiv 2306.15595)
    ntk        base θ · s^(d/(d−2))                    the longest wave stretched by s, the shortest kept (bloc97 2023; in
                                                       Peng et al. 2023, arXiv 2309.00071, definition 1)
    yarn       f / s below β_slow turns in C, f above β_fast, a ramp between (Peng et al. 2023, section 3.2), and queries and
               keys times 0.1 ln s + 1 (section 3.3)
    llama3     f / s for waves longer than C / low, f for waves shorter than C / high, a ramp in the frequency between
               (Llama 3.1's published code; Grattafiori et al. 2024, arXiv 2407.21783)
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from scratchlm.model.config import ModelConfig

Frequencies = Float[Tensor, " half"]


def _original_context(config: ModelConfig) -> float:
    return config.rope.original_context or config.context_length / config.rope.factor


def unscaled(frequencies: Frequencies, theta: float, config: ModelConfig) -> tuple[Frequencies, float]:
    """The trained frequencies."""
    return frequencies, 1.0


def linear(frequencies: Frequencies, theta: float, config: ModelConfig) -> tuple[Frequencies, float]:
    """Position interpolation: every wave stretched by the factor."""
    return frequencies / config.rope.factor, 1.0


def ntk(frequencies: Frequencies, theta: float, config: ModelConfig) -> tuple[Frequencies, float]:
    """A larger base: the longest wave is stretched by the factor, the shortest not at all."""
    width = 2 * len(frequencies)
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
    base = theta * config.rope.factor ** (width / max(1, width - 2))
    return base**-exponents, 1.0


def yarn(frequencies: Frequencies, theta: float, config: ModelConfig) -> tuple[Frequencies, float]:
    """Waves that turn often within the original context are kept, those that hardly turn are stretched."""
    rope = config.rope
    width, context = 2 * len(frequencies), _original_context(config)

    def dimension(turns: float) -> float:
        """The pair whose wave turns this often in the original context."""
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(0, low), min(width - 1, high)
    pairs = torch.arange(len(frequencies), dtype=torch.float64, device="cpu")
    # In a context so short that hardly a wave turns, high lies below low: the published code divides all the same.
    stretched = ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
    mixed = stretched * frequencies / rope.factor + (1 - stretched) * frequencies
    factor = rope.attention_factor
    return mixed, 0.1 * math.log(rope.factor) + 1.0 if factor is None else factor


def llama3(frequencies: Frequencies, theta: float, config: ModelConfig) -> tuple[Frequencies, float]:
    """Long waves stretched, short ones kept, a smooth passage between the two wavelengths."""
    rope = config.rope
    turns = _original_context(config) * frequencies / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies, 1.0
