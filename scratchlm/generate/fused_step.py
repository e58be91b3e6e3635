"""Which models can be written with in one compiled function per token, and how (:mod:`scratchlm.kernels.decode_step`).

The plain forward pass is the reference: the same logits up to rounding, and closer to exact ones in bf16, as sums and everything between products are fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scratchlm.generate.cache import KVCache
from scratchlm.kernels.matmul import nobody_watches
from scratchlm.model import ModelConfig, Transformer, choices
from scratchlm.model.linear import Embedding, Linear
from scratchlm.model.norm import NoNorm
from scratchlm.model.position import NoPosition

_FEEDFORWARDS = {
    "silu": "silu", "relu": "relu", "relu2": "relu2", "gelu": "gelu", "gelu_tanh": "gelu_tanh",
    "swiglu": "silu", "reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "glu": "sigmoid",
}  # fmt: skip
"""Which activation each has; the others are not fused."""

_PLAIN: dict[str, tuple[Any, ...]] = {
    "block": ("serial",),
    "norm": ("rmsnorm", "rmsnorm_noscale", "rmsnorm_unit_offset"),
    "norm_placement": ("pre",),
    "embedding_norm": (False,),
    "embedding_scale": (1.0, 1),
    "residual": ("plain",),
    "qk_norm": ("none", "head"),
    "qkv_clip": (None,),
    "attention_bias": ((), [], ""),
    "feedforward_bias": (False,),
    "head_bias": (False,),
    "attention_sinks": (False,),
    "attention_soft_cap": (None,),
    "logit_scale": (1.0, 1),
    "logit_soft_cap": (None,),
    "kernels": ("fast",),
    "resolved_final_norm": (True,),
}
"""Fields and the values of theirs that the compiled function knows."""


def why_not_config(config: ModelConfig) -> str | None:
    """Which choice of this architecture the compiled function does not know; None: it knows all of them."""
    for name, known in _PLAIN.items():
        value = getattr(config, name)
        if value not in known:
            return f"model.{name} = {value}"
    if config.feedforward not in _FEEDFORWARDS:
        return f"model.feedforward = {config.feedforward}"
    if config.moe.experts:
        return f"model.moe.experts = {config.moe.experts}"
    for name, only in (("attention", {"mha"}), ("mask", {"causal"}), ("position", {"rope", "none"})):
        if not set(getattr(config, name)) <= only:
            return f"model.{name} = {' '.join(getattr(config, name))}"
    if any(len(set(kinds)) > 1 for kinds in (config.position, config.rope.theta, config.rope.scaling)):
        return "positions that differ between layers"
    if config.qk_norm != "none" and config.resolved_qk_norm_kind not in _PLAIN["norm"]:
        return f"queries and keys normed by {config.resolved_qk_norm_kind}"
    return None if config.layers else "model.layers = 0"


def why_not(model: nn.Module) -> str | None:
    """Why this model cannot be written with by one compiled function per token; None: it can.

    The function reads weights where it expects them and asks no module: every module has to be what the architecture makes it, and nobody may watch.
    """
    if type(model) is not Transformer:
        return f"a model of class {type(model).__name__}"
    config = model.config
    if (reason := why_not_config(config)) is not None:
        return reason
    parts = [model.embedding, *model.blocks.modules(), model.norm, model.head]
    for module in parts:
        if type(module) not in _known_modules(config) or "forward" in vars(module):
            return f"a module of class {type(module).__name__} that was put or changed there"
    if (
        any(module._forward_hooks or module._forward_pre_hooks for module in [model, *parts])
        or _watched_everywhere()
    ):
        return "hooks on its modules"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    dtype = model.head.weight.dtype
    tensors = [
        *model.embedding.parameters(),
        *model.blocks.parameters(),
        *model.norm.parameters(),
        *model.head.parameters(),
    ]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return f"a model on {model.head.weight.device.type}"
    if dtype not in (torch.float32, torch.bfloat16) or any(tensor.dtype != dtype for tensor in tensors):
        return "weights that are not all fp32, or all bf16"
    if not all(tensor.is_contiguous() and nobody_watches(tensor.data, None) for tensor in tensors):
        return "weights that torch's dispatch watches, or that do not lie in one piece"
    if [tuple(weight.shape) for weight in _matrices(model)] != _shapes(config):
        return "weights of other shapes than the architecture says"
    return None


def _known_modules(config: ModelConfig) -> set[type]:
    """What the blocks of such a model are made of."""
    chosen = (
        choices.BLOCK.get(config.block), choices.NORM.get(config.norm), choices.FEEDFORWARD.get(config.feedforward),
        choices.QK_NORM.get(config.qk_norm), choices.RESIDUAL.get(config.residual), choices.NORM.get(config.resolved_qk_norm_kind),
        *(choices.POSITION.get(name) for name in config.position), *(choices.ATTENTION.get(name) for name in config.attention),
    )  # fmt: skip
    return {*chosen, Linear, Embedding, NoNorm, NoPosition, nn.ModuleList, nn.Dropout}


def _watched_everywhere() -> bool:
    from torch.nn.modules import module

    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def _matrices(model: Transformer) -> list[Tensor]:
    """Embedding, each block's four matrices, head."""
    found = [model.embedding.weight]
    blocks: list[Any] = list(model.blocks)
    for block in blocks:
        feedforward = block.feedforward
        inner = feedforward.gate_up if feedforward.gated else feedforward.up
        found += [block.attention.qkv.weight, block.attention.output.weight, inner.weight, feedforward.down.weight]
    return [*found, model.head.weight]


