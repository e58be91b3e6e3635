"""Adam in one pass against the formula in float64: on a GPU where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_device import DEVICE

from scratchlm.config import OptimConfig
from scratchlm.kernels import adam, adam_triton, triton_here
from scratchlm.optim import Adam, AdamW, Lion, build_optimizers
from scratchlm.optim.implementation import OnePass

CHUNK = 32
"""Of the tests, so that a small parameter has several."""


@pytest.fixture(autouse=True)
def small_chunks(interpreted: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_triton, "CHUNK", CHUNK)


def formula(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, *, lr: float, betas: tuple[float, float], eps: float, decay: float, decoupled: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    w, g, m, v = (x.double() for x in (w, g, m, v))
    if decoupled:
        w = w - lr * decay * w
    else:
        g = g + decay * w
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    return w - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps), m, v


def drawn(sizes: list[int], seed: int, aligned: bool = True) -> list[Tensor]:
    """In one piece each; those that are not aligned begin at the second number of a storage."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(size + 1, generator=generator).to(DEVICE) for size in sizes]
    return [x[:-1].clone() if aligned else x[1:] for x in found]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.sampled_from([0, 1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 100]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    copied=st.sampled_from([None, torch.bfloat16, torch.float16]),
    factor=st.sampled_from([None, 0.3, 0.0]),
    skip=st.sampled_from([None, 0.0, 1.0]),
    before=st.integers(0, 3000),
    aligned=st.booleans(),
    decoupled=st.booleans(),
    decay=st.sampled_from([0.0, 0.1]),
    betas=st.sampled_from([(0.9, 0.95), (0.0, 0.999), (0.5, 0.0)]),
    seed=st.integers(0, 99),
)
def test_any_step(
    sizes: list[int],
    dtype: torch.dtype,
    copied: torch.dtype | None,
    factor: float | None,
    skip: float | None,
    before: int,
    aligned: bool,
    decoupled: bool,
    decay: float,
    betas: tuple[float, float],
    seed: int,
) -> None:
    assume(decoupled or not decay or betas[1])  # else g + λ θ ≈ 0 is divided by itself
    w, g, m, v = (drawn(sizes, 4 * seed + n, aligned) for n in range(4))
    g, v = [x.to(dtype) for x in g], [x.square() for x in v]
    steps = [torch.tensor(float(before), device=DEVICE) for _ in sizes]
    copies = [] if copied is None else [torch.full_like(x, 7.0, dtype=copied) for x in w]
    how: dict[str, Any] = {"lr": 1e-2, "betas": betas, "eps": 1e-6, "decay": decay, "decoupled": decoupled}
    scaled = [x.double() * (1.0 if factor is None else factor) for x in g]
    expected = [formula(*one, before + 1, **how) for one in zip(w, scaled, m, v, strict=True)]
    given_ = [None if value is None else torch.tensor(value, device=DEVICE) for value in (factor, skip)]
    kept = [x.clone() for x in (*w, *m, *v, *steps, *copies)]
    adam.step_(w, g, m, v, steps, copies, *given_, **how)
    if skip == 1.0:
        assert all(map(torch.equal, kept, (*w, *m, *v, *steps, *copies)))
        return
    for place, right in enumerate(expected):
        for ours, theirs in zip((w[place], m[place], v[place]), right, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6)  # differences of numbers near 1
        assert steps[place].item() == before + 1
        if copies:
            assert torch.equal(copies[place], w[place].to(copies[place].dtype))


