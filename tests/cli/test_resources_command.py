"""``scratchlm resources RECIPE``: recipes and presets, devices and this machine, tables, JSON and a page, one line for errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scratchlm.cli import main
from scratchlm.resources.tables import si

TINY = """name = "tiny"
[tokenizer]
vocab_size = 300
[model]
context_length = 16
d_model = 16
layers = 1
heads = 2
d_ff = 16
[train]
batch_size = 4
steps = 50
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # whatever was measured here is not seen
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def found(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["resources", *options, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["resources", *options]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("scratchlm: error: ") and err.count("\n") == 1
    return err


def test_help_is_short_and_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "--help"]) == 0
    out = capsys.readouterr().out
    for word in (
        "RECIPE",
        "PRESET",
        "--device",
        "--dtype",
        "--micro-batch",
        "--memory",
        "--html",
        "--json",
        "--field",
    ):
        assert word in out
    for below in ("devices", "measure", "dtypes"):
        assert f"resources {below}" in out
    assert out.count("\n") < 30


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "tiny.toml", "--device", "h100", "--model.layers", "2"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 110
    for word in (
        "tiny",
        "parameters",
        "active",
        "gradients",
        "the chunked loss makes its gradients in the forward pass",
        "peak memory",
        "KV cache",
        "step time",
        "tokens/s",
        "USD",
        "blocks.*",
        "qkv",
    ):
        assert word in out, word
    assert "eager" in out  # 50 steps are over before compiling would pay


def test_json_of_a_known_device(capsys: pytest.CaptureFixture[str]) -> None:
    values = found(capsys, "tiny.toml", "--device", "NVIDIA H100 SXM")
    assert values["target"]["device"] == "h100-sxm" and values["target"]["memory_bytes"] == 80e9
    assert values["precision"] == "bf16" and values["micro_batch"] == 4
    assert values["tokens"] == 50 * 4 * 16
    assert values["time"]["price"] == pytest.approx(3.78 * values["time"]["total"] / 3600)
    assert not values["time"]["compiled"]


def test_options_change_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--device", "a100-80gb", "--dtype", "fp32", "--compile", "on", "--price", "7", "--memory", "2 GiB")
    values = found(capsys, "tiny.toml", *options, "--micro-batch", "2", "--train.steps", "3")
    assert values["precision"] == "fp32" and values["time"]["compiled"]
    assert (values["micro_batch"], values["accumulation"], values["steps"]) == (2, 2, 3)
    assert values["tokens"] == 3 * 4 * 16  # the step is as large as before
    assert values["target"]["memory_bytes"] == 2 * 2**30 and values["target"]["price_per_hour"] == 7
    assert values["time"]["price"] == pytest.approx(7 * values["time"]["total"] / 3600)
    assert values["micro_batches"]["largest"] > 2


def test_the_recipes_precision_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert found(capsys, "tiny.toml", "--device", "h100", "--train.precision", "fp32")["precision"] == "fp32"
    assert found(capsys, "tiny.toml", "--device", "v100")["precision"] == "fp32"  # has no bf16


def test_this_machine_unmeasured(capsys: pytest.CaptureFixture[str]) -> None:
    values = found(capsys, "tiny.toml", "--device", "cpu")
    assert values["time"] is None and values["target"]["device"] == "cpu"
    assert "scratchlm resources measure" in values["target"]["notes"][0]
    assert values["memory"]["peak"] > 0 and values["micro_batches"]["largest"] > 4


def test_a_device_without_a_peak_has_no_times(capsys: pytest.CaptureFixture[str]) -> None:
    values = found(capsys, "tiny.toml", "--device", "v5p", "--dtype", "fp32")
    assert values["time"] is None
    assert "the peak in fp32 of Google TPU v5p is unknown" in values["target"]["notes"][0]


