"""Both dispatches of a mixture of experts against loops over tokens and choices in float64, and against each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scratchlm.kernels import moe as kernels
from scratchlm.kernels.moe import grouped_experts, reference_experts

EXPERTS, K, D_MODEL, D_EXPERT = 5, 2, 16, 8
NAMES = ("x", "gates", "up", "down", "up_bias", "down_bias")


def swiglu(projected: Tensor) -> Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_without_torchs(*arguments: object) -> Tensor:
    """`grouped_experts` as on a device whose torch has no grouped matmul."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_torch_has_grouped_mm", lambda device, dtype: False)
        return grouped_experts(*arguments)  # type: ignore[arg-type]


DISPATCHES: dict[str, Callable[..., Tensor]] = {
    "reference": reference_experts,
    "grouped": grouped_experts,
    "grouped, blocks": grouped_without_torchs,
}
every_dispatch = pytest.mark.parametrize("dispatch", DISPATCHES.values(), ids=list(DISPATCHES))

LOADS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "random": lambda g: torch.stack([torch.randperm(EXPERTS, generator=g)[:K] for _ in range(37)]),
    "one token": lambda g: torch.tensor([[3, 1]]),
    "no tokens": lambda g: torch.zeros(0, K, dtype=torch.long),
    "all to two": lambda g: torch.tensor([[4, 0]]).expand(37, 2),
    "one expert each": lambda g: torch.tensor([[2]]).expand(20, 1),
    "nothing for the first and last": lambda g: torch.randperm(3, generator=g)[:2].add(1).expand(11, 2),
    "more experts than pairs": lambda g: torch.tensor([[1, 4]]),
    "all of them": lambda g: torch.stack([torch.randperm(EXPERTS, generator=g) for _ in range(9)]),
}
every_load = pytest.mark.parametrize("load", LOADS.values(), ids=list(LOADS))


def drawn(
    load: Callable[[torch.Generator], Tensor], dtype: torch.dtype, d_model: int = D_MODEL, d_expert: int = D_EXPERT
) -> tuple[Tensor, list[Tensor]]:
    """Choices, and x, gates, up, down, up_bias, down_bias that require gradients."""
    generator = torch.Generator().manual_seed(7)
    experts = load(generator)
    tokens, k = experts.shape
    shapes = (
        (tokens, d_model),
        (tokens, k),
        (EXPERTS, 2 * d_expert, d_model),
        (EXPERTS, d_model, d_expert),
        (EXPERTS, 2 * d_expert),
        (EXPERTS, d_model),
    )
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    gates_dtype = torch.promote_types(dtype, torch.float32)
    return experts, [t.to(gates_dtype if i == 1 else dtype).requires_grad_() for i, t in enumerate(tensors)]


def results(
    dispatch: Callable[..., Tensor], experts: Tensor, tensors: list[Tensor], biased: bool = True
) -> dict[str, Tensor]:
    """The mixture and all gradients, by name."""
    x, gates, up, down, *biases = tensors
    y = dispatch(x, experts, gates, up, down, swiglu, *(biases if biased else ()))
    wanted = tensors if biased else tensors[:4]
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    gradients = torch.autograd.grad((y * upstream).sum(), wanted)
    return {"y": y.detach(), **dict(zip(NAMES, gradients, strict=False))}


