"""The generator: prompts in, text out, one token at a time."""

from __future__ import annotations

import codecs
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scratchlm.config import GenerateConfig
from scratchlm.errors import UserError
from scratchlm.generate.cache import KVCache
from scratchlm.generate.fused_step import FusedStep, Int8Matrices, fused_step, why_not
from scratchlm.generate.sampling import row_generator, sample
from scratchlm.progress import progress
from scratchlm.section import validate

if TYPE_CHECKING:
    from scratchlm.model import Transformer
    from scratchlm.tokenizer import Tokenizer


FUSED_FROM = 2
"""Tokens from which on a text of its own is written with one compiled function per token (:mod:`scratchlm.generate.fused_step`); the first is read off
the prompt."""

IN_8_BITS = "generate.weights = int8 is for Llama-like models in fp32 or bf16 on a CPU"


class Generator:
    """Continues texts with a model.

    The model sees at most its `context_length` tokens. A text that grows beyond it slides: the last half of the context
    becomes the whole window, is read once more from position 0, and generation goes on; so every position is one the model
    was trained on, and a token costs one position except once per half context.

    Args:
        model: a Transformer; it is used where it is and as it is (in eval mode while it computes).
        tokenizer: the one the model was trained with. Ids it does not know are never sampled.
        separator_id: the id an empty prompt starts after: the one that separated documents in training. None: the
            tokenizer's first special token.

    Raises:
        UserError: `separator_id` is no id of the tokenizer.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, separator_id: int | None = None) -> None:
        self.model, self.tokenizer, self.separator_id = model, tokenizer, separator_id
        if separator_id is not None and separator_id not in tokenizer.vocab:
            raise UserError(f"the separator {separator_id} is no id of the tokenizer; give that of a special token")
        self.context_length = model.config.context_length
        known = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        ids = sorted({*tokenizer.vocab, *tokenizer.special_tokens.values()})
        known[[i for i in ids if i < model.config.vocab_size]] = True
        self._unknown = None if bool(known.all()) else ~known

    def stream(self, prompt: str, config: GenerateConfig | None = None, **options: Any) -> Iterator[str]:
        """Yield the continuation of `prompt` as it comes.

        A piece is never empty and never ends inside a UTF-8 character; bytes that are no UTF-8 become U+FFFD. Joined, the
        pieces are what :meth:`generate` returns for the prompt alone.

        Args:
            prompt: text; empty: start after the separator.
            config: sampling parameters (its `prompts` are ignored); None: the defaults.
            options: fields of :class:`~scratchlm.config.GenerateConfig` that replace those of `config`.

        Raises:
            UserError: see :meth:`generate`; at the call, not at the first piece.
        """
        config = self._config(config, options)
        stop, matrices = self._stop_ids(config), self._matrices(config)
        return self._pieces(self._tokens([self._encode(prompt)], config, stop, matrices))

    def _pieces(self, steps: Iterator[list[tuple[int, int]]]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for step in steps:
            for _, token in step:
                if piece := decoder.decode(self.tokenizer.decode_bytes([token])):
                    yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def generate(
        self,
        prompts: str | Sequence[str],
        config: GenerateConfig | None = None,
        *,
        show_progress: bool = False,
        **options: Any,
    ) -> list[str]:
        """Continue each prompt, all of them in one batch.

        Row i draws from a random stream of its own, given by (seed, i): its text does not depend on the other rows, but for rounding. (A text alone
        is computed in another order than many side by side; in bf16 that now and then decides between two tokens.)

        Args:
            prompts: texts (one text counts as a list of one); an empty one starts after the separator.
            config: sampling parameters (its `prompts` are ignored); None: the defaults.
            show_progress: show a bar of the tokens drawn for each prompt, `max_tokens` at most.
            options: fields of :class:`~scratchlm.config.GenerateConfig` (`max_tokens`, `temperature`, `top_k`, `top_p`,
                `stop`, `seed`, `weights`) that replace those of `config`.

        Returns:
            For each prompt the continuation alone, without the stop token that ended it.

        Raises:
            UserError: an unknown option or stop token, a value out of range, an empty prompt without
                a separator or special token, a prompt with an id that the model does not have, or ``weights = int8`` for a model that is
                not Llama-like or not on a CPU.
        """
        config = self._config(config, options)
        encoded = list(map(self._encode, [prompts] if isinstance(prompts, str) else prompts))
        texts: list[list[int]] = [[] for _ in encoded]
        stop, matrices = self._stop_ids(config), self._matrices(config)
        # In 8 bits texts are written one after another, else side by side.
        groups = [list(range(len(encoded)))] if matrices is None else [[row] for row in range(len(encoded))]
        steps = (
            step
            for rows in groups
            for step in self._tokens(
                [encoded[row] for row in rows], config, stop, matrices, first=min(rows, default=0)
            )
        )
        total = config.max_tokens * len(groups)
        for step in progress(steps, description="generate", total=total, unit="token", show=show_progress):
            for row, token in step:
                texts[row].append(token)
        return [self.tokenizer.decode_bytes(ids).decode("utf-8", errors="replace") for ids in texts]

    @staticmethod
    def _config(config: GenerateConfig | None, options: dict[str, Any]) -> GenerateConfig:
        base = config if config is not None else GenerateConfig()
        return validate(GenerateConfig, {**base.model_dump(), **options}, "generate") if options else base

    def _stop_ids(self, config: GenerateConfig) -> set[int]:
        special = self.tokenizer.special_tokens
        for token in config.stop:
            if token not in special:
                known = ", ".join(special) or "none"
                raise UserError(
                    f"generate.stop names {token!r}, which is no special token of the tokenizer ({known})"
                )
        return {special[token] for token in config.stop}

    def _encode(self, prompt: str) -> list[int]:
        """Ids of a prompt, at least one, at most a context: of a longer one the tail."""
        ids = [int(token) for token in self.tokenizer.encode(prompt)]
        if not ids:
            if self.separator_id is None and not self.tokenizer.special_tokens:
                raise UserError(
                    "an empty prompt starts after a special token, and this tokenizer has none; give a text"
                )
            start = self.separator_id
            ids = [start if start is not None else next(iter(self.tokenizer.special_tokens.values()))]
        if max(ids) >= self.model.config.vocab_size:
            raise UserError(
                f"the prompt has token id {max(ids)}, the model's vocabulary ends at {self.model.config.vocab_size - 1}; "
                "use the tokenizer the model was trained with"
            )
        if len(ids) > self.context_length:
            warnings.warn(
                f"the prompt has {len(ids)} tokens, the model reads {self.context_length}: only its tail is used",
                stacklevel=3,
            )
            ids = ids[-self.context_length :]
        return ids

    def _tokens(
        self,
        prompts: list[list[int]],
        config: GenerateConfig,
        stop: set[int],
        matrices: Int8Matrices | None = None,
        first: int = 0,
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield for each step the (row, token id) of every row that goes on; rows are counted from `first`."""
        if not prompts or not config.max_tokens:
            return
        windows = {
            row: list(ids) for row, ids in enumerate(prompts, first)
        }  # what the model sees of each unfinished row
        generators = {row: row_generator(config.seed, row) for row in windows}
        room = min(self.context_length, max(map(len, prompts)) + config.max_tokens)
        prefixes = {row: len(ids) for row, ids in windows.items()}  # how much of each window is prompt
        cache, logits = self._read(list(windows.values()), room, list(prefixes.values()))
        step = self._fused(cache, config.max_tokens, matrices)
        for left in range(config.max_tokens - 1, -1, -1):
            drawn = sample(
                logits, config.temperature, config.top_k, config.top_p, [generators[row] for row in windows]
            ).tolist()
            going = [place for place, token in enumerate(drawn) if token not in stop]
            rows = list(windows)
            windows = {rows[place]: [*windows[rows[place]], drawn[place]] for place in going}
            yield [(row, window[-1]) for row, window in windows.items()]
            if not windows or not left:
                return
            slid = {row: self._slide(window) for row, window in windows.items()}
            if any(len(slid[row]) < len(windows[row]) for row in windows) or cache.length == cache.max_length:
                prefixes = {row: max(0, prefixes[row] - len(windows[row]) + len(slid[row])) for row in windows}
                windows = slid
                cache, logits = self._read(list(windows.values()), room, list(prefixes.values()))
                step = self._fused(cache, config.max_tokens, matrices)
            elif step is not None:
                (window,) = windows.values()
                logits = self._known_only(step(window[-1], len(window) - 1))
            else:
                if len(going) < len(drawn):
                    cache.keep(going)
                logits = self._next(cache, list(windows.values()))

    def _fused(self, cache: KVCache, tokens: int, matrices: Int8Matrices | None) -> FusedStep | None:
        """One compiled function per token, where that pays and the model allows it."""
        step = fused_step(self.model, cache, matrices) if tokens >= FUSED_FROM else None
        if step is None and matrices is not None and tokens > 1:
            raise UserError(f"{IN_8_BITS}, and since the text was begun there is {why_not(self.model)}")
        return step

    def _matrices(self, config: GenerateConfig) -> Int8Matrices | None:
        """The matrices in 8 bits, where they are wanted.

        Raises:
            UserError: this model cannot be written with in 8 bits.
        """
        if config.weights == "own":
            return None
        if (reason := why_not(self.model)) is not None:
            advice = "; leave it out" + ", or choose device = cpu" * reason.startswith("a model on")
            raise UserError(f"{IN_8_BITS}, here is {reason}{advice}")
        return Int8Matrices()

    def _slide(self, window: list[int]) -> list[int]:
        if len(window) <= self.context_length:
            return window
        return window[-max(1, self.context_length // 2) :]

    def _read(self, windows: list[list[int]], room: int, prefixes: list[int]) -> tuple[KVCache, Tensor]:
        """Read whole windows into a new cache; the logits after the last token of each, (batch, vocab).

        Under ``mask = prefix_lm`` the first `prefixes` tokens of each window see each other: the prompt, and nothing generated.
        """
        length = max(map(len, windows))
        device = next(self.model.parameters()).device
        padding = torch.tensor([length - len(window) for window in windows])
        cache = KVCache(self.model.config, len(windows), room, device, padding=padding)
        ids = torch.tensor([[0] * (length - len(window)) + window for window in windows])
        positions = (torch.arange(length) - padding[:, None]).clamp(min=0)
        prefix = torch.tensor(prefixes, device=device) if "prefix_lm" in self.model.config.mask else None
        return cache, self._forward(cache, ids.to(device), positions.to(device), prefix)

    def _next(self, cache: KVCache, windows: list[list[int]]) -> Tensor:
        """Read the newest token of each window; the logits after it, (batch, vocab)."""
        ids = torch.tensor([window[-1:] for window in windows], device=cache.device)
        positions = torch.tensor([[len(window) - 1] for window in windows], device=cache.device)
        return self._forward(cache, ids, positions)

    @torch.no_grad()
    def _forward(self, cache: KVCache, ids: Tensor, positions: Tensor, prefix: Tensor | None = None) -> Tensor:
        training = self.model.training
        if training:
            self.model.eval()
        try:
            given = {} if prefix is None else {"prefix": prefix}
            hidden = self.model.hidden(ids, positions, cache=cache, **given)
            logits = self.model.logits(hidden[:, -1])  # the other positions' logits are not wanted
        finally:
            if training:
                self.model.train()
        cache.advance(ids.shape[1])
        return self._known_only(logits)

    def _known_only(self, logits: Tensor) -> Tensor:
        """Without the ids that the tokenizer does not know."""
        if self._unknown is None:
            return logits
        return logits.masked_fill(self._unknown.to(logits.device), float("-inf"))