def test_a_preset_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 XL has 1.5 billion parameters and at 1,024 tokens needs about 10 GFLOP to train on one."""
    values = found(capsys, "gpt2-xl", "--device", "h100", "--train.batch-size", "1")
    assert values["params"] == 1_557_611_200
    assert sum(component["params"] for component in values["components"]) == 1_557_611_200
    per_token = values["flops_per_token"]
    scores = next(one["forward"] for one in values["components"] if one["path"] == "blocks.*.attention")
    assert scores == 48 * 4 * 1024 * 1600  # queries by keys, weights by values
    # Fused attention computes the scores once more in the backward pass, which the formula does not count.
    assert per_token["forward"] + per_token["backward"] == per_token["model"] + scores / 2
    assert per_token["model"] == pytest.approx(10.27e9, rel=0.01)
    weights = values["memory"]["at_peak"]["weights"]
    assert weights == 4 * values["params"] and values["memory"]["at_peak"]["optimizer state"] >= 2 * weights
    assert values["cache"]["bytes_per_token"] == 2 * 48 * 1600 * 2
    assert 0.05 < values["time"]["model_flops_per_second"] / 989.4e12 < 0.7


def test_dropout_in_attention_keeps_no_scores_on_a_gpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("tiny.toml", "--train.precision", "fp32")
    none = found(capsys, *options, "--device", "h100")["memory"]["peak"]
    dropping = (*options, "--model.attention-dropout", "0.1")
    page = folder / "page.html"
    assert found(capsys, *dropping, "--device", "h100", "--html", str(page))["memory"]["peak"] == none
    assert f"peak {si(none, 'B')}" in page.read_text(encoding="utf-8")
    assert found(capsys, *dropping, "--device", "cpu")["memory"]["peak"] > none


def test_a_preset_in_the_place_of_a_recipes_model(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--device", "h100", "--compile", "off", "--model.layers", "1", "--model.context-length", "16")
    values = found(capsys, "tiny.toml", "--model.preset", "llama-3-tiny", *options)
    same = found(capsys, "llama-3-tiny", "--tokenizer.vocab-size", "300", "--train.batch-size", "4", *options)
    assert values["params"] == same["params"] and values["memory"]["peak"] == same["memory"]["peak"]
    assert (values["name"], same["name"]) == ("tiny", "llama-3-tiny")


def test_a_page_is_never_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "tiny.toml", "--device", "h100", "--html", "new/page.html", "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert err == f"{Path('new/page.html')}: open it in a browser\n"
    before = (folder / "new" / "page.html").read_bytes()
    assert b"NVIDIA H100 SXM" in before
    error = refused(capsys, "tiny.toml", "--html", "new/page.html")
    assert f"{Path('new/page.html')} exists" in error
    assert (folder / "new" / "page.html").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--json"], "which recipe? usage: scratchlm resources"),
        (["--device", "h100"], "name the recipe first"),
        (["gone.toml"], "recipe gone.toml does not exist"),
        (["gpt2-xxl"], "did you mean gpt2-xl?"),
        (["tiny.toml", "--device", "h10"], "device 'h10' is unknown; did you mean h100"),
        (["tiny.toml", "--dtype", "fp8"], "dtype"),
        (["tiny.toml", "--micro-batch", "3"], "micro-batch 3 does not divide train.batch_size = 4"),
        (["tiny.toml", "--memory", "much"], "memory 'much' is no size"),
        (["tiny.toml", "--memory", "0GB"], "nothing fits in that"),
        (["tiny.toml", "--price", "-1"], "price"),
        (["tiny.toml", "--price", "nan"], "price"),
        (["tiny.toml", "--compile", "maybe"], "compile"),
        (["tiny.toml", "--model.layrs", "3"], "did you mean --model.layers?"),
        (["tiny.toml", "--device", "h100", "--model.heads", "3"], "heads"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *options)


def test_devices_that_print_one_peak_have_times(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (("--device", "tpu-v5e"), ("--device", "t4", "--optim.optimizer", "muon")):
        values = found(capsys, "tiny.toml", *options)
        assert values["time"]["step"] > 0
        assert any("takes the peak of" in line for line in values["time"]["assumptions"])


def test_a_limit_on_memory_is_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("tiny.toml", "--device", "h100", "--train.batch-size", "64", "--train.micro-batch", "auto")
    free = found(capsys, *options)
    limited = found(capsys, *options, "--train.memory-limit", "1MB")
    assert free["micro_batch"] == 64 > limited["micro_batch"]
    assert limited["memory"]["peak"] <= 0.9e6 and limited["target"]["memory_bytes"] == 1e6
    assert found(capsys, *options, "--memory", "1MB")["micro_batch"] == limited["micro_batch"]
    here = ("tiny.toml", "--device", "cpu", "--memory", "16GB", *options[3:], "--train.memory-limit", "900MB")
    for compiling in ("on", "off"):  # a compiler's part is the machine's, not the limit's
        assert found(capsys, *here, "--compile", compiling)["micro_batch"] == 64


def test_fp8_is_not_passed_over_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    notes = found(capsys, "tiny.toml", "--device", "h100", "--train.fp8", "True")["target"]["notes"]
    assert any("train.fp8 is not in these figures" in note for note in notes)
