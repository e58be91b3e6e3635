"""The key/value cache: what attention has computed for earlier tokens is kept, so that each new token costs one position."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.model.config import ModelConfig


class KVCache:
    """Keys and values of every layer, in memory set aside once: a step writes one slot and copies nothing.

    ::

        slot      0    1    2    3    4  …  max_length − 1
        row 0     The  cat  sat  on   ·
        row 1     pad  pad  Oh   no   ·          lengths differ: padding on the left, so that all rows end together
                                      ▲ length

    Args:
        config: gives layers, key/value heads and head width.
        batch: rows.
        max_length: slots per row.
        device: where the keys and values live.
        dtype: theirs; None: that of the first keys and values written.
        padding: padding slots at the left of each row, int64 of shape (batch,); None: no row has any.

    Raises:
        UserError: the cache is empty by construction, or (from :meth:`update`) more tokens are written than fit.
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
        self.kv_heads, self.head_dim = config.resolved_kv_heads, config.resolved_head_dim
        self.device, self.dtype = torch.device(device), dtype
        self.length = 0
        self._keys: list[Tensor | None] = [None] * config.layers
        self._values: list[Tensor | None] = [None] * config.layers
        self._valid: Tensor | None = None
        if padding is not None and bool((padding > 0).any()):
            slots = torch.arange(self.max_length, device=self.device)
            self._valid = slots >= padding.to(self.device)[:, None]

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype = torch.float32) -> int:
        """Memory of one slot of one row: a key and a value in every layer."""
        return 2 * config.layers * config.resolved_kv_heads * config.resolved_head_dim * dtype.itemsize

    def _room(self, like: Tensor) -> Tensor:
        shape = (self.batch, self.kv_heads, self.max_length, self.head_dim)
        return torch.empty(shape, device=self.device, dtype=self.dtype or like.dtype)

    def update(
        self,
        layer: int,
        k: Float[Tensor, "batch kv_heads new head_dim"],
        v: Float[Tensor, "batch kv_heads new head_dim"],
    ) -> tuple[Float[Tensor, "batch kv_heads total head_dim"], Float[Tensor, "batch kv_heads total head_dim"]]:
        """Write the new keys and values of one layer behind the earlier ones.

        Returns:
            All of them, as views of the cache; total = :attr:`length` + new. The length itself moves by :meth:`advance`,
            when all layers have been through.

        Raises:
            UserError: they do not fit.
        """
        new = k.shape[-2]
        total = self.length + new
        if total > self.max_length:
            raise UserError(
                f"the key/value cache holds {self.max_length} tokens, {total} were given; make it larger or empty it"
            )
        if self._valid is not None and new > 1:
            # A padding query may attend to nothing; whatever came of it must not reach others, not even times zero.
            padding = ~self._valid[:, None, self.length : total, None]
            k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
        both = []
        for rooms, fresh in ((self._keys, k), (self._values, v)):
            room = rooms[layer]
            if room is None:
                room = rooms[layer] = self._room(fresh)
            room[:, :, self.length : total] = fresh
            both.append(room[:, :, :total])
        return both[0], both[1]

    def advance(self, new: int) -> None:
        """The forward pass over `new` tokens is done: they are the past now."""
        self.length += new

    def key_mask(self, batch: int, total: int) -> Bool[Tensor, "batch total"] | None:
        """False for padding slots; None where no row has any."""
        return None if self._valid is None else self._valid[:, :total]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self._keys = [None if room is None else room[index] for room in self._keys]
        self._values = [None if room is None else room[index] for room in self._values]
        if self._valid is not None:
            self._valid = self._valid[index]
        self.batch = len(rows)
