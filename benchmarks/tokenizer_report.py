"""What the tokenizer benchmark found, for people: the ratios against their targets, ``tables.md``, and the chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scratchlm.files import atomic_path, write_text

OURS = "scratchlm"
SCRIPTS = ("cjk", "cyrillic", "arabic", "emoji")
CORPORA = ("prose", "python", "multilingual")
MAIN = "encode prose 32000"


def targets(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target of the project for its tokenizer with the ratio as measured; None where its part has not been run."""
    rows: list[dict[str, Any]] = []

    def figure(part: str, *path: str) -> float | None:
        value = parts.get(part)
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, (int, float)) else None

    def row(what: str, against: str, value: float | None, target: float, most: bool = False) -> None:
        met = None if value is None else (value <= target if most else value >= target)
        rows.append(
            {"what": what, "against": against, "value": value, "target": target, "at_most": most, "met": met}
        )

    def over_all(task: str, peer: str) -> str:
        values = [figure(part, task, peer, "times_ours") for part in parts if part.startswith("encode ")]
        known = [value for value in values if value is not None]
        return f" (all corpora and vocabularies: {min(known):.2f} to {max(known):.2f})" if known else ""

    for task, wanted in {
        "cold": {"tiktoken": 10, "gigatoken": 1.2},
        "warm": {"tiktoken": 20, "tokenizers": 80, "gigatoken": 1.2},
    }.items():
        for peer, target in wanted.items():
            row(
                f"encode, 1 thread, {task}" + over_all(task, peer),
                peer,
                figure(MAIN, task, peer, "times_ours"),
                target,
            )
    for peer, target in {"tiktoken": 15.0, "gigatoken": 1.1}.items():
        row("encode, 2 threads, warm", peer, figure("threads prose", "warm", peer, "times_ours"), target)
    row("encode, 2 threads: cores at work", "CPU time ÷ wall", figure("threads prose", "warm", OURS, "cores"), 1.7)
    prose = figure("script prose", "warm", OURS, "mb_per_s")
    for script in SCRIPTS:
        row(f"{script}, warm", "gigatoken", figure(f"script {script}", "warm", "gigatoken", "times_ours"), 1)
        mine = figure(f"script {script}", "warm", OURS, "mb_per_s")
        row(f"{script}, warm", "our ASCII speed", round(mine / prose, 3) if mine and prose else None, 0.5)
    row(
        "decode, each from what it takes best",
        "tiktoken",
        figure("decode prose", "decode", "tiktoken", "times_ours"),
        3,
    )
    mine, other = (
        figure("decode prose", "decode", name, "mb_per_s") for name in (f"{OURS}, from a list", "tiktoken")
    )
    row("decode, both from a list", "tiktoken", round(mine / other, 2) if mine and other else None, 3)
    for size in (10_000, 32_000):
        for peer, target in {"tokenizers": 25, "rustbpe": 8, "gigatoken": 2.5}.items():
            row(f"train 100 MB to {size:,}", peer, figure(f"train {size}", "train", peer, "times_ours"), target)
    theirs = min(
        (
            value
            for name in ("encode gigatoken", "encode gigatoken encode_files")
            if (value := figure("memory", name, "peak_mb"))
        ),
        default=None,
    )
    for task, other in {"encode": theirs, "train": figure("memory", "train gigatoken", "peak_mb")}.items():
        mine = figure("memory", f"{task} {OURS}", "peak_mb")
        row(
            f"peak memory, {task} 100 MB",
            "gigatoken",
            round(mine / other, 3) if mine and other else None,
            1,
            most=True,
        )
    row(
        "text file → token shards, 2 workers",
        "gigatoken writing the same ids",
        figure("shards 2", "shards", "gigatoken", "times_ours"),
        1,
    )
    hurt = (parts.get("hurt") or {}).get("mb_per_s", {})
    for name, rates in hurt.items():
        rate = rates.get(OURS)
        row(f"10 MB: {name}", "MB/s", rate if isinstance(rate, (int, float)) else 0.0, 5)
    first = (parts.get("first") or {}).get("processes", {})

    def seconds(name: str) -> float | None:
        value: float | None = first.get(name, {}).get("seconds")
        return value

    row(
        "first encode ever (4 MB), nothing compiled, whole process",
        "seconds",
        seconds("encode 4 MB, nothing compiled"),
        5,
        most=True,
    )
    row(
        "first training ever, nothing compiled, whole process",
        "seconds",
        seconds("train 4 MB to 4096, nothing compiled"),
        10,
        most=True,
    )
    numpy, line = seconds("import numpy"), seconds("encode a line")
    row(
        "import + load + first encode",
        "seconds more than import numpy",
        round(line - numpy, 3) if line and numpy else None,
        1,
        most=True,
    )
    return rows


