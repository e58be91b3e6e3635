"""The parts of the tokenizer benchmark: each function is run in a process of its own by ``tokenizer.py``.

    python benchmarks/tokenizer_measure.py '{"part": "encode", "corpus": "prose", …}'    # the last line is JSON

In a part all rivals run in one process, in turn, round after round, forwards and backwards alternately; medians are
reported with minimum and maximum, ratios are medians of the rounds' ratios. CPU time ÷ wall time says how many cores
really worked. Ids are compared before anything is timed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from tokenizer_corpora import SCRIPTS, Corpus, adversarial, load
from tokenizer_engines import (
    DECODED_MEGABYTES,
    ENGINES,
    OURS,
    OURS_LIST,
    OURS_STR,
    SPECIAL,
    TRAINERS,
    Engine,
    Text,
    Vocabulary,
    installed,
)

from scratchlm.tokenizer import Tokenizer, train_bpe

Times = dict[str, list[tuple[float, float]]]  # name → (wall, CPU) seconds, round by round
CORPORA = ("prose", "python", "multilingual")


def timed(action: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, CPU seconds of all threads, and what `action` returned (so that freeing it is not timed)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def interleaved(rivals: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """Run all rivals in turn, `rounds` times."""
    times: Times = {name: [] for name in rivals}
    for number in range(rounds):
        names = list(rivals)
        for name in names if number % 2 == 0 else reversed(names):  # whoever runs first does not always run first
            wall, cpu, result = timed(rivals[name])
            times[name].append((wall, cpu))
            del result
    return times


def summary(times: Times, sizes: dict[str, int] | int, ours: str = OURS.name) -> dict[str, dict[str, float]]:
    """Per rival: seconds, MB/s (10^6 bytes), cores, and how many times faster ours is, round by round."""
    size_of = sizes if isinstance(sizes, dict) else dict.fromkeys(times, sizes)
    reference = times[ours]
    found = {}
    for name, rounds in times.items():
        wall = [seconds for seconds, _ in rounds]
        ratios = [
            (theirs / size_of[name]) / (mine / size_of[ours])
            for (theirs, _), (mine, _) in zip(rounds, reference, strict=True)
        ]
        found[name] = {
            "seconds": round(statistics.median(wall), 5),
            "min": round(min(wall), 5),
            "max": round(max(wall), 5),
            "mb_per_s": round(size_of[name] / 1e6 / statistics.median(wall), 2),
            "cores": round(statistics.median(cpu / seconds for seconds, cpu in rounds), 2),
            "times_ours": round(statistics.median(ratios), 3),
        }
    return found


# ------------------------------------------------------------------ vocabularies


def vocabulary(vocab_size: int, pattern: str, megabytes: float, cache: Path) -> Vocabulary:
    """The tokenizer all are given: trained here on a third of each corpus. Kept in the cache folder."""
    corpora = [load(name, megabytes, cache).sample(megabytes / 3) for name in CORPORA]
    digest = hashlib.blake2b(digest_size=6)
    for corpus in corpora:
        digest.update(str(corpus.about["blake2b"]).encode())
    folder = cache / f"vocabulary-{vocab_size}-{pattern}-{digest.hexdigest()}"
    if (folder / "tokenizer.json").exists():
        return Vocabulary(folder, pattern)
    documents = [document.decode() for corpus in corpora for document in corpus.documents]
    folder.mkdir(parents=True, exist_ok=True)
    return Vocabulary.save(train_bpe(documents, vocab_size, [SPECIAL], pattern), folder)


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Corpora and vocabularies into the cache, so that no measured process has to make them."""
    cache = Path(job["cache"])
    corpora = {name: load(name, job["megabytes"], cache).about for name in (*CORPORA, *SCRIPTS)}
    trained = {}
    for vocab_size, pattern in job["vocabularies"]:
        made = vocabulary(vocab_size, pattern, job["megabytes"], cache)
        trained[f"{pattern} {vocab_size}"] = made.ours.content_hash
    return {"corpora": corpora, "vocabularies": trained}


def _texts(corpus: Corpus, engines: list[Engine], folder: Path) -> dict[str, Text]:
    """For each engine its text: the whole corpus, or its sample. Equal samples are shared."""
    whole = Text(corpus.documents, folder)
    samples: dict[float, Text] = {}
    texts = {}
    for engine in engines:
        if engine.sample is None or engine.sample * 1e6 >= corpus.size:
            texts[engine.name] = whole
        else:
            if engine.sample not in samples:
                samples[engine.sample] = Text(corpus.sample(engine.sample).documents, folder)
            texts[engine.name] = samples[engine.sample]
        engine.prepare(texts[engine.name])
    return texts


