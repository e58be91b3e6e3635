"""What a forward pass keeps for the backward one: counted by tracing it without computing anything.

Parameters and FLOPs stand as formulas beside each forward. What autograd keeps follows from its own rules for every operation,
which a formula could only repeat; so the forward itself is run on tensors without content (torch's fake tensors) and every
tensor that autograd keeps is noted, once per storage, under the component that kept it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scratchlm.errors import UserError
from scratchlm.kernels.visibility import BLOCK, columns_per_block, parts_worth_taking, plan_of
from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.transformer import Transformer

OUTSIDE = "around the blocks"
"""Component of what no module keeps by itself, such as the sums of the residual stream."""


class Kept:
    """Notes what autograd keeps while it is active; parameters are not counted, nor a storage twice.

    Attributes:
        by_component: bytes by module name, as deep as `depth` parts of it.
    """

    def __init__(self, model: nn.Module, depth: int = 3) -> None:
        self.by_component: dict[str, int] = {}
        self._seen = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        self._alive: list[Tensor] = []  # a storage that were freed could come again under the same address
        self._inside: list[str] = []
        self._model, self._depth = model, depth

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor.detach())
            name = ".".join(self._inside[-1].split(".")[: self._depth]) if self._inside else OUTSIDE
            self.by_component[name] = self.by_component.get(name, 0) + storage.nbytes()
        return tensor

    @contextmanager
    def active(self) -> Iterator[None]:
        handles = []
        for name, module in self._model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(self._enter(name)))
                handles.append(module.register_forward_hook(self._leave))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        return lambda module, arguments: self._inside.append(name)

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._inside.pop()


def _warm(config: ModelConfig, length: int) -> None:
    """Ask beforehand what is found out by computing with real numbers, and kept."""
    for name in dict.fromkeys(config.mask):
        rule = choices.MASK.get(name).of(config)
        # With the very arguments of the pass: results are kept by them.
        for one in parts_worth_taking(rule, length, BLOCK, config.prefix_length) or (rule,):
            columns_per_block(one, length, BLOCK, config.prefix_length)
    if config.moe.experts and config.kernels == "fast":
        small = ModelConfig(
            **{**config.model_dump(), "layers": config.moe.first_dense + config.moe.every, "context_length": 2}
            | {"attention": "mha", "mask": "causal", "position": "none", "rope": {}, "linear": {}}
            | {
                "d_model": 16,
                "heads": 1,
                "kv_heads": 1,
                "head_dim": 16,
                "d_ff": 16,
                "vocab_size": 4,
                "mtp_depth": 0,
            }
        )
        Transformer(small)(torch.zeros(2, dtype=torch.int64))


def activation_bytes(
    config: ModelConfig, batch: int, length: int, *, autocast: torch.dtype | None = None, depth: int = 3
) -> dict[str, int]:
    """Bytes that a forward pass up to the head keeps for the backward pass, by component; nothing is computed.

    Of the eager path, as it runs on a CPU: a compiler may keep less and compute again. The head and its loss are not in it:
    the chunked loss keeps the gradient of the last hidden states and of the head's weight.

    Args:
        config: the architecture; `vocab_size` 0 is taken as 1.
        batch: sequences.
        length: tokens of each.
        autocast: dtype of autocast; None: fp32 throughout.
        depth: how many parts of a module's name make a component: 3 is ``blocks.0.attention``.

    Returns:
        Component → bytes, in the order of the pass; a tensor that several keep is counted where it was kept first.

    Raises:
        UserError: a mixture of experts with the reference dispatch.
    """
    if config.moe.experts and "reference" in (config.kernels, config.moe.dispatch):
        raise UserError(
            "the reference dispatch of experts cannot be traced: how many tokens each expert gets is known only by "
            'computing; set moe.dispatch = "grouped" and kernels = "fast"'
        )
    _warm(config, length)
    # The cut normal draws again until nothing lies outside, which fake numbers cannot tell.
    config = config.model_copy(update={"vocab_size": config.vocab_size or 1, "init": "normal"})
    plan_of.cache_clear()  # plans hold tensors, which must be fake here and must not be elsewhere
    try:
        with FakeTensorMode():
            model = Transformer(config)
            ids = torch.zeros(batch, length, dtype=torch.int64)
            kept = Kept(model, depth)
            with kept.active(), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                model.hidden(ids)
    finally:
        plan_of.cache_clear()
    return kept.by_component
