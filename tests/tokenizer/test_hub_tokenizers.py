"""tokenizer.json as the Hub's families have it, written by `tokenizers` itself: ids are its own, and the way back opens there."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import bpe_oracle as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratchlm.errors import UserError
from scratchlm.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
FAMILIES = ["gpt2", "llama3", "qwen2.5", "qwen3"]
SPECIAL = {
    "gpt2": ["<|endoftext|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|eot_id|>"],
    "qwen2.5": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
ADDED = {
    "qwen2.5": ["<tool_call>", "</tool_call>"],
    "qwen3": ["<tool_call>", "</tool_call>", "<think>", "</think>"],
}


@functools.cache
def hub(family: str):
    """A small tokenizer of `tokenizers` with all the parts that the family's published one has."""
    pre, models, decoders = tokenizers.pre_tokenizers, tokenizers.models, tokenizers.decoders
    split = {"llama3": LLAMA3, "qwen2.5": QWEN, "qwen3": QWEN}.get(family)
    whole = pre.ByteLevel(add_prefix_space=False)
    plain = pre.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    other = tokenizers.Tokenizer(models.BPE())
    other.pre_tokenizer = (
        whole if split is None else pre.Sequence([pre.Split(tokenizers.Regex(split), "isolated"), plain])
    )
    if family.startswith("qwen"):
        other.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    other.train_from_iterator([oracle.TEXT], trainer)
    if family == "llama3":  # some of its tokens are reached by no merges
        model = json.loads(other.to_str())["model"]
        vocab = model["vocab"] | {"qĠq": len(model["vocab"]), "Ġunmerged": len(model["vocab"]) + 1}
        other.model = models.BPE(vocab, [tuple(pair) for pair in model["merges"]], ignore_merges=True)
        processors = tokenizers.processors
        other.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<|begin_of_text|> $A", pair=None, special_tokens=[("<|begin_of_text|>", len(vocab))]
                ),
            ]
        )
    else:
        other.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    other.decoder = decoders.ByteLevel()
    other.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in SPECIAL[family]])
    other.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in ADDED.get(family, [])])
    return other


@functools.cache
def ours(family: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        hub(family).save(f"{folder}/tokenizer.json")
        return Tokenizer.load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts(family):
    tokenizer, other = ours(family), hub(family)
    assert {
        name: other.token_to_id(name) for name in SPECIAL[family] + ADDED.get(family, [])
    } == tokenizer.special_tokens
    assert tokenizer.added_tokens == set(ADDED.get(family, []))
    assert tokenizer.normalizer == ("NFC" if family.startswith("qwen") else None)
    assert tokenizer.ignore_merges == (family == "llama3")
    assert tokenizer.vocab_size == other.get_vocab_size()
    if family == "llama3":
        assert tokenizer.encode(" unmerged") == [other.token_to_id("Ġunmerged")]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_theirs_and_the_way_back_is_exact(family, tmp_path):
    tokenizer, other = ours(family), hub(family)
    path = tokenizer.save(tmp_path)
    again, live = Tokenizer.load(path), tokenizer.as_hf()
    reopened = tokenizers.Tokenizer.from_file(str(path))
    assert again == tokenizer and again.added_tokens == tokenizer.added_tokens
    flags = {
        added["content"]: added["special"] for added in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
    }
    theirs = {added["content"]: added["special"] for added in json.loads(other.to_str())["added_tokens"]}
    assert flags == theirs

    names = st.sampled_from([*tokenizer.special_tokens, "e\u0301", "\u0338", " unmerged", "1234567", "it'S"])

    @given(parts=st.lists(st.one_of(oracle.texts, names), max_size=5))
    @settings(deadline=None, max_examples=100)
    def equal(parts):
        text = "".join(parts)
        ids = other.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids == again.encode(text)
        for one in (live, reopened):
            assert one.encode(text, add_special_tokens=False).ids == ids
            assert one.decode(ids, skip_special_tokens=False) == other.decode(ids, skip_special_tokens=False)
            assert one.decode(ids) == other.decode(ids)  # what is special is left out, what is only added is not
        assert tokenizer.decode(ids) == other.decode(ids, skip_special_tokens=False)

    equal()


def test_added_tokens_are_no_secrets():
    """`disallowed_special="all"` is about special tokens; those that are only added are text to their users."""
    tokenizer = ours("qwen3")
    text = "<think>x</think>"
    assert tokenizer.encode(
        text, allowed_special=tokenizer.added_tokens, disallowed_special="all"
    ) == tokenizer.encode(text)
    tokenizer.encode(text, allowed_special=(), disallowed_special="all")
    with pytest.raises(UserError, match=r"disallowed special token '<.im_end.>'"):
        tokenizer.encode(text + "<|im_end|>", allowed_special=(), disallowed_special="all")


@pytest.mark.parametrize("family", FAMILIES)
def test_to_tiktoken(family, tmp_path):
    """Hugging Face's trainer gives ids in the order of merges, so all but Qwen's normaliser can go there."""
    pytest.importorskip("tiktoken")
    tokenizer = ours(family)
    if tokenizer.normalizer is not None:
        with pytest.raises(UserError, match="tiktoken does not normalise text"):
            tokenizer.as_tiktoken()
        return
    live = tokenizer.as_tiktoken()
    again = Tokenizer.from_tiktoken(
        tokenizer.save_tiktoken(tmp_path / "x.tiktoken"), tokenizer.pattern, tokenizer.special_tokens
    )
    for text in (oracle.TEXT, " unmerged q q", "".join(tokenizer.special_tokens), "1234567 it'S\r\n\n  x  "):
        assert live.encode(text, allowed_special="all") == tokenizer.encode(text) == again.encode(text)


def test_files_that_are_none(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(b'{"model": "\xff"}')
    (tmp_path / "b.json").write_bytes(b"")
    (tmp_path / "c").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "tokenizer.json").mkdir()
    content = hub("qwen3").to_str().encode()
    for cut in (1, len(content) // 3, len(content) - 1):
        (tmp_path / f"cut{cut}.json").write_bytes(content[:cut])
    for name, message in [
        ("a.json", "is not valid JSON"), ("b.json", "is not valid JSON"), ("c", "does not exist, nor do vocab.json"),
        ("d", "is a folder, not a file"), *((path.name, "is not valid JSON") for path in tmp_path.glob("cut*")),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            Tokenizer.load(tmp_path / name)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
