"""What must hold for every architectural choice: equal kernels, influence, documents, cache, parameters, FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_variants import LINEAR, SMALL, VARIANTS, build, changed, random_ids, reference_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.errors import UserError
from scratchlm.generate.cache import KVCache
from scratchlm.model import ModelConfig, Transformer, choices
from scratchlm.train.loss import NextTokenLoss

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))


@dataclass
class Batch:
    inputs: Tensor
    targets: Tensor
    positions: Tensor | None = None
    documents: Tensor | None = None


@every_variant
def test_fast_equals_reference(config: ModelConfig) -> None:
    """Logits, and the gradients of the whole objective: cross-entropy, routers' losses, further predictions."""
    fast, reference = build(config), build(reference_of(config))
    assert reference.config.kernels == "reference"
    ids = random_ids(config, 2, 25)
    torch.testing.assert_close(fast(ids[:, :-1]), reference(ids[:, :-1]), rtol=1e-5, atol=1e-5)
    gradients = []
    for model, kernel in ((fast, "chunked"), (reference, "reference")):
        objective = NextTokenLoss(model, kernel, z_loss=1e-3)(Batch(ids[:, :-1], ids[:, 1:]))
        (objective / 48).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, f"{name} does not learn"
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=2e-5, msg=name)


@every_variant
def test_parameters_are_counted(config: ModelConfig) -> None:
    model = Transformer(config)
    assert model.num_params() == sum(p.numel() for p in model.parameters())
    assert (model.num_active_params() < model.num_params()) == (
        config.moe.experts > 0 and config.moe.top_k < config.moe.experts
    )


@every_variant
@pytest.mark.parametrize("length", [2, 7, 24])  # of one key and one query torch makes a product it does not count
def test_flops_are_counted(config: ModelConfig, length: int) -> None:
    """Exactly: each product of matrices m × k and k × n is 2mkn; attention has all length² scores, also the masked ones."""
    model = Transformer(reference_of(config))
    with FlopCounterMode(display=False) as counter:
        model(random_ids(config, 3, length))
    assert model.flops_per_token(length) * 3 * length == pytest.approx(counter.get_total_flops(), abs=0.5)


def test_attention_flops_have_no_causal_discount_though_the_blocked_kernel_takes_one() -> None:
    config = ModelConfig(
        vocab_size=8, context_length=512, d_model=16, layers=1, heads=2, attention_kernel="blocked"
    )
    model = Transformer(config)
    full = 4 * 512 * 16  # q kᵀ and weights v: 2 · 2 · keys · heads · head_dim, per token
    assert model.flops_per_token(512) - model.flops_per_token(0) == full
    with FlopCounterMode(display=False) as counter:
        model(random_ids(config, 512))
    blocks = 512 / 128
    expected = model.flops_per_token(0) + full * (blocks + 1) / (2 * blocks)
    assert counter.get_total_flops() == expected * 512


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "sliding_window", "window": 100},
        {"mask": "fixed", "stride": 64, "stride_summary": 2},
        {"mask": "block_sparse", "mask_block": 32, "global_tokens": 5},
        {"mask": "strided", "stride": 64},
        {"mask": "sliding_window causal", "window": 10, "layers": 2},
    ],
    ids=lambda changes: changes["mask"],
)
def test_sparse_masks_save_the_flops_they_say(changes: dict[str, object]) -> None:
    """What the model says it costs is what the fast path multiplies: less than the whole square."""
    length = 1000
    config = ModelConfig(
        **{"vocab_size": 8, "context_length": length, "d_model": 16, "layers": 1, "heads": 2, **changes},
        attention_kernel="blocked",
    )
    model = Transformer(config)
    with FlopCounterMode(display=False) as counter:
        model(random_ids(config, length))
    saved = model.flops_per_token(length)
    whole = Transformer(changed(config, attention_kernel="reference")).flops_per_token(length)
    causal_blocks = sum(
        4 * 32 * min(start + 128, length) * min(128, length - start) for start in range(0, length, 128)
    )
    expected = saved * length
    if "causal" in config.mask:  # says all of the square, by convention; computes the triangle's blocks
        expected += causal_blocks / 2 - 4 * 16 * length * length
    assert expected == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert saved < 0.75 * whole


def reachable(config: ModelConfig, length: int) -> Tensor:
    """True where a token may influence a logit: through some layers, each along its mask's pairs, listed by hand."""

    def reads(layer: int, q: int, k: int) -> bool:
        mask = "causal" if config.attention_at(layer) in LINEAR else config.mask_at(layer)
        block, stride = config.mask_block, config.stride
        listed = {
            "causal": True,
            "sliding_window": q - k < config.window,
            "strided": q - k < stride or (q - k) % stride == 0,
            "fixed": q // stride == k // stride or k % stride in range(stride - config.stride_summary, stride),
            "block_sparse": q // block - k // block < config.mask_local_blocks or k < config.global_tokens,
            "prefix_lm": True,
        }[mask]
        early = mask == "prefix_lm" and max(q, k) < config.prefix_length
        return (q >= k and listed) or early

    reach = torch.eye(length, dtype=torch.bool)
    for layer in range(config.layers):
        pairs = torch.tensor([[reads(layer, q, k) or q == k for k in range(length)] for q in range(length)])
        reach = (pairs.double() @ reach.double()) > 0
    return reach


