"""``scratchlm resources dtypes``: formats, an audit of a recipe, and what is wrong in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scratchlm.cli import main
from scratchlm.resources.number_formats import FORMATS, TYPICAL, add_up, becomes

TINY = """name = "tiny"
[tokenizer]
vocab_size = 300
[model]
context_length = 16
d_model = 16
layers = 2
heads = 2
d_ff = 16
[train]
precision = "fp32"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def as_json(capfdbinary: pytest.CaptureFixture[bytes], *arguments: str) -> Any:
    assert main(["resources", "dtypes", "--json", *arguments]) == 0

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(capfdbinary.readouterr().out, parse_constant=refuse)


def row(text: str, begins: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(begins)]
    return line.split()


def test_the_tables_of_formats(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "dtypes"]) == 0
    out = capfd.readouterr().out
    assert row(out, "fp16") == ["fp16", "2", "5", "10", "65,504", "6.104e-5", "5.96e-8", "0.0009766", "3.3", "±inf"]
    assert row(out, "e4m3  ") == ["e4m3", "1", "4", "3", "448", "0.01562", "0.001953", "0.125", "1.2", "NaN"]
    assert row(out, "an activation")[-6:] == ["kept", "kept", "kept", "kept", "NaN", "512"]
    assert row(out, "just above")[-6:] == ["kept", "65,536", "inf", "65,536", "NaN", "inf"]
    assert row(out, "sum in itself")[-4] == "32"
    assert row(out, "sum in itself")[-3] == "4"
    assert all(len(line) <= 120 for line in out.splitlines())


def test_saturated(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "dtypes", "--saturate", "True"]) == 0
    out = capfd.readouterr().out
    assert row(out, "an activation")[-3:] == ["kept", "largest", "512"]
    assert row(out, "e4m3  ")[-1] == "largest"
    assert all(len(line) <= 120 for line in out.splitlines()) and "its square, in Adam's v" in out


@pytest.mark.parametrize("saturate", [False, True])
def test_formats_as_json(capfdbinary: pytest.CaptureFixture[bytes], saturate: bool) -> None:
    printed = as_json(capfdbinary, "--saturate", str(saturate))
    assert printed["saturate"] is saturate
    assert [one["name"] for one in printed["formats"]] == [fmt.name for fmt in FORMATS]
    assert [one["largest"] for one in printed["formats"]] == [fmt.largest for fmt in FORMATS]
    assert len(printed["sums"]) == 3 * len(FORMATS)
    assert printed["sums"][3 * 3 + 0] == vars(add_up(FORMATS[3], "in itself"))
    for (what, x), one in zip(TYPICAL, printed["numbers"], strict=True):
        assert (one["what"], one["number"]) == (what, x)
        for fmt in FORMATS:
            fate, value = becomes(x, fmt, saturate=saturate)
            expected = None if fate in ("inf", "NaN") else value
            assert one["becomes"][fmt.name] == {"fate": fate, "value": expected}


def test_an_audit(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["resources", "dtypes", "tiny.toml", "--precision", "bf16"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("one training step under autocast to bf16, on the CPU: 32 random tokens, loss ")
    products = [line.split() for line in out.splitlines() if " mm " in line]
    assert ["blocks.*.attention.qkv", "bf16", "mm", "2"] in products  # forward, of two layers
    assert ["blocks.*.attention.qkv", "bf16", "mm", "4"] in products  # backward
    assert row(out, "adamw ")[1] == "fp32"
    assert row(out, "weights")[:2] == ["weights", "fp32"]
    assert all(len(line) <= 120 for line in out.splitlines())


def test_it_is_said_what_was_left_out(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scratchlm.resources.autocast_audit.LARGE", 1)
    assert main(["resources", "dtypes", "tiny.toml"]) == 0
    assert "only the first 1 of its 2 layers, which then repeat\n" in capfd.readouterr().out


def test_an_audit_as_json_with_flags(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    printed = as_json(capfdbinary, "tiny.toml", "--model.layers", "1", "--length", "8", "--optim.optimizer", "sgd")
    assert (printed["precision"], printed["layers"], printed["tokens"]) == ("fp32", 1, 16)  # the recipe's precision
    assert {one["what"] for one in printed["held"]} >= {"weights", "gradients", "sgd: momentum_buffer"}
    assert not any(one["is_cast"] for one in printed["operations"])
    products = [one for one in printed["operations"] if one["name"] == "mm" and one["phase"] == "forward"]
    assert {(*one["reads"], *one["writes"]) for one in products} == {("fp32", "fp32")}
    assert {one["place"] for one in products} >= {
        "blocks.0.attention.qkv",
        "blocks.0.feedforward.down",
        "head and loss",
    }
    assert printed["held"][0]["numbers"] == 2 * 300 * 16 + 4 * 16 * 16 + 3 * 16 * 16 + 3 * 16


def test_a_preset_in_place_of_the_model(folder: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    options = ["--model.preset", "gpt2-tiny", "--length", "4", "--precision", "bf16", "--model.layers", "1"]
    printed = as_json(capfdbinary, "tiny.toml", *options)
    assert printed["precision"] == "bf16" and printed["layers"] == 1
    assert any(one["name"] == "native_layer_norm" for one in printed["operations"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("nowhere.toml", "recipe nowhere.toml does not exist"),
        ("tiny.toml --precision fp8", "--precision"),
        ("tiny.toml --model.layer 3", "did you mean --model.layers?"),
        ("tiny.toml --length 17", "length = 17 is not between 1 and model.context_length = 16"),
        ("tiny.toml --length 0", "length = 0"),
        ("tiny.toml other.toml", "unexpected argument 'other.toml'"),
        ("--precision bf16", "--precision is about a model: name its recipe first"),
        ("--model.layers=3 tiny.toml", "--model.layers is about a model: name its recipe first"),
        ("--saturat True", "did you mean --saturate?"),
        ("--saturate perhaps", "--saturate"),
        ("--json --model.preset", "--model.preset is about a model"),
        ("tiny.toml --model.preset", "--model.preset: which one?"),
        ("tiny.toml --model.heads 3", "model"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    folder: Path, command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resources", "dtypes", *command.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("scratchlm: error: ") and printed.err.count("\n") == 1
    assert message in printed.err
    assert printed.out == ""
