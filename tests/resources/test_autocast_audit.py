"""The audit of a step, against the same step unwatched: its loss, the profiler's counts, and what modules really return."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from scratchlm.config import OptimConfig, Recipe, TrainConfig
from scratchlm.errors import UserError
from scratchlm.kernels import cpp_here, flash_attention_cpp
from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.linear import Linear
from scratchlm.model.norm import Norm
from scratchlm.optim import build_optimizers, clip_grad_norm, lr_multiplier
from scratchlm.resources import autocast_audit
from scratchlm.resources.autocast_audit import LOSS, OUTSIDE, Audit, Operation, audit, everywhere
from scratchlm.train.loss import NextTokenLoss
from scratchlm.train.precision import autocast

SMALL: dict[str, Any] = {"vocab_size": 50, "context_length": 16, "d_model": 16, "layers": 2, "heads": 2, "d_ff": 32}


def recipe(train: dict[str, Any] | None = None, optim: dict[str, Any] | None = None, **model: Any) -> Recipe:
    return Recipe(
        model=ModelConfig(**{**SMALL, **model}), train=TrainConfig(**train or {}), optim=OptimConfig(**optim or {})
    )


def select(found: Audit, phase: str, *names: str) -> list[Operation]:
    chosen = [one for one in found.operations if one.phase == phase and one.name in names]
    assert chosen, (phase, names)
    return chosen


def unwatched(given: Recipe, precision: Any) -> tuple[nn.Module, Any]:
    """The same step by the same rules, written out once more; the model and its loss."""
    torch.manual_seed(given.seed)
    model = Transformer(given.model, seed=given.seed)
    optimizers = build_optimizers(model, given.optim)
    batch = autocast_audit._random_batch(given.model.vocab_size, 2, given.model.context_length, given)
    loss = NextTokenLoss(model, given.train.loss_kernel)

    def step() -> float:
        optimizers.set_lr(lr_multiplier(0, given.train.steps, given.optim))
        with autocast(precision, torch.device("cpu")):
            total = loss(batch)
        (total / batch.targets.numel()).backward()
        clip_grad_norm(model.parameters(), given.optim.grad_clip)
        optimizers.step()
        return float(total.detach() / batch.targets.numel())

    return model, step


@pytest.fixture(params=["C++", "torch"])
def in_cpp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether kernels of ours in C++ do the loss, and attention where they are fast; else torch does all of it."""
    ours: bool = request.param == "C++"
    if not ours:
        monkeypatch.setattr(cpp_here, "compiler", lambda: None)
    elif cpp_here.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return ours


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["chunked", "reference"])
def test_it_is_the_unwatched_step(precision: Any, kernel: str, in_cpp: bool) -> None:
    given = recipe(train={"loss_kernel": kernel}, qk_norm="head")
    found = audit(given, precision)
    _, step = unwatched(given, precision)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        loss = step()
    assert found.loss == loss
    counted = Counter(event.name.removeprefix("aten::") for event in profiled.events())
    watched: Counter[str] = Counter()
    for one in found.operations:
        watched[one.name] += one.times
    # auto attention: short sequences in bf16 by products, of scores and mixtures, two forward and four back
    attention, times = ("bmm", 2 * 6) if precision == "bf16" else ("_scaled_dot_product_flash_attention_for_cpu", 2)
    if flash_attention_cpp.runs({"bf16": torch.bfloat16, "fp32": torch.float32}[precision]):
        assert in_cpp
        attention, times = "scratchlm::flash_attention", 2
        counted[attention] = counted["FlashAttention"]  # unwatched it goes past the dispatcher
    loss_kernel = "scratchlm::loss_and_gradient_"
    assert watched[loss_kernel] == (in_cpp and kernel == "chunked")
    compared = ("mm", "silu", "silu_backward", "embedding_dense_backward", "_fused_adamw_", "rsqrt")
    for name in (*compared, loss_kernel, attention):
        assert watched[name] == counted[name], name
    assert watched["_to_copy"] <= counted["_to_copy"]  # kernels cast inside, too
    assert watched["mm"] == 2 * 4 * 3 + 3 and watched[attention] == times


