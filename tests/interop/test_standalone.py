"""The code that is copied beside exported weights: equal to ours for every architecture, and at home in transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F
from model_variants import SMALL, VARIANTS, build, changed, random_ids
from safetensors.torch import load_file
from torch import Tensor

from scratchlm.model import ModelConfig, Transformer, choices

transformers = pytest.importorskip("transformers", reason="the code is for transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

from scratchlm.interop import save, standalone  # noqa: E402
from scratchlm.interop.standalone.attention_scratchlm import StateCache, frequencies  # noqa: E402
from scratchlm.interop.standalone.configuration_scratchlm import (  # noqa: E402
    CHOICES,
    DEFAULTS,
    UNREAD,
    ScratchLMConfig,
    complete,
)
from scratchlm.interop.standalone.modeling_scratchlm import ScratchLMForCausalLM, activate  # noqa: E402

PAGES = sorted(Path(standalone.__file__).parent.glob("*_scratchlm.py"))
every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=list(VARIANTS))
DISTINCT = {json.dumps(complete(config.model_dump(mode="json"))): name for name, config in VARIANTS.items()}
every_function = pytest.mark.parametrize("config", [VARIANTS[n] for n in DISTINCT.values()], ids=DISTINCT.values())
some = pytest.mark.parametrize(
    "name",
    [
        "gqa",
        "alibi, window",
        "mask = prefix_lm",
        "mask = fixed",
        "position = learned",
        "mla, q_rank, value_dim",
        "moe, sigmoid, groups",
        "three linear, one full",
        "attention = retention",
        "attention = gla",
        "delta and window",
        "head bias, tied, mtp",
        "no layers",
    ],
)


def ours_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model in which nothing is at a value that hides it, routers' corrections included."""
    model = build(config).eval()
    generator = torch.Generator().manual_seed(7)
    for name, buffer in model.named_buffers():
        if name.endswith("correction"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model.to(dtype)


def theirs_of(model: Transformer) -> ScratchLMForCausalLM:
    """The same model, by the standalone code."""
    copy = ScratchLMForCausalLM(ScratchLMConfig(architecture=model.config.model_dump(mode="json")))
    copy.to(model.embedding.weight.dtype).load_state_dict(model.state_dict())
    return copy.eval()


@every_variant
def test_the_same_logits(config: ModelConfig) -> None:
    """In fp32 and fp64, whole and piece by piece with a cache."""
    ids = random_ids(config, 2, 24)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        ours = ours_of(config, dtype)
        theirs = theirs_of(ours)
        with torch.no_grad():
            expected, found = ours(ids), theirs(ids, use_cache=False)
            torch.testing.assert_close(found.logits, expected, rtol=0, atol=tolerance)
    assert found.past_key_values is None
    cache, pieces = None, []
    with torch.no_grad():
        for piece in ids.split([5, 1, 1, 7, 10], dim=1):
            output = theirs(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-9)


@every_function
def test_padding_changes_nothing(config: ModelConfig) -> None:
    """Rows of unequal length, filled up at the left or at the right, in one piece and in two."""
    ours = ours_of(config, torch.float64)
    theirs = theirs_of(ours)
    rows = [random_ids(config, 14), random_ids(config, 9, seed=1)]
    left = torch.stack([F.pad(row, (14 - len(row), 0)) for row in rows])
    right = torch.stack([F.pad(row, (0, 14 - len(row))) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (14 - len(row), 0)) for row in rows])
    with torch.no_grad():
        whole = theirs(left, attention_mask=mask).logits
        first = theirs(left[:, :11], attention_mask=mask[:, :11], use_cache=True)
        second = theirs(left[:, 11:], attention_mask=mask, past_key_values=first.past_key_values).logits
        filled = theirs(right, attention_mask=mask.flip(1)).logits
        for i, row in enumerate(rows):
            alone = ours(row)
            torch.testing.assert_close(whole[i, -len(row) :], alone, rtol=0, atol=1e-9)
            torch.testing.assert_close(filled[i, : len(row)], alone, rtol=0, atol=1e-9)
            torch.testing.assert_close(second[i], alone[-3:], rtol=0, atol=1e-9)


