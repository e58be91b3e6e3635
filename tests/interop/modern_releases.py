"""config.json of well-known releases of the dense families after Llama, and their published numbers of parameters."""

from __future__ import annotations

from typing import Any

WIDTHS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
EVERYWHERE = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
YARN = {
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "yarn",
}
LLAMA3 = {
    "factor": 16.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GEMMA: dict[str, Any] = {"attention_bias": False, "head_dim": 256, "rms_norm_eps": 1e-6}
SOFT_GEMMA: dict[str, Any] = {**GEMMA, "cache_implementation": "hybrid", "query_pre_attn_scalar": 256}
PHI: dict[str, Any] = {
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
GLM: dict[str, Any] = {"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5, "rope_theta": 10000.0}
COMMAND: dict[str, Any] = {"attention_bias": False, "layer_norm_eps": 1e-5}
LOCAL = ["sliding_attention"] * 3 + ["full_attention"]

# model_type, layers d_model heads key/value-heads d_ff vocabulary context, the other keys, parameters
RELEASES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "Mistral-7B-v0.1": (
        "mistral",
        "32 4096 32 8 14336 32000 32768",
        {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False},
        7_241_732_096,
    ),
    "Ministral-8B": (  # its own file says mistral and lets every layer have the window
        "ministral",
        "36 4096 32 8 12288 131072 32768",
        {"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e8, "sliding_window": 32768},
        8_019_808_256,
    ),
    "Qwen2.5-0.5B": (
        "qwen2",
        "24 896 14 2 4864 151936 32768",
        {
            "max_window_layers": 24,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
            "use_sliding_window": False,
        },
        494_032_768,
    ),
    "Qwen3-8B": (
        "qwen3",
        "36 4096 32 8 12288 151936 40960",
        {
            "attention_bias": False,
            "head_dim": 128,
            "max_window_layers": 36,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        },
        8_190_735_360,
    ),
    "Gemma 2B": (
        "gemma",
        "18 2048 8 1 16384 256000 8192",
        {**GEMMA, "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 10000.0},
        2_506_172_416,
    ),
    "Gemma 2 9B": (
        "gemma2",
        "42 3584 16 8 14336 256000 8192",
        {
            **SOFT_GEMMA,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
        },
        9_241_705_984,
    ),
    "Gemma 3 1B": (
        "gemma3_text",
        "26 1152 4 1 6912 262144 32768",
        {
            **SOFT_GEMMA,
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        999_885_952,
    ),
    "OLMo 7B": (
        "olmo",
        "32 4096 32 32 11008 50304 2048",
        {"attention_bias": False, "clip_qkv": None, "rope_theta": 10000.0, "tie_word_embeddings": False},
        6_888_095_744,
    ),
    "OLMo 2 7B": (
        "olmo2",
        "32 4096 32 32 11008 100352 4096",
        {"attention_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 500000, "tie_word_embeddings": False},
        7_298_617_344,
    ),
    "Olmo 3 7B": (
        "olmo3",
        "32 4096 32 32 11008 100278 65536",
        {
            "attention_bias": False,
            "layer_types": LOCAL * 8,
            "rms_norm_eps": 1e-6,
            "rope_scaling": YARN,
            "rope_theta": 500000,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        7_298_011_136,
    ),
    "Phi-3 mini 4k": (
        "phi3",
        "32 3072 32 32 8192 32064 4096",
        {**PHI, "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 2047},
        3_821_079_552,
    ),
    "Phi-4": (
        "phi3",
        "40 5120 40 10 17920 100352 16384",
        {**PHI, "original_max_position_embeddings": 16384, "rope_theta": 250000, "sliding_window": None},
        14_659_507_200,
    ),
    "Command R": (
        "cohere",
        "40 8192 64 64 22528 256000 8192",
        {
            **COMMAND,
            "logit_scale": 0.0625,
            "model_max_length": 131072,
            "rope_theta": 8000000.0,
            "use_qk_norm": False,
        },
        34_980_831_232,
    ),
    "Command R+": (
        "cohere",
        "64 12288 96 8 33792 256000 8192",
        {**COMMAND, "logit_scale": 0.8333333333333334, "rope_theta": 75000000.0, "use_qk_norm": True},
        103_810_674_688,
    ),
    "Command R7B": (
        "cohere2",
        "32 4096 32 8 14336 256000 8192",
        {
            **COMMAND,
            "cache_implementation": "hybrid",
            "head_dim": 128,
            "layer_switch": 4,
            "logit_scale": 0.25,
            "order_of_interleaved_layers": "local_attn_first",
            "position_embedding_type": "rope_gptj",
            "rope_scaling": None,
            "rope_theta": 50000,
            "rotary_pct": 1.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "use_embedding_sharing": True,
            "use_gated_activation": True,
            "use_parallel_block": True,
            "use_parallel_embedding": True,
            "use_qk_norm": False,
        },
        8_028_033_024,
    ),
    "SmolLM3 3B": (
        "smollm3",
        "36 2048 16 4 11008 128256 65536",
        {
            "attention_bias": False,
            "layer_types": ["full_attention"] * 36,
            "max_window_layers": 28,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        3_075_098_624,
    ),
    "Granite 3.0 8B": (
        "granite",
        "40 4096 32 8 12800 49155 4096",
        {
            "attention_bias": False,
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "logits_scaling": 16.0,
            "mlp_bias": False,
            "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000,
            "tie_word_embeddings": True,
        },
        8_170_848_256,
    ),
    "GLM-4 9B": (
        "glm",
        "40 4096 32 2 13696 151552 131072",
        {**GLM, "rms_norm_eps": 1.5625e-7, "tie_word_embeddings": False},
        9_399_951_360,
    ),
    "GLM-4-9B-0414": (
        "glm4",
        "40 4096 32 2 13696 151552 32768",
        {**GLM, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        9_400_279_040,
    ),
    "Seed-OSS 36B": (
        "seed_oss",
        "64 5120 80 8 27648 155136 524288",
        {
            "attention_bias": True,
            "attention_out_bias": False,
            "head_dim": 128,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "residual_dropout": 0.1,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"rope_type": "default"},
            "rope_theta": 10000000.0,
            "tie_word_embeddings": False,
        },
        36_151_104_512,
    ),
    "EXAONE 4.0 32B": (
        "exaone4",
        "64 5120 40 8 27392 102400 131072",
        {
            "head_dim": 128,
            "layer_types": LOCAL * 16,
            "rms_norm_eps": 1e-5,
            "rope_scaling": LLAMA3,
            "rope_theta": 1000000,
            "sliding_window": 4096,
            "sliding_window_pattern": "LLLG",
            "tie_word_embeddings": False,
        },
        32_003_216_384,
    ),
    "Helium 1": (
        "helium",
        "24 2560 20 20 7040 48000 4096",
        {"head_dim": 128, "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-8, "rope_theta": 100000.0},
        2_172_643_840,
    ),
}


def release(name: str) -> dict[str, Any]:
    """Its config.json."""
    model_type, widths, more, _ = RELEASES[name]
    given = dict(zip((*WIDTHS, "vocab_size", "max_position_embeddings"), map(int, widths.split()), strict=True))
    activation = {} if "hidden_activation" in more else {"hidden_act": "silu"}
    return {"model_type": model_type, **EVERYWHERE, **given, **activation, **more}