def test_matrix_products_are_in_bf16_and_norms_and_loss_in_fp32(in_cpp: bool) -> None:
    found = audit(recipe(), "bf16")
    for phase in ("forward", "backward"):
        for product in select(found, phase, "mm"):
            assert product.reads == product.writes == ("bf16",)
    norms = {f"blocks.{layer}.{name}" for layer in (0, 1) for name in ("attention_norm", "feedforward_norm")} | {
        "norm"
    }
    of_norms = [one for one in found.listed() if one.phase == "forward" and one.place in norms]
    assert {one.place for one in of_norms} == norms
    assert all(one.reads == one.writes == ("fp32",) for one in of_norms)
    if in_cpp:  # reads the logits as they are; within, all is fp32, as the losses are
        (loss,) = select(found, "forward", "scratchlm::loss_and_gradient_")
        assert (loss.place, loss.reads, loss.writes) == (LOSS, ("bf16", "int64"), ("fp32",))
    for name in () if in_cpp else ("exp", "log", "amax"):
        assert [(one.place, one.reads, one.writes) for one in select(found, "forward", name)] == [
            (LOSS, ("fp32",), ("fp32",))
        ]
    (update,) = select(found, "optimizer", "_fused_adamw_")
    assert (update.place, update.reads, update.writes) == ("adamw", ("fp32",), ("fp32",))
    assert {one.place for one in found.operations if one.phase == "clipping"} == {"all gradients"}
    (embedding,) = select(found, "forward", "embedding")
    assert (embedding.reads, embedding.numbers) == (("fp32", "int64"), found.tokens * SMALL["d_model"])
    (mixed,) = [one for one in select(found, "forward", "add") if one.place == "blocks.0"]
    assert (mixed.reads, mixed.writes, mixed.times) == (
        ("fp32", "bf16"),
        ("fp32",),
        2,
    )  # the residual stream stays fp32


def test_what_modules_return_is_what_was_seen_in_them() -> None:
    given = recipe(qk_norm="full", norm="layernorm")
    model, step = unwatched(given, "bf16")
    returned: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | Norm):
            module.register_forward_hook(
                lambda _, __, out, name=name: returned.__setitem__(name, autocast_audit.short(out.dtype))
            )
    step()
    found = audit(given, "bf16")
    assert len(returned) == 2 * (4 + 2 + 2) + 1
    for name, dtype in returned.items():
        inside = [one for one in found.listed() if one.phase == "forward" and one.place == name]
        assert inside[-1].writes[0] == dtype, (name, dtype, inside)
    assert {dtype for name, dtype in returned.items() if name.endswith("qkv")} == {"bf16"}
    assert {dtype for name, dtype in returned.items() if name.endswith(".feedforward_norm")} == {"fp32"}


def test_casts_are_seen_and_each_weight_is_cast_once(in_cpp: bool) -> None:
    given = recipe()
    found = audit(given, "bf16")
    down = {one.place: one for one in found.casts() if one.phase == "forward" and one.writes == ("bf16",)}
    assert {one.name for one in down.values()} == {"_to_copy"} and {one.reads for one in down.values()} == {
        ("fp32",)
    }
    for name, module in Transformer(given.model).named_modules():
        if isinstance(module, Linear):
            # Attention's output and the activation come in bf16; what comes from a norm is cast, too.
            given_fp32 = not name.endswith(("output", "down"))
            cast = down[LOSS if name == "head" else name]
            inputs = given_fp32 * found.tokens * module.d_in
            # The head's gradient with respect to the logits is the third cast there, unless a kernel writes it as it shall be.
            third = name == "head" and not in_cpp
            assert cast.numbers == module.weight.numel() + inputs + third * found.tokens * module.d_out, name
            assert cast.times == 1 + given_fp32 + third, name
    up = {one.place: one for one in found.casts() if one.phase == "backward" and one.writes == ("fp32",)}
    for layer in (0, 1):  # gradients of weights, and of what was cast on the way in
        assert up[f"blocks.{layer}.attention.qkv"].times == 2 and up[f"blocks.{layer}.attention.output"].times == 1
    assert all(one.reads == ("bf16",) for one in up.values())


