"""Multi-head latent attention: the paper's equations, DeepSeek's own layer, its two forms, its cache."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scratchlm.generate.cache import KVCache
from scratchlm.kernels.visibility import Visibility
from scratchlm.model import ModelConfig, Transformer, choices
from scratchlm.model.context import Context
from scratchlm.model.latent_attention import LatentAttention
from scratchlm.model.linear import Linear
from scratchlm.model.mask import visibility
from scratchlm.model.norm import LayerNorm
from scratchlm.model.position import Positions, alibi_slopes
from scratchlm.optim.muon import split_sizes

WIDTHS: dict[str, Any] = {
    "vocab_size": 23,
    "context_length": 32,
    "d_model": 20,
    "layers": 2,
    "heads": 4,
    "head_dim": 6,
}
LATENT: dict[str, Any] = {"q_rank": 9, "kv_rank": 7, "rope_dim": 4, "value_dim": 5}

VARIANTS: dict[str, dict[str, Any]] = {
    "q_rank": {},
    "no q_rank": {"latent": {"q_rank": None}},
    "value_dim of head_dim": {"latent": {"value_dim": None}},
    "all biases": {"attention_bias": "q k v o"},
    "q and v biases, no q_rank": {"attention_bias": "q v", "latent": {"q_rank": None}},
    "sinks": {"attention_sinks": True},
    "sinks and biases": {"attention_sinks": True, "attention_bias": "q k v o"},
    "sinks and key bias": {"attention_sinks": True, "attention_bias": "k"},
    "sinks and value bias": {"attention_sinks": True, "attention_bias": "v"},
    "soft cap": {"attention_soft_cap": 0.7},
    "soft cap and key bias": {"attention_soft_cap": 0.7, "attention_bias": "k v"},
    "scale": {"attention_scale": 0.6},
    "alibi": {"position": "alibi"},
    "alibi, sinks, all biases": {"position": "alibi", "attention_sinks": True, "attention_bias": "q k v o"},
    "window": {"mask": "sliding_window", "window": 5},
    "window, sinks": {"mask": "sliding_window", "window": 5, "attention_sinks": True},
    "fixed": {"mask": "fixed", "stride": 4},
    "no position": {"position": "none"},
    "sinusoidal, no rotated part": {"position": "sinusoidal", "latent": {"rope_dim": 0}},
    "odd rope_dim": {"position": "none", "latent": {"rope_dim": 3}},
    "interleaved": {"rope": {"pairs": "interleaved", "theta": 50.0}},
    "yarn": {"rope": {"scaling": "yarn", "factor": 4.0}},
    "layernorm": {"norm": "layernorm"},
    "no norm": {"norm": "none"},
    "rank above the heads' widths": {"latent": {"kv_rank": 40}},
    "rank below": {"latent": {"kv_rank": 2}},
    "sdpa": {"attention_kernel": "sdpa"},
    "blocked": {"attention_kernel": "blocked"},
    "beside mha": {"attention": "mla mha"},
}  # fmt: skip
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=list(VARIANTS))


def config_of(changes: dict[str, Any], **more: Any) -> ModelConfig:
    changes = {**changes, **more}
    latent = {**LATENT, **changes.get("latent", {})}
    return ModelConfig(**{**WIDTHS, "attention": "mla", **changes, "latent": latent})


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(WIDTHS["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def redrawn(module: torch.nn.Module, seed: int = 0) -> None:
    """No parameter at a value that would hide it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.8 * noise + 0.4 if parameter.ndim == 1 else 1.5 * noise / parameter.shape[1] ** 0.5)


def layer_of(config: ModelConfig) -> LatentAttention:
    layer = LatentAttention(config, 0, Positions(config))
    redrawn(layer)
    return layer.double().eval().requires_grad_(False)


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    redrawn(model)
    return model.double().eval()


def visible_of(config: ModelConfig, length: int, past: int = 0) -> Visibility | None:
    rule = choices.MASK.get(config.mask_at(0)).of(config)
    return visibility(rule, length, past=past, distances="alibi" in config.position)


def rms_normed(x: np.ndarray, norm: torch.nn.Module, eps: float) -> np.ndarray:
    gain = norm.weight.detach().numpy()  # type: ignore[operator]
    return np.array([v * g for v, g in zip(x / math.sqrt((x * x).mean() + eps), gain, strict=True)])


