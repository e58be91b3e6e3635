"""Activation checkpointing: what a block keeps for the backward pass, and what it computes again there.

::

    none         x ─► norm ─► qkv ─► rotate ─► attention ─► output ─► + ─► norm ─► gate, up ─► silu · ─► down ─► +     all is kept
    selective    ■            ■                ■            ■                      ■                     ■             products are kept
    blocks       ■                                                                                                     the input is kept

Chen et al. 2016 (arXiv 1604.06174) keep the inputs and pay with a forward pass. Korthikanti et al. 2022 (arXiv 2205.05198) compute again only what is cheap
beside the memory it takes.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scratchlm.model.context import Context

_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_",
    "aten::_grouped_mm",
    "scratchlm::flash_attention",
    "scratchlm::grouped_",
)
"""How the names of operations begin whose results are dear: products of linear layers and of experts, fused attention. Not ``bmm``: these
are scores, the very thing not to be kept; and not our operations that are one pass over memory."""


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_dear(operation) else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_dear(operation: Any) -> bool:
    schema = getattr(operation, "_schema", None)
    return schema is not None and schema.name.startswith(_KEPT)


def checkpointed(block: nn.Module, x: Tensor, context: Context) -> Tensor:
    """`block(x, context)`, of which only what `context.checkpointing` says is kept: the backward pass calls the block again.

    Args:
        block: any module of this signature; its dropout falls on the same places the second time.
        x: (…, length, d_model).
        context: its `checkpointing` is ``selective`` or ``blocks``.
    """
    options: dict[str, Any] = {}
    if context.checkpointing == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    made: Tensor = checkpoint(block, x, context, use_reentrant=False, **options)
    return made