def by_loops(experts: Tensor, tensors: list[Tensor], biased: bool) -> np.ndarray:
    x, gates, up, down, up_bias, down_bias = (t.detach().double().numpy() for t in tensors)
    y = np.zeros(x.shape)
    for token in range(len(x)):
        for choice, expert in enumerate(experts[token].tolist()):
            projected = up[expert] @ x[token] + (up_bias[expert] if biased else 0)
            gate, linear = projected[: len(projected) // 2], projected[len(projected) // 2 :]
            inner = gate / (1 + np.exp(-gate)) * linear
            y[token] += gates[token, choice] * (down[expert] @ inner + (down_bias[expert] if biased else 0))
    return y


@every_dispatch
@every_load
@pytest.mark.parametrize("biased", [False, True])
def test_the_definition(dispatch: Callable[..., Tensor], load: Callable[..., Tensor], biased: bool) -> None:
    experts, tensors = drawn(load, torch.float64)
    ours = results(dispatch, experts, tensors, biased)["y"]
    np.testing.assert_allclose(ours.numpy(), by_loops(experts, tensors, biased), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dispatch", [reference_experts, grouped_experts, grouped_without_torchs])
def test_gradients_are_those_of_finite_differences(dispatch: Callable[..., Tensor]) -> None:
    experts, tensors = drawn(lambda g: torch.tensor([[0, 2], [2, 1], [4, 2]]), torch.float64, 3, 2)

    def mixture(x: Tensor, gates: Tensor, *rest: Tensor) -> Tensor:
        up, down, *biases = rest
        return dispatch(x, experts, gates, up, down, swiglu, *biases)

    assert torch.autograd.gradcheck(mixture, tensors)


@pytest.mark.parametrize("dispatch", [grouped_experts, grouped_without_torchs])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("widths", [(16, 8), (5, 3), (6, 8)], ids=["aligned", "odd", "one odd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@every_load
def test_grouped_is_the_reference_with_its_gradients(
    dispatch: Callable[..., Tensor],
    load: Callable[..., Tensor],
    dtype: torch.dtype,
    tolerance: float,
    widths: tuple[int, int],
    biased: bool,
) -> None:
    """In bfloat16 within 2 % of the largest entry: it has 8 bits, and sums are taken in another order."""
    experts, tensors = drawn(load, dtype, *widths)
    expected = results(reference_experts, experts, tensors, biased)
    ours = results(dispatch, experts, tensors, biased)
    assert ours.keys() == expected.keys()
    for name, exact in expected.items():
        assert ours[name].dtype == exact.dtype
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        torch.testing.assert_close(ours[name], exact, rtol=0, atol=tolerance * max(1.0, largest), msg=name)


@every_dispatch
def test_an_expert_without_tokens_has_no_gradient_and_gate_0_sends_none(dispatch: Callable[..., Tensor]) -> None:
    experts, tensors = drawn(lambda g: torch.tensor([[0, 3], [3, 1]]), torch.float32)
    with torch.no_grad():
        tensors[1][:] = torch.tensor([[0.0, 0.5], [0.25, 1.0]])  # the only token of expert 0 has gate 0
    found = results(dispatch, experts, tensors)
    for name in ("up", "down", "up_bias", "down_bias"):
        assert [bool(found[name][expert].any()) for expert in range(EXPERTS)] == [False, True, False, True, False]


def test_blocks_hold_every_row_once_and_belong_to_one_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, experts in ((0, 3), (1, 4), (7, 3), (64, 8), (100, 8), (33, 1)):
        for _ in range(20):
            owner_of_row = (
                torch.randint(experts, (rows,), generator=generator).pow(2).remainder(experts).sort().values
            )
            ends = torch.searchsorted(owner_of_row, torch.arange(experts), right=True)
            slot, owner, size = kernels._blocks(ends, rows)
            assert slot.unique().numel() == rows
            assert torch.equal(owner[slot // size], owner_of_row)
            assert len(owner) <= 3 * experts
            assert len(owner) * size <= 1.5 * rows + 2 * experts


def test_torchs_grouped_matmul_is_tried_and_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = kernels._torch_has_grouped_mm.__wrapped__
    assert not probe("cpu", torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        plain = probe("cpu", dtype)
        with torch.autocast("cpu", torch.bfloat16):  # the first use may be there
            assert probe("cpu", dtype) == plain

    def wrong(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        return torch.zeros(16, 16) if b.ndim == 3 else torch.zeros(2, 16, 16)

    monkeypatch.setattr(torch, "_grouped_mm", wrong)
    assert not probe("cpu", torch.float32)
    monkeypatch.delattr(torch, "_grouped_mm")
    assert not probe("cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_compiled_without_a_graph_break_and_for_any_choices(dtype: torch.dtype) -> None:
    """One graph serves all loads: shapes do not depend on them."""
    torch._dynamo.reset()
    compiled = torch.compile(grouped_experts, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            experts, tensors = drawn(LOADS["random"], dtype)
            experts = (
                (experts + seed) % EXPERTS if seed < 2 else experts.new_tensor([[4, 0]]).expand(37, 2).contiguous()
            )
            eager = results(grouped_experts, experts, tensors)
            for name, found in results(compiled, experts, tensors).items():
                torch.testing.assert_close(found, eager[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dispatch", [reference_experts, grouped_experts])
def test_autocast(dispatch: Callable[..., Tensor]) -> None:
    experts, tensors = drawn(LOADS["random"], torch.float32)
    exact = results(reference_experts, experts, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(dispatch, experts, tensors)
    assert found["y"].dtype == torch.bfloat16
    for name, gradient in exact.items():
        if name != "y":
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(
                found[name], gradient, rtol=0, atol=0.03 * float(gradient.abs().max()), msg=name
            )


@every_load
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("alone", [True, False], ids=["one token", "all tokens"])
def test_without_gradients_experts_are_read_where_they_lie(
    load: Callable[[torch.Generator], Tensor], biased: bool, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ways of reading and writing text: as the formula, and only where no gradient is wanted."""
    experts, (x, gates, up, down, up_bias, down_bias) = drawn(load, torch.float64)
    if alone:
        experts, x, gates = experts[:1], x[:1], gates[:1]
    biases = (up_bias, down_bias) if biased else (None, None)
    taken: list[str] = []
    for name in ("_for_one_token", "_each_where_it_lies"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, n=name, real=real: taken.append(n) or real(*given))
    with torch.no_grad():
        found = grouped_experts(x, experts, gates, up, down, swiglu, *biases)
        wanted = reference_experts(x, experts, gates, up, down, swiglu, *biases)
    assert taken == ([] if not len(x) else ["_for_one_token" if len(x) == 1 else "_each_where_it_lies"])
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    before = len(taken)
    grouped_experts(x, experts, gates, up, down, swiglu, *biases)
    assert len(taken) == before


@pytest.mark.parametrize("tokens", [1, 7])
def test_without_gradients_in_bf16_with_gates_in_fp32(tokens: int) -> None:
    experts, tensors = drawn(LOADS["random"], torch.float64)
    x, gates, up, down, up_bias, down_bias = (t.bfloat16() for t in tensors)
    given = x[:tokens], experts[:tokens], gates[:tokens].float(), up, down, swiglu, up_bias, down_bias.float()
    with torch.no_grad():
        found = grouped_experts(*given)
        exact = reference_experts(
            *(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given)
        )
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() < 0.03 * exact.abs().max()
