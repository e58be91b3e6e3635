"""Import and export as a user meets them: whole folders, tokenizers, dtypes, shards, memory, and everything that can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import RECIPE
from transformers_oracle import contents, transformers

from scratchlm.cli import main
from scratchlm.errors import UserError
from scratchlm.interop import load, save
from scratchlm.interop.choose import choose
from scratchlm.interop.folders import export_folder, import_folder
from scratchlm.model import ModelConfig, Transformer
from scratchlm.tokenizer import Tokenizer, train_bpe

SPECIAL = "<|end|>"


def their_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer that transformers wrote; returns its size."""
    ours = train_bpe(["some text, some more text, naïve 日本"], vocab_size=290, special_tokens=[SPECIAL])
    ours.save(folder / "own.json")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "own.json"), eos_token=SPECIAL, bos_token=SPECIAL
    )
    (folder / "own.json").unlink()
    theirs.save_pretrained(folder)
    return len(theirs)


def their_model(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Any:
    """A small random Llama of transformers in `folder`, with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    size = their_tokenizer(folder)
    options = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    options |= {"intermediate_size": 56, "max_position_embeddings": 96, "vocab_size": size} | changes
    config = transformers.LlamaConfig(**options, bos_token_id=size - 1, eos_token_id=size - 1)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    their_model(tmp_path / "theirs")
    return tmp_path / "theirs"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_import_and_export_give_the_folder_back(tmp_path: Path) -> None:
    their_model(tmp_path / "theirs", torch.bfloat16, shard="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    assert run("import", tmp_path / "theirs", tmp_path / "ours") == 0
    assert run("export", tmp_path / "ours", tmp_path / "back", "--shard-gb", "3e-5") == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    before, after = contents(tmp_path / "theirs"), contents(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(tensor.dtype == torch.bfloat16 and tensor.equal(after[name]) for name, tensor in before.items())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    one = transformers.AutoConfig.from_pretrained(tmp_path / "theirs").to_dict()
    two = transformers.AutoConfig.from_pretrained(tmp_path / "back").to_dict()
    assert {k: v for k, v in one.items() if k != "_name_or_path"} == {
        k: v for k, v in two.items() if k != "_name_or_path"
    }


def test_an_imported_model_generates_and_evaluates_like_any(
    theirs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("import", theirs, tmp_path / "ours") == 0
    (tmp_path / "text.txt").write_text("some text, some more text")
    for folder in (theirs, tmp_path / "ours"):  # a folder of the hub does without an import
        capfd.readouterr()
        assert run("generate", folder, "--prompts", "some", "--temperature", "0", "--max-tokens", "12") == 0
        written = capfd.readouterr().out
        model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(theirs), Tokenizer.load(theirs)
        ids = torch.tensor([tokenizer.encode("some")])
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0]
        assert written.rstrip("\n") == tokenizer.decode(
            [i for i in expected.tolist() if i != tokenizer.vocab_size - 1]
        )
        assert run("evaluate", folder, tmp_path / "text.txt") == 0
        assert "bits per byte" in capfd.readouterr().out


def test_training_goes_on_from_imported_weights(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    their_model(tmp_path / "theirs")
    assert run("import", "theirs", "ours") == 0
    text = (tmp_path / "ours/recipe.toml").read_text()
    assert 'start_from = "ours"' in text
    corpus = RECIPE.split("[tokenizer]")[0]
    (tmp_path / "further.toml").write_text(corpus + text.replace("context_length = 96", "context_length = 32"))
    options = ["--train.steps", "0", "--train.compile", "off", "--train.precision", "fp32"]
    assert run("train", "further.toml", *options) == 0
    assert "weights    from ours" in capfd.readouterr().out
    begun, given = load("runs/further")[0], load("ours")[0]
    assert begun.config.context_length == 32
    assert all(p.equal(q) for p, q in zip(begun.parameters(), given.parameters(), strict=True))
    text = text.replace("heads = 4", "heads = 8")
    (tmp_path / "other.toml").write_text(corpus + text)
    assert run("train", "other.toml", *options) == 2
    assert "start_from = ours holds a model that differs in" in capfd.readouterr().err


def test_a_trained_model_opens_in_transformers_with_its_tokenizer(small: Path) -> None:
    assert run("run", "small.toml") == 0
    assert run("export", "runs/small", "out") == 0
    ours, tokenizer = load("runs/small")
    assert tokenizer is not None
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    prompt = "def total"
    ids = their_tokenizer(prompt, return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode(prompt)
    assert their_tokenizer.eos_token == "<|endoftext|>"
    with torch.no_grad():
        assert (model(ids).logits - ours(ids)).abs().max() < 1e-4
    from scratchlm.generate import Generator

    own = Generator(ours, tokenizer).generate(prompt, max_tokens=20, temperature=0.0)[0]
    written = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert their_tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True) == own


def test_auto_writes_a_family_only_if_it_computes_the_same(tmp_path: Path) -> None:
    base = {"vocab_size": 300, "d_model": 32, "heads": 4, "layers": 2}
    assert choose(ModelConfig(**base)).family.model_type == "llama"
    with pytest.raises(UserError, match=r"no family of the hub has residual = vector; .*standalone"):
        choose(ModelConfig(**base, residual="vector"))
    with pytest.raises(UserError, match=r"no family of the hub has this combination; the nearest is \w+, without"):
        choose(ModelConfig(**base, position="alibi", feedforward="swiglu", mask="sliding_window"))
    with pytest.raises(UserError, match=r"no family of the hub has mask = strided, stride = 16; .*standalone"):
        choose(ModelConfig(**base, mask="strided"))
    with pytest.raises(UserError, match=r"no family of the hub has attention = gated_delta"):
        choose(ModelConfig(**base, attention="gated_delta"))
    with pytest.raises(UserError, match=r"family llama cannot say this model's .*norm.*; --family auto"):
        choose(ModelConfig(**base, norm="layernorm"), "llama")
    with pytest.raises(UserError, match="'lama' is unknown; did you mean llama"):
        choose(ModelConfig(**base), "lama")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": "q k v o"},
        {"head_dim": 12, "rope": {"fraction": 1.0}},
        {"qk_norm": "head"},
        {"kv_heads": 2, "tied_embeddings": True},
    ],
    ids=str,
)
def test_interleaved_pairs_are_put_in_order_for_families_with_halves(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """The same function with the rows of q and k in another order."""
    rope = {"pairs": "interleaved", **changes.pop("rope", {})}
    config = ModelConfig(vocab_size=97, d_model=32, heads=4, layers=2, d_ff=40, rope=rope, **changes)
    model = Transformer(config, seed=1).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    written = save(model, tmp_path / "out")
    again = load(tmp_path / "out")[0]
    assert again.config.rope.pairs == "half", written
    ids = torch.randint(0, 97, (2, 20))
    assert (again(ids) - model(ids)).abs().max() < 1e-12


def test_dtypes(theirs: Path, tmp_path: Path) -> None:
    import_folder(theirs, tmp_path / "ours", dtype="bf16")
    assert {p.dtype for p in load(tmp_path / "ours")[0].parameters()} == {torch.bfloat16}
    export_folder(tmp_path / "ours", tmp_path / "back", dtype="fp32")
    before, after = contents(theirs), contents(tmp_path / "back")
    assert all(tensor.bfloat16().float().equal(after[name]) for name, tensor in before.items())
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "float32"


def test_our_own_format_keeps_everything(tmp_path: Path) -> None:
    model = Transformer(ModelConfig(vocab_size=300, d_model=32, heads=4, layers=2, attention="gated_delta"), seed=0)
    tokenizer = train_bpe(["some text"], vocab_size=258, special_tokens=[SPECIAL])
    assert save(model, tmp_path / "own", family="scratchlm", tokenizer=tokenizer) == "scratchlm"
    again, its_tokenizer = load(tmp_path / "own")
    assert again.config == model.config and its_tokenizer is not None
    card = (tmp_path / "own/README.md").read_text()
    assert "| `attention` | gated_delta |" in card and "| `d_model` | 32 |" in card and f"`{SPECIAL}`" in card


# ------------------------------------------------------------------------------------------------- bad input


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        loaded = load_file(folder / "model.safetensors")
        change(loaded)
        save_file(loaded, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


Q = "model.layers.1.self_attn.q_proj.weight"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensors": (
        tensors(lambda t: [t.pop(Q), t.pop("model.norm.weight")]),
        rf"lacks 2 of the model's tensors: {Q}, model.norm.weight",
    ),
    "extra tensors": (
        tensors(lambda t: t.update({"model.extra.weight": torch.zeros(2), "odd": torch.zeros(1)})),
        "holds 2 tensors that a model of its config.json does not have: model.extra.weight, odd",
    ),
    "another shape": (
        tensors(lambda t: t.update({Q: t[Q][:40].clone()})),
        rf"{Q} has the shape \[40, 48\].*\[48, 48\]",
    ),
    "integers": (tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})), "is stored as I8; quantised"),
    "unknown family": (
        edited(model_type="lama"),
        r"model_type 'lama' is unknown; did you mean llama\?; known are .*llama",
    ),
    "no family": (edited(model_type=None), "names no model_type"),
    "unknown option": (
        edited(rope_wobble=3, new_thing=True),
        "options new_thing, rope_wobble of family llama are not known",
    ),
    "unsupported value": (
        edited(hidden_act="laplace"),
        r"hidden_act = 'laplace' of family llama is not supported: known are",
    ),
    "dynamic scaling": (
        edited(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        r"rope_(scaling|parameters).rope_type = 'dynamic' of family llama is not supported",
    ),
    "stray scaling option": (
        edited(rope_parameters={"rope_type": "linear", "factor": 2.0, "beta_fast": 3}),
        r"rope_(scaling|parameters).beta_fast = 3",
    ),
    "quantised": (edited(quantization_config={"quant_method": "gptq"}), "quantised .*gptq"),
    "a width is missing": (edited(hidden_size=None), "has no hidden_size, which a model of family llama needs"),
    "widths that do not fit": (edited(num_key_value_heads=3), "kv_heads = 3 does not divide heads = 4"),
    "a width of the wrong type": (edited(num_attention_heads="four"), "four"),
    "cut off": (cut, "cut off or damaged"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "cut off or damaged"),
    "no weights": (removed("model.safetensors"), "holds no weights"),
    "pickle": (pickled, r"is a pickle, which can run code .*--allow-pickle True"),
    "no config": (removed("config.json"), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "names no model_type"),
    "config without end": (lambda f: (f / "config.json").write_text("[" * 100_000), "is not valid JSON"),
    "index without shards": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
        r"model-1.safetensors does not exist",
    ),
    "index that leads out": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "not a file of its folder",
    ),
    "tied head that differs": (
        edited(tie_word_embeddings=True),
        "ties the head to the embedding, but lm_head.weight",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    name: str, theirs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, said = BAD[name]
    spoil(theirs)
    assert run("import", theirs, tmp_path / "ours") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("scratchlm: error")]
    assert len(lines) == 1
    import re

    assert re.search(said, lines[0]), lines[0]
    assert not (tmp_path / "ours").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}


def test_wrong_commands(theirs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for arguments, said in (
        (("import",), "which model, and where to?"),
        (("import", "theirs"), "which model, and where to?"),
        (("import", "no/model", "out"), "no/model is no folder here; to fetch it from the Hub add --download True"),
        (("import", tmp_path / "nowhere/at/all", "out"), "is no folder here"),
        (("import", theirs / "config.json", "out"), "is a file; name the folder"),
        (("import", theirs, tmp_path / "full"), "is not an empty folder"),
        (("import", "--dtype", "fp16", theirs, "out"), "the two folders come first, then the options"),
        (("export", "--family", "llama", theirs, "out"), "the two folders come first, then the options"),
        (("import", theirs, "out", "--revision", "main"), "--revision belongs to --download"),
        (("import", theirs, "out", "--dtype", "int8"), "dtype"),
        (("export", tmp_path / "nowhere", "out"), "does not exist"),
        (("export", theirs, tmp_path / "full"), "is not an empty folder"),
        (("export", theirs, tmp_path / "out", "--family", "gpt2"), "family gpt2 cannot say this model's"),
    ):
        assert run(*arguments) == 2
        assert said in capfd.readouterr().err
    assert (tmp_path / "full/notes.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_an_import_of_one_of_ours_is_not_needed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(Transformer(ModelConfig(vocab_size=10), seed=0), tmp_path / "own", family="scratchlm")
    assert run("import", tmp_path / "own", tmp_path / "out") == 2
    assert "it is one of ours, which needs no import" in capfd.readouterr().err


def test_a_pickle_is_read_when_it_is_allowed(theirs: Path, tmp_path: Path) -> None:
    before = contents(theirs)
    pickled(theirs)
    assert run("import", theirs, tmp_path / "ours", "--allow-pickle", "True") == 0
    export_folder(tmp_path / "ours", tmp_path / "back")
    after = contents(tmp_path / "back")
    assert before.keys() == after.keys() and all(tensor.equal(after[name]) for name, tensor in before.items())


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("harm.txt", "w"))


def test_a_pickle_that_is_code_is_never_run(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (theirs / "model.safetensors").unlink()
    torch.save({"x": Evil()}, theirs / "pytorch_model.bin")
    assert run("import", theirs, tmp_path / "ours", "--allow-pickle", "True") == 2
    assert "cannot be read as weights alone" in capfd.readouterr().err
    assert not (tmp_path / "harm.txt").exists()


def test_a_tokenizer_we_cannot_read_is_kept(
    theirs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = theirs / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content))
    assert run("import", theirs, tmp_path / "ours") == 0
    assert "the normalizer 'Lowercase' is not supported" in capfd.readouterr().err
    assert not (tmp_path / "ours/tokenizer.json").exists()
    assert run("generate", tmp_path / "ours", "--prompts", "x") == 2
    assert run("export", tmp_path / "ours", tmp_path / "back") == 0
    assert (tmp_path / "back/tokenizer.json").read_bytes() == path.read_bytes()


PEAK = """
import resource, sys, torch
from pathlib import Path
from scratchlm.interop.folders import import_folder, export_folder
from scratchlm.interop.huggingface import open_folder
source, out = Path(sys.argv[1]), Path(sys.argv[2])
open_folder(source.parent / "tiny")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_folder(source, out) if sys.argv[3] == "import" else export_folder(source, out, shard_bytes=20_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_the_model_a_shard_and_a_tensor(tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    model = their_model(tmp_path / "theirs", shard="20MB", **wide)
    their_model(tmp_path / "tiny")
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size > 100e6
    for source, out, what in (("theirs", "ours", "import"), ("ours", "back", "export")):
        command = [sys.executable, "-c", PEAK, tmp_path / source, tmp_path / out, what]
        found = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
        peak = int(found.stdout.split()[-1])
        assert peak < size + 20e6 + 4.2e6 + 20e6, f"{what}: {peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
