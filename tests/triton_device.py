"""Where Triton's kernels are tested: on a GPU where there is one, else on the CPU in its interpreter; who imports this is skipped where there is neither."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":  # `conftest.py` sets it where there is no GPU
    pytest.skip("torch does not see the GPU that is here, and TRITON_INTERPRET is not 1", allow_module_level=True)
