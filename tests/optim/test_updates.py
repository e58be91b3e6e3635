"""AdamW, SGD and Muon against torch's own, step by step; Muon against the polar factor."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from optim_models import IMPLEMENTATIONS, compare, parameters, set_gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scratchlm.errors import UserError
from scratchlm.optim import SGD, AdamW, Muon, newton_schulz
from scratchlm.optim.newton_schulz import fast_dtype

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@every_implementation
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-3, "weight_decay": 0.0},
        {"lr": 1e-3, "weight_decay": 0.3, "betas": (0.9, 0.95)},
        {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.5, 0.7), "eps": 1e-4},
        {"lr": 1e-3, "weight_decay": 0.01, "betas": (0.0, 0.999), "eps": 1e-12},
    ],
    ids=["plain", "decay", "betas, ε", "no first moment"],
)
def test_adamw_is_torchs(settings: dict[str, Any], implementation: str) -> None:
    compare(AdamW, torch.optim.AdamW, settings, {**settings, "foreach": False}, implementation)


@every_implementation
@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
    ids=["plain", "momentum", "nesterov"],
)
def test_sgd_is_torchs(settings: dict[str, Any], implementation: str) -> None:
    compare(SGD, torch.optim.SGD, {"lr": 1e-3, **settings}, {"lr": 1e-3, **settings}, implementation)


@every_implementation
def test_sgd_decay_is_torchs_without_momentum_and_decoupled_with_it(implementation: str) -> None:
    settings = {"lr": 1e-3, "weight_decay": 0.5}
    compare(SGD, torch.optim.SGD, settings, settings, implementation)
    moving, still = parameters()[:1], parameters()[:1]
    a = SGD(moving, lr=0.1, momentum=0.9, weight_decay=0.5, implementation=implementation)
    b = SGD(still, lr=0.1, momentum=0.9, implementation=implementation)
    for optimizer, group in ((a, moving), (b, still)):
        group[0].grad = torch.ones_like(group[0])
        optimizer.step()
    torch.testing.assert_close(a.state[moving[0]]["momentum_buffer"], b.state[still[0]]["momentum_buffer"])
    old = parameters()[0]
    torch.testing.assert_close(moving[0].detach(), old.detach() * (1 - 0.05) - 0.1)


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 8), (16, 6), (6, 16))]


@every_implementation
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(nesterov: bool, implementation: str) -> None:
    """torch's runs in bfloat16, so the two agree to its precision; ours is held to itself in float32 below."""
    left, right = matrices(), matrices()
    settings: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    a = Muon(left, implementation=implementation, **settings)
    b = torch.optim.Muon(right, **settings)
    start = [p.detach().clone() for p in left]
    for step in range(5):
        for optimizer, group in ((a, left), (b, right)):
            for index, p in enumerate(group):
                p.grad = (
                    torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + index)) * 10**index
                )
            optimizer.step()
    for p, q, old in zip(left, right, start, strict=True):
        assert (p - q).norm() < 0.05 * (q - old).norm()
        assert (q - old).norm() > 0.1


def polar(matrix: np.ndarray) -> np.ndarray:
    """The nearest matrix with orthonormal rows or columns: U Vᵀ of U S Vᵀ, in float64."""
    u, _, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return u @ vt