def test_without_autocast_there_is_nothing_but_fp32() -> None:
    found = audit(recipe(), "fp32")
    assert {dtype for one in found.listed() for dtype in (*one.reads, *one.writes)} <= {"fp32", "int64", "bool"}
    assert not found.casts()


def test_a_gradient_is_booked_where_its_forward_was() -> None:
    found = audit(recipe(layers=3), "bf16")
    products = {one.place: one.times for one in select(found, "backward", "mm")}
    parts = ("attention.qkv", "attention.output", "feedforward.gate_up", "feedforward.down")
    assert products == {f"blocks.{layer}.{part}": 2 for layer in range(3) for part in parts}
    (embedding,) = select(found, "backward", "embedding_dense_backward")
    assert (embedding.place, embedding.times) == ("embedding", 1)
    rotations = {one.place for one in select(found, "backward", "neg")}
    assert rotations == {"blocks.0.attention.position"}  # which the layers share
    assert {one.place for one in select(found, "forward", "add")} >= {"blocks.0", "blocks.1", "blocks.2"}


def test_the_reference_kernels_take_attention_apart() -> None:
    given = recipe(kernels="reference", optim={"implementation": "reference"}, train={"loss_kernel": "reference"})
    found = audit(given, "bf16")
    scores = [one for one in select(found, "forward", "exp") if "attention" in one.place]
    assert [(one.place, one.reads, one.writes) for one in scores] == [
        (f"blocks.{layer}.attention", ("fp32",), ("fp32",)) for layer in (0, 1)
    ]
    assert all(one.writes == ("bf16",) for one in select(found, "forward", "bmm"))
    assert {one.name for one in found.operations if one.phase == "optimizer"} >= {"sqrt", "div", "sub_"}


