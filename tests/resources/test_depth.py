"""The peak of a deep model from two shallow ones: that of its own trace, to the byte, or no answer."""

from __future__ import annotations

from typing import Any

import pytest
from model_variants import VARIANTS

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.model import ModelConfig
from scratchlm.resources.depth import peak_of_deeper, shallow
from scratchlm.resources.step import Traceable
from scratchlm.resources.trace import Operation, Storage, Trace

IRREGULAR = ("moe", "norm = layernorm_nobias")
"""Prefixes of variants that need not be answered: what experts report is added up over the layers at the end, and a gain without a bias is copied
in some layers."""

SOME = (
    "norm = rmsnorm",
    "norm_placement = double",
    "block = parallel",
    "mla and mha",
    "three linear, one full",
    "delta and window",
    "local and global theta",
    "mtp",
    "moe",
)


def deep(config: ModelConfig, precision: str, compiled: bool) -> tuple[int | None, int]:
    """By two shallow models, and by a trace."""
    for layers in range(8, 60):
        found = shallow(config.model_copy(update={"layers": layers}))
        if found is not None and layers % 2:  # so that patterns do not divide them
            break
    assert found is not None
    one, two, more = found
    models = (one, two, config.model_copy(update={"layers": layers}))
    assert one.layers < two.layers < layers
    how: dict[str, Any] = {
        "precision": precision,
        "accumulation": 2 if precision == "bf16" else 1,
        "compiled": compiled,
    }
    prepared = [Traceable(model, OptimConfig(), TrainConfig()) for model in models]
    traces = [model.step(micro_batch=2, for_peak=True, **how).memory for model in prepared]
    return peak_of_deeper(traces[0], traces[1], more), traces[2].peak()[1]


def check(name: str, precision: str, compiled: bool) -> None:
    answer, peak = deep(VARIANTS[name], precision, compiled)
    assert answer == peak or (answer is None and name.startswith(IRREGULAR))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_the_peak_is_that_of_its_own_trace(name: str, compiled: bool) -> None:
    check(name, "bf16", compiled)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name, config in VARIANTS.items() if config.layers])
def test_over_all_architectures(name: str, precision: str, compiled: bool) -> None:
    check(name, precision, compiled)


def test_patterns_stay_as_they_are() -> None:
    mixed = ModelConfig(
        vocab_size=50, layers=59, position=("rope", "rope", "none"), mask=("causal", "sliding_window"), window=4
    )
    found = shallow(mixed)
    assert found is not None
    one, two, more = found
    assert (one.layers, two.layers, more) == (17, 23, 7)
    for model in (one, two):
        kinds = [(model.position_at(layer), model.mask_at(layer)) for layer in range(model.layers)]
        assert kinds[:12] == [(mixed.position_at(layer), mixed.mask_at(layer)) for layer in range(12)]
        assert kinds[-12:] == [(mixed.position_at(layer), mixed.mask_at(layer)) for layer in range(47, 59)]
    assert shallow(mixed.model_copy(update={"layers": 35})) is None


def made_up(layers: int, kept: int, passing: int) -> Trace:
    """Each layer keeps a little in the forward pass and gives it back in the backward pass, where its gradient comes to be."""
    trace = Trace()
    for layer in range(2 * layers):
        forward = layer < layers
        trace.operations.append(
            Operation("work", "forward" if forward else "backward", "", 0, 0, 0, (), None)  # type: ignore[arg-type]
        )
        trace.storages.append(Storage(passing, layer, "forward", "", "", died=layer + 1))
        if forward:
            trace.storages.append(Storage(kept, layer, "forward", "", "", died=2 * layers - layer))
        else:
            trace.storages.append(Storage(7, layer, "backward", "", ""))
    return trace


@pytest.mark.parametrize(("kept", "peak"), [(10, 50 * 10 + 7 + 3), (2, 50 * 7 + 2 + 3)])
def test_the_peak_may_lie_at_the_end_or_in_the_middle(kept: int, peak: int) -> None:
    assert made_up(50, kept, 3).peak()[1] == peak
    assert peak_of_deeper(made_up(2, kept, 3), made_up(3, kept, 3), 48) == peak


def test_what_does_not_repeat_is_not_answered() -> None:
    one, two = made_up(2, 5, 3), made_up(3, 5, 3)
    two.operations[1].name = "another"
    assert peak_of_deeper(one, two, 4) is None
    assert peak_of_deeper(two, one, 4) is None
    one.operations = [operation for operation in one.operations if operation.phase == "forward"]
    assert peak_of_deeper(one, two, 4) is None
