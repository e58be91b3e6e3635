"""MXFP4 against transformers' own reading of it, and a gpt-oss folder packed as it is released."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from cases.experts import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers_oracle import build, contents, ids_for

from scratchlm.cli import main
from scratchlm.errors import UserError
from scratchlm.interop.huggingface import open_folder
from scratchlm.interop.mxfp4 import MAGNITUDES, dequantise

GPT_OSS = next(case for case in CASES if case.model_type == "gpt_oss")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_as_transformers_reads_it(experts: int, rows: int, count: int, seed: int) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, count, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(90, 160, (experts, rows, count), generator=generator, dtype=torch.uint8)
    wanted = convert_moe_packed_tensors(blocks, scales)
    assert dequantise(blocks, scales).transpose(1, 2).equal(wanted)


def test_every_number_by_hand() -> None:
    blocks = torch.tensor([[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]], dtype=torch.uint8)
    found = dequantise(blocks, torch.tensor([[129]], dtype=torch.uint8))[0].tolist()
    assert found == [4 * m for m in MAGNITUDES] + [-4 * m for m in MAGNITUDES]


def packed(folder: Path, seed: int = 0) -> None:
    """A random gpt-oss of transformers whose experts are then replaced by random packed ones."""
    model = build(GPT_OSS, seed, torch.float32)
    arguments = GPT_OSS.draw(random.Random(seed))
    arguments |= {"hidden_size": 64, "intermediate_size": 32, "head_dim": 8}
    del model
    import transformers

    config = transformers.AutoConfig.for_model("gpt_oss", **arguments)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    quantised = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantised}))


def test_a_released_folder_opens_and_leaves_in_bf16(tmp_path: Path) -> None:
    import transformers
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed(tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    before, after = contents(tmp_path / "theirs"), contents(tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    compared = 0
    for name, tensor in after.items():
        if f"{name}_blocks" in before:
            wanted = convert_moe_packed_tensors(before[f"{name}_blocks"], before[f"{name}_scales"])
            assert tensor.dtype == torch.bfloat16 and tensor.equal(wanted)
            compared += 1
        else:
            assert tensor.equal(before[name])
    assert compared >= 4
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    ours = open_folder(tmp_path / "theirs", dtype="fp32").model
    ids = ids_for(ours.config.vocab_size, 1, 20, 0)
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_a_broken_pair_is_one_line(tmp_path: Path) -> None:
    packed(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs/model.safetensors")
    tensors.pop(next(name for name in tensors if name.endswith("_scales")))
    save_file(tensors, tmp_path / "theirs/model.safetensors")
    with pytest.raises(UserError, match="are no pair of MXFP4"):
        open_folder(tmp_path / "theirs")
