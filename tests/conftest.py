"""Shared by all tests: few threads, a small corpus, a small recipe."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; torch reads this when it is imported
if "TRITON_INTERPRET" not in os.environ and not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU; Triton reads it when it is imported

os.environ["SCRATCHLM_KEEP_ANSWERS"] = "0"  # a user's folder stays as it is, and every estimate is a fresh one

import pytest
from small_run import write_corpus, write_recipe


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with ``corpus.txt`` and ``small.toml``: a whole run takes about a second."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus.txt")
    write_recipe(tmp_path / "small.toml")
    return tmp_path


@pytest.fixture
def told() -> Iterator[list[warnings.WarningMessage]]:
    """The warnings of this test, as if nothing had been said before, and nobody had asked whether Triton runs."""
    from scratchlm.kernels import triton_here

    def forget() -> None:
        triton_here.trouble.cache_clear()
        triton_here.warn_once.cache_clear()

    forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    forget()


@pytest.fixture
def interpreted(
    told: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch
) -> list[warnings.WarningMessage]:
    """Triton's kernels take the CPU's tensors here, and what is said is caught: nothing may fall back unseen.

    The interpreter cuts fp32 down to bf16; here it rounds, as a GPU does.
    """
    from scratchlm.kernels import triton_here

    monkeypatch.setattr(triton_here, "INTERPRETED", True)
    try:
        import numpy
        import torch
        from triton.runtime import interpreter
    except ImportError:
        return told
    cut = interpreter._convert_float

    def rounded(numbers: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return cut(numbers, source, target, mode)
        narrow = torch.from_numpy(numpy.ascontiguousarray(numbers, dtype=numpy.float32)).bfloat16()
        return narrow.view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    return told