def turned(x: np.ndarray, position: int, config: ModelConfig) -> np.ndarray:
    """RoPE of one vector: pair i is a complex number times exp(i · position · θ^(−2i/d))."""
    if config.position != ("rope",):
        return x
    half, theta = len(x) // 2, config.rope.theta[0]
    out = np.empty_like(x)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if config.rope.pairs == "interleaved" else (i, i + half)
        value = complex(x[a], x[b]) * np.exp(1j * position * theta ** (-2 * i / len(x)))
        out[a], out[b] = value.real, value.imag
    return out


def by_the_equations(layer: LatentAttention, config: ModelConfig, h: np.ndarray) -> np.ndarray:
    """Eq. 9 to 19 of DeepSeek-V2 over one sequence (length, d_model), with the project's extras where they belong."""
    heads, d, d_v = config.heads, config.resolved_head_dim, config.resolved_value_dim
    rank, d_rope = config.latent.kv_rank, config.latent.rope_dim

    def of(name: str) -> tuple[np.ndarray, np.ndarray]:
        linear = getattr(layer, name)
        weight, bias = linear.weight.detach().numpy(), linear.full_bias()
        return weight, np.zeros(len(weight)) if bias is None else bias.detach().numpy()

    (down, down_b), (up, up_b), (out, out_b) = of("down"), of("kv_up"), of("output")
    reads = len(down) - rank - d_rope
    keys: list[list[np.ndarray]] = []
    values: list[list[np.ndarray]] = []
    result = []
    for t in range(len(h)):
        c_kv = rms_normed(down[reads : reads + rank] @ h[t], layer.kv_norm, config.norm_eps)  # 9
        k_c, v_c = (up @ c_kv + up_b)[: heads * d], (up @ c_kv + up_b)[heads * d :]  # 10, 11
        read = down[:reads] @ h[t] + down_b[:reads]
        if layer.q_up is not None:
            q_up, q_up_b = of("q_up")
            assert layer.q_norm is not None
            read = q_up @ rms_normed(read, layer.q_norm, config.norm_eps) + q_up_b  # 12, 13
        k_r = turned(down[reads + rank :] @ h[t], t, config)  # 15
        keys.append([np.concatenate([k_c[i * d : (i + 1) * d], k_r]) for i in range(heads)])  # 17
        values.append([v_c[i * d_v : (i + 1) * d_v] for i in range(heads)])
        mixed = []
        for i in range(heads):
            q_r = turned(read[heads * d + i * d_rope : heads * d + (i + 1) * d_rope], t, config)  # 14
            q = np.concatenate([read[i * d : (i + 1) * d], q_r])  # 16
            weights = []
            for j in range(t + 1):  # 18
                score = float(q @ keys[j][i]) * (config.attention_scale or 1 / math.sqrt(d + d_rope))
                if config.attention_soft_cap is not None:
                    score = config.attention_soft_cap * math.tanh(score / config.attention_soft_cap)
                if config.position == ("alibi",):
                    score -= float(alibi_slopes(heads)[i]) * (t - j)
                in_window = config.mask != ("sliding_window",) or t - j < config.window
                weights.append(math.exp(score) if in_window else 0.0)
            total = sum(weights) + (0.0 if layer.sinks is None else math.exp(layer.sinks[i].item()))
            mixed.append(sum(w / total * values[j][i] for j, w in enumerate(weights)))
        result.append(out @ np.concatenate(mixed) + out_b)  # 19
    return np.array(result)


EQUATIONS = [name for name in VARIANTS if name not in ("fixed", "yarn", "layernorm", "beside mha")]


@pytest.mark.parametrize("kernels", ["fast", "reference"])
@pytest.mark.parametrize("name", EQUATIONS)
def test_the_layer_is_the_papers_equations(name: str, kernels: str) -> None:
    config = config_of(VARIANTS[name], kernels=kernels)
    layer = layer_of(config)
    x = drawn(2, 11, 20)
    ours = layer(x, Context(visible={config.mask_at(0): visible_of(config, 11)})).detach().numpy()
    for row in range(2):
        np.testing.assert_allclose(ours[row], by_the_equations(layer, config, x[row].numpy()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "yarn"])