@every_variant
def test_exactly_the_allowed_positions_influence_a_logit(config: ModelConfig) -> None:
    model = build(config).double()
    ids = random_ids(config, 24)
    swapped = ids.repeat(24, 1)
    swapped.diagonal().add_(1).remainder_(config.vocab_size)  # row i has another token at position i
    with torch.no_grad():
        differences = (model(swapped) - model(ids)).abs().amax(dim=-1)  # (changed, logit)
    influence = differences.T > 1e-13
    expected = reachable(config, 24)
    assert torch.equal(influence & expected, influence), "a logit changed with a token it must not see"
    missing = expected & ~influence
    # A ReLU feature may be silent, and a router may send a changed token the same way: nearly all must be there.
    assert missing.sum() <= 0.02 * expected.sum(), "tokens that may be read are not"


CAUSAL = build(VARIANTS["gqa"])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.data())
def test_causality_at_any_position(length: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, length - 1))
    replacement = data.draw(st.integers(0, SMALL["vocab_size"] - 1))
    ids = random_ids(CAUSAL.config, length, seed=length)
    swapped = ids.clone()
    swapped[position] = replacement
    with torch.no_grad():
        before, after = CAUSAL(ids), CAUSAL(swapped)
    torch.testing.assert_close(after[:position], before[:position], rtol=1e-5, atol=1e-5)
    if replacement != ids[position]:
        for later in range(position, length):  # … and every later one does see it
            assert not torch.equal(after[later], before[later])


def by_distance(config: ModelConfig) -> bool:
    """Whether only distances matter, so that positions need not begin anew in each document."""
    if {"sinusoidal", "learned"} & set(config.position):
        return False
    if "rope" in config.position and {"linear", "gla"} & set(config.attention):
        return False  # a feature map or a decay per channel does not turn with the rotation
    return all(choices.MASK.get(name).shift_invariant for name in config.mask)


@every_variant
def test_packed_documents_are_as_if_alone(config: ModelConfig) -> None:
    model = build(config)
    ids = random_ids(config, 2, 24)
    lengths = [[1, 9, 14], [24]]
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    positions = torch.stack([torch.cat([torch.arange(part) for part in n]) for n in lengths])
    with torch.no_grad():
        packed = model(ids, positions=positions, documents=documents)
        assert not torch.allclose(packed[0], model(ids)[0]) or config.layers == 0
        for row, parts in enumerate(lengths):
            alone = torch.cat([model(part) for part in ids[row].split(parts)])
            torch.testing.assert_close(packed[row], alone, rtol=1e-4, atol=1e-4)
        if by_distance(config):
            torch.testing.assert_close(model(ids, documents=documents), packed, rtol=1e-3, atol=1e-3)


