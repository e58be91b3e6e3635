"""Mixtures of experts against loops over tokens and experts in NumPy float64, and against transformers' blocks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from mixtures import D_FF, D_MODEL, config, inputs, mixture, run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.config import OptimConfig
from scratchlm.model.config import ModelConfig
from scratchlm.model.context import Context
from scratchlm.model.feedforward import SwiGLU
from scratchlm.model.moe import ExpertLinear, MixtureOfExperts, within_capacity
from scratchlm.optim.build import build_optimizers, parameter_roles

# the oracle


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def route(module: MixtureOfExperts, c: ModelConfig, u: np.ndarray) -> tuple[list[int], list[float], np.ndarray]:
    """One token's experts, gates and distribution, from the papers' sentences."""
    moe, weights = c.moe, {name: t.double().numpy() for name, t in module.router.state_dict().items()}
    scores = np.array([u @ e for e in weights["score.weight"]]) + weights.get("score.bias", 0)
    values = {"softmax_topk": softmax, "topk_softmax": lambda s: s, "sigmoid": sigmoid}[moe.router](scores)
    going_by = values + weights.get("correction", 0)
    per_group = c.n_experts // moe.groups
    members = [list(range(g * per_group, (g + 1) * per_group)) for g in range(moe.groups)]
    best = [sorted((going_by[i] for i in group), reverse=True) for group in members]
    strength = [sum(b[:2]) if moe.router == "sigmoid" else b[0] for b in best]
    groups = sorted(range(moe.groups), key=lambda g: -strength[g])[: moe.top_groups or moe.groups]
    open_to = [i for g in groups for i in members[g]]
    chosen = sorted(open_to, key=lambda i: -going_by[i])[: c.active_experts]
    gates = [values[i] for i in chosen]
    if moe.router == "topk_softmax":
        gates = list(softmax(np.array(gates)))
    elif moe.normalise:
        gates = [gate / sum(gates) for gate in gates]
    shares = values / values.sum() if moe.router == "sigmoid" else softmax(scores)
    return chosen, [gate * moe.gate_scale for gate in gates], shares


def swiglu(u: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gate, linear = np.split(up @ u, 2)
    return down @ (gate * sigmoid(gate) * linear)


def by_loops(module: MixtureOfExperts, c: ModelConfig, x: Tensor) -> np.ndarray:
    """Every token through its experts and, one after the other, the shared ones."""
    weights = {name: t.detach().double().numpy() for name, t in module.state_dict().items()}
    rows = []
    for u in x.detach().double().numpy().reshape(-1, D_MODEL):
        y = np.zeros(D_MODEL)
        for expert, gate in zip(*route(module, c, u)[:2], strict=True):
            y += gate * swiglu(u, weights["up.weight"][expert], weights["down.weight"][expert])
        shared, width = np.zeros(D_MODEL), c.moe.d_shared or c.resolved_d_expert
        for i in range(1 if c.moe.d_shared else c.moe.shared):  # of a width that no experts divide, they are one
            part = slice(i * width, (i + 1) * width)
            gate_w, up_w = np.split(weights["shared.gate_up.weight"], 2)
            both = np.concatenate([gate_w[part], up_w[part]])
            shared += swiglu(u, both, weights["shared.down.weight"][:, part])
        if c.moe.shared_gate:
            shared *= sigmoid(weights["shared_gate.weight"] @ u)
        rows.append(y + shared)
    return np.stack(rows).reshape(x.shape)


VARIANTS: list[dict[str, Any]] = [
    {"router": router, "normalise": normalise, **more}
    for router, normalise, more in itertools.product(
        ["softmax_topk", "topk_softmax", "sigmoid"],
        [True, False],
        [
            {},
            {"top_k": 1, "router_bias": True, "gate_scale": 2.5},
            {"shared": 1, "fine_grained": 2},
            {"shared": 2, "shared_gate": True, "fine_grained": 4, "groups": 4, "top_groups": 2},
            {"shared": 2, "d_shared": 3},
            {"groups": 2, "top_groups": 1, "bias_update": 0.1},
            {"experts": 8, "groups": 8, "top_groups": 3, "top_k": 3, "d_expert": 5},
            {"top_k": 4},
        ],
    )
    if normalise or router != "topk_softmax"  # whose gates add up to 1 as they are
]


@pytest.mark.parametrize("kernels", ["fast", "reference"])
@pytest.mark.parametrize("moe", VARIANTS, ids=[" ".join(f"{k}={v}" for k, v in m.items()) for m in VARIANTS])
def test_the_definition(moe: dict[str, Any], kernels: str) -> None:
    module = mixture(kernels=kernels, **moe).double()
    c = config(**moe)
    x = inputs(2, 9).double()
    y, record = run(module, x)
    np.testing.assert_allclose(y.detach().numpy(), by_loops(module, c, x), rtol=1e-9, atol=1e-9)
    routed = [route(module, c, u) for u in x.numpy().reshape(-1, D_MODEL)]
    counts = np.bincount([e for chosen, _, _ in routed for e in chosen], minlength=c.n_experts)
    assert record.load.tolist() == counts.tolist()
    assert record.load.sum() == 18 * c.active_experts
    assert record.dropped == 0
    shares = np.stack([s for _, _, s in routed])
    np.testing.assert_allclose(float(record.entropy), -(shares * np.log(shares)).sum(1).mean(), rtol=1e-6)
    balance = c.n_experts * (counts / counts.sum() * shares.mean(0)).sum()
    np.testing.assert_allclose(float(record.loss.detach()), 0.01 * balance, rtol=1e-6)


@pytest.mark.parametrize("feedforward", ["relu", "gelu", "geglu", "swiglu_clamped"])
@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_experts_are_of_the_feedforwards_kind(feedforward: str, kernels: str) -> None:
    """Every expert is the dense network with its weights, biases included."""
    module = mixture(
        feedforward=feedforward, feedforward_bias=True, kernels=kernels, top_k=1, shared=1, normalise=True
    )
    assert module.shared is not None
    x = inputs(12)
    y, _ = run(module, x)
    experts = module.router(x).experts[:, 0]
    assert experts.unique().numel() > 1
    always = module.shared(x, Context())
    inner = module.shared.gate_up if module.shared.gated else module.shared.up
    for expert in range(4):
        with torch.no_grad():
            inner.weight.copy_(module.up.weight[expert])
            inner.bias.copy_(module.up.bias[expert])
            module.shared.down.weight.copy_(module.down.weight[expert])
            module.shared.down.bias.copy_(module.down.bias[expert])
        here = experts == expert
        dense = module.shared(x[here], Context())
        torch.testing.assert_close(y[here], dense + always[here], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (2, 3), (2, 1, 3), (2, 0)])
@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_any_leading_shape(shape: tuple[int, ...], over: str) -> None:
    module = mixture(shared=1, balance_over=over, router_z_loss=0.1)
    x = inputs(*shape)
    y, record = run(module, x)
    assert y.shape == x.shape
    assert record.load.sum() == 2 * math.prod(shape)
    assert record.loss.isfinite()
    (y.sum() + record.loss).backward()
    flat, _ = run(module, x.reshape(-1, D_MODEL))
    torch.testing.assert_close(y.reshape(-1, D_MODEL), flat)


def test_without_drops_a_token_depends_on_itself_alone() -> None:
    module = mixture(shared=1).train()
    x = inputs(3, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(run(module, x)[0][1, 2].sum(), x)
    assert gradient[1, 2].any()
    gradient[1, 2] = 0
    assert not gradient.any()


# capacity


def test_capacity_keeps_the_first_pairs_of_each_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, k, capacity in ((1, 1, 1), (13, 2, 3), (40, 3, 5), (40, 3, 0), (9, 2, 100)):
        experts = torch.stack([torch.randperm(6, generator=generator)[:k] for _ in range(tokens)])
        taken, expected = [0] * 6, []
        for row in experts.tolist():
            for expert in row:
                expected.append(taken[expert] < capacity)
                taken[expert] += 1
        kept = within_capacity(experts, torch.tensor(taken, dtype=torch.float32), capacity)
        assert kept.flatten().tolist() == expected


@pytest.mark.parametrize("kernels", ["fast", "reference"])
@pytest.mark.parametrize("factor", [0.33, 1.0, 1.1])
def test_capacity_drops_in_training_only(kernels: str, factor: float) -> None:
    """A dropped pair contributes nothing; the others keep their gates as they were."""
    module = mixture(capacity_factor=factor, kernels=kernels, shared=1)
    x = inputs(2, 10)
    assert run(module.eval(), x)[1].dropped == 0
    y, record = run(module.train(), x)
    routing = module.router(x)
    capacity = math.ceil(factor * 20 * 2 / 4)
    assert record.load.sum() == 40  # counted before the drop
    assert record.dropped == record.load.sub(capacity).clamp(min=0).sum() > 0
    taken = [0] * 4
    expected = module.shared(x, Context()).detach().view(-1, D_MODEL).double().numpy()
    for token, (row, gates) in enumerate(
        zip(routing.experts.view(-1, 2).tolist(), routing.gates.view(-1, 2).tolist(), strict=True)
    ):
        for expert, gate in zip(row, gates, strict=True):
            if taken[expert] < capacity:
                up, down = (w[expert].detach().double().numpy() for w in (module.up.weight, module.down.weight))
                expected[token] += gate * swiglu(x.view(-1, D_MODEL)[token].double().numpy(), up, down)
            taken[expert] += 1
    np.testing.assert_allclose(y.detach().view(-1, D_MODEL).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_later_tokens_never_displace_earlier_ones() -> None:
    module = mixture(capacity_factor=0.5).train()
    x = inputs(1, 16)
    changed = x.clone()
    changed[:, 9:] = inputs(1, 7, seed=9)
    before, after = run(module, x)[0], run(module, changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert run(module, x)[1].dropped > 0


# precision, compilation


def test_scores_are_float32_under_autocast_and_in_bfloat16_models() -> None:
    x = inputs(30)
    module = mixture()
    exact = module.router(x)
    with torch.autocast("cpu", torch.bfloat16):
        routing = module.router(x)
        y, _ = run(module, x)
    assert torch.equal(routing.scores, exact.scores)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), run(module, x)[0], rtol=0, atol=0.03 * float(y.detach().abs().max()))
    small = module.bfloat16().router(x.bfloat16())
    assert small.scores.dtype == small.gates.dtype == torch.float32
    expected = x.bfloat16().float() @ module.router.score.weight.float().T
    torch.testing.assert_close(small.scores, expected)


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid"])
def test_compiled_is_eager(router: str) -> None:
    module = mixture(
        router=router, shared=1, bias_update=0.1, groups=2, top_groups=1, balance_over="sequence"
    ).train()

    def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context = Context()
        y = module(x, context)
        return y, context.routers[0].loss, context.routers[0].load

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    for seed in range(2):
        x = inputs(2, 20, seed=seed)
        found = []
        for function in (step, compiled):
            module.zero_grad()
            y, loss, load = function(x)
            (y.square().sum() + loss).backward()
            found.append([y.detach(), loss.detach(), load, *(p.grad for p in module.parameters())])
        for eager, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)  # sums of squares in another order


# costs, roles


@pytest.mark.parametrize("feedforward", ["swiglu", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("moe", [{}, {"shared": 2, "shared_gate": True, "fine_grained": 2, "router_bias": True}])
def test_costs(feedforward: str, bias: bool, moe: dict[str, Any]) -> None:
    module = mixture(feedforward=feedforward, feedforward_bias=bias, kernels="reference", **moe)
    assert module.num_params() == sum(p.numel() for p in module.parameters())
    idle = sum(p[0].numel() for layer in (module.up, module.down) for p in layer.parameters())
    assert module.num_active_params() == module.num_params() - idle * (module.n_experts - module.k)
    for tokens in (1, 10):
        with FlopCounterMode(display=False) as counter:
            module(inputs(tokens), Context())
        assert counter.get_total_flops() == tokens * module.flops_per_token(tokens)


def test_splitting_experts_keeps_parameters_and_work() -> None:
    whole = mixture(shared=0)
    for m in (2, 4, 8):
        split = mixture(fine_grained=m)
        assert split.n_experts == 4 * m and split.k == 2 * m
        for cost in (MixtureOfExperts.num_params, MixtureOfExperts.num_active_params):
            assert cost(split) - split.router.num_params() == cost(whole) - whole.router.num_params()


def test_one_expert_is_the_dense_network() -> None:
    c = config(experts=1, top_k=1)
    module, dense = mixture(experts=1, top_k=1), SwiGLU(c)
    with torch.no_grad():
        dense.gate_up.weight.copy_(module.up.weight[0])
        dense.down.weight.copy_(module.down.weight[0])
    x = inputs(2, 5)
    torch.testing.assert_close(run(module, x)[0], dense(x, Context()))


def test_optimizers_take_experts_as_matrices_and_routers_not() -> None:
    module = mixture(shared=1, shared_gate=True, feedforward_bias=True, router_bias=True)
    roles = parameter_roles(module)
    assert {name for name, role in roles.items() if role == "router"} == {
        "router.score.weight",
        "shared_gate.weight",
    }
    assert roles["up.weight"] == roles["down.weight"] == "matrix"
    assert roles["up.bias"] == roles["router.score.bias"] == "bias"
    optimizers = build_optimizers(module, OptimConfig(optimizer="muon"))
    by_muon = {id(p) for group in optimizers.optimizers["muon"].param_groups for p in group["params"]}
    mine = {name for name, p in module.named_parameters() if id(p) in by_muon}
    assert mine == {"up.weight", "down.weight", "shared.gate_up.weight", "shared.down.weight"}
    assert module.up.weight.muon_split == [D_FF, D_FF]
    before = module.up.weight.detach().clone()
    run(module, inputs(2, 9))[0].square().sum().backward()
    optimizers.step()
    assert not torch.equal(module.up.weight, before)


def test_what_initialisation_reads() -> None:
    module = mixture(fine_grained=2)
    stacked = [m for m in module.modules() if isinstance(m, ExpertLinear)]
    assert [m.parts for m in stacked] == [[16, 16], [D_MODEL]]
    assert [m.residual_output for m in stacked] == [False, True]
    for m in stacked:
        assert m.weight.shape == (m.n_experts, m.d_out, m.d_in) == (8, sum(m.parts), m.d_in)


# transformers' blocks


def copied(module: MixtureOfExperts, block: nn.Module, shared: str | None = None) -> None:
    """Give `block` our weights."""
    theirs = {
        "gate.weight": module.router.score.weight,
        "experts.gate_up_proj": module.up.weight,
        "experts.down_proj": module.down.weight,
    }
    if shared is not None:
        gate, up = module.shared.gate_up.weight.chunk(2)
        theirs |= {
            f"{shared}.gate_proj.weight": gate,
            f"{shared}.up_proj.weight": up,
            f"{shared}.down_proj.weight": module.shared.down.weight,
        }
    if module.shared_gate is not None:
        theirs["shared_expert_gate.weight"] = module.shared_gate.weight
    if module.router.correction is not None:
        theirs["gate.e_score_correction_bias"] = module.router.correction
    state = block.state_dict()
    assert state.keys() == theirs.keys()
    block.load_state_dict({name: tensor.detach() for name, tensor in theirs.items()})


def agree(module: MixtureOfExperts, block: nn.Module) -> None:
    x = inputs(2, 25)
    found = []
    for function in (lambda u: run(module, u)[0], lambda u: block(u.clone())):
        u = x.clone().requires_grad_()
        y = function(u)
        y = y[0] if isinstance(y, tuple) else y
        found.append((y, *torch.autograd.grad(y.square().sum(), u)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax"])
def test_mixtral(router: str) -> None:
    """Its two descriptions are one function: softmax over the chosen, or over all and then normalised."""
    theirs = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    module = mixture(router=router)
    block = theirs.MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=D_MODEL, intermediate_size=D_FF, num_local_experts=4, num_experts_per_tok=2)
    ).eval()
    copied(module, block)
    agree(module, block)


@pytest.mark.parametrize("d_shared", [None, 2 * D_FF + 3])
@pytest.mark.parametrize("normalise", [False, True])
def test_qwen2_moe(normalise: bool, d_shared: int | None) -> None:
    theirs = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe")
    from transformers import Qwen2MoeConfig

    module = mixture(experts=6, top_k=3, shared=2, d_shared=d_shared, shared_gate=True, normalise=normalise)
    block = theirs.Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            hidden_size=D_MODEL,
            moe_intermediate_size=D_FF,
            shared_expert_intermediate_size=d_shared or 2 * D_FF,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=normalise,
        )
    ).eval()
    copied(module, block, shared="shared_expert")
    agree(module, block)


@pytest.mark.parametrize("normalise", [False, True])
def test_deepseek_v3(normalise: bool) -> None:
    theirs = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    module = mixture(
        router="sigmoid", experts=12, top_k=4, shared=1, groups=4, top_groups=2, normalise=normalise, gate_scale=2.5
    )
    block = theirs.DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=D_MODEL,
            moe_intermediate_size=D_FF,
            n_routed_experts=12,
            num_local_experts=12,
            num_experts_per_tok=4,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            norm_topk_prob=normalise,
            routed_scaling_factor=2.5,
        )
    ).eval()
    copied(module, block, shared="shared_experts")
    agree(module, block)


def test_olmoe() -> None:
    theirs = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
    from transformers import OlmoeConfig

    module = mixture(experts=8, top_k=3, normalise=False)
    block = theirs.OlmoeSparseMoeBlock(
        OlmoeConfig(hidden_size=D_MODEL, intermediate_size=D_FF, num_experts=8, num_experts_per_tok=3)
    ).eval()
    copied(module, block)
    agree(module, block)
