"""Models in and out: our own checkpoints here; one mapping per Hugging Face family later."""

from scratchlm.interop.native import load, save

__all__ = ["load", "save"]
