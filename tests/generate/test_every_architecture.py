"""Generation with every architecture: a row's text does not depend on its neighbours, within the context and beyond it."""

from __future__ import annotations

import pytest
from model_variants import VARIANTS, build, some_now

from scratchlm.generate import Generator
from scratchlm.model import ModelConfig


class Letters:
    """Ids 0 … 36 as single bytes from "A" on."""

    def __init__(self) -> None:
        self.vocab = {n: bytes([65 + n]) for n in range(37)}
        self.special_tokens = {"A": 0}

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 65 for letter in text]

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(65 + n for n in ids)


@pytest.mark.parametrize("config", some_now(VARIANTS, 3))
def test_alone_as_in_a_batch(config: ModelConfig) -> None:
    generator = Generator(build(config).double(), Letters())  # type: ignore[arg-type]
    prompts = ["ABCDE", "FG", "HIJKLMNOPQRS"]
    options = {
        "max_tokens": 40,
        "temperature": 0.0,
        "stop": [],
    }  # beyond the context of 24: rows slide, each in its time
    together = generator.generate(prompts, **options)
    assert together == [generator.generate([prompt], **options)[0] for prompt in prompts]
    assert all(len(text) == 40 for text in together)
