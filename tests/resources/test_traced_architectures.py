"""A step without memory against a real one, over the whole architecture table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from model_variants import VARIANTS
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.model import ModelConfig, Transformer
from scratchlm.resources.account import components_of
from scratchlm.resources.step import Step, Traceable
from scratchlm.resources.trace import FLOPS
from scratchlm.train.loss import NextTokenLoss


class Case(NamedTuple):
    config: ModelConfig
    prepared: Traceable
    step: Step


@pytest.fixture(scope="module", params=list(VARIANTS))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """A step of each in fp32, traced once for all tests."""
    config = VARIANTS[request.param]
    prepared = Traceable(config, OptimConfig(), TrainConfig())
    yield Case(config, prepared, prepared.step(precision="fp32", micro_batch=2))


def test_flops_of_forward_and_backward_are_those_torch_counts(case: Case) -> None:
    """The same products in the same numbers; torch's counter is told of the products it does not know: flash attention on a CPU
    and the experts' grouped products."""
    model = Transformer(case.config, seed=0)
    batch = case.prepared.batch(2, case.config.context_length)
    counted = {}
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
    with counter:
        objective = NextTokenLoss(model)(batch)
        counted["forward"] = counter.get_total_flops()
        objective.backward()
    counted["backward"] = counter.get_total_flops() - counted["forward"]
    assert {phase: case.step.trace.flops(phase) for phase in counted} == counted
    assert counted["backward"] or not case.config.layers


def as_traced(config: ModelConfig) -> ModelConfig:
    """A real mixture has to take the products that a hollow one is traced with."""
    grouped = config.moe.model_copy(update={"dispatch": "grouped"})
    return config.model_copy(update={"moe": grouped}) if config.moe.experts else config


def test_every_operation_is_that_of_a_real_step(case: Case) -> None:
    """Each with its bytes, and every storage with its birth and death.

    (torch's FakeTensor, under autograd without autocast, gives a transposed weight a storage of its own: no oracle for this.)
    """
    real = Traceable(as_traced(case.config), OptimConfig(), TrainConfig(), real=True)
    trace = real.step(precision="fp32", micro_batch=2).trace
    assert case.step.trace.operations == trace.operations
    assert case.step.trace.storages == trace.storages


def test_components_add_up(case: Case) -> None:
    """Parameters, those active, and bytes of weights, gradients and moments: exactly those of the model and of AdamW."""
    model = case.prepared.model
    parts = components_of(case.step, model)
    assert sum(part.params for part in parts) == model.num_params()
    assert sum(part.active for part in parts) == model.num_active_params()
    assert sum(part.weights for part in parts) == 4 * model.num_params()
    assert sum(part.gradients for part in parts) == 4 * model.num_params()
    assert sum(part.state for part in parts) == 8 * model.num_params()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if at % 4 == 0 else pytest.mark.slow) for at, name in enumerate(VARIANTS)]
)
def test_under_autocast_too(name: str) -> None:
    hollow, real = (
        Traceable(as_traced(VARIANTS[name]), OptimConfig(), TrainConfig(), real=real)
        .step(precision="bf16", micro_batch=2)
        .trace
        for real in (False, True)
    )
    assert hollow.operations == real.operations
    assert hollow.storages == real.storages