def _encode_table(parts: dict[str, Any], names: list[str], task: str) -> list[str]:
    known = [name for name in names if name in parts]
    engines: dict[str, None] = {}
    for name in known:
        engines |= dict.fromkeys(parts[name][task])
    lines = [f"| | {' | '.join(name.split(' ', 1)[1] for name in known)} |", "| --- |" + " ---: |" * len(known)]
    for engine in engines:
        cells = []
        for name in known:
            row = parts[name][task].get(engine)
            if row is None:
                cells.append("–")
                continue
            mark = "" if parts[name]["ids"].get(engine, {}).get("same_ids") else " ≠"
            ratio = "" if engine == OURS else f" ({row['times_ours']:.2f}x)"
            cells.append(
                f"{row['mb_per_s']:.0f}{ratio}{mark}"
                if row["mb_per_s"] >= 20
                else f"{row['mb_per_s']:.1f}{ratio}{mark}"
            )
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    return lines


def _commits(parts: dict[str, Any]) -> list[str]:
    """Parts can be run one by one: which commit each of them measured, unless it is one for all."""
    found: dict[str, list[str]] = {}
    for name, part in parts.items():
        if name != "prepare":
            found.setdefault(part.get("about", {}).get("commit", ""), []).append(name)
    if len(found) < 2:
        return []
    told = [f"`{commit}`: {', '.join(names)}" for commit, names in found.items()]
    return ["Not all parts were run at one commit. " + "; ".join(told) + ".", ""]