@every_function
def test_the_same_gradients(config: ModelConfig) -> None:
    ours = ours_of(config, torch.float64)
    theirs = theirs_of(ours)
    ids = random_ids(config, 2, 12)
    F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs(ids, labels=ids).loss.backward()
    found = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.startswith("predictions."):
            assert not found[name].requires_grad
        else:
            assert parameter.grad is not None and found[name].grad is not None, name
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=0, atol=1e-9, msg=name)


@every_function
def test_half_precision_costs_what_it_costs_ours(config: ModelConfig) -> None:
    """bf16 weights, and autocast: hardly farther from fp32 than ScratchLM's own fast path is."""
    if config.moe.experts:
        pytest.skip("a rounded score sends tokens to other experts")
    ours = ours_of(config)
    theirs, ids = theirs_of(ours), random_ids(config, 2, 24)

    def error(found: Tensor) -> float:
        return ((found.float() - exact).norm() / exact.norm()).item()

    with torch.no_grad():
        exact = ours(ids)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(theirs(ids).logits) < 1.5 * error(ours(ids)) + 0.002
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
        assert theirs(ids).logits.dtype == torch.bfloat16
        assert error(theirs(ids).logits) < 1.5 * error(ours(ids)) + 0.002


@pytest.mark.parametrize("scaling", sorted(CHOICES["rope.scaling"]))
def test_the_same_frequencies(scaling: str) -> None:
    """Over settings that no small model has, such as ramps that begin or end outside the pairs there are."""
    random = torch.Generator().manual_seed(0)
    for _ in range(100):
        draw = torch.rand(8, generator=random).tolist()
        rope = {
            "theta": 10 ** (1 + 6 * draw[0]),
            "scaling": scaling,
            "factor": 1.0 if scaling == "none" else 1 + 31 * draw[1],
            "original_context": int(10 ** (1 + 5 * draw[2])),
            "beta_fast": 2 + 100 * draw[3],
            "beta_slow": 10 ** (-6 * draw[4]),
            "truncate": draw[5] < 0.5,
            "attention_factor": None if draw[6] < 0.5 else 0.5 + draw[7],
        }
        width = 2 * int(1 + 20 * draw[7])
        ours = ModelConfig(heads=1, head_dim=width, rope=rope)
        theta = ours.rope.theta[0]
        plain = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        expected, factor = choices.ROPE_SCALING.get(scaling)(plain, theta, ours)
        theirs = ScratchLMConfig(architecture=ours.model_dump(mode="json")).resolved()
        found, its_factor = frequencies(theirs, theta, scaling, width)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert its_factor == factor


@pytest.mark.parametrize("kind", sorted(CHOICES["feedforward"]))
def test_the_same_activations_far_out(kind: str) -> None:
    x = torch.linspace(-20, 20, 200, dtype=torch.float64)
    x = torch.stack([x.repeat_interleave(200), x.repeat(200)])
    expected = choices.FEEDFORWARD.get(kind).activate(x.T, reference=True)
    torch.testing.assert_close(activate(kind, x.T), expected, rtol=1e-9, atol=1e-12)


def test_a_fraction_leaves_the_rotated_part_of_latent_attention_whole() -> None:
    ours = ours_of(changed(VARIANTS["attention = mla"], rope={"fraction": 0.5}), torch.float64)
    ids = random_ids(ours.config, 2, 12)
    with torch.no_grad():
        torch.testing.assert_close(theirs_of(ours)(ids).logits, ours(ids), rtol=0, atol=1e-9)


def continued(model: Transformer, ids: Tensor, tokens: int) -> Tensor:
    """Greedy, without a cache; the prompt is the prefix."""
    prompt = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids, prefix=prompt)[:, -1:].argmax(dim=-1)], dim=1)
    return ids


