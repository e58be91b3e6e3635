"""Sizes as people write them."""

from __future__ import annotations

import pytest

from scratchlm.errors import UserError
from scratchlm.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("512mb", 512 * 10**6), ("1.5T", 15 * 10**11), ("1.5 TiB", 3 * 2**39),
        ("70kB", 70_000), ("2KiB", 2048), ("8e10", 8 * 10**10), ("1000", 1000), ("12B", 12), (" 3 g ", 3 * 10**9), (".5k", 500),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1 GB 2", "inf", "nan", "80GX", "12iB", "1,5GB", "1e400", "9" * 50, "0", "0.0001"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(UserError, match="write it like 80GB"):
        parse_bytes(text)
