"""Presets: the published architectures have the published numbers of parameters, and the tiny ones run."""

from __future__ import annotations

import functools
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from scratchlm.config import load_recipe, save_recipe
from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, Transformer, presets, shape
from scratchlm.model.position import Positions

PAGE = Path(__file__).parents[2] / "docs/presets.md"

NAMES = presets.names()
TINY = [name for name in NAMES if "-tiny" in name]
FULL = [name for name in NAMES if name not in TINY]

PUBLISHED = {
    # as the model cards' safetensors count them, or torch for GPT-2
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-1-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "smollm3-3b": 3_075_098_624,
    "gpt-oss-20b": 20_914_757_184,
}
ROUNDED = {
    # name: (billions in the paper, last digit printed)
    "palm-8b": (8.63, 0.01),  # PaLM, table 1
    "palm-62b": (62.50, 0.01),
    "palm-540b": (540.35, 0.01),
    "gpt3-125m": (0.125, 0.001),  # GPT-3, table 2.1
    "gpt3-350m": (0.350, 0.01),  # 356 by the table's own widths
    "gpt3-760m": (0.760, 0.001),
    "gpt3-2.7b": (2.7, 0.1),
    "gpt3-6.7b": (6.7, 0.1),
    "gpt3-175b": (175.0, 0.5),  # 174.6 by the table's own widths
    "llama-1-13b": (13.0, 0.1),  # Llama 1, table 2
    "llama-1-33b": (32.5, 0.1),
    "llama-1-65b": (65.2, 0.1),
    "gpt-oss-120b": (116.83, 0.01),  # gpt-oss, table 1
}


