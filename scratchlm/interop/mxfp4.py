"""Reading MXFP4, four bits per weight, as gpt-oss's experts are released.

::

    NAME_blocks   (…, rows, blocks, 16) uint8    two numbers a byte, the lower half first: sign, two bits of exponent, one of mantissa
    NAME_scales   (…, rows, blocks)     uint8    the power of two that a block of 32 is multiplied by, plus 127

(OCP Microscaling Formats, version 1.0, 2023, sections 5.2 and 5.3.3; gpt-oss's model card, arXiv 2508.10925.) Every value is one of bf16's, so that
nothing is lost.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from scratchlm.errors import UserError
from scratchlm.interop.tensor_files import Stored, TensorFiles

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the three bits below the sign stand for (E2M1)."""

BLOCKS, SCALES = "_blocks", "_scales"


def dequantise(
    blocks: UInt8[Tensor, "... rows blocks half"], scales: UInt8[Tensor, "... rows blocks"]
) -> Float[Tensor, "... rows columns"]:
    """The numbers in bf16; columns = 2 · half · blocks."""
    values = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)], dtype=torch.bfloat16)
    both = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    numbers = torch.ldexp(values[both.int()], scales.int().sub(127)[..., None])
    return numbers.to(torch.bfloat16).flatten(-2)


class Mxfp4Files(TensorFiles):
    """Tensor files in which some tensors are packed: they look as if they were stored in bf16, and are unpacked when they are read.

    Unpacked they are (…, columns, rows): the way transformers has these weights.
    """

    def unpack(self) -> None:
        """Replace the packed pairs by what they stand for.

        Raises:
            UserError: one of a pair is missing, or their shapes do not belong together.
        """
        for name in [name for name in self.stored if name.endswith(BLOCKS)]:
            base = name.removesuffix(BLOCKS)
            blocks, scales = self.stored[name], self.stored.get(base + SCALES)
            fitting = scales is not None and blocks.shape[:-1] == scales.shape and len(scales.shape) >= 2
            if scales is None or not fitting or {blocks.dtype, scales.dtype} != {"U8"}:
                raise UserError(
                    f"{blocks.file}: {name} and {base + SCALES} are no pair of MXFP4; take the folder anew"
                )
            *outer, rows, count, half = blocks.shape
            del self.stored[name], self.stored[base + SCALES]
            self.stored[base] = dataclasses.replace(blocks, shape=(*outer, 2 * half * count, rows), dtype="BF16")
            self.packed[base] = (blocks, scales)

    def __init__(self, *arguments: object) -> None:
        self.packed: dict[str, tuple[Stored, Stored]] = {}
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.unpack()

    def read(self, name: str) -> Tensor:
        if name not in self.packed:
            return super().read(name)
        blocks, scales = (
            self.tensor(stored.file, name + end)
            for stored, end in zip(self.packed[name], (BLOCKS, SCALES), strict=True)
        )
        return dequantise(blocks, scales).transpose(-1, -2)
