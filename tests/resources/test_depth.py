"""The step of a deep model from those of two shallow ones: what its own trace says, to the byte, or no answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from model_variants import VARIANTS
from test_timing import measured

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.model import ModelConfig
from scratchlm.model.draw.hollow import hollow
from scratchlm.resources.account import further
from scratchlm.resources.answer import Component
from scratchlm.resources.any_depth import Steps, Taken
from scratchlm.resources.depth import Deepening, Irregular, shallow
from scratchlm.resources.devices import find
from scratchlm.resources.timing import Datasheet, Machine, Measured
from scratchlm.resources.trace import Operation, Storage, Trace

IRREGULAR = ("norm = layernorm_nobias",)
"""Prefixes of variants that need not be told: a gain without a bias is copied in some layers."""

BY_DEPTH = ("parallel, double, vector", "parallel_shared, double")
"""Compiled, what is kept of these blocks depends on how deep they lie."""

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

SMALL = ModelConfig(vocab_size=60, context_length=32, d_model=48, heads=4, layers=9)
H100 = Datasheet(find("h100"))


def cached() -> Measured:
    """A machine whose passes over memory are fastest in the middle: its seconds grow along no line."""
    rates = {10**4: 2e9, 10**5: 2e10, 10**6: 4e10, 10**7: 3e10, 10**8: 1e10}
    passes = [
        {"operation": name, "dtype": "fp32", "tensor_bytes": size, "moved": size, "seconds": size / rate}
        | {"spread": 0.0, "rounds": 3}
        for name in ("add", "silu", "softmax", "layer_norm")
        for size, rate in rates.items()
    ]
    return Measured(measured(elementwise=passes))


def check(
    config: ModelConfig,
    optim: OptimConfig | None = None,
    train: TrainConfig | None = None,
    *,
    precision: str = "fp32",
    compiled: bool = False,
    machine: Machine = H100,
    device_type: str = "cpu",
) -> bool:
    """Everything that is asked of a step: by two shallow models as of the deep one, to the byte and the FLOP.

    Returns:
        Whether the two told.
    """
    how: dict[str, Any] = {
        "precision": precision,
        "accumulation": 2 if precision == "bf16" else 1,
        "compiled": compiled,
        "micro_batch": 2,
    }
    by_two, whole = (
        Steps(config, optim or OptimConfig(), train or TrainConfig(), device_type=device_type) for _ in range(2)
    )
    assert by_two._two is not None
    whole._two = None
    account, memory = by_two.ask(lambda step: (step.account(machine, compiled), step.memory()), **how)
    known, bytes_ = whole.ask(lambda step: (step.account(machine, compiled), step.memory()), **how)
    assert by_two.ask(Taken.peak, **how) == bytes_.peak == memory.peak
    assert memory == bytes_
    assert account.seconds == pytest.approx(known.seconds)
    assert list(account.components) == list(known.components)
    assert account.operations.keys() == known.operations.keys()
    for group, other in ((g, known.operations[key]) for key, g in account.operations.items()):
        assert group.seconds == pytest.approx(other.seconds)
        assert replace(group, seconds=other.seconds) == other
    for part, other_part in zip(account.components.values(), known.components.values(), strict=True):
        flops = {"forward": other_part.forward, "backward": other_part.backward}
        assert {"forward": part.forward, "backward": part.backward} == pytest.approx(flops)
        assert replace(part, **flops) == other_part
    assert account.model_flops == pytest.approx(known.model_flops)
    same = {
        name: getattr(known, name) for name in ("seconds", "operations", "components", "model_flops")
    }  # looked at above
    assert replace(account, **same) == known
    return by_two._two is not None


def deep(config: ModelConfig) -> ModelConfig:
    """The same with just so many layers that shallow ones are asked, and so that patterns do not divide them."""
    models = (config.model_copy(update={"layers": layers}) for layers in range(9, 61, 2))
    return next(model for model in models if shallow(model) is not None)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_a_deep_step_is_that_of_its_own_trace(name: str, compiled: bool) -> None:
    assert check(deep(VARIANTS[name]), precision="bf16", compiled=compiled)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name, config in VARIANTS.items() if config.layers])
def test_over_all_architectures(name: str, precision: str, compiled: bool) -> None:
    told = check(deep(VARIANTS[name]), precision=precision, compiled=compiled)
    assert told or name.startswith(IRREGULAR) or (compiled and "parallel" in name)  # see BY_DEPTH


@pytest.mark.slow
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [*SOME, *BY_DEPTH])
def test_many_layers(name: str, device_type: str) -> None:
    config = VARIANTS[name].model_copy(update={"layers": 41})
    told = check(config, precision="bf16", compiled=True, device_type=device_type)
    assert told == (name not in BY_DEPTH)


@pytest.mark.parametrize("name", BY_DEPTH)
def test_where_a_third_trace_says_otherwise_the_whole_is_traced(name: str) -> None:
    assert not check(deep(VARIANTS[name]), compiled=True)
    assert check(deep(VARIANTS[name]), compiled=False)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_in_bf16_whose_gradients_are_collected_one_by_one(compiled: bool) -> None:
    assert check(SMALL, train=TrainConfig(weights="bf16"), precision="bf16", compiled=compiled)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("predictions", [0, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "lion", "adafactor", "muon"])
def test_optimizers_that_go_over_the_layers_again_and_again(
    optimizer: str, predictions: int, device_type: str
) -> None:
    config = SMALL.model_copy(update={"mtp_depth": predictions})
    assert check(config, OptimConfig(optimizer=optimizer), device_type=device_type)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adam_on_a_gpu_goes_over_all_layers_at_once(precision: str, weights: str, compiled: bool) -> None:
    train = TrainConfig(weights=weights)  # type: ignore[arg-type]
    assert check(SMALL, train=train, precision=precision, compiled=compiled, device_type="cuda")


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lion"])
def test_optimizers_that_update_one_tensor_after_the_other_are_traced_whole(optimizer: str) -> None:
    assert not check(SMALL, OptimConfig(optimizer=optimizer, implementation="reference"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_seconds_that_grow_along_no_line(optimizer: str) -> None:
    """An operation over all layers takes its time from what it moves then."""
    config = SMALL.model_copy(update={"layers": 31, "d_model": 128})
    assert check(config, OptimConfig(optimizer=optimizer), machine=cached())


def test_patterns_stay_as_they_are() -> None:
    mixed = ModelConfig(
        vocab_size=50, layers=59, position=("rope", "rope", "none"), mask=("causal", "sliding_window"), window=4
    )
    found = shallow(mixed)
    assert found is not None
    one, two, three, more = found
    assert (one.layers, two.layers, three.layers, more) == (17, 23, 29, 7)
    for model in (one, two, three):
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
    deep = made_up(50, kept, 3)
    one, two = made_up(2, kept, 3), made_up(3, kept, 3)
    live = Deepening(one, two, 48).deeper(one.timeline(), two.timeline())
    assert live == deep.timeline() and max(live) == peak


def test_which_operation_it_is() -> None:
    """The ends grow by themselves; in the middle each is the middle one of the longer."""
    one, two = made_up(2, 5, 3), made_up(3, 5, 3)
    deepening = Deepening(one, two, 4)
    assert deepening.phases() == [op.phase for op in made_up(6, 5, 3).operations]
    live = one.timeline(), two.timeline()
    numbers = [sum(often * live[which][i] for often, which, i in deepening.parts(at)) for at in range(12)]
    assert numbers == deepening.deeper(*live) == made_up(6, 5, 3).timeline()
    same = [deepening.parts(at)[0] for at in range(12)]
    assert [which for _, which, _ in same] == [1] * 12
    assert [i for *_, i in same] == [0, 1, 1, 1, 1, 2, 3, 4, 4, 4, 4, 5]
    with pytest.raises(IndexError):
        deepening.parts(12)


def test_runs_of_equal_operations_grow_in_their_middle() -> None:
    """An optimizer that goes over the layers twice: the first time each makes something that lives until it is its turn again."""

    def made_up(layers: int) -> Trace:
        trace = Trace()
        for turn in ("norm", "update"):
            for layer in range(layers):
                trace.operations.append(Operation(turn, "optimizer", "", 0, 0, 0, (), None))  # type: ignore[arg-type]
                if turn == "norm":
                    trace.storages.append(Storage(10, layer, "optimizer", "", "", died=layers + layer + 1))
        return trace

    one, two = made_up(2), made_up(3)
    deeper = Deepening(one, two, 5).deeper(one.timeline(), two.timeline())
    assert deeper == made_up(7).timeline() == [*range(10, 80, 10), *range(70, 0, -10)]


def test_what_does_not_repeat_is_not_answered() -> None:
    one, two = made_up(2, 5, 3), made_up(3, 5, 3)
    two.operations[1].name = "another"
    for a, b in ((one, two), (two, one)):
        with pytest.raises(Irregular):
            Deepening(a, b, 4)
    one.operations = [operation for operation in one.operations if operation.phase == "forward"]
    with pytest.raises(Irregular):
        Deepening(one, two, 4)


def test_numbers_go_on_along_a_line() -> None:
    one, two = Component("a", copies=1, forward=0.5, weights=7), Component("a", copies=2, forward=0.75, weights=7)
    assert further({"x": one, "y": 3}, {"x": two, "y": 5}, 10) == {
        "x": Component("a", copies=11, forward=3.0, weights=7),
        "y": 23,
    }
    with pytest.raises(Irregular):
        further({"x": 1}, {"x": 1, "y": 2}, 1)


def test_where_shallow_ones_do_not_tell_the_whole_is_traced() -> None:
    config = ModelConfig(vocab_size=50, context_length=16, d_model=16, layers=12, heads=2)
    steps = Steps(config, OptimConfig(), TrainConfig())

    def unsure(step: Taken) -> int:
        if step.more:
            raise Irregular("made up")
        return len(step.steps[0].params)

    assert steps.ask(unsure, precision="fp32", micro_batch=1) == len(hollow(config).state_dict())
    assert steps._two is None
    assert steps.ask(lambda step: step.more, precision="fp32", micro_batch=1) == 0
