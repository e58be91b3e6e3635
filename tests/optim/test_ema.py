"""The average of the weights: its formula, the exchange, its state, its bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_models import small_model, train_step
from torch import nn

from scratchlm.config import OptimConfig, TrainConfig
from scratchlm.errors import UserError
from scratchlm.optim import WeightAverage, build_optimizers
from scratchlm.resources.step import trace_step


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.9999), st.integers(1, 40), st.integers(0, 1000))
def test_it_is_the_weighted_mean_of_all_steps(decay: float, steps: int, seed: int) -> None:
    """By the definition: weights dᵗ⁻ⁱ of steps i = 1 … t, divided by their sum."""
    drawn = np.random.default_rng(seed).standard_normal((steps, 3, 2))
    p = nn.Parameter(torch.full((3, 2), 1e6, dtype=torch.float64))  # the initial weights must not enter
    average = WeightAverage({"p": p}, decay)
    for values in drawn:
        with torch.no_grad():
            p.copy_(torch.from_numpy(values))
        average.update()
    shares = decay ** np.arange(steps - 1, -1, -1.0)
    expected = np.tensordot(shares / shares.sum(), drawn, 1)
    np.testing.assert_allclose(average.averages["p"].numpy(), expected, rtol=0, atol=1e-9)


def test_after_one_step_it_is_the_weights_and_constant_weights_stay() -> None:
    p = nn.Parameter(torch.randn(50))
    average = WeightAverage({"p": p}, 0.99)
    for _ in range(20):
        average.update()
        assert torch.equal(average.averages["p"], p)


def test_swapping_is_exact_also_after_an_error_and_costs_no_storage() -> None:
    model = small_model()
    optimizers = build_optimizers(model, OptimConfig(ema=0.8, lr=0.05))
    average = optimizers.average
    assert average is not None
    with average.swapped():  # nothing averaged yet: the model's own
        assert all(map(torch.equal, model.parameters(), small_model().parameters()))
    for step in range(4):
        train_step(model, optimizers, step)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    averaged = {name: value.clone() for name, value in average.averages.items()}
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), average.swapped():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, averaged[name])
            assert not torch.equal(parameter, own[name]), name
        raise ZeroDivisionError
    assert [p.data_ptr() for p in model.parameters()] == places
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name])
    for name, value in average.averages.items():
        assert torch.equal(value, averaged[name])


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_training_is_the_same_with_it_and_its_state_goes_on_bit_for_bit(optimizer: str) -> None:
    plain, with_average, resumed = small_model(), small_model(), small_model(seed=5)
    config = OptimConfig(optimizer=optimizer, lr=0.01, ema=0.7)
    a = build_optimizers(plain, config.model_copy(update={"ema": 0.0}))
    b, c = build_optimizers(with_average, config), build_optimizers(resumed, config)
    assert a.average is None and b.named_state() == {}
    for step in range(4):
        train_step(plain, a, step)
        train_step(with_average, b, step)
    train_step(resumed, c, 9)  # to be forgotten
    saved = {name: value.clone() for name, value in b.named_state().items()}
    assert saved["ema.updates.all"].item() == 4
    resumed.load_state_dict(with_average.state_dict())
    c.load_named_state(saved)
    for step in range(4, 8):
        train_step(plain, a, step)
        train_step(with_average, b, step)
        train_step(resumed, c, step)
    assert all(map(torch.equal, plain.parameters(), with_average.parameters()))
    after, again = b.named_state(), c.named_state()
    assert after.keys() == again.keys() == {*saved}
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert not torch.equal(after["ema.average.norm.weight"], saved["ema.average.norm.weight"]), "saved is a copy"
    c.load_named_state({name: value for name, value in after.items() if not name.startswith("ema.")})
    assert c.average is not None and c.average.updates == 0, "a state without an average begins it anew"


def test_a_tied_embedding_is_averaged_once_and_what_is_not_trained_is_left() -> None:
    model = small_model(tied=True)
    model.blocks[0].requires_grad_(False)
    average = build_optimizers(model, OptimConfig(ema=0.5)).average
    assert average is not None
    assert set(average.parameters) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "embedding.weight" in average.parameters and "head.weight" not in average.parameters
    assert not any(name.startswith("blocks.0.") for name in average.parameters)


def test_another_models_average_is_refused_and_changes_nothing() -> None:
    model = small_model()
    optimizers = build_optimizers(model, OptimConfig(ema=0.5))
    train_step(model, optimizers, 0)
    good = {name: value.clone() for name, value in optimizers.named_state().items()}
    name = "ema.average.norm.weight"
    for wrong, message in (
        ({**good, name: torch.zeros(3)}, r"norm\.weight has shape \(3,\), the parameter \(16,\)"),
        ({**good, "ema.average.other": torch.zeros(3)}, "has ema.average.other"),
        ({key: value for key, value in good.items() if key != name}, f"lacks {name}"),
        ({key: value for key, value in good.items() if key != "ema.updates.all"}, "lacks ema.updates.all"),
    ):
        with pytest.raises(UserError, match=message):
            optimizers.load_named_state(wrong)
        for key, value in optimizers.named_state().items():
            assert torch.equal(value, good[key])
    with pytest.raises(UserError, match=r"has ema\..*do not have"):
        build_optimizers(model, OptimConfig()).load_named_state(good)


def test_wrong_decays_and_half_precision_are_refused() -> None:
    p = nn.Parameter(torch.zeros(2))
    for decay in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(UserError, match="must be above 0 and below 1"):
            WeightAverage({"p": p}, decay)
    with pytest.raises(UserError, match=r"p is torch\.bfloat16, too coarse"):
        WeightAverage({"p": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))}, 0.9)


def test_the_estimate_of_memory_counts_it() -> None:
    config = small_model().config
    states = []
    for ema in (0.0, 0.9):
        step = trace_step(config, OptimConfig(ema=ema), TrainConfig(), precision="fp32", micro_batch=1)
        states.append(sum(storage.size for storage in step.trace.storages if storage.kind == "optimizer state"))
    parameters = sum(p.numel() for p in small_model().parameters())
    assert states == [8 * parameters, 12 * parameters]
