"""``scratchlm model list``, ``show`` and ``shape``: what they print is true and can be pasted into a recipe."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from scratchlm.cli import main
from scratchlm.commands.shared import take_preset
from scratchlm.config import load_recipe
from scratchlm.errors import UserError
from scratchlm.model import ModelConfig, presets, shape


def test_list_has_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "list"]) == 0
    printed = capsys.readouterr().out.split()
    assert set(presets.names()) <= set(printed)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama-3-8b", "8,030,261,248 parameters\n"),
        ("mixtral-8x7b", "46,702,792,704 parameters, 12,879,925,248 of them active for a token\n"),
        ("gpt2-tiny", "and 128 for every token of the tokenizer's vocabulary\n"),
        ("olmo-2-tiny", "and 256 for every token of the tokenizer's vocabulary\n"),
        ("deepseek-v3-671b", "11,610,067,968 of them only predict further tokens\n"),
    ],
)
def test_show_is_a_recipe_with_its_counts(
    name: str, said: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["model", "show", name]) == 0
    printed = capfdbinary.readouterr().out.decode()
    assert said in printed
    assert all(sentence in printed for sentence in presets.family_of(name).left_out)
    recipe = tmp_path / "pasted.toml"
    recipe.write_text(printed + "[evaluate]\ncontext_length = 8\n", encoding="utf-8")
    assert load_recipe(recipe).model == presets.load(name)


def test_shape_prints_the_proposal_beside_known_models(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    asked = [
        "--params",
        "20M",
        "--vocab-size",
        "8192",
        "--feedforward",
        "gelu",
        "--head-dim",
        "64",
        "--kv-heads",
        "2",
    ]
    assert main(["model", "shape", *asked, "--context", "512", "--aspect", "80"]) == 0
    printed = capfdbinary.readouterr().out.decode()
    config = shape.propose(
        20_000_000, aspect=80, head_dim=64, vocab_size=8192, feedforward="gelu", kv_heads=2, context_length=512
    )
    assert ModelConfig(**tomllib.loads(printed[printed.index("[model]") :])["model"]) == config
    assert f"{shape.count(config).total:,} parameters" in printed
    rows = {words[0]: words for line in printed.splitlines() if len(words := line.split()) > 8}
    assert {"proposed", *shape.KNOWN} <= set(rows)
    assert " ".join(rows["gpt2-small"]) == "gpt2-small 124.4 M 768 12 64 4.00 64 1.00 12 50,257"
    assert rows["deepseek-v3-671b"][1:5] == ["671", "B", "7,168", "61"]
    assert all(rule in printed for rule in shape.RULES.values())


def test_shape_as_json(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["model", "shape", "--json", "--params", "125M"]) == 0
    printed = json.loads(capfdbinary.readouterr().out)
    config = ModelConfig(**printed["model"])
    assert config == shape.propose(125_000_000)
    assert printed["wish"] == 125_000_000
    assert printed["proposed"]["params"] == shape.count(config).total
    assert printed["known"]["llama-2-7b"]["aspect_ratio"] == 128
    assert printed["known"]["deepseek-v3-671b"]["params"] == 671_026_404_352
    assert list(printed["known"]) == list(shape.KNOWN)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("model shpe", "did you mean model shape?"),
        ("model shape", "how many parameters?"),
        ("model shape --json", "how many parameters?"),
        ("model shape --params", "--params"),
        ("model shape --params many", "is no number of parameters; write 125M"),
        ("model shape --params 10", "outside 1M to 1T"),
        ("model shape --params 1M --vocab-size 1000000", "no model within 5 %"),
        ("model shape --params 1M --aspect 0", "aspect = 0.0"),
        ("model shape --params 1M --aspect nan", "aspect"),
        ("model shape --params 1M --kv-heads -1", "kv_heads = -1"),
        ("model shape --params 1M --feedforward swigul", "swiglu"),
        ("model shape --params 1M --layers 3", "unknown option --layers"),
        ("model shape 1M", "unexpected argument '1M'"),
        ("model show", "which preset?"),
        ("model show llama3-8b", "did you mean llama-3-8b?"),
        ("model show gpt2-small gpt2-xl", "unexpected argument 'gpt2-xl'"),
        ("model list all", "unexpected argument 'all'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("scratchlm: error: ") and printed.err.count("\n") == 1
    assert message in printed.err
    assert printed.out == ""


def test_the_presets_option_is_taken_out_of_a_recipes_options() -> None:
    for given in (["--model.preset", "gpt2-tiny"], ["--model.preset=gpt2-tiny"]):
        rest = ["--train.steps", "3", *given, "--model.layers", "2"]
        assert take_preset(rest) == "gpt2-tiny"
        assert rest == ["--train.steps", "3", "--model.layers", "2"]
    rest = ["--train.steps", "3"]
    assert take_preset(rest) is None and rest == ["--train.steps", "3"]
    with pytest.raises(UserError, match="which one"):
        take_preset(["--seed", "1", "--model.preset"])
