"""The recipes that read from the Hub, shrunk by flags, on local files laid out as the Hub's: from the command line, offline."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from small_run import last_checkpoint, records

from scratchlm.cli import main
from scratchlm.config import load_recipe
from scratchlm.data import TokenData
from scratchlm.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
# As the Hub has them: where the Parquet files lie, and into how many files each split is cut.
LAYOUTS = {
    "tinystories": ("data", {"train": 4, "validation": 1}),
    "openwebtext": ("plain_text", {"train": 8}),
}
SMALL = {
    "tokenizer.vocab_size": "300",
    "model.context_length": "16",
    "model.d_model": "32",
    "model.d_ff": "64",
    "model.layers": "1",
    "model.heads": "2",
    "train.batch_size": "4",
    "train.steps": "3",
    "train.eval_interval": "2",
    "train.compile": "off",
    "train.precision": "fp32",
    "data.workers": "1",
    "device": "cpu",
}


def stories(number: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    words = ["once", "Lily", "Ben", "naïve", "dragon", "🙂", "said", "the", "garden"]
    return [f"{seed}-{n} " + " ".join(chance.choices(words, k=chance.randint(3, 30))) for n in range(number)]


@pytest.fixture(params=sorted(LAYOUTS))
def hub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, dict[str, list[str]]]:
    """A recipe's name and the rows of its dataset, which lies in the folder ``hub``; no network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    arrow = pytest.importorskip("pyarrow")
    folder, splits = LAYOUTS[request.param]
    (tmp_path / "hub" / folder).mkdir(parents=True)
    rows: dict[str, list[str]] = {}
    for split, files in splits.items():
        rows[split] = []
        for number in range(files):
            texts = stories(60, seed=100 * len(rows) + number)
            name = f"{split}-{number:05d}-of-{files:05d}.parquet"
            parquet.write_table(arrow.table({"text": texts}), tmp_path / "hub" / folder / name)
            rows[split] += texts
    return request.param, rows


def command(first: str, name: str, **more: str) -> list[str]:
    fields = {**SMALL, "corpus.dataset": "hub", "out": "run", **more}
    if name == "openwebtext":
        fields["corpus.validation_fraction"] = "0.2"
    return [
        *first.split(),
        str(RECIPES / f"{name}.toml"),
        *(part for k, v in fields.items() for part in (f"--{k}", v)),
    ]


def documents(split: str, tokenizer: Tokenizer) -> list[str]:
    [folder] = Path("runs/cache/data").iterdir()
    tokens = TokenData.open(folder, tokenizer).split(split)
    text = tokenizer.decode(tokens.read(0, len(tokens)))
    return text.split("<|endoftext|>")[:-1]


def test_preparing_the_data_of_a_recipe(
    hub: tuple[str, dict[str, list[str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    name, rows = hub
    assert main(command("data prepare", name)) == 0, capfd.readouterr().err
    tokenizer = Tokenizer.load(Path("run/tokenizer.json"))
    assert tokenizer.vocab_size == 300
    train, held_out = documents("train", tokenizer), documents("validation", tokenizer)
    if name == "tinystories":
        assert (train, held_out) == (rows["train"], rows["validation"])
    else:  # a share is held out
        assert sorted(train + held_out) == sorted(rows["train"])
        assert 0.1 < len(held_out) / len(rows["train"]) < 0.3
    saved = load_recipe("run/recipe.toml")
    assert saved.corpus.dataset == "hub" and saved.model.layers == 1
    assert saved.optim.lr == load_recipe(RECIPES / f"{name}.toml").optim.lr == 1e-3
    before = capfd.readouterr()
    assert main(command("data prepare", name)) == 0
    assert capfd.readouterr().out.count("up to date, skipped") == 2, before


def test_a_trial_on_the_first_documents(hub: tuple[str, dict[str, list[str]]]) -> None:
    name, rows = hub
    assert main(command("data prepare", name, **{"corpus.max_documents": "50"})) == 0
    tokenizer = Tokenizer.load(Path("run/tokenizer.json"))
    train, held_out = documents("train", tokenizer), documents("validation", tokenizer)
    assert (
        train == rows["train"][:50]
        if name == "tinystories"
        else sorted(train + held_out) == sorted(rows["train"][:50])
    )


@pytest.mark.parametrize("hub", ["tinystories"], indirect=True)
def test_training_by_a_recipe(hub: tuple[str, dict[str, list[str]]], capfd: pytest.CaptureFixture[str]) -> None:
    name, _ = hub
    assert main(command("train", name)) == 0, capfd.readouterr().err
    assert last_checkpoint(Path("run")).name.endswith("3")
    assert any("validation_loss" in str(record) or "validation" in str(record) for record in records(Path("run")))