# ------------------------------------------------------------------ encode, decode


def compare(engines: list[Engine], texts: dict[str, Text], given: Vocabulary) -> dict[str, dict[str, Any]]:
    """Whose ids equal ours, each on its text; tiktoken's and Hugging Face's must.

    Raises:
        SystemExit: tiktoken or Hugging Face disagrees with us: no use in timing anything.
    """
    expected: dict[int, np.ndarray] = {}
    found: dict[str, dict[str, Any]] = {}
    for engine in engines:
        text = texts[engine.name]
        if id(text) not in expected:
            expected[id(text)] = given.ours.encode_array(text.data)
        ours = expected[id(text)]
        if engine.name == "tokenizers":  # it is fed documents: pre-tokens end where they do
            ours = np.concatenate(given.ours.encode_batch(text.documents, threads=1))
        try:
            assert engine.load is not None
            ids = engine.ids(engine.encode(engine.load(given), text))
        except Exception as error:  # whatever a peer raises
            found[engine.name] = {"same_ids": False, "reason": f"{type(error).__name__}: {error}"[:200]}
            continue
        shorter = min(len(ids), len(ours))
        unequal = np.flatnonzero(ids[:shorter] != ours[:shorter])
        same = len(ids) == len(ours) and not len(unequal)
        found[engine.name] = {"same_ids": same, "tokens": len(ids), "bytes": text.size}
        if not same:
            found[engine.name]["first_difference"] = int(unequal[0]) if len(unequal) else shorter
            if engine.name in ("tiktoken", "tokenizers"):
                raise SystemExit(f"ids differ from {engine.name}'s at {found[engine.name]}: nothing is timed")
    return found


def encode(job: dict[str, Any]) -> dict[str, Any]:
    """One corpus, one vocabulary: cold (a fresh tokenizer's first pass) and warm (its second), 1 or 2 threads."""
    cache, threads = Path(job["cache"]), job["threads"]
    given = vocabulary(job["vocab_size"], job["pattern"], job["megabytes"], cache)
    corpus = load(job["corpus"], job["megabytes"], cache)
    engines = installed(ENGINES)
    if job.get("engines"):
        engines = [engine for engine in engines if engine.name in job["engines"]]
    if job.get("from_str"):
        engines.insert(1, OURS_STR)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        texts = _texts(corpus, engines, Path(folder))
        same = compare(engines, texts, given)
        engines = [
            engine for engine in engines if "reason" not in same[engine.name] and (threads == 1 or engine.batch)
        ]
        cold: Times = {engine.name: [] for engine in engines}
        warm: Times = {engine.name: [] for engine in engines}
        for number in range(job["rounds"]):
            for engine in engines if number % 2 == 0 else reversed(engines):
                assert engine.load is not None
                tokenizer, text = engine.load(given), texts[engine.name]

                def run(engine: Engine = engine, tokenizer: Any = tokenizer, text: Text = text) -> Any:
                    if threads == 1:
                        return engine.encode(tokenizer, text)
                    assert engine.batch is not None
                    return engine.batch(tokenizer, text, threads)

                for times in (cold, warm):
                    wall, cpu, result = timed(run)
                    times[engine.name].append((wall, cpu))
                    del result
                del tokenizer
    sizes = {engine.name: texts[engine.name].size for engine in engines}
    return {"ids": same, "cold": summary(cold, sizes), "warm": summary(warm, sizes)}


def decode(job: dict[str, Any]) -> dict[str, Any]:
    """Ids of a corpus, the same for all, back to text. Engines that take lists get lists."""
    cache = Path(job["cache"])
    given = vocabulary(job["vocab_size"], job["pattern"], job["megabytes"], cache)
    engines = [engine for engine in installed(ENGINES) if engine.decode]
    engines.insert(1, OURS_LIST)
    data = b"".join(load(job["corpus"], job["megabytes"], cache).sample(DECODED_MEGABYTES).documents)
    encoded = given.ours.encode_array(data)
    listed = encoded.tolist()
    rivals, left_out = {}, {}
    for engine in engines:
        assert engine.load is not None
        tokenizer = engine.load(given)
        ids = listed if engine.decodable is np.ndarray.tolist else engine.decodable(encoded)

        def run(engine: Engine = engine, tokenizer: Any = tokenizer, ids: Any = ids) -> Any:
            assert engine.decode is not None
            return engine.decode(tokenizer, ids)

        try:
            result = run()
        except Exception as error:  # whatever a peer raises
            left_out[engine.name] = f"{type(error).__name__}: {error}"[:200]
            continue
        if (result.encode() if isinstance(result, str) else bytes(result)) == data:
            rivals[engine.name] = run
        else:
            left_out[engine.name] = "the text it gives back is another one"
    return {"left_out": left_out, "decode": summary(interleaved(rivals, job["rounds"]), len(data))}