def test_the_first_steps_are_as_exact_as_the_later_ones() -> None:
    """1 − β and 1 − βᵗ in fp32 would leave one digit of a β near 1."""
    w, g, m, v = drawn([8], 0), drawn([8], 1), [torch.zeros(8, device=DEVICE)], [torch.zeros(8, device=DEVICE)]
    how: dict[str, Any] = {"lr": 1.0, "betas": (0.99999, 0.999999), "eps": 0.0, "decay": 0.0, "decoupled": True}
    right = formula(w[0], g[0], m[0], v[0], 1, **how)[0]
    assert torch.allclose(right, w[0].double() - g[0].sign())
    adam.step_(w, g, m, v, [torch.zeros((), device=DEVICE)], [], None, None, **how)
    torch.testing.assert_close(w[0].double(), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_the_optimizer_takes_it_and_it_is_the_reference(kind: type[Adam]) -> None:
    made = {}
    for implementation in ("auto", "reference"):
        group = [nn.Parameter(x) for x in drawn([3, 2 * CHUNK + 5, 1], 0)]
        group.append(nn.Parameter(drawn([4], 9)[0]))  # never gets a gradient
        optimizer = kind(
            [{"params": group[:2], "weight_decay": 0.1}, {"params": group[2:]}],
            lr=1e-2,
            implementation=implementation,
        )
        assert optimizer.takes_one_pass() == (implementation == "auto")
        for step in range(5):
            for parameter, gradient in zip(group[:3], drawn([3, 2 * CHUNK + 5, 1], step + 1), strict=True):
                parameter.grad = gradient
            optimizer.step()
        assert optimizer.state[group[0]]["step"] == 5 and not optimizer.state[group[3]]
        made[implementation] = group
    for ours, right in zip(made["auto"], made["reference"], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


def test_gradients_of_copies_are_scaled_and_copies_follow() -> None:
    """Of two parameters one has its gradient at the copy, the other, as after several micro-batches, its own."""
    parameters = [nn.Parameter(x) for x in drawn([40, 7], 0)]
    right = [nn.Parameter(p.detach().clone()) for p in parameters]
    copies = {p: p.detach().to(torch.float16).requires_grad_() for p in parameters}
    gradients = drawn([40, 7], 1)
    copies[parameters[0]].grad, parameters[1].grad = gradients[0].half(), gradients[1]
    right[0].grad, right[1].grad = gradients[0].half().float() * 0.25, gradients[1] * 0.25
    optimizer, reference = AdamW(parameters, lr=0.1), AdamW(right, lr=0.1, implementation="reference")
    optimizer.one_pass = OnePass(copies, torch.tensor(0.25, device=DEVICE))
    optimizer.step()
    reference.step()
    for ours, theirs in zip(parameters, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert torch.equal(copies[ours], ours.half())
    assert copies[parameters[0]].grad.equal(gradients[0].half()) and parameters[1].grad.equal(gradients[1])


def test_a_step_by_itself_is_a_plain_one_again() -> None:
    model = nn.Linear(3, 2, bias=False).to(DEVICE)
    optimizers = build_optimizers(model, OptimConfig(lr=0.1, weight_decay=0.0))
    model.weight.grad = torch.ones(2, 3, device=DEVICE)
    zero, one = (torch.tensor(value, device=DEVICE) for value in (0.0, 1.0))
    before = model.weight.detach().clone()
    optimizers.step(one, OnePass({}, zero))
    optimizers.step(None, OnePass({}, zero))
    assert torch.equal(model.weight, before)
    optimizers.optimizers["adamw"].step()
    assert not (model.weight == before).any()


def test_what_was_promised_and_cannot_be_done_is_said() -> None:
    (p,) = group = [nn.Parameter(torch.ones(3, device=DEVICE))]
    optimizer = AdamW(group)
    p.grad = torch.ones(3, device=DEVICE)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].double()
    optimizer.one_pass = OnePass({}, torch.tensor(0.5, device=DEVICE))
    with pytest.raises(RuntimeError, match="one pass was promised"):
        optimizer.step()


def test_who_does_not_take_it() -> None:
    (p,) = drawn([6], 0)
    assert AdamW([p]).takes_one_pass()
    assert not AdamW([p], implementation="foreach").takes_one_pass()
    assert not AdamW([p, p.bfloat16()]).takes_one_pass()
    assert not AdamW([p, torch.zeros(4, 3, device=DEVICE).t()]).takes_one_pass()
    assert not Lion([p]).takes_one_pass()


def test_without_triton_torchs_kernel_steps_and_it_is_said_once(
    interpreted: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_here.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(adam_triton, "step", None)
    (p,) = group = [nn.Parameter(torch.ones(3, device=DEVICE))]
    p.grad = torch.ones(3, device=DEVICE)
    optimizer = AdamW(group, lr=0.1, weight_decay=0.0)
    for _ in range(2):
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8, device=DEVICE))
    assert not optimizer.takes_one_pass()
    assert [str(w.message) for w in interpreted] == [
        "the optimizer's step is made in several passes by torch's kernels, which is slower: triton is not installed"
    ]


def test_it_can_be_traced_without_memory() -> None:
    with FakeTensorMode():
        w, g, m, v = ([torch.empty(5)] for _ in range(4))
        how: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "decay": 0.0, "decoupled": True}
        adam.step_(w, g, m, v, [torch.empty(())], [], None, None, **how)


def test_a_state_that_is_not_finite_stays_visible() -> None:
    (p,) = group = [nn.Parameter(torch.ones(3, device=DEVICE))]
    p.grad = torch.tensor([1.0, math.nan, math.inf], device=DEVICE)
    AdamW(group, lr=0.1).step()
    assert p.detach().isfinite().tolist() == [True, False, False]
