"""The whole model against Hugging Face's: Llama (also without positions), Qwen3, OLMo 1, Granite; OLMoE's attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_variants import SMALL, build, random_ids

from scratchlm.kernels.cross_entropy import (
    HeadOptions,
    chunked_linear_cross_entropy,
    reference_linear_cross_entropy,
)
from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.context import Context

transformers = pytest.importorskip("transformers")


def hugging_face_twin(model: Transformer, family: str, more: dict[str, Any]) -> Any:
    """The same weights in transformers' class with `more` settings, our fused matrices taken apart."""
    config = model.config
    config_class = getattr(transformers, f"{family}Config")
    twin_config = config_class(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.resolved_d_ff,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.resolved_kv_heads,
        head_dim=config.resolved_head_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope.theta[0],
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta[0]},
        tie_word_embeddings=config.tied_embeddings,
        hidden_act="silu",
        attn_implementation="eager",
        **more,
    )
    state = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    state["lm_head.weight"] = model.head.weight
    width = config.resolved_head_dim
    sizes = [config.heads * width, config.resolved_kv_heads * width, config.resolved_kv_heads * width]
    for layer, block in enumerate(model.blocks):
        here = f"model.layers.{layer}"
        q, k, v = block.attention.qkv.weight.split(sizes)
        gate, up = block.feedforward.gate_up.weight.chunk(2)
        state |= {
            f"{here}.self_attn.q_proj.weight": q,
            f"{here}.self_attn.k_proj.weight": k,
            f"{here}.self_attn.v_proj.weight": v,
            f"{here}.self_attn.o_proj.weight": block.attention.output.weight,
            f"{here}.mlp.gate_proj.weight": gate,
            f"{here}.mlp.up_proj.weight": up,
            f"{here}.mlp.down_proj.weight": block.feedforward.down.weight,
            f"{here}.input_layernorm.weight": block.attention_norm.weight,
            f"{here}.post_attention_layernorm.weight": block.feedforward_norm.weight,
        }
        if config.qk_norm != "none":
            state[f"{here}.self_attn.q_norm.weight"] = block.attention.q_norm.norm.weight
            state[f"{here}.self_attn.k_norm.weight"] = block.attention.k_norm.norm.weight
    state = {name: value for name, value in state.items() if value is not None}
    twin = getattr(transformers, f"{family}ForCausalLM")(twin_config).eval()
    assert len(list(twin.parameters())) == len(state) - config.tied_embeddings
    twin.load_state_dict({name: value.detach().clone() for name, value in state.items()}, strict=True)
    return twin


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "MHA, untied": ("Llama", {}, {}),
    "GQA": ("Llama", {"kv_heads": 2}, {}),
    "MQA": ("Llama", {"kv_heads": 1}, {}),
    "tied": ("Llama", {"tied_embeddings": True, "init_embedding_std": 0.2}, {}),
    "GQA, tied, other width of heads, θ, ε": (
        "Llama",
        {"kv_heads": 2, "tied_embeddings": True, "head_dim": 10, "rope": {"theta": 500.0}, "norm_eps": 1e-3},
        {},
    ),
    "norms of queries and keys": ("Qwen3", {"kv_heads": 2, "qk_norm": "head"}, {}),
    "cut queries, keys and values": (
        "Olmo",
        {"kv_heads": 2, "qkv_clip": 0.5, "norm": "layernorm_noparams"},
        {"clip_qkv": 0.5},
    ),
    "fixed residual scale": (
        "Granite",
        {"residual": "fixed", "residual_init": 0.3, "attention_scale": 0.2, "logit_scale": 0.25},
        {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "logits_scaling": 4.0},
    ),
}


@pytest.mark.parametrize("kernels", ["fast", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_transformers(case: str, kernels: str) -> None:
    family, changes, more = CASES[case]
    config = ModelConfig(**{**SMALL, **changes, "kernels": kernels})
    model = build(config)
    twin = hugging_face_twin(model, family, more)
    ids = random_ids(config, 3, 24)
    theirs = twin(ids, labels=ids)
    torch.testing.assert_close(model(ids), theirs.logits, rtol=1e-4, atol=1e-4)

    hidden, targets = model.hidden(ids)[:, :-1], ids[:, 1:]
    for loss in (reference_linear_cross_entropy, chunked_linear_cross_entropy):
        ours = loss(hidden, model.head.weight, targets, HeadOptions(config.logit_scale))[0] / targets.numel()
        torch.testing.assert_close(ours, theirs.loss, rtol=1e-5, atol=1e-5)

    ours.backward()
    theirs.loss.backward()
    q, _, v = model.blocks[0].attention.qkv.weight.grad.split(model.blocks[0].attention.qkv.parts)
    attention = twin.model.layers[0].self_attn
    torch.testing.assert_close(q, attention.q_proj.weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(v, attention.v_proj.weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        model.embedding.weight.grad, twin.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-5
    )


def test_no_position_is_rope_that_stands_still() -> None:
    config = ModelConfig(**{**SMALL, "position": "none", "kv_heads": 2})
    model = build(config)
    twin = hugging_face_twin(model, "Llama", {})
    ids = random_ids(config, 2, 20)
    theirs = twin(ids, position_ids=torch.zeros_like(ids)).logits
    torch.testing.assert_close(model(ids), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", ["fast", "reference"])
def test_queries_and_keys_are_cut_behind_their_norm(kernels: str) -> None:
    from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeRotaryEmbedding

    fields = {"qk_norm": "full", "qkv_clip": 0.6, "kv_heads": 2, "layers": 1, "kernels": kernels}
    config = ModelConfig(**{**SMALL, **fields})
    ours = build(config).blocks[0].attention
    twin_config = transformers.OlmoeConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, clip_qkv=0.6, attn_implementation="eager"
    )
    twin = OlmoeAttention(twin_config, 0).eval()
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    state = dict(zip(names, ours.qkv.weight.detach().split(ours.qkv.parts), strict=True))
    state |= {"o_proj.weight": ours.output.weight, "q_norm.weight": ours.q_norm.norm.weight}
    twin.load_state_dict({**state, "k_norm.weight": ours.k_norm.norm.weight})
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    angles = OlmoeRotaryEmbedding(twin_config)(x, torch.arange(9)[None])
    hidden = torch.full((9, 9), float("-inf")).triu(1)
    torch.testing.assert_close(ours(x, Context()), twin(x, angles, hidden[None, None])[0], rtol=1e-4, atol=1e-5)