@pytest.mark.parametrize("pairs", ["interleaved", "half"])
@pytest.mark.parametrize("q_rank", [9, None])
def test_equals_transformers_deepseek(q_rank: int | None, pairs: str, scaled: bool) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 300.0}
    ours: dict[str, Any] = {"pairs": pairs, "theta": 300.0}
    scale = None
    if (
        scaled
    ):  # DeepSeek's YaRN scales all of the scores, not the rotated part: attention_scale, not attention_factor
        shape = {"factor": 8.0, "original_max_position_embeddings": 4}
        rope |= {"rope_type": "yarn", **shape, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 4, "beta_slow": 1}
        ours |= {"scaling": "yarn", "factor": 8.0, "original_context": 4, "beta_fast": 4.0, "attention_factor": 1.0}
        scale = (0.1 * math.log(8.0) + 1) ** 2 / math.sqrt(6 + 4)
    theirs_config = DeepseekV3Config(
        hidden_size=20, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_rank, kv_lora_rank=7,
        qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, rope_interleave=pairs == "interleaved",
        max_position_embeddings=32, rope_parameters=rope, attention_bias=False,
    )  # fmt: skip
    theirs_config._attn_implementation = "eager"
    theirs: Any = DeepseekV3Attention(theirs_config, 0)
    redrawn(theirs, seed=3)
    theirs = theirs.double().eval()
    latent = {"q_rank": q_rank, "norm_eps": 1e-6}  # theirs has that ε here, whatever the configuration's
    config = config_of({"rope": ours, "attention_scale": scale, "norm_eps": 0.3, "latent": latent})
    layer = layer_of(config)

    def parted(weight: Tensor, first: int) -> Tensor:
        """Theirs has both parts of a head beside each other, ours the first parts of all heads, then the second."""
        per_head = weight.unflatten(0, (4, -1))
        return torch.cat([per_head[:, :first].flatten(0, 1), per_head[:, first:].flatten(0, 1)])

    with torch.no_grad():
        reads = parted(theirs.q_proj.weight, 6) if q_rank is None else theirs.q_a_proj.weight
        layer.down.weight.copy_(torch.cat([reads, theirs.kv_a_proj_with_mqa.weight]))
        if layer.q_up is not None and layer.q_norm is not None:
            layer.q_up.weight.copy_(parted(theirs.q_b_proj.weight, 6))
            layer.q_norm.weight.copy_(theirs.q_a_layernorm.weight)
        layer.kv_norm.weight.copy_(theirs.kv_a_layernorm.weight)
        layer.kv_up.weight.copy_(parted(theirs.kv_b_proj.weight, 6))
        layer.output.weight.copy_(theirs.o_proj.weight)
        x = drawn(2, 30, 20)
        angles = DeepseekV3RotaryEmbedding(theirs_config)(x, torch.arange(30)[None])
        hidden = torch.full((30, 30), float("-inf"), dtype=torch.float64).triu(1)
        expected = theirs(x, angles, hidden[None, None])[0]
        # Their RMSNorm and softmax compute in float32 whatever comes in, as do their angles.
        torch.testing.assert_close(layer(x, Context()), expected, rtol=1e-4, atol=1e-4)
        if scaled:
            plain = layer_of(config_of({"latent": latent, "rope": ours}))
            plain.load_state_dict(layer.state_dict())
            assert not torch.allclose(plain(x, Context()), expected, rtol=1e-2, atol=1e-2)


