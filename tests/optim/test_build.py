"""Who is updated by what, what decays, and a state that is saved by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_models import small_model, train_step
from torch import nn

from scratchlm.config import OptimConfig
from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer
from scratchlm.optim import AdamW, Muon, build_optimizers, parameter_roles

OPTIMIZERS = ["adamw", "adam", "lion", "adafactor", "sgd", "muon"]


def expected_role(name: str) -> str:
    if "norm" in name:
        return "norm"
    return name.split(".")[0] if name.startswith(("embedding", "head")) else "matrix"


def test_roles_of_our_model() -> None:
    model = small_model()
    roles = parameter_roles(model)
    assert roles == {name: expected_role(name) for name, _ in model.named_parameters()}
    assert set(roles.values()) == {"embedding", "head", "norm", "matrix"}
    tied = parameter_roles(small_model(tied=True))
    assert tied["embedding.weight"] == "embedding" and "head.weight" not in tied


def test_roles_of_a_foreign_model() -> None:
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(5, 4),
            "inner": nn.Linear(4, 4),
            "scale": nn.LayerNorm(4),
            "lm_head": nn.Linear(4, 5, bias=False),
            "frozen": nn.Linear(2, 2),
        }
    )
    model["frozen"].requires_grad_(False)
    assert parameter_roles(model) == {
        "words.weight": "embedding",
        "inner.weight": "matrix",
        "inner.bias": "bias",
        "scale.weight": "norm",
        "scale.bias": "bias",
        "lm_head.weight": "head",
    }


def test_muon_gets_hidden_matrices_and_nothing_else() -> None:
    model = small_model()
    optimizers = build_optimizers(model, OptimConfig(optimizer="muon"))
    assert isinstance(optimizers.optimizers["muon"], Muon) and isinstance(optimizers.optimizers["adamw"], AdamW)
    name_of = {id(p): name for name, p in model.named_parameters()}
    owned = {
        kind: {name_of[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for kind, optimizer in optimizers.optimizers.items()
    }
    assert owned["muon"] == {name for name in name_of.values() if expected_role(name) == "matrix"}
    assert owned["muon"] | owned["adamw"] == set(name_of.values()) and not owned["muon"] & owned["adamw"]
    assert {group["initial_lr"] for group in optimizers.optimizers["muon"].param_groups} == {0.02}


@pytest.mark.parametrize("all_decay", [False, True])
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adam"])  # whose decay is a gradient
def test_what_shrinks_when_there_is_nothing_to_learn(optimizer: str, all_decay: bool) -> None:
    """With zero gradients a parameter moves by its decay alone: norms and embeddings do not, unless asked."""
    model = small_model()
    config = OptimConfig(
        optimizer=optimizer,
        lr=0.1,
        weight_decay=0.5,
        muon_lr=0.2,
        muon_weight_decay=0.1,
        decay_embeddings_and_norms=all_decay,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    build_optimizers(model, config).step()
    for name, p in model.named_parameters():
        role = expected_role(name)
        if role in ("norm", "embedding") and not all_decay:
            assert torch.equal(p, before[name]), name
        else:
            factor = 1 - 0.2 * 0.1 if optimizer == "muon" and role == "matrix" else 1 - 0.1 * 0.5
            torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True])
def test_training_lowers_the_loss(optimizer: str, tied: bool) -> None:
    model = small_model(tied=tied)
    lr = {"lion": 3e-3, "adafactor": 3e-2}.get(optimizer, 1e-2)
    optimizers = build_optimizers(model, OptimConfig(optimizer=optimizer, lr=lr, momentum=0.9))
    ids = torch.randint(13, (2, 8), generator=torch.Generator().manual_seed(0))

    def loss() -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    before = loss()
    for _ in range(30):
        train_step(model, optimizers, 0)
    assert loss() < 0.5 * before


def test_learning_rates_follow_the_multiplier() -> None:
    optimizers = build_optimizers(small_model(), OptimConfig(optimizer="muon", lr=0.1, muon_lr=0.4))
    for multiplier in (0.5, 0.25, 1.0):
        optimizers.set_lr(multiplier)
        assert {g["lr"] for g in optimizers.optimizers["muon"].param_groups} == {0.4 * multiplier}
        assert {g["lr"] for g in optimizers.optimizers["adamw"].param_groups} == {0.1 * multiplier}
    model = small_model()
    optimizers = build_optimizers(model, OptimConfig())
    before = [p.detach().clone() for p in model.parameters()]
    optimizers.set_lr(0.0)
    train_step(model, optimizers, 0)
    assert all(map(torch.equal, before, model.parameters()))
    optimizers.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("implementation", ["auto", "reference", "foreach", "fused"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_saved_by_name_goes_on_bit_for_bit(optimizer: str, implementation: str) -> None:
    config = OptimConfig(optimizer=optimizer, implementation=implementation)
    model = small_model()
    optimizers = build_optimizers(model, config)
    assert optimizers.named_state() == {}
    for step in range(3):
        train_step(model, optimizers, step)
    saved = {name: value.clone() for name, value in optimizers.named_state().items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    keys = {"adafactor": "column_mean", "sgd": "momentum_buffer", "muon": "momentum_buffer"}
    assert f"{optimizer}.{keys.get(optimizer, 'exp_avg')}.blocks.0.attention.qkv.weight" in saved
    if optimizer not in ("sgd", "lion"):
        counts = "adamw" if optimizer == "muon" else optimizer
        assert saved[f"{counts}.step.norm.weight"].item() == 3

    other = small_model(seed=99)
    others = build_optimizers(other, config)
    train_step(other, others, 50)  # a state that must be forgotten
    other.load_state_dict(weights)
    others.load_named_state({name: value.clone() for name, value in saved.items()})
    for name, value in others.named_state().items():
        assert torch.equal(value, saved[name])
    for step in range(3, 6):
        train_step(model, optimizers, step)
        train_step(other, others, step)
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name

    plain = small_model()
    plain.load_state_dict(weights)
    fresh = build_optimizers(plain, config)
    train_step(plain, fresh, 3)
    fresh.load_state_dict(optimizers.state_dict())
    assert fresh.named_state().keys() == saved.keys()


def test_loading_copies() -> None:
    model = small_model()
    optimizers = build_optimizers(model, OptimConfig())
    train_step(model, optimizers, 0)
    saved = {name: value.clone() for name, value in optimizers.named_state().items()}
    kept = {name: value.clone() for name, value in saved.items()}
    optimizers.load_named_state(saved)
    train_step(model, optimizers, 1)
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    model = small_model()
    optimizers = build_optimizers(model, OptimConfig())
    train_step(model, optimizers, 0)
    good = {name: value.clone() for name, value in optimizers.named_state().items()}
    qkv = "adamw.exp_avg.blocks.0.attention.qkv.weight"

    def without(name: str) -> dict[str, Any]:
        return {key: value for key, value in good.items() if key != name}

    for wrong, message in (
        ({**good, qkv: torch.zeros(3, 3)}, r"qkv\.weight has shape \(3, 3\), the parameter \(48, 16\)"),
        ({**good, qkv: torch.zeros(())}, r"has shape \(\)"),
        ({**good, "adamw.exp_avg.blocks.9.norm": torch.zeros(1)}, "does not have|do not have"),
        ({f"sgd.{name}": value for name, value in good.items()}, "do not have"),
        (without(qkv), f"lacks {qkv}"),
        ({**good, qkv.replace("exp_avg", "row_mean"): torch.zeros(48)}, "do not have"),
        ({name: value for name, value in good.items() if ".exp_avg." not in name}, "lacks adamw.exp_avg."),
    ):
        with pytest.raises(UserError, match=message):
            optimizers.load_named_state(wrong)
        for name, value in optimizers.named_state().items():
            assert torch.equal(value, good[name])
    with pytest.raises(UserError, match=r"is of adamw, not of adamw, muon"):
        build_optimizers(small_model(), OptimConfig(optimizer="muon")).load_state_dict(optimizers.state_dict())


def test_nothing_to_train_and_unknown_optimizers() -> None:
    with pytest.raises(UserError, match="nothing to optimize"):
        build_optimizers(small_model().requires_grad_(False), OptimConfig())
    with pytest.raises(UserError, match="unknown; allowed"):
        build_optimizers(small_model(), OptimConfig().model_copy(update={"optimizer": "shampoo"}))
    only_vectors = nn.LayerNorm(4)
    assert set(build_optimizers(only_vectors, OptimConfig(optimizer="muon")).optimizers) == {"adamw"}


def test_the_embedding_may_have_a_learning_rate_of_its_own() -> None:
    model = Transformer(ModelConfig(vocab_size=19, context_length=8, d_model=16, layers=1, heads=2), seed=0)
    for decays in (False, True):
        config = OptimConfig(optimizer="muon", lr=0.1, embedding_lr=0.7, decay_embeddings_and_norms=decays)
        found = build_optimizers(model, config)
        found.set_lr(0.5)
        own = [group for group in found.param_groups if group["name"] == "embedding"]
        assert [group["lr"] for group in own] == [0.35]
        assert [list(map(id, group["params"])) for group in own] == [[id(model.embedding.weight)]]
        assert own[0]["weight_decay"] == (config.weight_decay if decays else 0.0)
        others = [id(p) for group in found.param_groups if group["name"] != "embedding" for p in group["params"]]
        assert len(others) == len(set(others)) == len(list(model.parameters())) - 1
        assert id(model.embedding.weight) not in others