def _shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Of :func:`_matrices`."""
    d, width, d_ff = config.d_model, config.resolved_head_dim, config.resolved_d_ff
    mixed, all_heads = config.heads * width, (config.heads + 2 * config.resolved_kv_heads) * width
    gated = choices.FEEDFORWARD.get(config.feedforward).gated
    block = [(all_heads, d), (d, mixed), ((2 if gated else 1) * d_ff, d), (d, d_ff)]
    return [(config.vocab_size, d), *block * config.layers, (config.vocab_size, d)]


class FusedStep:
    """Reads one token and gives the logits after it, for one row with a cache that other tokens have filled.

    Weights are read where they lay when it was made: it sees what training changes in place, but goes on with the old ones when a model is given others
    (``model.to(dtype)``).

    Args:
        model: one for which :func:`why_not` has no reason.
        cache: of one row without padding, in which something is.
        matrices: the model's matrices in 8 bits, instead of its own.
    """

    def __init__(self, model: Transformer, cache: KVCache, matrices: Int8Matrices | None = None) -> None:
        from scratchlm.kernels import compiled_rows, decode_step

        config = model.config
        self.model, self.cache = model, cache
        self._call = compiled_rows.call
        self._loops = decode_step.STEP if matrices is None else decode_step.STEP_INT8
        matrix: Callable[[Tensor], Tensor] = (lambda weight: weight) if matrices is None else matrices.of
        self._dtype, self._numbers_read = model.head.weight.dtype, sum(p.numel() for p in model.blocks.parameters())
        self._held: list[Tensor] = []
        rows = []
        blocks: list[Any] = list(model.blocks)
        for layer, block in enumerate(blocks):
            attention, feedforward = block.attention, block.feedforward
            slots = cache.slots(layer)
            heads_norms = [getattr(attention, name) for name in ("q_norm", "k_norm")]
            gains = [getattr(getattr(norm, "norm", None), "weight", None) for norm in heads_norms]
            inner = feedforward.gate_up if feedforward.gated else feedforward.up
            rows.append(
                [
                    self._address(tensor)
                    for tensor in (
                        block.attention_norm.weight, matrix(attention.qkv.weight), *gains, matrix(attention.output.weight),
                        block.feedforward_norm.weight, matrix(inner.weight), matrix(feedforward.down.weight),
                        slots["k"], slots["v"],
                    )
                ]
            )  # fmt: skip
        first = blocks[0]
        normed = config.qk_norm != "none"
        head_norm = first.attention.q_norm.norm if normed else None
        self._table = torch.tensor(rows, dtype=torch.int64, device="cpu").numpy()
        last: Any = model.norm
        ends = (model.embedding.weight, last.weight, matrix(model.head.weight))
        self._ends = torch.tensor([self._address(tensor) for tensor in ends], device="cpu").numpy()
        gated = first.feedforward.gated
        width, inner_width = config.resolved_head_dim, (2 if gated else 1) * config.resolved_d_ff
        activation = decode_step.ACTIVATIONS.index(_FEEDFORWARDS[config.feedforward])
        self._sizes = torch.tensor(
            [
                config.heads, config.resolved_kv_heads, width, inner_width, cache.max_length, int(gated), activation, int(normed),
                int(config.rope.pairs == "interleaved"), config.d_model,
            ]
        ).numpy()  # fmt: skip
        scale = config.attention_scale if config.attention_scale is not None else width**-0.5
        self._numbers = torch.tensor(
            [
                first.attention_norm.eps, first.attention_norm.offset,
                *((head_norm.eps, head_norm.offset) if head_norm is not None else (0.0, 0.0)), scale,
            ],
            dtype=torch.float32,
            device="cpu",
        ).numpy()  # fmt: skip
        rotated = "rope" in config.position
        table = (
            first.attention.position.table if rotated else torch.empty(2, config.context_length, 0, device="cpu")
        )
        self._cos, self._sin = table.float().numpy()

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._held.append(tensor.detach())  # the memory, not the parameter, which may be given another
        return tensor.data_ptr()

    def __call__(self, token: int, position: int) -> Float[Tensor, "1 vocab"]:
        """Read `token`, which stands at `position`, into the cache; the logits after it in fp32.

        The slots before :attr:`KVCache.length` are read, and it moves on by one.
        """
        place = self.cache.length
        config = self.model.config
        if not (
            0 <= token < config.vocab_size
            and place < self.cache.max_length
            and 0 <= position < config.context_length
        ):
            raise IndexError(
                f"token {token} at slot {place}, position {position}: no such token, slot, or position"
            )
        logits = torch.empty(1, config.vocab_size, dtype=torch.float32, device="cpu")
        self._call(
            self._loops, self._table, self._ends, self._sizes, self._numbers, self._cos[position], self._sin[position],
            token, place, logits.numpy()[0], dtype=self._dtype, numbers=self._numbers_read,
        )  # fmt: skip
        self.cache.advance(1)
        return logits


class Int8Matrices:
    """Every matrix of a model in 8 bits (:func:`scratchlm.kernels.decode_step.quantised_int8`), made when it is first asked for.

    The embedding, of which a token reads one row, stays as it is; a tied head is a matrix.
    """

    def __init__(self) -> None:
        self._packed: dict[int, tuple[Tensor, int, Tensor]] = {}

    def of(self, weight: Tensor) -> Tensor:
        """Numbers and scales of this matrix, made anew if it has changed."""
        from scratchlm.kernels.decode_step import packed_int8

        known = self._packed.get(id(weight))
        if known is None or known[1] != weight._version:
            known = self._packed[id(weight)] = (
                weight,
                weight._version,
                packed_int8(weight),
            )  # held, so that its id stays its own
        return known[2]


def fused_step(model: nn.Module, cache: KVCache, matrices: Int8Matrices | None = None) -> FusedStep | None:
    """For a model and the cache of a prompt that it has read; None where the plain forward pass has to do it."""
    if cache.batch != 1 or cache.padded or why_not(model) is not None:
        return None
    assert isinstance(model, Transformer)
    slots = [tensor for layer in range(model.config.layers) for tensor in cache.slots(layer).values()]
    if not slots or any(slot.dtype != model.head.weight.dtype or not slot.is_contiguous() for slot in slots):
        return None
    return FusedStep(model, cache, matrices)
