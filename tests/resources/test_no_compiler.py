"""An estimate imports nothing of torch's compiler, exporter and rules for shapes, and all of it works after it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from scratchlm.config import Recipe
from scratchlm.resources.no_compiler import the_real, without_the_compiler

heavy = (
    "sympy", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "torch.distributed.tensor", "matplotlib.pyplot",
    "torch.export", "torch._meta_registrations", "torch._refs", "tyro._cli",
)
recipe = Recipe(model={"vocab_size": 300, "context_length": 64, "d_model": 32, "layers": 2, "heads": 4}, train={"batch_size": 4})
with without_the_compiler():
    import torch
    from scratchlm.resources.estimate import estimate
    estimate(recipe, precision="bf16", memory_bytes=1e9, compiled=True)
assert not [name for name in heavy if name in sys.modules]
with without_the_compiler():
    assert sys.modules["torch._dynamo"].config.cache_size_limit > 0  # what no stand-in has is the real one's
    import torch._dynamo
    assert torch._dynamo.__file__ and torch._dynamo.config.__file__
with without_the_compiler():
    mixture = recipe.model.model_copy(update={"moe": recipe.model.moe.model_copy(update={"experts": 4, "top_k": 2})})
    assert estimate(recipe.model_copy(update={"model": mixture}), precision="bf16").params > 0  # asks for torch's rules
assert the_real("torch._meta_registrations").__file__
assert torch.export.Dim("rows").__name__ == "rows"
double = torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)
assert double(torch.ones(3)).sum() == 6
"""


def test_it_is_not_there_and_then_it_is() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TWICE = """
from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.model import ModelConfig
from scratchlm.resources.no_compiler import without_the_compiler

with without_the_compiler():
    import sys
    from scratchlm.resources.step import Traceable
    config = ModelConfig(
        vocab_size=64, context_length=24, d_model=48, layers=2, heads=4, kv_heads=2, qk_norm="each", qk_norm_kind="layernorm"
    )
    step = Traceable(config, OptimConfig(), TrainConfig())
    assert not getattr(sys.modules["torch._meta_registrations"], "__file__", None)
    first, second = (step.step(precision="fp32", micro_batch=2).trace for _ in range(2))
    assert sys.modules["torch._meta_registrations"].__file__  # asked for on the way
    assert first.timeline_by_kind() == second.timeline_by_kind()
"""


def test_what_is_fetched_in_the_middle_of_a_step_keeps_nothing_of_it() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
