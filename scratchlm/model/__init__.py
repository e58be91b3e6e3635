"""The model: one field per architectural choice.

``ModelConfig`` is light; ``Transformer`` and the pieces load torch on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scratchlm.model.config import ModelConfig

if TYPE_CHECKING:
    from scratchlm.model.transformer import Transformer

__all__ = ["ModelConfig", "Transformer"]


def __getattr__(name: str) -> Any:
    if name == "Transformer":
        from scratchlm.model.transformer import Transformer

        return Transformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
