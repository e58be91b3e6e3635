"""``scratchlm tokenizer convert | compare | inspect``: formats both ways, what is said, what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from scratchlm.cli import main
from scratchlm.tokenizer import Tokenizer, train_bpe
from scratchlm.tokenizer.tiktoken_files import KNOWN, Known, ranks_of

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_bpe([Path(__file__).read_text(encoding="utf-8")], 400, [END])


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer) -> Path:
    monkeypatch.chdir(tmp_path)
    tokenizer.save("t.json")
    (tmp_path / "text.txt").write_text("def main():\n    return 'the text'  # é漢\n" * 20, encoding="utf-8")
    return tmp_path


def run(capsys, line: str) -> str:
    """Standard output of a command that must succeed."""
    assert main(line.split()) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def fails(capsys, *words: str) -> str:
    assert main(list(words)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("scratchlm: error: ")
    return error


# ------------------------------------------------------------------ convert


def test_round_through_all_formats(folder, capsys, tokenizer):
    said = run(capsys, "tokenizer convert t.json t.tiktoken")
    assert "t.tiktoken: 400 tokens, 143 merges" in said
    assert f"give them to whoever opens it: pattern gpt2; special tokens {END}=399" in said
    run(capsys, f"tokenizer convert t.tiktoken pair --pattern gpt2 --special-tokens {END}=399")
    assert sorted(path.name for path in Path("pair").iterdir()) == ["merges.txt", "vocab.json"]
    assert f"special tokens {END}=399" in run(capsys, "tokenizer convert t.json other --to gpt2")
    said = run(capsys, "tokenizer convert pair back.json")
    assert "does not hold" not in said
    assert Tokenizer.load("back.json") == tokenizer
    run(capsys, "tokenizer convert pair elsewhere --to hf")
    assert Tokenizer.load("elsewhere/tokenizer.json") == tokenizer
    assert run(capsys, "tokenizer encode pair text.txt") == run(capsys, "tokenizer encode t.json text.txt")


def test_openai_names_of_the_pair(folder, capsys, tokenizer):
    run(capsys, "tokenizer convert t.json pair")
    Path("pair/vocab.json").rename("pair/encoder.json")
    Path("pair/merges.txt").rename("pair/vocab.bpe")
    assert Tokenizer.load("pair") == tokenizer


def test_well_known_rank_files(folder, capsys, monkeypatch, tokenizer):
    monkeypatch.setitem(KNOWN, "r50k_base", Known(399, "gpt2", {END: 399}))
    run(capsys, "tokenizer convert t.json r50k_base.tiktoken")
    run(capsys, "tokenizer convert r50k_base.tiktoken again.json")
    assert Tokenizer.load("again.json") == tokenizer
    Path("r50k_base.tiktoken").rename("mine.tiktoken")
    run(capsys, "tokenizer convert mine.tiktoken named.json --name r50k_base")
    assert Tokenizer.load("named.json") == tokenizer
    content = json.loads(run(capsys, "tokenizer compare text.txt r50k_base=mine.tiktoken --json"))
    assert content["tokenizers"][0]["name"] == "r50k_base"


def test_specials_of_a_pair(folder, capsys):
    run(capsys, "tokenizer convert t.json pair")
    run(capsys, f"tokenizer convert pair more.json --special-tokens {END} <|new|>")
    assert Tokenizer.load("more.json").special_tokens == {END: 399, "<|new|>": 400}


def test_what_convert_refuses(folder, capsys, tokenizer):
    ranks = ranks_of(tokenizer)
    assert len(ranks) == 399
    run(capsys, "tokenizer convert t.json x.tiktoken")
    cases = {
        "tokenizer convert t.json x.tiktoken": "x.tiktoken exists; choose another",
        "tokenizer convert t.json t.bin": "t.bin: its name does not say which format; add --to",
        "tokenizer convert t.json y.json --pattern gpt2": "t.json holds its own pattern and special tokens",
        "tokenizer convert t.json y.json --name gpt2": "--name gpt2 is for rank files; t.json is none",
        "tokenizer convert x.tiktoken y.json": "give the pattern (and the special tokens)",
        "tokenizer convert x.tiktoken y.json --name gpt5": "'gpt5' is no well-known encoding",
        "tokenizer convert x.tiktoken y.json --pattern gpt9": "unknown pre-tokenisation pattern 'gpt9'",
        "tokenizer convert x.tiktoken y.json --pattern gpt2 --special-tokens a=400 b": "every one an id (NAME=ID) or none",
        "tokenizer convert x.tiktoken y.json --pattern gpt2 --special-tokens <a>=500 <a>=501": "'<a>' is named twice",
        "tokenizer convert x.tiktoken y.json --pattern gpt2 --special-tokens <a> <a>": "'<a>' is named twice",
        "tokenizer convert x.tiktoken y.json --pattern gpt2 --special-tokens <a>=5": "which vocab gives to",
        "tokenizer convert none.json y.json": "none.json does not exist",
        "tokenizer convert none.tiktoken y.json --pattern gpt2": "none.tiktoken does not exist",
        "tokenizer convert text.txt y.json": "text.txt is not valid JSON",
        "tokenizer convert . y.json": "tokenizer.json does not exist, nor do vocab.json and merges.txt",
    }
    for line, message in cases.items():
        assert message in fails(capsys, *line.split()), line
    assert not Path("y.json").exists()
    run(capsys, "tokenizer convert t.json x.tiktoken --overwrite True")


def test_formats_that_cannot_hold_it(folder, capsys, tokenizer):
    Tokenizer(tokenizer.vocab, tokenizer.merges, [END], normalizer="NFC").save("nfc.json")
    Tokenizer(tokenizer.vocab | {400: b"q!q"}, tokenizer.merges, [END], ignore_merges=True).save("whole.json")
    Tokenizer(tokenizer.vocab, tokenizer.merges, [END], "o200k", ignore_merges=True).save("same.json")
    assert "tiktoken does not normalise text" in fails(capsys, *["tokenizer", "convert", "nfc.json", "n.tiktoken"])
    assert "cannot say that text is normalised" in fails(capsys, *["tokenizer", "convert", "nfc.json", "n"])
    assert "cannot say that b'q!q' is taken as a whole" in fails(
        capsys, *["tokenizer", "convert", "whole.json", "w"]
    )
    assert not Path("n").exists() and not Path("w").exists()
    run(capsys, "tokenizer convert whole.json w.tiktoken")  # tiktoken does take it so
    # Every token is made by merges here: taking them whole changes nothing. The pattern must be told.
    assert "pattern o200k; special tokens" in run(capsys, "tokenizer convert same.json s")
    Tokenizer(tokenizer.vocab, tokenizer.merges, [END], added_tokens=[END]).save("added.json")
    assert json.loads(Path("added.json").read_text())["added_tokens"][0]["special"] is False
    assert Tokenizer.load("added.json").added_tokens == {END}
    assert "1 of them are added but not special" in run(capsys, "tokenizer convert added.json a")


# ------------------------------------------------------------------ compare


def test_compare(folder, capsys, tokenizer):
    Path("runs/one").mkdir(parents=True)
    tokenizer.save("runs/one")
    tokenizer.save_gpt2("pair")
    said = run(capsys, "tokenizer compare text.txt t.json runs/one named=pair")
    assert "text.txt: 0.00 MB, 140 words" in said
    assert all(name in said for name in ("t ", "one ", "named ", "scratchlm", "bytes", "MB/s"))
    content = json.loads(run(capsys, "tokenizer compare text.txt --json"))
    assert [one["name"] for one in content["tokenizers"]] == ["one"] and content["whole"]
    text = Path("text.txt").read_text(encoding="utf-8")
    assert content["bytes"] == len(text.encode())
    assert content["tokenizers"][0]["tokens"] == len(tokenizer.encode(text))
    assert content["tokenizers"][0]["engines"][0]["warm"] > 0


def test_compare_reads_no_more_than_it_uses(folder, capsys):
    with Path("huge.txt").open("wb") as stream:
        stream.write(b"the beginning of a file " * 10_000)
        stream.truncate(1 << 40)  # a terabyte of zeros, none of it on the disk
    content = json.loads(run(capsys, "tokenizer compare huge.txt t.json --megabytes 0.1 --json"))
    assert 100_000 <= content["bytes"] < 200_000 and not content["whole"]


def test_what_compare_refuses(folder, capsys):
    Path("empty.txt").touch()
    Path("bad.txt").write_bytes(b"ab\xff")
    Path("cut.json").write_bytes(Path("t.json").read_bytes()[:1000])
    cases = {
        "tokenizer compare text.txt": "no tokenizer here",
        "tokenizer compare text.txt cl100k_base": "where is cl100k_base? Write cl100k_base=PATH",
        "tokenizer compare text.txt =t.json": "neither PATH nor NAME=PATH",
        "tokenizer compare text.txt t=": "neither PATH nor NAME=PATH",
        "tokenizer compare text.txt t.json t.json": "two tokenizers are named t; write NAME=PATH",
        "tokenizer compare text.txt none.json": "none.json does not exist",
        "tokenizer compare text.txt cut.json": "cut.json is not valid JSON",
        "tokenizer compare text.txt t.json --megabytes 0": "megabytes",
        "tokenizer compare none.txt t.json": "cannot read none.txt: No such file",
        "tokenizer compare empty.txt t.json": "empty.txt is empty",
        "tokenizer compare bad.txt t.json": "bad.txt: byte 2 is not UTF-8",
    }
    for line, message in cases.items():
        assert message in fails(capsys, *line.split()), line


# ------------------------------------------------------------------ inspect


def test_inspect(folder, capsys, tokenizer):
    words = ["tokenizer", "inspect", "t.json", "--text"]
    assert main([*words, "return the"]) == 0
    shown = capsys.readouterr().out
    cut = "│".join(tokenizer.decode([index]) for index in tokenizer.encode("return the"))
    assert cut in shown and "longest tokens" in shown
    shown = run(capsys, "tokenizer inspect t.json --word tokenizer")
    assert "pieces" in shown and "t│o│k" in shown and "longest tokens" not in shown
    content = json.loads(run(capsys, "tokenizer inspect t.json --word tokenizer --json"))
    assert content["words"][0]["ids"] == tokenizer.encode("tokenizer") and content["text"] is None
    said = run(capsys, "tokenizer inspect t.json --file text.txt --html t.html")
    text = Path("text.txt").read_text(encoding="utf-8")
    assert f"t.html: {len(tokenizer.encode(text)):,} tokens, " in said
    assert Path("t.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "t.html exists" in fails(capsys, *["tokenizer", "inspect", "t.json", "--text", "x", "--html", "t.html"])
    assert "give one of the two" in fails(
        capsys, *["tokenizer", "inspect", "t.json", "--text", "x", "--file", "text.txt"]
    )
    assert "cannot read none.txt" in fails(capsys, *["tokenizer", "inspect", "t.json", "--file", "none.txt"])


def test_inspect_of_a_long_file_shows_its_beginning(folder, capsys, monkeypatch):
    monkeypatch.setattr("scratchlm.commands.tokenizer_tools._INSPECTED", 1000)
    Path("long.txt").write_text("some words\n" * 30_000)
    assert main(["tokenizer", "inspect", "t.json", "--file", "long.txt", "--json"]) == 0
    shown = capsys.readouterr()
    assert "long.txt goes on" in shown.err and 1000 <= json.loads(shown.out)["text"]["bytes"] < 70_000


def test_decode_names_id_and_place(folder, capsys):
    Path("ids.txt").write_text("97 98 5000")
    error = fails(capsys, *["tokenizer", "decode", "t.json", "ids.txt"])
    assert "id 5000 at position 2 is not in the vocabulary of 400 tokens (0 to 399)" in error
