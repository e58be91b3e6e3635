"""An estimate imports nothing of torch's compiler, and the compiler works after it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import torch
from scratchlm.config import Recipe
from scratchlm.resources.estimate import estimate
from scratchlm.resources.no_compiler import without_the_compiler

heavy = ("sympy", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "torch.distributed.tensor", "matplotlib.pyplot")
recipe = Recipe(model={"vocab_size": 300, "context_length": 64, "d_model": 32, "layers": 2, "heads": 4}, train={"batch_size": 4})
with without_the_compiler():
    estimate(recipe, precision="bf16", memory_bytes=1e9)
assert not [name for name in heavy if name in sys.modules]
with without_the_compiler():
    assert sys.modules["torch._dynamo"].config.cache_size_limit > 0  # what no stand-in has is the real one's
    import torch._dynamo
    assert torch._dynamo.__file__
double = torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)
assert double(torch.ones(3)).sum() == 6
"""


def test_it_is_not_there_and_then_it_is() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