@pytest.mark.parametrize(
    "model",
    [
        {"attention": "mla", "tied_embeddings": True},
        {"attention": "gated_delta mha", "layers": 2},
        {"moe": {"experts": 4, "top_k": 2, "bias_update": 0.01}, "mtp_depth": 1},
        {"mask": "prefix_lm", "prefix_length": 4, "norm_placement": "post", "residual_dropout": 0.1},
        {"mask": "sliding_window causal", "window": 4, "attention_sinks": True, "embedding_scale": "sqrt_d_model"},
    ],
    ids=lambda model: " ".join(map(str, model.values())),
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_other_architectures(model: dict[str, Any], optimizer: str) -> None:
    given = recipe(
        optim={"optimizer": optimizer}, train={"document_boundaries": model.get("mtp_depth") == 1}, **model
    )
    found = audit(given, "bf16", length=12)
    assert math.isfinite(found.loss) and found.tokens == 24
    built = Transformer(given.model)
    known = {name for name, _ in built.named_modules()} - {""}
    known |= {OUTSIDE, LOSS, "all gradients", "routers", "adamw", "muon", "sgd"}
    assert {one.place for one in found.operations} <= known
    assert all(one.reads and one.times > 0 for one in found.listed())
    held = {(one.what, one.dtype): one.numbers for one in found.held}
    assert held["weights", "fp32"] == held["gradients", "fp32"] == built.num_params()
    moments = sum(
        n
        for (what, _), n in held.items()
        if what in ("adamw: exp_avg", "muon: momentum_buffer", "sgd: momentum_buffer")
    )
    assert moments == built.num_params()
    if given.model.moe.experts:
        routed = [
            one for one in found.listed() if "router" in one.place and one.phase == "forward" and not one.is_cast
        ]
        assert {one.name for one in found.listed() if one.place == "routers"} >= {"sign", "add_"}
        assert routed and all(one.writes[0] == "fp32" for one in routed)


def test_what_is_held_is_counted_by_kind_and_dtype() -> None:
    model = nn.Module()
    model.wide, model.narrow = (
        nn.Parameter(torch.ones(3, 2, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16)
    )
    model.register_buffer("table", torch.ones(5, dtype=torch.int16))
    optimizers = build_optimizers(model, OptimConfig(optimizer="sgd"))
    model.narrow.grad = torch.ones_like(model.narrow)
    optimizers.step()
    assert [tuple(vars(one).values()) for one in autocast_audit._held(model, optimizers)] == [
        ("weights", "fp64", 1, 6, 48),
        ("weights", "bf16", 1, 6, 12),
        ("gradients", "bf16", 1, 6, 12),
        ("sgd: momentum_buffer", "bf16", 1, 6, 12),
        ("buffers", "int16", 1, 5, 10),
    ]


def test_a_large_model_is_cut_to_its_pattern_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    patterned = {
        "layers": 12,
        "mask": "sliding_window sliding_window causal",
        "window": 4,
        "moe": {"experts": 2, "top_k": 1, "every": 2, "first_dense": 1},
    }
    whole = audit(recipe(**patterned), "bf16")
    assert (whole.layers, whole.of_layers) == (12, 12)
    monkeypatch.setattr(autocast_audit, "LARGE", 1000)
    cut = audit(recipe(**patterned), "bf16")
    assert (cut.layers, cut.of_layers) == (7, 12)  # the dense one, and lcm(3, 2)

    def seen(found: Audit) -> set[Any]:
        return {
            (one.phase, one.name, one.reads, one.writes, everywhere(one.place))
            for one in found.operations
            if one.phase in ("forward", "backward")
        }

    assert seen(cut) == seen(whole)


def test_what_cannot_be_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^length = 17 is not between 1 and model.context_length = 16$"):
        audit(recipe(), length=17)
    monkeypatch.setattr(autocast_audit, "_memory", lambda: 1e5)
    with pytest.raises(UserError, match=r"needs about 0 GB, this machine has 0; audit a narrower model"):
        audit(recipe())


def test_the_vocabulary_of_a_recipe_without_one_is_the_tokenizers() -> None:
    given = recipe(vocab_size=0)
    found = audit(given, "fp32", length=4)
    weights = next(one for one in found.held if one.what == "weights")
    assert weights.numbers == Transformer(given.model.model_copy(update={"vocab_size": 4096})).num_params()


def test_nothing_is_left_watching() -> None:
    before, drawn = torch._C._len_torch_dispatch_stack(), torch.get_rng_state()
    with pytest.raises(UserError):
        audit(recipe(), length=99)
    audit(recipe(), length=4)
    assert torch._C._len_torch_dispatch_stack() == before == 0
    assert not torch.is_autocast_enabled("cpu") and torch.equal(torch.get_rng_state(), drawn)


def test_places() -> None:
    assert everywhere("blocks.0.attention.qkv") == "blocks.*.attention.qkv"
    assert everywhere("blocks.10.experts.3") == "blocks.*.experts.*"
    assert everywhere("q8.norm2") == "q8.norm2"


def test_bf16_weights_are_audited_as_they_train() -> None:
    """Nothing is cast where it is used, and beside the masters lies the copy."""
    tiny = {"vocab_size": 64, "context_length": 16, "d_model": 16, "layers": 1, "heads": 2}
    found = {
        weights: audit(Recipe(model=tiny, train={"weights": weights}), length=16) for weights in ("fp32", "bf16")
    }
    held = {
        weights: {h.dtype: h.numbers for h in one.held if h.what == "weights"} for weights, one in found.items()
    }
    numbers = held["fp32"]["fp32"]
    assert held == {"fp32": {"fp32": numbers}, "bf16": {"fp32": numbers, "bf16": numbers}}
    assert found["fp32"].loss == pytest.approx(found["bf16"].loss, rel=0.02)