@some
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_continues_as_ours(name: str, use_cache: bool) -> None:
    """Rows of unequal length in one batch, each as alone; and beams, which reorder the cache."""
    ours = ours_of(VARIANTS[name], torch.float64)
    theirs = theirs_of(ours)
    rows = [random_ids(ours.config, 9), random_ids(ours.config, 6, seed=1)]
    ids = torch.stack([F.pad(row, (9 - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (9 - len(row), 0)) for row in rows])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    found = theirs.generate(ids, **options, use_cache=use_cache)
    for i, row in enumerate(rows):
        assert found[i, 9:].equal(continued(ours, row[None], 7)[0, len(row) :])
    if use_cache:
        beams = theirs.generate(ids, **options, num_beams=3)
        assert beams.equal(theirs.generate(ids, **options, num_beams=3, use_cache=False))


@some
def test_what_is_saved_opens_again(name: str, tmp_path: Path) -> None:
    theirs = theirs_of(ours_of(VARIANTS[name]))
    theirs.save_pretrained(tmp_path)
    assert {page.name for page in PAGES} <= {path.name for path in tmp_path.iterdir()}
    again, found = ScratchLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.architecture == theirs.config.architecture
    weights = again.state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    assert all(tensor.equal(weights[key]) for key, tensor in theirs.state_dict().items())
    assert (again.head.weight is again.embedding.weight) == VARIANTS[name].tied_embeddings


OPEN = """
import json, sys, warnings
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("scratchlm", "einops", "jaxtyping", "pydantic"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
found = {}
for folder in sys.argv[2:]:
    ids = torch.tensor(json.load(open(folder + "/ids.json")))
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        found[folder] = model(ids).logits.contiguous()
    model.save_pretrained(folder + "_again")
    again = AutoModelForCausalLM.from_pretrained(folder + "_again", trust_remote_code=True)
    with torch.no_grad():
        assert again(ids).logits.equal(found[folder])
save_file(found, sys.argv[1])
"""


def test_a_folder_opens_where_scratchlm_is_not(tmp_path: Path) -> None:
    expected = {}
    for number, name in enumerate(
        ["tied", "delta and window", "mla, q_rank, value_dim", "moe, sigmoid, groups", "mtp"]
    ):
        model, folder = ours_of(VARIANTS[name]), tmp_path / f"model{number}"
        save(model, folder, family="standalone")
        ids = random_ids(model.config, 2, 20)
        (folder / "ids.json").write_text(json.dumps(ids.tolist()))
        with torch.no_grad():
            expected[str(folder)] = model(ids)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OPEN, str(tmp_path / "logits.safetensors"), *expected]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    for where, logits in expected.items():
        torch.testing.assert_close(found[where], logits, rtol=0, atol=1e-4)


def test_every_field_and_every_name_is_known() -> None:
    """A field or choice that is added to the model is to be added here."""

    def names(values: dict[str, Any], section: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in values.items():
            flat |= names(value, f"{name}.") if isinstance(value, dict) else {section + name: value}
        return flat

    ours = names(ModelConfig().model_dump(mode="json"))
    unread = {f"{section}.{name}" if section else name for section, fields in UNREAD.items() for name in fields}
    assert {name: value for name, value in ours.items() if name not in unread} == names(DEFAULTS)
    assert unread <= ours.keys()
    for axis in choices.AXES:
        assert axis.axis in unread or CHOICES[axis.axis] == set(axis.names), axis.axis


@pytest.mark.parametrize("field", sorted(CHOICES))
def test_an_unknown_name_is_refused(field: str) -> None:
    section, _, leaf = field.rpartition(".")
    default = (DEFAULTS[section] if section else DEFAULTS)[leaf]
    value: Any = ["new"] if isinstance(default, list) else "new"
    with pytest.raises(ValueError, match=rf"architecture\.{field} = 'new' is unknown; known: "):
        ScratchLMConfig(architecture={section: {leaf: value}} if section else {leaf: value})


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"architecture\.hyper is unknown to this version of the model's code"):
        ScratchLMConfig(architecture={"hyper": 1})
    with pytest.raises(ValueError, match=r"architecture\.moe\.hyper is unknown"):
        ScratchLMConfig(architecture={"moe": {"hyper": 1}})


