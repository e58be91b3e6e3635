"""What must hold for every architectural choice: equal kernels, causality, documents, cache, parameters, FLOPs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_variants import SMALL, VARIANTS, build, random_ids, reference_of
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.errors import UserError
from scratchlm.generate.cache import KVCache
from scratchlm.kernels.cross_entropy import cross_entropy
from scratchlm.model import ModelConfig, Transformer, choices
from scratchlm.model.mask import attention_mask

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))


@every_variant
def test_fast_equals_reference(config: ModelConfig) -> None:
    fast, reference = build(config), build(reference_of(config))
    assert reference.config.kernels == "reference" and fast.config.kernels == "fast"
    ids = random_ids(config, 2, 24)
    logits = fast(ids), reference(ids)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    for out in logits:
        cross_entropy(out[:, :-1], ids[:, 1:]).mean().backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (fast, reference)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, f"{name} does not learn"
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5, msg=name)


@every_variant
def test_parameters_are_counted(config: ModelConfig) -> None:
    model = Transformer(config)
    assert model.num_params() == sum(p.numel() for p in model.parameters())


@every_variant
@pytest.mark.parametrize("length", [2, 7, 24])  # of one key and one query torch makes a product it does not count
def test_flops_are_counted(config: ModelConfig, length: int) -> None:
    """Exactly: each product of matrices m × k and k × n is 2mkn; attention has all length² scores, also the masked ones."""
    model = Transformer(reference_of(config))
    with FlopCounterMode(display=False) as counter:
        model(random_ids(config, 3, length))
    assert model.flops_per_token(length) * 3 * length == counter.get_total_flops()


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


@every_variant
def test_a_later_token_never_changes_an_earlier_logit(config: ModelConfig) -> None:
    model = build(config)
    ids = random_ids(config, 2, 24)
    with torch.no_grad():
        before = model(ids)
        for position in (1, 12, 23):
            changed = ids.clone()
            changed[:, position:] = (changed[:, position:] + 1) % config.vocab_size
            after = model(changed)
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(after[:, position], before[:, position])


CAUSAL = build(VARIANTS["gqa"])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.data())
def test_causality_at_any_position(length: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, length - 1))
    replacement = data.draw(st.integers(0, SMALL["vocab_size"] - 1))
    ids = random_ids(CAUSAL.config, length, seed=length)
    changed = ids.clone()
    changed[position] = replacement
    with torch.no_grad():
        before, after = CAUSAL(ids), CAUSAL(changed)
    torch.testing.assert_close(after[:position], before[:position], rtol=1e-5, atol=1e-5)
    if replacement != ids[position]:
        for later in range(position, length):  # … and every later one does see it
            assert not torch.equal(after[later], before[later])


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
        # Positions that go on across documents give the same: only distances within a document count.
        torch.testing.assert_close(model(ids, documents=documents), packed, rtol=1e-3, atol=1e-3)


@every_variant
def test_with_a_cache_piece_by_piece_as_at_once(config: ModelConfig) -> None:
    model = build(config)
    ids = random_ids(config, 2, 24)
    cache = KVCache(config, batch=2, max_length=24)
    with torch.no_grad():
        whole, pieces = model(ids), []
        for piece in ids.split([5, 1, 1, 7, 10], dim=1):
            pieces.append(model(piece, cache=cache))
            cache.advance(piece.shape[1])
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


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
    model, half = build(config), build(config).bfloat16()
    ids = random_ids(config, 2, 24)
    with torch.no_grad():
        exact, rounded = model(ids), half(ids)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


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
    schema = ModelConfig.model_json_schema()["properties"]
    for axis in choices.AXES:
        listed = schema[axis.axis].get("enum", [schema[axis.axis].get("const")])
        assert [name for name in listed if name != "auto"] == list(axis.names)
    enumerated = {name for name, field in schema.items() if "enum" in field or "const" in field}
    assert enumerated == {axis.axis for axis in choices.AXES} | {"kernels"}
    for axis in choices.AXES:
        for name in axis.names:
            assert callable(axis.get(name))
        with pytest.raises(UserError, match=rf"{axis.axis} = .*did you mean {axis.names[0]}\?"):
            axis.get(axis.names[0] + "x")


class Window:
    """Each position sees itself and the one before it."""

    is_plain_causal = False

    def __init__(self, config: ModelConfig) -> None:
        pass

    def allowed(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        back = queries[..., :, None] - keys[..., None, :]
        return (back >= 0) & (back < 2)


@pytest.mark.parametrize("kernels", ["fast", "reference"])
@pytest.mark.parametrize("kernel", ["auto", "reference", "sdpa", "blocked"])
def test_another_mask_than_the_causal_one_is_obeyed(
    monkeypatch: pytest.MonkeyPatch, kernels: str, kernel: str
) -> None:
    monkeypatch.setitem(choices.MASK.table, "window", f"{__name__}:Window")
    base = ModelConfig(**{**SMALL, "layers": 1, "kernels": kernels, "attention_kernel": kernel})
    config = base.model_copy(update={"mask": "window"})  # the names that a recipe may use were fixed at import
    model = build(config)
    ids = random_ids(config, 24)
    with torch.no_grad():
        before = model(ids)
        for changed_at in (0, 11, 23):
            changed = ids.clone()
            changed[changed_at] = (changed[changed_at] + 1) % config.vocab_size
            difference = (model(changed) - before).abs().amax(-1)
            differing = [position for position in range(24) if difference[position] > 1e-5]
            assert differing == [p for p in (changed_at, changed_at + 1) if p < 24]
        cache = KVCache(config, batch=1, max_length=24)  # with a cache, too
        pieces = []
        for piece in ids[None].split([5, 1, 18], dim=1):
            pieces.append(model(piece, cache=cache))
            cache.advance(piece.shape[1])
        torch.testing.assert_close(torch.cat(pieces, dim=1)[0], before, rtol=1e-4, atol=1e-4)


def test_the_causal_mask_needs_no_matrix() -> None:
    model = build(VARIANTS["gqa"])
    assert attention_mask(model.mask, 24) is None
    assert attention_mask(Window(model.config), 3).tolist() == [  # type: ignore[union-attr]
        [True, False, False],
        [True, True, False],
        [False, True, True],
    ]


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
