"""The first encoding on a machine: plain Python while that is quicker than compiling, the same ids before and after."""

from __future__ import annotations

import bpe_oracle as oracle
import pytest

from scratchlm.tokenizer import Tokenizer
from scratchlm.tokenizer import encoding as encoding_module


@pytest.fixture
def never_compiled(monkeypatch):
    monkeypatch.setattr(encoding_module, "_compiled_before", lambda: False)


def fresh() -> Tokenizer:
    made = oracle.trained()
    return Tokenizer(made.vocab, made.merges, [oracle.EOT])


LONG = (oracle.TEXT + "é漢 " + oracle.EOT + "it's \U0001f600\n") * 20


def wanted(text: str) -> list[int]:
    tokenizer = fresh()
    return tokenizer._encoder._plain(text, tokenizer._encoder.special_choice("all", ())[0]).tolist()


def test_what_plain_python_does_sooner_is_not_compiled(never_compiled, monkeypatch):
    monkeypatch.setattr(encoding_module, "_FIRST", 1 << 10)
    tokenizer = fresh()
    for text in (LONG, LONG.encode(), LONG[: 1 << 10]):
        assert tokenizer.encode_array(text, allowed_special="all").tolist() == wanted(
            text if isinstance(text, str) else text.decode()
        )
    assert tokenizer.count_tokens(LONG, allowed_special="all") == len(wanted(LONG))
    [one] = tokenizer.encode_batch([LONG], allowed_special="all")
    assert list(one) == wanted(LONG)
    assert tokenizer._encoder._fast_encoder is None


@pytest.mark.parametrize("limit", ["_PATIENCE", "_FIRST_EVER", "_PART"])
def test_when_it_takes_long_the_rest_is_compiled(never_compiled, monkeypatch, limit):
    """Too much time, too much text, or a word that may be long: the ids are the same."""
    monkeypatch.setattr(encoding_module, "_FIRST", 1 << 10)
    monkeypatch.setattr(encoding_module, "_PART", 256)
    text = LONG + "a" * 2000 * (limit == "_PART") + LONG
    if limit != "_PART":
        monkeypatch.setattr(encoding_module, limit, 1e-4 if limit == "_PATIENCE" else len(text) - 1)
    tokenizer = fresh()
    ids = tokenizer.encode_array(text, allowed_special="all")
    assert ids.tolist() == wanted(text) and ids.dtype == tokenizer.encode_array("").dtype
    assert tokenizer._encoder._fast_encoder is not None
    assert ids.flags.writeable


def test_bytes_that_are_no_text_stay_what_they_are(never_compiled, monkeypatch):
    monkeypatch.setattr(encoding_module, "_FIRST", 1 << 10)
    monkeypatch.setattr(encoding_module, "_PART", 256)
    data = b"\xff\xfe and \xc3( so on " * 300
    for patience in (4.0, 1e-4):
        monkeypatch.setattr(encoding_module, "_PATIENCE", patience)
        tokenizer = fresh()
        assert tokenizer.decode_bytes(tokenizer.encode_array(data)) == data
        assert (tokenizer._encoder._fast_encoder is None) == (patience == 4.0)


def test_where_it_was_compiled_before_it_is_used(monkeypatch):
    monkeypatch.setattr(encoding_module, "_FIRST", 1 << 10)
    monkeypatch.setattr(encoding_module, "_compiled_before", lambda: True)
    tokenizer = fresh()
    assert tokenizer.encode_array(LONG, allowed_special="all").tolist() == wanted(LONG)
    assert tokenizer._encoder._fast_encoder is not None


def test_what_was_compiled_is_found_on_disk():
    fresh()._encoder._fast  # noqa: B018 (compiles)
    assert encoding_module._compiled_before()


def test_many_texts_are_no_way_around_the_limit(never_compiled, monkeypatch):
    """Short ones, too, end on the compiled road when plain Python has taken too long; each is counted once."""
    monkeypatch.setattr(encoding_module, "_SMALL", 1 << 10)
    monkeypatch.setattr(encoding_module, "_FIRST", 1 << 11)
    monkeypatch.setattr(encoding_module, "_FIRST_TOTAL", 1 << 11)
    texts = [LONG[start : start + 500] for start in range(0, 10_000, 500)]
    right = [wanted(text) for text in texts]
    patient = fresh()
    assert [one.tolist() for one in patient.encode_batch(texts, allowed_special="all")] == right
    assert patient._encoder._fast_encoder is None and patient._encoder._at_work.seen == sum(map(len, texts))
    monkeypatch.setattr(encoding_module, "_PATIENCE", 1e-5)
    hasty = fresh()
    assert [one.tolist() for one in hasty.encode_batch(texts, allowed_special="all")] == right
    assert hasty._encoder._fast_encoder is not None
    counted = fresh()
    counted.count_tokens(LONG, allowed_special="all")
    assert counted._encoder._at_work.seen == len(LONG)


def test_a_normal_form_has_no_budget_of_its_own(never_compiled, monkeypatch):
    made = oracle.trained()
    tokenizer = Tokenizer(made.vocab, made.merges, [oracle.EOT], normalizer="NFC")
    encoder = tokenizer._encoder
    assert encoder._without_normalizer._at_work is encoder._at_work