@every_variant
def test_with_a_cache_piece_by_piece_as_at_once(config: ModelConfig) -> None:
    model = build(config)
    ids = random_ids(config, 2, 24)
    cache = KVCache(config, batch=2, max_length=24)
    with torch.no_grad():
        whole, pieces = model(ids, prefix=5), []
        for piece in ids.split([5, 1, 1, 7, 10], dim=1):  # the first piece is the prompt, and so the prefix
            pieces.append(model(piece, cache=cache))
            cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
    windowed = [
        config.attention_at(n) not in LINEAR and config.mask_at(n) == "sliding_window" for n in range(config.layers)
    ]
    held = [sum(t.numel() // 2 for t in layer.values()) for layer in cache._slots]
    assert KVCache.bytes_per_token(config) == 4 * sum(n // 24 for n, w in zip(held, windowed, strict=True) if not w)
    states = sum(t.numel() // 2 for layer in cache._states for t in layer.values())
    assert KVCache.state_bytes(config) == 4 * (states + sum(n for n, w in zip(held, windowed, strict=True) if w))


@every_variant
def test_rows_of_different_length_side_by_side(config: ModelConfig) -> None:
    """Left padding in the cache changes nothing for the row that has it."""
    model = build(config)
    prompts = [random_ids(config, 9), random_ids(config, 4, seed=1)]
    longer = [torch.cat([prompt, random_ids(config, 3, seed=2)]) for prompt in prompts]
    padding = torch.tensor([0, 5])
    cache = KVCache(config, batch=2, max_length=12, padding=padding)
    first = torch.stack([prompts[0], torch.cat([torch.zeros(5, dtype=torch.int64), prompts[1]])])
    places = (torch.arange(9) - padding[:, None]).clamp(min=0)
    with torch.no_grad():
        last = [model(first, positions=places, cache=cache)[:, -1]]
        cache.advance(9)
        for step in range(3):
            ids = torch.stack([row[len(prompt) + step] for row, prompt in zip(longer, prompts, strict=True)])
            last.append(model(ids[:, None], positions=9 + step - padding[:, None], cache=cache)[:, -1])
            cache.advance(1)
        for row, prompt in enumerate(prompts):
            alone = model(longer[row], prefix=len(prompt))[len(prompt) - 1 :]
            together = torch.stack([logits[row] for logits in last])
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@every_variant
def test_any_leading_dimensions(config: ModelConfig) -> None:
    model = build(config)
    ids = random_ids(config, 2, 3, 2, 7)
    with torch.no_grad():
        logits = model(ids)
        assert logits.shape == (2, 3, 2, 7, config.vocab_size)
        torch.testing.assert_close(logits[1, 2, 0], model(ids[1, 2, 0]), rtol=1e-4, atol=1e-4)
        packed = model(ids, documents=torch.zeros_like(ids))
        torch.testing.assert_close(packed, logits, rtol=1e-4, atol=1e-4)
        for empty in ((0,), (2, 0), (0, 5)):
            assert model(random_ids(config, *empty)).shape == (*empty, config.vocab_size)


@every_variant
def test_a_bfloat16_model_stays_near_the_float32_one(config: ModelConfig) -> None:
    if config.moe.experts:
        pytest.skip("a rounded score sends tokens to other experts: see tests/model/test_moe.py")
    model, half = build(config), build(config).bfloat16()
    ids = random_ids(config, 2, 24)
    with torch.no_grad():
        exact, rounded = model(ids), half(ids)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


@every_variant
def test_the_state_dict_goes_round(config: ModelConfig) -> None:
    model, other = build(config), build(config, seed=5)
    ids = random_ids(config, 2, 24)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(ids), other(ids))


def test_too_long_a_sequence_is_refused() -> None:
    config = ModelConfig(**SMALL)
    model = Transformer(config)
    with pytest.raises(UserError, match=r"25 tokens .* context of 24.*model\.context_length"):
        model(random_ids(config, 2, 25))
    cache = KVCache(config, batch=1, max_length=30)
    with torch.no_grad():
        model(random_ids(config, 1, 20), cache=cache)
        cache.advance(20)
        with pytest.raises(UserError, match="25 tokens"):
            model(random_ids(config, 1, 5), cache=cache)


def test_every_axis_is_a_field_and_every_named_field_an_axis() -> None:
    schema = ModelConfig.model_json_schema()
    listed: dict[str, list[str]] = {}

    def walk(properties: dict[str, dict[str, object]], prefix: str) -> None:
        for name, field in properties.items():
            if "$ref" in field:
                walk(schema["$defs"][str(field["$ref"]).rsplit("/", 1)[-1]]["properties"], f"{prefix}{name}.")
            for place in (field, field.get("items", {}), *field.get("anyOf", [])):  # type: ignore[misc]
                if "enum" in place:  # type: ignore[operator]
                    listed[prefix + name] = place["enum"]  # type: ignore[index]

    walk(schema["properties"], "")
    for axis in choices.AXES:
        assert [name for name in listed.pop(axis.axis) if name != "auto"] == list(axis.names)
        for name in axis.names:
            assert axis.get(name) is not None
        with pytest.raises(UserError, match=rf"{axis.axis} = .*did you mean {axis.names[0]}\?"):
            axis.get(axis.names[0] + "x")
    assert set(listed) == {"kernels", "qk_norm_kind", "attention_bias", "linear.form", "moe.balance_over"}


def test_documents_behind_a_filled_cache_are_refused() -> None:
    config = VARIANTS["gqa"]
    model, ids = build(config), random_ids(config, 1, 8)
    documents = torch.zeros_like(ids)
    cache = KVCache(config, batch=1, max_length=8)
    with torch.no_grad():
        first = model(ids[:, :4], documents=documents[:, :4], cache=cache)  # nothing in it yet: fine
        torch.testing.assert_close(first, model(ids)[:, :4], rtol=1e-4, atol=1e-4)
        cache.advance(4)
        with pytest.raises(UserError, match="documents cannot be told apart behind a cache"):
            model(ids[:, 4:], documents=documents[:, 4:], cache=cache)


@every_variant
def test_under_autocast_nothing_overflows_and_little_changes(config: ModelConfig) -> None:
    """As training in bf16 computes: the objective, its gradients, and generation piece by piece."""
    model, ids = build(config), random_ids(config, 2, 25)
    batch = Batch(ids[:, :-1], ids[:, 1:])
    exact = NextTokenLoss(model)(batch).item()
    with torch.autocast("cpu", torch.bfloat16):
        objective = NextTokenLoss(model)(batch)
    objective.backward()
    # A rounded score may send a token to another expert.
    assert objective.item() == pytest.approx(exact, rel=0.1 if config.moe.experts else 0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    cache = KVCache(config, batch=2, max_length=24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for piece in ids[:, :24].split([5, 1, 7, 11], dim=1):
            assert model(piece, cache=cache).isfinite().all()
            cache.advance(piece.shape[1])
