"""Text from a model: key/value cache, sampling, the generator."""

from scratchlm.generate.cache import KVCache
from scratchlm.generate.generator import Generator
from scratchlm.generate.sampling import apply_temperature, apply_top_k, apply_top_p, row_generator, sample

__all__ = [
    "Generator",
    "KVCache",
    "apply_temperature",
    "apply_top_k",
    "apply_top_p",
    "row_generator",
    "sample",
]