@functools.cache
def counted(name: str) -> shape.Count:
    return shape.count(presets.load(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_a_legal_model_and_survives_toml(name: str) -> None:
    config = presets.load(name)
    assert isinstance(config, ModelConfig)
    assert ModelConfig(**tomllib.loads(presets.to_toml(config))["model"]) == config
    if name in TINY:
        assert config.vocab_size == 0 and config.context_length == 256
        assert 64 <= config.d_model <= 128 and 2 <= config.layers <= 6
    else:
        assert config.vocab_size > 30_000


def test_every_family_has_a_tiny_one_that_makes_its_choices() -> None:
    """All fields of names are equal between a tiny model and the family; only sizes differ."""
    sizes = {
        "vocab_size", "context_length", "d_model", "layers", "heads", "kv_heads", "head_dim", "d_ff", "window",
        "attention_scale", "logit_scale", "init_linear_std", "init_embedding_std", "embedding_dropout", "residual_dropout",
    }  # fmt: skip
    nested = {
        "rope": {"factor", "original_context"},
        "latent": {"q_rank", "kv_rank", "rope_dim", "value_dim"},
        "moe": {"experts", "top_k", "d_expert", "first_dense", "groups", "top_groups", "balance_loss"},
    }
    partner = {"qwen3-tiny-moe": "qwen3-30b-a3b", "gemma-3-tiny": "gemma-3-27b"}
    for family in presets.families():
        assert f"{family.name}-tiny" in family.presets
        for tiny in (name for name in family.presets if "-tiny" in name):
            full = presets.load(partner.get(tiny, family.presets[0])).model_dump()
            small = presets.load(tiny).model_dump()
            for field, value in full.items():
                if field in nested:
                    differing = {key for key, inner in value.items() if inner != small[field][key]}
                    assert differing <= nested[field], (tiny, field)
                elif field not in sizes:
                    assert small[field] == value, (tiny, field)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name: str) -> None:
    assert counted(name).total == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_numbers_of_parameters_published_in_billions(name: str) -> None:
    billions, digit = ROUNDED[name]
    assert counted(name).total / 1e9 == pytest.approx(billions, abs=digit)


def test_active_parameters_of_mixtures() -> None:
    """Mixtral: 12.9 B (its announcement). Qwen3: 3.3 and 22 B. gpt-oss, table 1, without the embedding: 3.61 and 5.13 B.
    DeepSeek-V3: 37 B, and 671 B in all; its 14 B of multi-token prediction repeat embedding and head, which are shared."""
    assert counted("mixtral-8x7b").active / 1e9 == pytest.approx(12.9, abs=0.05)
    assert counted("qwen3-30b-a3b").active / 1e9 == pytest.approx(3.3, abs=0.06)
    assert counted("qwen3-235b-a22b").active / 1e9 == pytest.approx(22, abs=0.5)
    for name, billions in (("gpt-oss-20b", 3.61), ("gpt-oss-120b", 5.13)):
        assert (counted(name).active - counted(name).embeddings / 2) / 1e9 == pytest.approx(billions, abs=0.006)
    deepseek = counted("deepseek-v3-671b")
    main = deepseek.total - deepseek.prediction
    corrections = 58 * 256  # the routers' correction bias: a buffer here, a parameter in the published files
    assert main + corrections == 671_026_419_200
    assert deepseek.active / 1e9 == pytest.approx(37, abs=0.6)
    assert (deepseek.prediction + deepseek.embeddings) / 1e9 == pytest.approx(14, abs=0.6)


def test_count_is_what_the_model_holds() -> None:
    for name, vocab_size in (("gpt2-tiny", 300), ("qwen3-tiny-moe", 300), ("llama-3-tiny", 0)):
        config = presets.load(name).model_copy(update={"vocab_size": vocab_size})
        found = shape.count(config)
        model = Transformer(config.model_copy(update={"vocab_size": vocab_size or 1}))
        held = sum(parameter.numel() for parameter in model.parameters())
        assert found.total == held - (0 if vocab_size else 2 * config.d_model)
        assert found.active == model.num_active_params() - (0 if vocab_size else 2 * config.d_model)


def hugging_face(name: str) -> Any:
    """The configuration of transformers with the values of the published config.json, written down apart from our files."""
    import transformers as hf

    llama = functools.partial(hf.LlamaConfig, rms_norm_eps=1e-5)
    llama3 = functools.partial(llama, vocab_size=128_256, num_key_value_heads=8)
    stretched = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 8192}  # fmt: skip
    qwen3 = functools.partial(
        hf.Qwen3Config, vocab_size=151_936, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6
    )
    gemma3 = functools.partial(hf.Gemma3TextConfig, rms_norm_eps=1e-6)
    made = {
        "gpt2-small": lambda: hf.GPT2Config(),
        "gpt2-xl": lambda: hf.GPT2Config(n_embd=1600, n_layer=48, n_head=25),
        "llama-1-65b": lambda: hf.LlamaConfig(
            hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64, rms_norm_eps=1e-6
        ),
        "llama-2-70b": lambda: llama(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, max_position_embeddings=4096,
        ),
        "llama-3-8b": lambda: llama3(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        ),
        "llama-3.1-405b": lambda: llama3(
            hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
            max_position_embeddings=131072, rope_parameters={**stretched, "factor": 8.0},
        ),
        "llama-3.2-1b": lambda: llama3(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, tie_word_embeddings=True,
            max_position_embeddings=131072, rope_parameters={**stretched, "factor": 32.0},
        ),
        "mixtral-8x7b": lambda: hf.MixtralConfig(
            rms_norm_eps=1e-5, max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        "gemma-2-2b": lambda: hf.Gemma2Config(max_position_embeddings=8192),
        "gemma-2-27b": lambda: hf.Gemma2Config(
            hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32, num_key_value_heads=16,
            head_dim=128, query_pre_attn_scalar=144, max_position_embeddings=8192,
        ),
        "gemma-3-1b": lambda: gemma3(
            vocab_size=262_144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
            num_key_value_heads=1, head_dim=256, sliding_window=512, max_position_embeddings=32768,
        ),
        "gemma-3-27b": lambda: gemma3(
            vocab_size=262_208, hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32,
            num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168, sliding_window=1024,
            max_position_embeddings=131072,
            rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
        ),
        "olmo-2-32b": lambda: hf.Olmo2Config(
            vocab_size=100_352, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
            num_key_value_heads=8, rms_norm_eps=1e-6, max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        ),
        "qwen3-0.6b": lambda: qwen3(
            hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, tie_word_embeddings=True,
            max_position_embeddings=40960, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        "qwen3-32b": lambda: qwen3(
            hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
            max_position_embeddings=40960, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        "qwen3-30b-a3b": lambda: hf.Qwen3MoeConfig(  # type: ignore[call-arg]
            vocab_size=151_936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
            rms_norm_eps=1e-6, max_position_embeddings=40960,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        "smollm3-3b": lambda: hf.SmolLM3Config(
            max_position_embeddings=65536, rope_parameters={"rope_type": "default", "rope_theta": 5e6}
        ),
        "gpt-oss-20b": lambda: hf.GptOssConfig(num_hidden_layers=24, num_local_experts=32),
        "gpt-oss-120b": lambda: hf.GptOssConfig(),
        "deepseek-v3-671b": lambda: hf.DeepseekV3Config(
            max_position_embeddings=163840,
            rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
                             "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
        ),
    }  # fmt: skip
    return made[name]()


ORACLES = [
    "gpt2-small", "gpt2-xl", "llama-1-65b", "llama-2-70b", "llama-3-8b", "llama-3.1-405b", "llama-3.2-1b", "mixtral-8x7b",
    "gemma-2-2b", "gemma-2-27b", "gemma-3-1b", "gemma-3-27b", "olmo-2-32b", "qwen3-0.6b", "qwen3-32b", "qwen3-30b-a3b",
    "smollm3-3b", "gpt-oss-20b", "gpt-oss-120b", "deepseek-v3-671b",
]  # fmt: skip


@functools.cache
def oracle(name: str) -> Any:
    """The model of transformers, without memory for its weights; its rotary tables are real."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(hugging_face(name))


@pytest.mark.parametrize("name", ORACLES)
def test_as_many_parameters_as_in_transformers(name: str) -> None:
    theirs = sum(parameter.numel() for parameter in oracle(name).parameters())
    ours = counted(name)
    assert ours.total - ours.prediction == theirs


@pytest.mark.parametrize("name", ORACLES)
def test_what_transformers_configuration_says_beside_sizes(name: str) -> None:
    """Context, ε, windows and which layers they and RoPE belong to, scores' scale, caps, experts."""
    theirs, ours = hugging_face(name), presets.load(name)
    assert ours.context_length == theirs.max_position_embeddings and ours.vocab_size == theirs.vocab_size
    assert ours.norm_eps == getattr(theirs, "rms_norm_eps", getattr(theirs, "layer_norm_epsilon", None))
    kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * ours.layers
    masks = {"full_attention": "causal", "sliding_attention": "sliding_window"}
    assert [ours.mask_at(layer) for layer in range(ours.layers)] == [masks[kind] for kind in kinds]
    if "sliding_attention" in kinds:
        assert ours.window == theirs.sliding_window
    if hasattr(theirs, "no_rope_layers"):
        rotated = [ours.position_at(layer) == "rope" for layer in range(ours.layers)]
        assert rotated == [bool(rope) for rope in theirs.no_rope_layers]
    scale = ours.attention_scale or 1 / math.sqrt(ours.resolved_head_dim)
    if hasattr(theirs, "query_pre_attn_scalar"):
        assert scale == pytest.approx(theirs.query_pre_attn_scalar**-0.5, rel=1e-6)
    assert ours.attention_soft_cap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logit_soft_cap == getattr(theirs, "final_logit_softcapping", None)
    if ours.moe.experts:
        assert ours.active_experts == theirs.num_experts_per_tok


@pytest.mark.parametrize(
    "name", ["llama-3-8b", "llama-3.1-405b", "llama-3.2-1b", "gemma-3-27b", "deepseek-v3-671b", "gpt-oss-120b"]
)
def test_wavelengths_as_in_transformers(name: str) -> None:
    """The tables of the first and the last layer: of both kinds, where layers differ."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS as SCALINGS

    config, theirs = presets.load(name).model_copy(update={"context_length": 2}), hugging_face(name)
    if name.startswith("gpt-oss"):  # its ramp is not rounded to whole dimensions, ours is: see docs/presets.md
        theirs.rope_parameters["truncate"] = True
    kinds = getattr(theirs, "layer_types", None) or [None] * config.layers
    positions = Positions(config)
    width = config.latent.rope_dim if config.attention == ("mla",) else config.resolved_head_dim
    for layer in (0, 5):
        said = theirs.rope_parameters.get(kinds[layer], theirs.rope_parameters)
        if said["rope_type"] == "default":
            expected, scale = said["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width), 1.0
        else:
            kind = {"layer_type": kinds[layer]} if said is not theirs.rope_parameters else {}
            expected, scale = SCALINGS[said["rope_type"]](theirs, torch.device("cpu"), **kind)
        found, factor = positions.at(layer, width).frequencies()  # type: ignore[operator]
        torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=0)
        assert factor == pytest.approx(scale)


def test_deepseeks_scale_of_scores() -> None:
    scaling = oracle("deepseek-v3-671b").model.layers[0].self_attn.scaling
    assert presets.load("deepseek-v3-671b").attention_scale == pytest.approx(scaling, rel=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_run_and_have_gradients(name: str) -> None:
    config = presets.load(name).model_copy(update={"vocab_size": 512})
    assert shape.count(config).body < 3_000_000
    torch.manual_seed(0)
    model = Transformer(config, seed=0)
    ids = torch.randint(512, (2, 33))
    hidden, routers = model.run(ids[:, :-1], model.context(ids[:, :-1]))
    loss = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(512)) < 1.5  # untrained: near uniform
    (loss + sum(record.loss for record in routers)).backward()
    for label, parameter in model.named_parameters():
        if label.startswith("predictions."):
            continue  # used by the training objective alone
        assert parameter.grad is not None and parameter.grad.isfinite().all(), label
    assert sum(float(p.grad.abs().sum()) for p in model.blocks[0].parameters() if p.grad is not None) > 0


@pytest.mark.parametrize(
    ("name", "hint"),
    [("llama-3-8", "did you mean llama-3-8b"), ("LLAMA-2-7B", "did you mean llama-2-7b"), ("", "model list"),
     ("gpt2-", "did you mean gpt2-"), ("gpt2-small/../x", "unknown")],
)  # fmt: skip
def test_unknown_preset(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=re.escape(hint)) as caught:
        presets.load(name)
    assert "\n" not in str(caught.value)


def test_merge_changes_neither_side() -> None:
    first, second = {"a": 1, "s": {"x": 1, "y": 2}, "t": 3}, {"a": 2, "s": {"y": 3}, "t": {"z": 1}}
    merged = presets.merge(first, second)
    assert merged == {"a": 2, "s": {"x": 1, "y": 3}, "t": {"z": 1}}
    merged["s"]["x"] = 9
    assert first == {"a": 1, "s": {"x": 1, "y": 2}, "t": 3} and second == {"a": 2, "s": {"y": 3}, "t": {"z": 1}}
    before = presets.load("gpt-oss-20b")
    presets.values("gpt-oss-20b")["moe"]["experts"] = 1
    assert presets.load("gpt-oss-20b") == before


def test_a_recipe_takes_a_preset_below_its_own_fields(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[model]\npreset = "gpt-oss-tiny"\nlayers = 2\n[model.moe]\ntop_k = 1\n')
    model = load_recipe(path).model
    assert model.layers == 2 and model.moe.top_k == 1
    same = model.model_copy(update={"layers": 4, "moe": model.moe.model_copy(update={"top_k": 2})})
    assert same == presets.load("gpt-oss-tiny")


def test_a_preset_from_elsewhere_takes_the_place_of_the_recipes_model(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text in ('[model]\npreset = "gpt-oss-tiny"\nlayers = 2\n', "seed = 3\n"):
        path.write_text(text)
        assert load_recipe(path, preset="llama-3-tiny").model == presets.load("llama-3-tiny")
    with pytest.raises(UserError, match=r"^preset 'lama-3-tiny' is unknown; did you mean llama-3-tiny\?"):
        load_recipe(path, preset="lama-3-tiny")


def test_what_a_run_records_names_no_preset(tmp_path: Path) -> None:
    path, resolved = tmp_path / "mine.toml", tmp_path / "recipe.toml"
    path.write_text('[model]\npreset = "deepseek-v3-tiny"\n')
    recipe = load_recipe(path)
    save_recipe(recipe, resolved)
    assert "preset" not in resolved.read_text()
    assert load_recipe(resolved) == recipe


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('preset = "llama-3-tny"', r"mine.toml: preset 'llama-3-tny' is unknown; did you mean llama-3-tiny\?"),
        ("preset = 3", r"mine.toml: model.preset = 3 is no name"),
        ('preset = "gemma-3-tiny"\nlayers = 2', r"mine.toml: model: mask has 6 values for layers = 2"),
        ('preset = "gemma-3-tiny"\nlayrs = 2', r"unknown field model.layrs; did you mean model.layers\?"),
    ],
)
def test_wrong_presets_in_a_recipe(tmp_path: Path, table: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[model]\n{table}\n")
    with pytest.raises(UserError, match=message):
        load_recipe(path)


def test_the_page_lists_every_preset_its_count_and_what_is_left_out() -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    rows = dict(re.findall(r"\| `([\w.-]+)` \| ([\d,]+) ", page))
    assert list(rows) == NAMES
    for name, shown in rows.items():
        assert int(shown.replace(",", "")) == counted(name).total - counted(name).prediction, name
    for family in presets.families():
        assert family.source in page, family.name
        for sentence in family.left_out:
            assert sentence in page, family.name