# ------------------------------------------------------------------ training


def training_file(corpus: str, megabytes: float, cache: Path) -> Path:
    """A corpus as a text file, documents separated by the special token."""
    path = cache / f"{corpus}-{megabytes:g}.txt"
    if not path.exists():
        path.write_bytes(SPECIAL.encode().join(load(corpus, megabytes, cache).documents))
    return path


def _trainers(names: list[str] | None) -> dict[str, Callable[[Path, int], Any]]:
    found = {}
    for name, train in TRAINERS.items():
        if names and name not in names:
            continue
        try:
            importlib.import_module(name)  # distributions and modules go by the same names here
        except ImportError:
            continue
        found[name] = train
    return found


def train(job: dict[str, Any]) -> dict[str, Any]:
    """From a text file to merges, all in: reading, counting, merging, on all cores that each takes."""
    path = training_file(job["corpus"], job["megabytes"], Path(job["cache"]))
    trainers = _trainers(job.get("engines"))
    small = training_file(job["corpus"], 1, Path(job["cache"]))
    for trainer in trainers.values():
        trainer(small, 500)  # compiles, starts threads
    rivals = {name: lambda trainer=trainer: trainer(path, job["vocab_size"]) for name, trainer in trainers.items()}
    times = interleaved(rivals, job["rounds"])
    return {
        "train": summary(times, path.stat().st_size),
        "merges_as_gigatoken": _same_merges(path, job["vocab_size"]),
    }


def _same_merges(path: Path, vocab_size: int) -> float:
    """Which share of our merges gigatoken has too (it breaks ties in another way)."""
    if "gigatoken" not in _trainers(None):
        return float("nan")
    ours, theirs = (set(map(tuple, TRAINERS[name](path, vocab_size))) for name in ("scratchlm", "gigatoken"))
    return round(len(ours & theirs) / len(ours), 4)


