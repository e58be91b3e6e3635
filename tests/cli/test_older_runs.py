"""A run that an earlier program began goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from test_run import ALL, SIX, lines, verbs

from scratchlm.cli import main
from scratchlm.config import load_recipe
from scratchlm.data.corpus import FileCorpus
from scratchlm.files import stable_hash


def test_a_run_from_when_corpora_were_hashed_by_blake2b_goes_on(
    small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its steps are up to date by the keys of then, its tokens are found and may be trained on further."""
    command = ["run", "small.toml", *SIX]
    now = FileCorpus.fingerprint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FileCorpus,
            "fingerprint",
            lambda self, show_progress=True, algorithm="blake2b": now(self, show_progress, algorithm),
        )
        lines(capfd, *command)
    [path] = (small / "runs/cache/data").glob("*/manifest.json")
    value = json.loads(path.read_text())
    decides = {name: value[name] for name in ("corpus", "tokenizer", "separator_id", "dtype")}
    decides |= {"format_version": 1, "shard_tokens": load_recipe(small / "small.toml").data.shard_tokens}
    value |= {"format_version": 1, "key": stable_hash(decides, length=32)}
    for split in value["splits"].values():
        for shard in split["shards"]:
            del shard["digest"]
            shard["blake2b"] = hashlib.blake2b(
                (path.parent / shard["name"]).read_bytes(), digest_size=16
            ).hexdigest()
    path.write_text(json.dumps(value))
    keys = json.loads((small / "runs/small/steps.json").read_text())
    assert verbs(lines(capfd, *command)) == dict.fromkeys(ALL, "up")
    assert json.loads((small / "runs/small/steps.json").read_text()) == keys
    (path.parent / "verified.json").unlink()  # so that the shards are compared with their digests
    said = verbs(lines(capfd, *command, "--generate.seed", "1"))
    assert said == {**dict.fromkeys(ALL, "up"), "sample": "done", "report": "done"}
    # another text is another corpus, as ever
    with (small / "corpus.txt").open("a") as file:
        file.write("<|endoftext|>one more document")
    assert main(command) == 2
    assert "the corpus or the tokenizer has changed" in capfd.readouterr().err