def test_the_configuration_says_what_transformers_asks_for(tmp_path: Path) -> None:
    ours = VARIANTS["gqa"]
    config = ScratchLMConfig(architecture=ours.model_dump(mode="json"), bos_token_id=3, eos_token_id=4)
    config.save_pretrained(tmp_path)
    for one in (config, ScratchLMConfig.from_pretrained(tmp_path)):
        assert (one.vocab_size, one.hidden_size, one.num_hidden_layers) == (37, 24, 2)
        assert (one.num_attention_heads, one.num_key_value_heads, one.head_dim) == (4, 2, 6)
        assert (one.max_position_embeddings, one.intermediate_size) == (24, ours.resolved_d_ff)
        assert (one.bos_token_id, one.eos_token_id, one.tie_word_embeddings) == (3, 4, False)
    assert ScratchLMConfig().architecture == DEFAULTS


def test_the_loss_is_of_the_next_token() -> None:
    theirs = theirs_of(ours_of(VARIANTS["gqa"]))
    ids = random_ids(VARIANTS["gqa"], 2, 10)
    labels = ids.clone()
    labels[0, :6] = -100
    with torch.no_grad():
        logits = theirs(ids).logits
        shares = logits[:, :-1].log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
        asked = -torch.cat([shares[0, 5:], shares[1]])
        assert theirs(ids, labels=labels).loss.item() == pytest.approx(asked.mean().item(), rel=1e-5)
        found = theirs(ids, labels=labels, num_items_in_batch=50).loss.item()
        assert found == pytest.approx(asked.sum().item() / 50, rel=1e-5)
        assert theirs(ids, labels=labels, use_cache=False, return_dict=False)[1].equal(logits)
        assert theirs(ids, logits_to_keep=3).logits.equal(logits[:, -3:])
        hidden = theirs(ids, output_hidden_states=True).hidden_states
        assert len(hidden) == 3 and torch.allclose(theirs.head(hidden[-1]), logits)
        rows = theirs.get_input_embeddings()(ids)
        assert theirs(inputs_embeds=rows).logits.equal(logits)


def test_dropout_acts_in_training_alone() -> None:
    for field in ("embedding_dropout", "attention_dropout", "residual_dropout"):
        config = ModelConfig(**SMALL, **{field: 0.5})
        ours = ours_of(config)
        theirs, ids = theirs_of(ours), random_ids(config, 1, 12)
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-4)
            theirs.train()
            assert not torch.allclose(theirs(ids).logits, theirs(ids).logits)


@every_function
def test_a_model_from_nothing_begins_sensibly(config: ModelConfig) -> None:
    transformers.set_seed(0)
    model = ScratchLMForCausalLM(ScratchLMConfig(architecture=config.model_dump(mode="json")))
    ours = dict(Transformer(config, seed=0).named_parameters())
    for name, parameter in model.named_parameters():
        kind = getattr(ours[name], "role", "")
        if kind == "norm" or (kind == "bias" and "decay" not in name):
            assert parameter.equal(ours[name]), name
        elif kind != "bias":
            assert 0 < parameter.std() < 1, name
    ids = random_ids(config, 2, 12)
    loss = model(ids, labels=ids).loss
    assert 0.5 * torch.tensor(37.0).log() < loss < 2 * torch.tensor(37.0).log()