def both_forms(
    layer: LatentAttention, config: ModelConfig, new: int, total: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """What the forms make of the same random queries and cache, (2, heads, new, value_dim)."""
    rank, rope_dim = config.latent.kv_rank, config.latent.rope_dim
    inputs = (
        drawn(2, 4, new, 6, seed=seed),
        drawn(2, 4, new, rope_dim, seed=seed + 1),
        drawn(2, total, rank, seed=seed + 2),
        drawn(2, total, rope_dim, seed=seed + 3),
        visible_of(config, new, total - new),
        layer.scores(layer.position.slopes),
    )
    return layer.absorbed(*inputs), layer.materialised(*inputs)


@every_variant
@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_absorbed_equals_materialised_wherever_it_may_be_taken(changes: dict[str, Any], kernels: str) -> None:
    config = config_of(changes, kernels=kernels)
    layer = layer_of(config)
    if not layer.absorbs(1, 1000):
        assert "attention_bias" in changes
        absorbed, materialised = both_forms(layer, config, 1, 9)
        assert (absorbed - materialised).abs().max() > 1e-3, "this bias could have been absorbed"
        return
    for new, total in ((1, 9), (3, 9), (9, 9), (1, 1)):
        absorbed, materialised = both_forms(layer, config, new, total)
        torch.testing.assert_close(absorbed, materialised, rtol=0, atol=1e-10)
        assert materialised.shape == (2, 4, new, config.resolved_value_dim)


@settings(max_examples=30, deadline=None)
@given(*(st.integers(low, high) for low, high in ((1, 6), (0, 12), (1, 12), (0, 4), (1, 9), (0, 99))))
def test_absorbed_equals_materialised_at_any_widths(
    new: int, past: int, rank: int, half_rope: int, value_dim: int, seed: int
) -> None:
    latent = {"kv_rank": rank, "rope_dim": 2 * half_rope, "value_dim": value_dim}
    config = config_of({"latent": latent, "attention_bias": "q k v", "position": "none"})
    forms = both_forms(layer_of(config), config, new, new + past, seed)
    torch.testing.assert_close(*forms, rtol=0, atol=1e-10)


def test_dropout_with_a_value_bias_is_materialised_in_training_alone() -> None:
    for bias, absorbed_in_training in (("v", False), ("k", True)):
        layer = layer_of(config_of({"attention_dropout": 0.5, "attention_bias": bias}))
        assert layer.absorbs(1, 1000)
        assert layer.train().absorbs(1, 1000) == absorbed_in_training


@pytest.mark.parametrize("widths", [(6, 5, 7, 4), (6, 5, 40, 4), (6, 5, 2, 4), (2, 2, 3, 0), (16, 16, 8, 2)])
def test_the_form_that_multiplies_less_is_taken(widths: tuple[int, int, int, int]) -> None:
    head_dim, value_dim, rank, rope_dim = widths
    latent = {"kv_rank": rank, "rope_dim": rope_dim, "value_dim": value_dim}
    changes = {"head_dim": head_dim, "latent": latent, "kernels": "reference", "position": "none"}
    layer = layer_of(config_of(changes, context_length=400))
    taken = set()
    for new, total in itertools.product(
        (2, 3, 5, 20, 60), (3, 20, 60, 300)
    ):  # of 1 × 1 torch makes an uncounted product
        if new > total:
            continue
        counts = []
        for form in (layer.absorbed, layer.materialised):
            queries = drawn(4, new, head_dim), drawn(4, new, rope_dim)
            with FlopCounterMode(display=False) as counter:
                form(*queries, drawn(total, rank), drawn(total, rope_dim), None, layer.scores(None))
            counts.append(counter.get_total_flops())
        assert layer.absorbs(new, total) == (counts[0] < counts[1]), (new, total)
        taken.add(layer.absorbs(new, total))
    narrow_vectors = 2 * (rank + rope_dim) <= head_dim + rope_dim + value_dim
    assert taken == ({True} if narrow_vectors else {False, True})


def test_where_deepseeks_widths_change_form() -> None:
    latent = {"kv_rank": 512, "rope_dim": 64, "value_dim": 128}
    layer = LatentAttention(config := config_of({"head_dim": 128, "latent": latent}), 0, Positions(config))
    for total in (2, 100, 100_000):
        assert layer.absorbs(1, total)
        assert not layer.absorbs(total, total)
    last = max(new for new in range(1, 1000) if layer.absorbs(new, 30_000))
    assert 145 < last < 160


def in_pieces(model: Transformer, ids: Tensor, sizes: list[int], cache: KVCache | None = None) -> Tensor:
    cache = cache or KVCache(model.config, len(ids), ids.shape[1])
    pieces = []
    with torch.no_grad():
        for piece in ids.split(sizes, dim=1):
            pieces.append(model(piece, cache=cache))
            cache.advance(piece.shape[1])
    return torch.cat(pieces, dim=1)


@every_variant
def test_piece_by_piece_as_at_once(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(config_of(changes))
    ids = random_ids(2, 30)
    with torch.no_grad():
        whole = model(ids)
    taken: list[str] = []
    for name in ("absorbed", "materialised"):
        original = getattr(LatentAttention, name)

        def spied(self: LatentAttention, *args: Any, name: str = name, original: Any = original) -> Tensor:
            taken.append(name)
            return original(self, *args)

        monkeypatch.setattr(LatentAttention, name, spied)
    for sizes in ([12, 1, 1, 1, 9, 6], [1] * 30, [30]):
        torch.testing.assert_close(in_pieces(model, ids, sizes), whole, rtol=0, atol=1e-10)
    layer = model.blocks[0].attention
    assert ("absorbed" in taken) == layer.absorbs(1, 1000)  # type: ignore[operator,union-attr]


@every_variant
def test_padding_on_the_left_changes_nothing(changes: dict[str, Any]) -> None:
    model = model_of(config_of(changes))
    lengths, longest, steps = [9, 4, 1], 9, 6
    prompts = [random_ids(length, seed=length) for length in lengths]
    following = random_ids(3, steps, seed=50)
    padding = torch.tensor([longest - length for length in lengths])
    cache = KVCache(model.config, 3, longest + steps, padding=padding)
    ids = torch.stack([torch.cat([torch.zeros(longest - len(p), dtype=torch.int64), p]) for p in prompts])
    positions = (torch.arange(longest) - padding[:, None]).clamp(min=0)
    with torch.no_grad():
        last = [model(ids, positions, cache=cache)[:, -1]]
        cache.advance(longest)
        for step in range(steps):
            places = torch.tensor([[length + step] for length in lengths])
            last.append(model(following[:, step : step + 1], places, cache=cache)[:, -1])
            cache.advance(1)
        together = torch.stack(last, dim=1)
        for row, prompt in enumerate(prompts):
            alone = model(torch.cat([prompt, following[row]])[None])[0, len(prompt) - 1 :]
            torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("latent", [{}, {"rope_dim": 2, "kv_rank": 11}], ids=str)
def test_the_cache_holds_the_latent_vector_and_the_shared_key_alone(latent: dict[str, Any]) -> None:
    config = config_of({"latent": latent})
    numbers = config.latent.kv_rank + config.latent.rope_dim
    assert KVCache.bytes_per_token(config, torch.float64) == 8 * 2 * numbers
    assert KVCache.state_bytes(config) == 0
    written: list[Tensor] = []

    class Counting(KVCache):
        def append(self, layer: int, new: Any, reach: int | None = None) -> dict[str, Tensor]:
            written.extend(new.values())
            return super().append(layer, new, reach)

    model = model_of(config)
    in_pieces(model, random_ids(3, 10), [7, 1, 2], Counting(config, 3, 10))
    assert sum(tensor.numel() for tensor in written) == 3 * 10 * 2 * numbers
    wide = ModelConfig(**{**WIDTHS, "attention": "mha"})
    assert KVCache.bytes_per_token(wide) == 4 * 2 * (2 * 4 * 6) > KVCache.bytes_per_token(config)


@every_variant
def test_parameters_are_counted(changes: dict[str, Any]) -> None:
    model = Transformer(config_of(changes))
    assert model.num_params() == sum(parameter.numel() for parameter in model.parameters())


def test_parameters_are_those_of_the_paper() -> None:
    layer = layer_of(config_of({}))
    matrices = 20 * 9 + 9 * 4 * (6 + 4) + 20 * (7 + 4) + 7 * 4 * (6 + 5) + 4 * 5 * 20
    assert layer.num_params() == matrices + 9 + 7  # and the two norms
    layer = layer_of(config_of({"latent": {"q_rank": None}}))
    assert layer.num_params() == 20 * 4 * (6 + 4) + 20 * (7 + 4) + 7 * 4 * (6 + 5) + 4 * 5 * 20 + 7
    assert layer.down.parts == [24, 16, 7, 4], "each projection is initialised, and orthogonalised, by itself"


@pytest.mark.parametrize("names", ["", "q", "k", "v", "o", "q k v o"])
@pytest.mark.parametrize("q_rank", [9, None])
def test_biases_are_where_they_were_asked_for(names: str, q_rank: int | None) -> None:
    layer = layer_of(config_of({"attention_bias": names, "latent": {"q_rank": q_rank}}))
    sizes = {
        "down.bias" if q_rank is None else "q_up.bias": ("q" in names) * 4 * (6 + 4),
        "kv_up.bias": ("k" in names) * 4 * 6 + ("v" in names) * 4 * 5,
        "output.bias": ("o" in names) * 20,
    }
    found = {name: p.numel() for name, p in layer.named_parameters() if name.endswith("bias")}
    assert found == {name: size for name, size in sizes.items() if size}
    assert layer.kv_up.biased == ["k" in names, "v" in names]


def test_pieces_follow_the_configuration() -> None:
    for kernels in ("fast", "reference"):
        layer = layer_of(config_of({"norm": "layernorm", "kernels": kernels}))
        assert type(layer.kv_norm) is type(layer.q_norm) is LayerNorm
        linears = [module for module in layer.modules() if isinstance(module, Linear)]
        assert [linear.residual_output for linear in linears] == [linear is layer.output for linear in linears]
        assert {linear.reference for linear in linears} == {kernels == "reference"}
        layer = layer_of(config_of({"norm_eps": 0.1, "kernels": kernels}))
        assert layer.kv_norm.eps == layer.q_norm.eps == 0.1
    for q_rank in (9, None):  # what holds several matrices says so to Muon, which takes no empty ones
        layer = layer_of(config_of({"position": "none", "latent": {"rope_dim": 0, "q_rank": q_rank}}))
        assert split_sizes(layer.down.weight) == [q_rank or 4 * 6, 7]
        assert split_sizes(layer.kv_up.weight) == [4 * 6, 4 * 5]


@every_variant
@pytest.mark.parametrize("length", [2, 7, 24])
def test_flops_are_counted(changes: dict[str, Any], length: int) -> None:
    config = config_of({**changes, "kernels": "reference", "attention_kernel": "auto"})
    model = Transformer(config)
    with FlopCounterMode(display=False) as counter:
        model(random_ids(3, length))
    assert model.flops_per_token(length) * 3 * length == counter.get_total_flops()


@every_variant
def test_fast_equals_reference_and_every_parameter_learns(changes: dict[str, Any]) -> None:
    fast = model_of(config_of(changes)).train()
    reference = model_of(config_of({**changes, "kernels": "reference", "attention_kernel": "auto"})).train()
    ids, aims = random_ids(2, 24), drawn(2, 24, 23)
    for model in (fast, reference):
        (model(ids) * aims).sum().backward()
    torch.testing.assert_close(fast(ids), reference(ids), rtol=0, atol=1e-10)
    for (name, parameter), other in zip(fast.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None
        if "kv_up.bias" in name and changes == {"attention_bias": "q k v o"}:
            keys, values = parameter.grad.split([4 * 6, 4 * 5])
            assert keys.abs().max() < 1e-9 and (values != 0).all(), "a softmax sees no constant"
        else:
            assert (parameter.grad != 0).any(), f"{name} does not learn"
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-8, atol=1e-9, msg=name)


@every_variant
def test_bfloat16_stays_near_float32(changes: dict[str, Any]) -> None:
    exact, half = Transformer(config_of(changes), seed=1), Transformer(config_of(changes), seed=1).bfloat16()
    ids = random_ids(2, 24)
    with torch.no_grad():
        expected = exact(ids)
        for out in (half(ids), in_pieces(half, ids, [15, *[1] * 9])):
            assert out.dtype == torch.bfloat16
            assert (out.float() - expected).norm() < 0.04 * expected.norm()


def test_flex_attention_takes_both_forms() -> None:
    config = config_of({"layers": 1})
    sdpa, flex = model_of(config), model_of(config_of({"layers": 1, "attention_kernel": "flex"}))
    assert flex.blocks[0].attention.absorbs(1, 8)  # type: ignore[operator,union-attr]
    ids = random_ids(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(flex, ids, [7, 1]), sdpa(ids), rtol=0, atol=1e-10)