def tables(results: dict[str, Any], ratios: list[dict[str, Any]], left_out: dict[str, str]) -> str:
    parts, machine = results["parts"], results.get("machine", {})
    lines = [
        "# The tokenizer beside its peers",
        "",
        f"Made by `{results['command']}` ([JSON](results.json): every median with minimum, maximum, cores and commit) on "
        f"{machine.get('processor')}, {machine.get('cores')} cores, Python {machine.get('python')}; "
        + ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
        + ".",
        "",
        "In brackets: how many times faster ours is, the median of the rounds' ratios. A shared machine: trust the ratios more than the MB/s. "
        "`≠`: this peer's ids differ from ours (tiktoken's and Hugging Face's never do: else nothing is timed).",
        "",
        *_commits(parts),
        "## Targets",
        "",
        "| | against | measured | target | |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for row in ratios:
        value = "not measured" if row["value"] is None else f"{row['value']:.2f}"
        sign = "≤" if row["at_most"] else "≥"
        mark = {True: "met", False: "**missed**", None: ""}[row["met"]]
        lines.append(f"| {row['what']} | {row['against']} | {value} | {sign} {row['target']:g} | {mark} |")
    lines += [
        "",
        "## Corpora",
        "",
        "| | bytes | documents | ASCII | BLAKE2b |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, about in results.get("corpora", {}).items():
        lines.append(
            f"| {name} | {about['bytes']:,} | {about['documents']:,} | {about['ascii']:.1%} | `{about['blake2b']}` |"
        )
    names = [f"encode {corpus} {size}" for corpus in CORPORA for size in (10_000, 32_000, 100_000)]
    names.append("encode prose 32000 cl100k")
    for task, title in {
        "warm": "one thread, second pass (warm)",
        "cold": "one thread, first pass of a fresh tokenizer (cold)",
    }.items():
        lines += ["", f"## Encoding, {title}: MB/s", "", *_encode_table(parts, names, task)]
    lines += ["", "## Encoding by script, 32,000 tokens, warm: MB/s", ""]
    lines += _encode_table(parts, [f"script {script}" for script in ("prose", *SCRIPTS)], "warm")
    lines += ["", "## Encoding, two threads, 32,000 tokens, warm: MB/s", ""]
    lines += _encode_table(parts, [f"threads {corpus}" for corpus in CORPORA], "warm")
    simple = {
        "decode prose": ("decode", "Decoding prose, 32,000 tokens"),
        "decode multilingual": ("decode", "Decoding multilingual text, 32,000 tokens"),
        "train 10000": ("train", "Training on prose to 10,000, file to merges, all cores"),
        "train 32000": ("train", "Training on prose to 32,000, file to merges, all cores"),
        "shards 1": ("shards", "Text file → token shards, 1 worker"),
        "shards 2": ("shards", "Text file → token shards, 2 workers"),
    }
    for part, (key, title) in simple.items():
        if part in parts:
            lines += [
                "",
                f"## {title}",
                "",
                "| | seconds | min–max | MB/s | cores | ours is |",
                "| --- | ---: | --- | ---: | ---: | ---: |",
            ]
            for engine, row in parts[part][key].items():
                lines.append(
                    f"| {engine} | {row['seconds']:.3f} | {row['min']:.3f}–{row['max']:.3f} | {row['mb_per_s']:.1f} | {row['cores']:.2f} | {row['times_ours']:.2f}x |"
                )
    if "memory" in parts:
        lines += [
            "",
            "## Peak memory beyond the interpreter with its imports, 100 MB file",
            "",
            "| | MB | min–max |",
            "| --- | ---: | --- |",
        ]
        for name, row in parts["memory"].items():
            if name != "about":
                lines.append(f"| {name} | {row['peak_mb']:.0f} | {row['min']:.0f}–{row['max']:.0f} |")
    if "hurt" in parts:
        engines = [OURS, "gigatoken", "tiktoken"]
        lines += [
            "",
            "## Inputs of 10 MB meant to hurt: MB/s (0: not done in 30 s)",
            "",
            f"| | {' | '.join(engines)} |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, rates in parts["hurt"]["mb_per_s"].items():
            lines.append(f"| {name} | {' | '.join(str(rates.get(engine, '–')) for engine in engines)} |")
    if "first" in parts:
        lines += ["", "## Whole processes: first use", "", "| | seconds | min–max |", "| --- | ---: | --- |"]
        for name, row in parts["first"]["processes"].items():
            lines.append(f"| {name} | {row['seconds']:.2f} | {row['min']:.2f}–{row['max']:.2f} |")
    lines += ["", "## Not measured in encoding", ""]
    lines += [f"- {name}: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def chart(results: dict[str, Any], path: Path) -> None:
    """Warm encoding speed on three corpora and training time, as bars; grey text that a light and a dark page both show."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grey = "#808890"
    parts = results["parts"]
    encoding = {
        corpus: parts[f"encode {corpus} 32000"]["warm"] for corpus in CORPORA if f"encode {corpus} 32000" in parts
    }
    training = {size: parts[f"train {size}"]["train"] for size in (10_000, 32_000) if f"train {size}" in parts}
    if not encoding:
        return
    names = [name for name in next(iter(encoding.values())) if name != f"{OURS}, from str"]
    names.sort(key=lambda name: -encoding[next(iter(encoding))][name]["mb_per_s"])
    figure, axes = plt.subplots(
        1, 1 + bool(training), figsize=(11, 5), width_ratios=[2, 1][: 1 + bool(training)], squeeze=False
    )
    colours = {"prose": "#3b82c4", "python": "#e08a2e", "multilingual": "#3fa06a"}
    _bars(
        axes[0][0],
        names,
        {corpus: {n: rows.get(n, {}).get("mb_per_s", 0) for n in names} for corpus, rows in encoding.items()},
        colours,
    )
    axes[0][0].set_title("Encoding, one thread, warm: MB/s (more is better)", color=grey, fontsize=11)
    if training:
        trainers = list(next(iter(training.values())))
        data = {f"to {size:,}": {n: rows[n]["seconds"] for n in trainers} for size, rows in training.items()}
        _bars(axes[0][1], trainers, data, dict(zip(data, ("#8a6fc4", "#c46f9a"), strict=False)))
        axes[0][1].set_title("Training on 100 MB: seconds", color=grey, fontsize=11)
    for axis in axes[0]:
        axis.tick_params(colors=grey)
        axis.set_facecolor("none")
        for side, spine in axis.spines.items():
            spine.set_color(grey)
            spine.set_visible(side in ("left", "bottom"))
        legend = axis.legend(frameon=False, loc="lower right" if axis is axes[0][0] else "upper right", fontsize=9)
        for text in legend.get_texts():
            text.set_color(grey)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(
            temporary,
            format=path.suffix[1:],
            transparent=True,
            dpi=150,
            metadata={"Date": None} if path.suffix == ".svg" else None,
        )
    plt.close(figure)


def _bars(axis: Any, names: list[str], groups: dict[str, dict[str, float]], colours: dict[str, str]) -> None:
    height = 0.8 / len(groups)
    for number, (group, values) in enumerate(groups.items()):
        places = [place + number * height for place in range(len(names))]
        bars = axis.barh(places, [values[name] for name in names], height, label=group, color=colours[group])
        labels = [f"{values[name]:.0f}" if values[name] >= 20 else f"{values[name]:.1f}" for name in names]
        axis.bar_label(bars, labels, padding=3, color="#808890", fontsize=8)
    axis.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
    for label, name in zip(axis.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == OURS else "normal")
    axis.invert_yaxis()
    axis.margins(x=0.12)


def write(results: dict[str, Any], out: Path, picture: Path | None) -> dict[str, Any]:
    """Write ``tables.md`` and the chart; returns every ratio, by what and against whom."""
    from tokenizer_engines import PEERS

    ratios = targets(results["parts"])
    left_out = {engine.name: engine.reason for engine in PEERS if engine.reason}
    for name, part in results["parts"].items():
        for engine, row in part.get("ids", {}).items() if name.startswith("encode") else ():
            if "reason" in row:
                left_out.setdefault(engine, f"{name}: {row['reason']}")
    write_text(out / "tables.md", tables(results, ratios, left_out))
    chart(results, picture or out / "tokenizer.svg")
    return {"benchmark": "tokenizer", "targets": ratios}