def test_in_bf16_a_routers_correction_stays_fp32(tmp_path: Path) -> None:
    theirs = theirs_of(ours_of(VARIANTS["moe, sigmoid, groups"]))
    theirs.save_pretrained(tmp_path)
    again = ScratchLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    name = "blocks.1.feedforward.router.correction"
    assert again.head.weight.dtype == torch.bfloat16
    assert again.state_dict()[name].equal(theirs.state_dict()[name])


def test_an_embedding_can_grow(tmp_path: Path) -> None:
    theirs = theirs_of(ours_of(VARIANTS["head bias, tied, mtp"]))
    ids = random_ids(VARIANTS["mtp"], 1, 8)
    with torch.no_grad():
        before = theirs(ids).logits
        theirs.resize_token_embeddings(40)
        theirs.save_pretrained(tmp_path)
        again = ScratchLMForCausalLM.from_pretrained(tmp_path)
        assert again.config.vocab_size == 40
        assert again(ids).logits.shape[-1] == 40
        torch.testing.assert_close(again(ids).logits[..., :37], before)


def test_what_cannot_be_is_said() -> None:
    linear = theirs_of(ours_of(VARIANTS["three linear, one full"]))
    ids = random_ids(VARIANTS["gqa"], 1, 8)
    with pytest.raises(ValueError, match="keeps states beside keys and values"):
        linear(ids, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="no token can be taken away"):
        linear(ids, use_cache=True).past_key_values.crop(3)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\); it must be \(batch, 8\)"):
        linear(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        linear()
    learned = theirs_of(ours_of(VARIANTS["position = learned"]))
    with pytest.raises(ValueError, match="has learned 24 positions"):
        learned(random_ids(VARIANTS["gqa"], 1, 25))
    assert theirs_of(ours_of(VARIANTS["gqa"]))(random_ids(VARIANTS["gqa"], 1, 25)).logits.isfinite().all()


def test_a_state_cache_follows_its_rows() -> None:
    """Copied, chosen and reordered: each row goes on as its own."""
    ours = ours_of(VARIANTS["delta and window"], torch.float64)
    theirs, ids = theirs_of(ours), random_ids(VARIANTS["delta and window"], 3, 12)
    with torch.no_grad():
        for act, order in (
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ):
            cache = theirs(ids[:, :8], use_cache=True).past_key_values
            assert isinstance(cache, StateCache) and cache.get_seq_length() == 8
            act(cache)
            found = theirs(ids[order, 8:], past_key_values=cache).logits
            torch.testing.assert_close(found, ours(ids[order])[:, 8:], rtol=0, atol=1e-9)


def test_positions_can_be_given() -> None:
    ours = ours_of(VARIANTS["rope above learned"], torch.float64)
    theirs, ids = theirs_of(ours), random_ids(VARIANTS["gqa"], 2, 8)
    places = torch.arange(8) + torch.tensor([[3], [9]])
    with torch.no_grad():
        found = theirs(ids, position_ids=places).logits
        torch.testing.assert_close(found, ours(ids, positions=places), rtol=0, atol=1e-9)
        assert not torch.allclose(found, theirs(ids).logits)


def test_under_prefix_lm_the_prompt_can_be_said() -> None:
    ours = ours_of(changed(VARIANTS["mask = prefix_lm"], layers=1), torch.float64)
    theirs, ids = theirs_of(ours), random_ids(ours.config, 2, 12)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        found = theirs(ids, attention_mask=mask, prompt_length=9).logits
        torch.testing.assert_close(found[0], ours(ids[0], prefix=9), rtol=0, atol=1e-9)
        torch.testing.assert_close(found[1, 3:], ours(ids[1, 3:], prefix=6), rtol=0, atol=1e-9)
        first = theirs(ids[:, :3], use_cache=True)  # of a prefix that comes in two pieces the first is the prefix
        second = theirs(ids[:, 3:], past_key_values=first.past_key_values).logits
        together = torch.cat([first.logits, second], dim=1)
        torch.testing.assert_close(together, ours(ids, prefix=3), rtol=0, atol=1e-9)
