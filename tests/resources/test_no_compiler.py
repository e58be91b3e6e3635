"""An estimate imports nothing of torch's compiler, exporter and rules for shapes, and all of it works after it."""

from __future__ import annotations

import gc
import subprocess
import sys

from scratchlm.resources.no_compiler import uncollected

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
import sys
import scratchlm.resources.hollow_tensor as hollow_tensor
from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.model import ModelConfig
from scratchlm.resources.step import Traceable

ask = hollow_tensor._ask

def ask_with_an_import(func, args, kwargs):
    if "embedding_dense_backward" in str(func):  # as some rules of torch do
        import torch._dynamo
    return ask(func, args, kwargs)

hollow_tensor._ask = ask_with_an_import
step = Traceable(ModelConfig(vocab_size=64, context_length=24, d_model=48, layers=2, heads=4), OptimConfig(), TrainConfig())
assert "torch._dynamo" not in sys.modules
first = step.step(precision="fp32", micro_batch=2).trace
assert "torch._dynamo" in sys.modules
assert first.timeline_by_kind() == step.step(precision="fp32", micro_batch=2).trace.timeline_by_kind()
"""


def test_what_is_imported_in_the_middle_of_a_step_keeps_nothing_of_it() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


RULES = """
import sys
from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.model import ModelConfig
from scratchlm.resources.no_compiler import without_the_compiler

with without_the_compiler():
    from scratchlm.resources.step import Traceable
    config = ModelConfig(
        vocab_size=64, context_length=24, d_model=48, layers=2, heads=4, kv_heads=2, qk_norm="each", qk_norm_kind="layernorm"
    )
    assert Traceable(config, OptimConfig(), TrainConfig()).step(precision="fp32", micro_batch=2).trace.peak()[1] > 0
"""


def test_rules_are_fetched_where_small_tensors_do_not_tell() -> None:
    """Of layer norm over grouped keys: their gradient has gaps."""
    done = subprocess.run([sys.executable, "-c", RULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_collected_for_a_while() -> None:
    for on in (True, False):
        (gc.enable if on else gc.disable)()
        try:
            with uncollected():
                assert not gc.isenabled()
            assert gc.isenabled() == on
        finally:
            gc.enable()
