"""Files that mix dtypes: they compute, keep their numbers, and what must stay fine stays fine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers_oracle import contents, transformers

from scratchlm.interop import load, save
from scratchlm.interop.huggingface import open_folder
from scratchlm.model import ModelConfig, Transformer
from scratchlm.model.position import TablePosition


def mixed(folder: Path, pattern: str, dtype: torch.dtype) -> Any:
    """A small bf16 Llama of transformers in which the tensors that `pattern` is part of have another dtype."""
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: value.to(dtype) if pattern in name else value for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model.eval()


@pytest.mark.parametrize("pattern", ["lm_head", "mlp", "norm", "self_attn", "embed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_model_of_several_dtypes_computes_and_leaves_as_it_came(
    pattern: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = mixed(tmp_path / "theirs", pattern, dtype)
    ours = load(tmp_path / "theirs")[0]
    ids = torch.randint(0, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs.float()(ids).logits
        for length in (12, 1):  # many rows, and one
            assert (ours(ids[:, :length]).float() - wanted[:, :length]).abs().max() < 0.05
    save(ours, tmp_path / "back", family="llama")
    before, after = contents(tmp_path / "theirs"), contents(tmp_path / "back")
    assert all(after[name].dtype == value.dtype and after[name].equal(value) for name, value in before.items())


def test_tensors_that_lie_in_one_of_ours_take_the_widest(tmp_path: Path) -> None:
    mixed(tmp_path / "theirs", "q_proj", torch.float32)
    save(load(tmp_path / "theirs")[0], tmp_path / "back", family="llama")
    before, after = contents(tmp_path / "theirs"), contents(tmp_path / "back")
    for name, value in before.items():
        assert after[name].equal(value.to(after[name].dtype))  # no number has changed
        assert after[name].dtype == (
            torch.float32 if any(part in name for part in ["q_", "k_", "v_"]) else value.dtype
        )


def test_one_wide_tensor_widens_the_tables_alone(tmp_path: Path) -> None:
    mixed(tmp_path / "theirs", "model.norm", torch.float64)
    model = open_folder(tmp_path / "theirs").model
    assert [name for name, p in model.named_parameters() if p.dtype != torch.bfloat16] == ["norm.weight"]
    assert {m.table.dtype for m in model.modules() if isinstance(m, TablePosition)} == {torch.float64}


def test_a_routers_correction_stays_fine(tmp_path: Path) -> None:
    """Its steps of 0.001 are below bf16's at 1."""
    moe = {"experts": 4, "router": "sigmoid", "shared": 1, "d_expert": 8}
    model = Transformer(ModelConfig(vocab_size=61, d_model=32, heads=4, layers=2, moe=moe), seed=0)
    for block in model.blocks:
        block.feedforward.router.correction.copy_(torch.tensor([1.001, 0.999, 1.0, 0.5]))
    for family in ("scratchlm", "auto"):
        save(model, tmp_path / family, family=family, dtype="bf16")
        again = load(tmp_path / family)[0]
        for block, own in zip(again.blocks, model.blocks, strict=True):
            assert block.feedforward.router.correction.equal(own.feedforward.router.correction)
            assert block.feedforward.up.weight.dtype == torch.bfloat16
