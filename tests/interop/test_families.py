"""Every family both ways against transformers: logits, hidden states, gradients, generation, files."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from all_cases import CASES
from torch import Tensor
from transformers_oracle import Case, build, contents, greedy, ids_for, layer_outputs, precision, reload
from transformers_oracle import save as save_theirs

from scratchlm.interop.family import families, family_of
from scratchlm.interop.huggingface import open_folder, read_config
from scratchlm.interop.native import save
from scratchlm.interop.weights import places_of, stored
from scratchlm.model import Transformer

SEEDS = (0, 1)
MORE_SEEDS = (2, 3, 4)  # by `make test-slow`
EVERY = [
    pytest.param(case, seed, id=f"{case.id}-{seed}", marks=[pytest.mark.slow] if seed in MORE_SEEDS else [])
    for case in CASES
    for seed in (*SEEDS, *MORE_SEEDS)
]
LENGTH = 40  # longer than every window that is drawn


@cache  # small models; the tests come back to each
def pair(case: Case, seed: int, dtype: torch.dtype, root: Path) -> tuple[Any, Transformer, Path]:
    """Their model, and ours read from what theirs wrote."""
    theirs = build(case, seed, dtype)
    folder = root / f"{case.id}-{seed}-{dtype}"
    save_theirs(theirs, folder)
    return theirs, open_folder(folder).model, folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def logits_of(theirs: Any, ids: Tensor, dtype: torch.dtype, **more: Any) -> Any:
    with precision(dtype), torch.no_grad():
        return theirs(ids, use_cache=False, **more)


def in_files(theirs: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names and layouts of files, which differ from those in memory for mixtures of experts."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Tensor] = revert_weight_conversion(theirs, values)
    return reverted


@pytest.mark.parametrize("case,seed", EVERY)
def test_logits_and_every_layer_are_equal(case: Case, seed: int, root: Path) -> None:
    theirs, ours, _ = pair(case, seed, torch.float64, root)
    ids = ids_for(ours.config.vocab_size, 2, LENGTH, seed)
    answer = logits_of(theirs, ids, torch.float64, output_hidden_states=case.hidden)
    if case.hidden:
        states = layer_outputs(ours, ids)
        assert len(states) == len(answer.hidden_states)
        for layer, (own, their) in enumerate(zip(states, answer.hidden_states, strict=True)):
            worst = (own - their).abs().max().item()
            assert worst <= case.tolerance, f"after layer {layer - 1} (−1: the embedding): {worst:.1e}"
    with torch.no_grad():
        worst = (ours(ids) - answer.logits).abs().max().item()
    assert worst <= case.tolerance
    assert answer.logits.std() > 0.05  # a model that says nothing would agree with anything


@pytest.mark.parametrize("case,seed", EVERY)
def test_gradients_are_equal(case: Case, seed: int, root: Path) -> None:
    theirs, ours, _ = pair(case, seed, torch.float64, root)
    ids = ids_for(ours.config.vocab_size, 2, LENGTH, seed + 100)
    theirs.zero_grad(set_to_none=True)
    ours.zero_grad(set_to_none=True)
    with precision(torch.float64):
        logits = theirs(ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    their_grads = in_files(theirs, grads)
    family = families()[case.model_type]
    own = stored(ours)
    compared = 0
    for place in places_of(ours, family.weights):
        grad = getattr(own.get(place.ours), "grad", None)
        name = place.theirs
        if name not in their_grads or grad is None:  # a buffer, or a tied head
            continue
        worst = (place.take(grad) - their_grads[name]).abs().max().item()
        assert worst <= case.tolerance * max(1.0, their_grads[name].abs().max().item()), f"{name}: {worst:.1e}"
        compared += 1
    assert compared >= len([name for name in their_grads if name.endswith("weight")]) - 1  # all but a tied head


@pytest.mark.parametrize("case,seed", EVERY)
def test_fp32_logits_are_equal_and_padding_changes_nothing(case: Case, seed: int, root: Path) -> None:
    theirs, ours, _ = pair(case, seed, torch.float32, root)
    vocab = ours.config.vocab_size
    ids, lengths = ids_for(vocab, 3, LENGTH, seed), (LENGTH, LENGTH - 7, 5)
    with torch.no_grad():
        assert (ours(ids) - logits_of(theirs, ids, torch.float32).logits).abs().max() <= 1e-4
        mask = torch.stack([torch.arange(LENGTH) >= LENGTH - length for length in lengths]).long()
        padded = torch.where(mask.bool(), ids, 0)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        takes = "position_ids" in inspect.signature(theirs.forward).parameters
        more = {"position_ids": positions} if takes else {}
        answer = logits_of(theirs, padded, torch.float32, attention_mask=mask, **more).logits
        for row, length in enumerate(lengths):
            alone = ours(ids[row : row + 1, LENGTH - length :])
            assert (alone - answer[row : row + 1, LENGTH - length :]).abs().max() <= 1e-4


@pytest.mark.parametrize("case,seed", [pair for pair in EVERY if pair.values[1] == SEEDS[0] or pair.marks])
def test_greedy_generation_with_cache_is_equal(case: Case, seed: int, root: Path) -> None:
    theirs, ours, _ = pair(case, seed, torch.float64, root)
    prompts = [row.tolist() for row in ids_for(ours.config.vocab_size, 2, 24, seed + 7)]
    prompts[1] = prompts[1][:9]
    padded = torch.tensor([[0] * (24 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (24 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with precision(torch.float64), torch.no_grad():
        written = theirs.generate(padded, attention_mask=mask, max_new_tokens=64, do_sample=False, use_cache=True)
    expected = written[:, 24:].tolist()
    assert len(expected[0]) == 64
    assert greedy(ours, prompts, 64) == expected


@pytest.mark.parametrize("case,seed", EVERY)
def test_what_we_write_is_what_was_read_and_opens_there(case: Case, seed: int, root: Path, tmp_path: Path) -> None:
    theirs, ours, folder = pair(case, seed, torch.float32, root)
    save(ours, tmp_path / "out", family=case.model_type)
    before, after = contents(folder), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.equal(after[name]), name
    family, _, config = read_config(folder)
    assert config == ours.config
    assert read_config(tmp_path / "out")[2] == config
    assert family is family_of(case.model_type, "")
    again = open_folder(tmp_path / "out").model
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in ours.state_dict().items())
    opened = reload(tmp_path / "out", torch.float32)
    ids = ids_for(ours.config.vocab_size, 2, LENGTH, seed)
    # The numbers are the same; where they lie in memory, which may turn a sum round, is not.
    worst = (
        (logits_of(opened, ids, torch.float32).logits - logits_of(theirs, ids, torch.float32).logits).abs().max()
    )
    assert worst <= 1e-5


def test_every_family_has_a_case() -> None:
    assert {case.model_type for case in CASES} == set(families())
