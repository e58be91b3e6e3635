"""Hugging Face datasets: against a stand-in for the package, and, where it is installed, against local files."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from scratchlm.config import CorpusConfig, load_recipe
from scratchlm.data import open_corpus
from scratchlm.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes"
ROWS = {
    "train": [
        "Once upon a time.",
        "",
        "Lily \u00e9 \U0001f600",
        None,
        *(f"story {number}" for number in range(2500)),
    ],
    "validation": ["A held-out story."],
}


class Rows:
    """As much of ``datasets.Dataset`` as the corpus uses."""

    def __init__(self, columns: dict[str, list]) -> None:
        self.columns = columns
        self.column_names = list(columns)
        self.data = types.SimpleNamespace(nbytes=sum(len(text or "") for text in columns.get("text", [])))

    def select_columns(self, names):
        return Rows({name: self.columns[name] for name in names})

    def iter(self, batch_size):
        for start in range(0, len(next(iter(self.columns.values()))), batch_size):
            yield {name: values[start : start + batch_size] for name, values in self.columns.items()}


@pytest.fixture
def package(monkeypatch):
    """A package ``datasets`` that knows one dataset, offline, and notes how it was asked."""
    module = types.ModuleType("datasets")
    module.calls = []

    def load_dataset(path, name=None, *, split, streaming):
        module.calls.append((path, name, split, streaming))
        if path != "roneneldan/TinyStories":
            raise FileNotFoundError(
                f"Dataset '{path}' doesn't exist on the Hub or cannot be accessed.\nsecond line"
            )
        if split not in ROWS:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(ROWS)}.')
        return Rows({"id": list(range(len(ROWS[split]))), "text": ROWS[split]})

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def stories(**fields) -> CorpusConfig:
    return CorpusConfig(
        **{"kind": "huggingface", "dataset": "roneneldan/TinyStories", "validation_split": "validation", **fields}
    )


def texts(config: CorpusConfig, split="train") -> list[str]:
    return [document.text for document in open_corpus(config).documents(split)]


def test_rows_become_documents(package):
    assert texts(stories()) == [text for text in ROWS["train"] if text]
    assert texts(stories(), "validation") == ROWS["validation"]
    names = [document.name for document in open_corpus(stories()).documents("train")]
    assert names[:3] == ["train#0", "train#2", "train#4"] and names[-1] == "train#2503"
    assert package.calls[0] == ("roneneldan/TinyStories", None, "train", False)
    assert open_corpus(stories()).total_bytes() == sum(len(text or "") for rows in ROWS.values() for text in rows)


def test_a_trial_streams(package):
    config = stories(max_documents=3, subset="clean")
    assert texts(config) == [text for text in ROWS["train"] if text][:3]
    assert package.calls == [("roneneldan/TinyStories", "clean", "train", True)]
    assert open_corpus(config).total_bytes() is None


def test_without_a_split_of_its_own_a_share_is_held_out(package):
    config = stories(validation_split=None, validation_fraction=0.1)
    train, held_out = texts(config), texts(config, "validation")
    assert sorted(train + held_out) == sorted(text for text in ROWS["train"] if text)
    assert 0.07 < len(held_out) / len(ROWS["train"]) < 0.13


def test_the_fingerprint_follows_the_content(package, monkeypatch):
    first = open_corpus(stories()).fingerprint(show_progress=False)
    assert open_corpus(stories()).fingerprint(show_progress=False) == first
    assert open_corpus(stories(max_documents=5)).fingerprint(show_progress=False) != first
    monkeypatch.setitem(ROWS, "validation", ["Another story."])
    assert open_corpus(stories()).fingerprint(show_progress=False) != first


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": None}, "corpus.dataset is empty"),
        (
            {"dataset": "no/such"},
            "cannot load dataset 'no/such', split 'train': Dataset 'no/such' doesn't exist on the Hub or cannot be accessed.$",
        ),
        ({"train_split": "trian"}, "split 'trian': Unknown split"),
        ({"subset": "x", "dataset": "no/such"}, "dataset 'no/such', configuration 'x', split"),
        ({"text_field": "story"}, "split train: no column 'story'; it has id, text: set corpus.text_field"),
        ({"text_field": "id"}, "row 0: column 'id' holds a int, not text"),
    ],
)
def test_errors_are_one_line_and_say_what_to_do(package, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        texts(stories(**fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tinystories", "openwebtext"])
def test_the_course_s_recipes(package, name):
    """CS336, assignment 1: the hyperparameters of its TinyStories and OpenWebText models."""
    recipe = load_recipe(RECIPES / f"{name}.toml")
    model, train = recipe.model, recipe.train
    assert (model.context_length, model.d_model, model.resolved_d_ff, model.layers, model.heads) == (
        256,
        512,
        1344,
        4,
        16,
    )
    assert model.rope.theta == (10_000,) and model.norm_placement == "pre" and model.feedforward == "swiglu"
    assert recipe.tokenizer.vocab_size == {"tinystories": 10_000, "openwebtext": 32_000}[name]
    assert train.batch_size * train.steps * model.context_length == 327_680_000
    assert recipe.corpus.kind == "huggingface" and recipe.corpus.text_field == "text"
    local = recipe.corpus.model_copy(update={"dataset": "roneneldan/TinyStories"})
    assert len(texts(local)) > 2000 and texts(local, "validation")


# With the package itself, offline


def written(folder: Path) -> Path:
    folder.mkdir()
    for split, rows in ROWS.items():
        lines = [json.dumps({"text": text}) + "\n" for text in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    module = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


def test_a_local_folder_of_files(datasets, tmp_path):
    folder = str(written(tmp_path / "stories"))
    assert texts(stories(dataset=folder)) == [text for text in ROWS["train"] if text]
    assert texts(stories(dataset=folder), "validation") == ROWS["validation"]
    assert texts(stories(dataset=folder, max_documents=2)) == ["Once upon a time.", "Lily \u00e9 \U0001f600"]
    with pytest.raises(UserError, match="no column 'story'; it has text"):
        texts(stories(dataset=folder, text_field="story"))
    with pytest.raises(UserError, match=r"cannot load dataset .*split 'test'"):
        texts(stories(dataset=folder, train_split="test"))


def test_a_folder_of_save_to_disk(datasets, tmp_path):
    both = datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": rows}) for split, rows in ROWS.items()})
    both.save_to_disk(str(tmp_path / "both"))
    assert texts(stories(dataset=str(tmp_path / "both"))) == [text for text in ROWS["train"] if text]
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        texts(stories(dataset=str(tmp_path / "both"), train_split="test"))
    both["train"].save_to_disk(str(tmp_path / "one"))
    one = stories(dataset=str(tmp_path / "one"), validation_split=None)
    assert len(texts(one)) + len(texts(one, "validation")) == len([text for text in ROWS["train"] if text])
    with pytest.raises(UserError, match="holds a single split"):
        texts(stories(dataset=str(tmp_path / "one")))