@every_implementation
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40)])
def test_muons_step_is_the_polar_factor_of_its_momentum(
    shape: tuple[int, int], nesterov: bool, implementation: str
) -> None:
    """The quintic takes singular values into [0.68, 1.21], so the step is within 0.32 of U Vᵀ in the spectral norm, and
    it leaves U and V, so that U Vᵀ is its own polar factor, too."""
    generator = np.random.default_rng(0)
    rank = min(shape)
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Muon([p], lr=0.5, momentum=0.9, nesterov=nesterov, implementation=implementation)
    momentum = np.zeros(shape)
    for _ in range(3):
        before = p.detach().double().numpy().copy()
        u, _ = np.linalg.qr(generator.standard_normal((shape[0], rank)))
        v, _ = np.linalg.qr(generator.standard_normal((shape[1], rank)))
        gradient = u * np.geomspace(0.05, 1.0, rank) @ v.T  # conditioned: none is too small for five steps
        p.grad = torch.from_numpy(gradient).float()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        wanted = polar(0.1 * gradient + 0.9 * momentum if nesterov else momentum)
        step = (before - p.detach().double().numpy()) / (0.5 * max(1, shape[0] / shape[1]) ** 0.5)
        half = implementation != "reference" and fast_dtype("cpu") == torch.bfloat16
        assert np.linalg.norm(step - wanted, 2) < (0.4 if half else 0.33)
        if not half:
            np.testing.assert_allclose(polar(step), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("in_batches", [False, True], ids=["one by one", "as on a GPU"])
def test_muon_batched_is_the_reference_in_float32(in_batches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "in_batches", lambda device: in_batches)
    left, right = [[*matrices(), nn.Parameter(torch.ones(3, 4, 8))] for _ in range(2)]
    for group in (left, right):
        group[1].muon_split = [10, 2, 4]  # type: ignore[attr-defined]
        group[2].muon_split = 3  # type: ignore[attr-defined]
    a = Muon(left, implementation="reference", weight_decay=0.1)
    b = Muon(right, implementation="foreach", dtype=torch.float32, weight_decay=0.1)
    for step in range(10):
        for optimizer, group in ((a, left), (b, right)):
            for index, p in enumerate(group):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + index))
            optimizer.step()
    for p, q in zip(left, right, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_muon_on_a_gpu_launches_for_all_matrices_of_a_shape_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten layers take no more launches than two."""

    class Counted(TorchDispatchMode):
        launches = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view and func.overloadpacket._qualified_op_name != "aten::empty":
                self.launches += 1
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(newton_schulz, "in_batches", lambda device: True)
    launches = {}
    for layers in (2, 10):
        group = [nn.Parameter(torch.randn(*shape)) for _ in range(layers) for shape in ((12, 4), (4, 4), (4, 8))]
        for index, p in enumerate(group):
            p.grad = torch.randn(p.shape)
            if index % 3 == 0:
                p.muon_split = 3  # type: ignore[attr-defined]
        optimizer = Muon(group, weight_decay=0.1)
        optimizer.step()
        with Counted() as counted:
            optimizer.step()
        launches[layers] = counted.launches
    assert launches[10] == launches[2]


def test_muon_treats_each_stored_matrix_as_its_own() -> None:
    fused = nn.Parameter(torch.zeros(12, 6))
    fused.muon_split = [6, 4, 2]  # type: ignore[attr-defined]
    parts = [nn.Parameter(torch.zeros(rows, 6)) for rows in (6, 4, 2)]
    gradient = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)[:, None] ** 2
    fused.grad = gradient
    for part, rows in zip(parts, gradient.split([6, 4, 2]), strict=True):
        part.grad = rows.clone()
    for group in ([fused], parts):
        Muon(group, implementation="reference").step()
    torch.testing.assert_close(fused, torch.cat(list(parts)))
    whole = nn.Parameter(torch.zeros(12, 6))
    whole.grad = gradient.clone()
    Muon([whole], implementation="reference").step()
    assert not torch.allclose(whole, fused, atol=1e-3)


@pytest.mark.parametrize("optimizer", [AdamW, SGD, Muon])
def test_a_closure_gives_the_loss(optimizer: type) -> None:
    p = nn.Parameter(torch.ones(2, 2))

    def closure() -> torch.Tensor:
        p.grad = None
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer([p], lr=0.1).step(closure).item() == 4 and (p < 1).all()


@pytest.mark.parametrize(
    ("optimizer", "wrong", "message"),
    [
        (AdamW, {"lr": -1.0}, "lr = -1"),
        (AdamW, {"betas": (0.9, 1.0)}, "beta2 = 1"),
        (AdamW, {"betas": (float("nan"), 0.9)}, "beta1 = nan"),
        (AdamW, {"eps": -1e-8}, "eps"),
        (AdamW, {"weight_decay": -0.1}, "weight_decay"),
        (AdamW, {"implementation": "quick"}, "allowed: auto, reference, foreach, fused"),
        (SGD, {"momentum": 1.0}, "momentum = 1"),
        (SGD, {"lr": float("nan")}, "lr = nan"),
        (Muon, {"momentum": -0.1}, "momentum"),
    ],
)
def test_hyperparameters_out_of_range(optimizer: type, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        optimizer(matrices(), **wrong)


def test_muon_takes_matrices_only() -> None:
    with pytest.raises(UserError, match="give it to AdamW"):
        Muon(parameters())
    for split in ([3, 4], 3, [8, 0], 0):
        p = matrices()[0]
        p.muon_split = split  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="muon_split"):
            Muon([p])


@every_implementation
def test_bfloat16_parameters_are_updated_too(implementation: str) -> None:
    for optimizer in (AdamW, SGD):
        half, full = parameters(torch.bfloat16)[:4], parameters()[:4]
        a, b = (optimizer(group, lr=1e-2, implementation=implementation) for group in (half, full))
        for step in range(3):
            for settings, group in ((a, half), (b, full)):
                for p in group:
                    p.grad = torch.full_like(p, 1.0 + step)
                settings.step()
        for p, q in zip(half, full, strict=True):
            assert p.dtype == torch.bfloat16
            torch.testing.assert_close(p.float(), q, rtol=2e-2, atol=2e-2)


def test_auto_is_fused_on_the_cpu_and_a_copy_goes_on_alike() -> None:
    a = parameters()
    first = AdamW(a)
    set_gradients(a, 0)
    first.step()
    b = copy.deepcopy(a)
    second = AdamW(b, implementation="fused")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, group in ((first, a), (second, b)):
        set_gradients(group, 1)
        optimizer.step()
    assert all(map(torch.equal, a, b))
