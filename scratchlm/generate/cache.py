"""What a model keeps of earlier tokens, so that each new token costs one position.

Attention with scores keeps keys and values (or the latent vector they are read from), one slot per token; linear attention
keeps a state whose size does not grow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.model import choices
from scratchlm.model.config import ModelConfig
from scratchlm.model.mask import window_slots


class KVCache:
    """Keys, values and states of every layer; slots are set aside once: a step writes one and copies nothing.

    A layer that reads only a window keeps that and some room (:func:`~scratchlm.model.mask.window_slots`); when the room is full, the window moves back
    to the front. Its part does not grow beyond it.

    ::

        slot      0    1    2    3    4  …  max_length − 1
        row 0     The  cat  sat  on   ·
        row 1     pad  pad  Oh   no   ·          lengths differ: padding on the left, so that all rows end together
                                      ▲ length

    Args:
        config: gives the number of layers.
        batch: rows.
        max_length: slots per row.
        device: where everything lives.
        dtype: that of the slots; None: that of what is first written.
        padding: padding slots at the left of each row, int64 of shape (batch,); None: no row has any.

    Raises:
        UserError: the cache is empty by construction, or (from :meth:`append`) more tokens are written than fit.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        padding: Int[Tensor, " batch"] | None = None,
    ) -> None:
        if batch < 1 or max_length < 1:
            raise UserError(
                f"a cache of {batch} rows and {max_length} tokens holds nothing; both must be at least 1"
            )
        self.batch, self.max_length = batch, max_length
        self.device, self.dtype = torch.device(device), dtype
        self.length = 0
        self._slots: list[dict[str, Tensor]] = [{} for _ in range(config.layers)]
        self._ends: list[dict[str, int]] = [{} for _ in range(config.layers)]
        """Of layers with a window: where the filled part of the slots ends."""
        self._states: list[dict[str, Tensor]] = [{} for _ in range(config.layers)]
        self._valid: Tensor | None = None
        if padding is not None and bool((padding > 0).any()):
            slots = torch.arange(self.max_length, device=self.device)
            self._valid = slots >= padding.to(self.device)[:, None]

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype = torch.float32) -> int:
        """Memory of one slot of one row, over all layers that keep every token."""
        total = 0
        for layer in range(config.layers):
            if choices.MASK.get(config.mask_at(layer)).of(config).reach is None:
                total += choices.ATTENTION.get(config.attention_at(layer)).cache_widths(config)
        return total * dtype.itemsize

    @staticmethod
    def state_bytes(config: ModelConfig, dtype: torch.dtype = torch.float32, max_length: int | None = None) -> int:
        """Memory of one row that does not grow with the length: states (fp32 at least), and full windows, over all layers.

        Args:
            config: the architecture.
            dtype: of keys and values.
            max_length: of the cache, where that is known: a window has no more slots.
        """
        total = 0
        for layer in range(config.layers):
            kind = choices.ATTENTION.get(config.attention_at(layer))
            reach = choices.MASK.get(config.mask_at(layer)).of(config).reach
            slots = 0 if reach is None else window_slots(reach)
            window = (slots if max_length is None else min(slots, max_length)) * kind.cache_widths(config)
            wider = max(0, torch.float32.itemsize - dtype.itemsize)
            total += (window + kind.state_size(config)) * dtype.itemsize + wider * kind.wide_size(config)
        return total

    def append(self, layer: int, new: Mapping[str, Tensor], reach: int | None = None) -> dict[str, Tensor]:
        """Write new tensors of one layer, each (batch, …, new, width), behind the earlier ones of the same name.

        Args:
            layer: its number.
            new: name → tensor.
            reach: how many positions a query reads, itself included; what lies further back is dropped. None: all.

        Returns:
            All of them, (batch, …, total, width), as views of the cache; total = :attr:`length` + new. With `reach` those
            that some new query may read, the last reach − 1 + new at most. The length itself moves by :meth:`advance`,
            when all layers have been through.

        Raises:
            UserError: they do not fit.
        """
        slots, total = self._slots[layer], self.length
        windows: dict[str, Tensor] = {}
        for name, fresh in new.items():
            count = fresh.shape[-2]
            total = self.length + count
            if total > self.max_length:
                raise UserError(
                    f"the key/value cache holds {self.max_length} tokens, {total} were given; make it larger or empty it"
                )
            if self._valid is not None and count > 1:
                # A padding query may attend to nothing; whatever came of it must not reach others, not even times zero.
                padding = ~self._valid[:, self.length : total]
                middle = (1,) * (fresh.ndim - 3)
                fresh = fresh.masked_fill(padding.reshape(len(padding), *middle, count, 1), 0)
            if reach is not None:
                windows[name] = self._append_to_window(layer, name, fresh.to(self.dtype or fresh.dtype), reach)
                continue
            if name not in slots:
                shape = (*fresh.shape[:-2], self.max_length, fresh.shape[-1])
                slots[name] = torch.empty(shape, device=self.device, dtype=self.dtype or fresh.dtype)
            slots[name].narrow(-2, self.length, count).copy_(fresh)
        return windows or {name: slots[name].narrow(-2, 0, total) for name in new}

    def _append_to_window(self, layer: int, name: str, fresh: Tensor, reach: int) -> Tensor:
        """The last reach − 1 positions, and the new ones behind them."""
        slots, ends, count = self._slots[layer], self._ends[layer], fresh.shape[-2]
        if name not in slots:
            shape = (*fresh.shape[:-2], min(window_slots(reach), self.max_length), fresh.shape[-1])
            slots[name], ends[name] = torch.empty(shape, device=self.device, dtype=fresh.dtype), 0
        buffer, end = slots[name], ends[name]
        held = min(end, reach - 1)
        past = buffer.narrow(-2, end - held, held)
        if end + count > buffer.shape[-2]:  # no room: what is still read goes to the front
            whole = torch.cat([past, fresh], dim=-2) if held else fresh
            ends[name] = min(whole.shape[-2], reach - 1)
            buffer.narrow(-2, 0, ends[name]).copy_(whole.narrow(-2, whole.shape[-2] - ends[name], ends[name]))
            return whole
        buffer.narrow(-2, end, count).copy_(fresh)
        ends[name] = end + count
        return buffer.narrow(-2, end - held, held + count)

    def slots(self, layer: int) -> dict[str, Tensor]:
        """Name → all slots of this layer, (batch, …, max_length, width), filled or not; empty before the first token."""
        return self._slots[layer]

    @property
    def padded(self) -> bool:
        """Whether some row has padding."""
        return self._valid is not None

    def state(self, layer: int) -> dict[str, Tensor]:
        """What this layer keeps instead of slots; empty before the first token."""
        return self._states[layer]

    def replace(self, layer: int, state: Mapping[str, Tensor]) -> None:
        """Keep `state` for this layer, each tensor (batch, …)."""
        self._states[layer] = dict(state)

    def advance(self, new: int) -> None:
        """The forward pass over `new` tokens is done: they are the past now."""
        self.length += new

    def key_mask(self, batch: int, total: int) -> Bool[Tensor, "batch total"] | None:
        """False for padding slots; None where no row has any."""
        return None if self._valid is None else self._valid[:, :total]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self._slots = [{name: slots[index] for name, slots in layer.items()} for layer in self._slots]
        self._states = [{name: state[index] for name, state in layer.items()} for layer in self._states]
        if self._valid is not None:
            self._valid = self._valid[index]
        self.batch = len(rows)