# ------------------------------------------------------------------ memory


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Peak resident memory of one task of one engine, beyond the interpreter with what it imports."""
    path = training_file(job["corpus"], job["megabytes"], Path(job["cache"]))
    given = Vocabulary(Path(job["vocabulary"]), "gpt2")
    importlib.import_module(job["engine"].split()[0])
    importlib.import_module({"scratchlm": "numba", "gigatoken": "awkward"}[job["engine"].split()[0]])
    if job["engine"] == "scratchlm":
        _without_extensions()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    if job["task"] == "train":
        TRAINERS[job["engine"]](path, job["vocab_size"])
    elif job["engine"] == "scratchlm":
        ids = Tokenizer.load(given.json).encode_array(path.read_bytes())
        assert len(ids)
    else:
        import gigatoken

        tokenizer = gigatoken.Tokenizer(given.json)
        if job["engine"] == "gigatoken encode_files":
            ids = tokenizer.encode_files(gigatoken.TextFileSource([path]))
        else:
            ids = tokenizer.encode(path.read_bytes())
        assert len(ids)
    return {"peak_mb": round((_resident("VmHWM") - before) / 1e6, 1), "before_mb": round(before / 1e6, 1)}


def _without_extensions() -> None:
    """Keep Numba from loading the packages that register with it when its first function is compiled or loaded.

    Here that is awkward, 45 MB, which gigatoken brings along and counts among its imports; who has only us has no awkward.
    """
    from numba.core import entrypoints

    entrypoints._already_initialized = True


# ------------------------------------------------------------------ inputs meant to hurt


def hurt(job: dict[str, Any]) -> dict[str, Any]:
    """One engine on one of the adversarial inputs; the caller ends it when it takes too long."""
    given = Vocabulary(Path(job["vocabulary"]), "gpt2")
    data = adversarial(int(job["megabytes"] * 1e6))[job["input"]]
    engine = next(engine for engine in ENGINES if engine.name == job["engine"])
    assert engine.load is not None
    with tempfile.TemporaryDirectory() as folder:
        text = Text([data], Path(folder))
        if engine is not OURS or job["input"] != "random bytes":
            engine.prepare(text)
        engine.encode(engine.load(given), Text([b"warm up"], Path(folder)))
        seconds = []
        for _ in range(job["rounds"]):
            fresh = engine.load(given)
            wall, _, _ = timed(lambda fresh=fresh: engine.encode(fresh, text))
            seconds.append(wall)
        if engine is OURS:
            tokenizer = engine.load(given)
            assert tokenizer.decode_bytes(tokenizer.encode_array(data)) == data
    return {"mb_per_s": round(len(data) / 1e6 / statistics.median(seconds), 2), "seconds": seconds}


# ------------------------------------------------------------------ data prepare


def shards(job: dict[str, Any]) -> dict[str, Any]:
    """Text file → token shards: `data prepare`, and gigatoken writing the same ids with the separators in a flat file."""
    import gigatoken

    from scratchlm.config import CorpusConfig, DataConfig
    from scratchlm.data import corpus as corpora
    from scratchlm.data import open_corpus
    from scratchlm.data import prepare as prepare_tokens

    cache = Path(job["cache"])
    path = training_file(job["corpus"], job["megabytes"], cache)
    held_out = cache / "held-out.txt"
    held_out.write_text("A held-out document.\n")
    given = vocabulary(job["vocab_size"], "gpt2", job["megabytes"], cache)
    separator = given.ours.special_tokens[SPECIAL]
    paths = {"paths": [str(path)], "validation_paths": [str(held_out)]}

    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        folder, flat = Path(scratch) / "ours", Path(scratch) / "gigatoken.bin"

        # Tokenizers with empty caches; making them is not timed.
        fresh_ours = [_scratch_tokenizer(given) for _ in range(job["rounds"] + 1)]
        fresh_theirs = [gigatoken.Tokenizer(given.json) for _ in range(2 * job["rounds"] + 1)]

        def ours(workers: int) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            corpora._hashes.clear()  # the file is hashed anew, as by a new process
            config = DataConfig(workers=workers, shard_tokens=100_000_000)
            corpus = open_corpus(CorpusConfig(kind="text", **paths))
            prepare_tokens(corpus, fresh_ours.pop(), folder, config, separator_id=separator, show_progress=False)

        def theirs(parallel: bool) -> None:
            tokenizer = fresh_theirs.pop()
            source = gigatoken.TextFileSource([path], separator=SPECIAL)
            rows = tokenizer.encode_files(source, parallel=parallel).layout
            content, offsets = np.asarray(rows.content.data), np.asarray(rows.offsets.data)
            ids = np.empty(
                len(content) + len(offsets) - 1, dtype=np.uint16 if given.ours.vocab_size <= 1 << 16 else np.uint32
            )
            ends = offsets[1:] + np.arange(len(offsets) - 1)
            ids[ends] = separator
            inside = np.ones(len(ids), dtype=bool)
            inside[ends] = False
            ids[inside] = content
            with flat.open("wb") as file:
                ids.tofile(file)
                file.flush()
                os.fsync(file.fileno())  # as `data prepare` does

        def theirs_simply(parallel: bool) -> None:
            """Ids alone, without separators, as they come: less than is asked for."""
            tokenizer = fresh_theirs.pop()
            rows = tokenizer.encode_files(
                gigatoken.TextFileSource([path], separator=SPECIAL), parallel=parallel
            ).layout
            with flat.with_suffix(".plain").open("wb") as file:
                np.asarray(rows.content.data).astype(
                    np.uint16 if given.ours.vocab_size <= 1 << 16 else np.uint32
                ).tofile(file)
                file.flush()
                os.fsync(file.fileno())

        ours(job["workers"])
        theirs(job["workers"] > 1)
        written = b"".join(part.read_bytes() for part in sorted(folder.glob("train-*.bin")))
        same = written == flat.read_bytes()
        rivals = {
            "scratchlm": lambda: ours(job["workers"]),
            "gigatoken": lambda: theirs(job["workers"] > 1),
            "gigatoken, no separators": lambda: theirs_simply(job["workers"] > 1),
        }
        times = interleaved(rivals, job["rounds"])
    return {"same_bytes": same, "shards": summary(times, path.stat().st_size)}


def _scratch_tokenizer(given: Vocabulary) -> Tokenizer:
    assert OURS.load is not None
    tokenizer: Tokenizer = OURS.load(given)
    return tokenizer


PARTS = {
    "prepare": prepare,
    "encode": encode,
    "decode": decode,
    "train": train,
    "memory": memory,
    "hurt": hurt,
    "shards": shards,
}

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(PARTS[job["part"]](job)))
