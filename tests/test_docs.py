"""What the pages promise exists: links lead somewhere, commands and their options are real, Python is Python."""

from __future__ import annotations

import ast
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from pydantic import BaseModel

from scratchlm.cli import COMMANDS
from scratchlm.commands import (
    devices,
    drawings,
    dtypes,
    experiments,
    interop,
    models,
    profiling,
    resources,
    tokenizer_tools,
    tokenizers,
    trained,
)
from scratchlm.config import Recipe
from scratchlm.evaluate.samples import read_samples
from scratchlm.section import field_paths

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

ARGUMENTS: dict[str, type[BaseModel]] = {
    "run": Recipe,
    "train": Recipe,
    "data prepare": Recipe,
    "tokenizer train": tokenizers.TrainArguments,
    "tokenizer encode": tokenizers.EncodeArguments,
    "tokenizer decode": tokenizers.DecodeArguments,
    "tokenizer inspect": tokenizer_tools.InspectArguments,
    "tokenizer compare": tokenizer_tools.CompareArguments,
    "tokenizer convert": tokenizer_tools.ConvertArguments,
    "evaluate": trained.EvaluateArguments,
    "generate": trained.GenerateArguments,
    "import": interop.ImportArguments,
    "export": interop.ExportArguments,
    "model list": models.ListArguments,
    "model show": models.ShowArguments,
    "model draw": drawings.DrawArguments,
    "model shape": models.ShapeArguments,
    "resources": resources.ResourcesArguments,
    "resources devices": devices.DevicesArguments,
    "resources measure": devices.MeasureArguments,
    "resources dtypes": dtypes.AuditArguments,
    "profile": profiling.ProfileArguments,
    "ablate": experiments.AblateArguments,
    "lr": experiments.LearningRateArguments,
}
FLAGS = {
    **{name: {"fresh", "model.preset"} for name in ("run", "train", "data prepare")},
    "model shape": {"json"},
    "tokenizer inspect": {"json"},
    "tokenizer compare": {"json"},
    "resources": {"json", "model.preset"},
    "resources devices": {"json", "sources"},
    "resources measure": {"json", "quick"},
    "resources dtypes": {"json", "saturate", "model.preset"},
    "profile": {"json", "model.preset"},
    "lr": {"model.preset"},
}  # beside the fields

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:href|src)=\"([^\"]+)\"")


def blocks(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks in one of `languages`."""
    return [textwrap.dedent(content) for _, language, content in FENCE.findall(text) if language in languages]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def links(text: str) -> list[str]:
    found = [first or second for first, second in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(text)))]
    return [link for link in found if not re.match(r"[a-z][a-z0-9+.-]*:", link)]


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(link: str, page: Path) -> str | None:
    """What is wrong with a relative link of a page."""
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return f"{link}: there is no {path}"
    if anchor and target.suffix == ".md" and anchor not in slugs(target.read_text(encoding="utf-8")):
        return f"{link}: no heading of that name"
    return None


def command_lines(text: str) -> list[str]:
    """Every ``scratchlm …`` line of the console blocks, continued lines joined, and of the code within sentences."""
    lines: list[str] = []
    for block in blocks(text, "console", "bash", "sh", "shell"):
        joined = re.sub(r"\\\n\s*", " ", block)
        lines += [line.strip().removeprefix("$ ").strip() for line in joined.splitlines()]
    lines += re.findall(r"`(scratchlm [^`\n]+)`", prose(text))
    return [line for line in lines if re.match(r"scratchlm\s", line)]


def mistakes(line: str) -> list[str]:
    """What `line` says that the command line does not know."""
    words = shlex.split(line.split(" | ")[0].split(" > ")[0], comments=True)[1:]
    if not words or words[0] in ("--help", "-h", "--version", "<command>", "…", "..."):
        return []
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    name = " ".join(words[: 2 if words[0] in groups else 1])
    if name not in ARGUMENTS and words[0] in ARGUMENTS:  # `resources RECIPE` beside `resources measure`
        name = words[0]
    if name not in ARGUMENTS:
        return [f"there is no command {name!r}"]
    known = {*field_paths(ARGUMENTS[name]), *FLAGS.get(name, ()), "help"}
    flags = [word[2:].split("=")[0] for word in words if word.startswith("--")]
    return [f"{name} has no option --{flag}" for flag in flags if flag.replace("-", "_") not in known]


def test_every_command_has_its_options_here() -> None:
    assert set(ARGUMENTS) == set(COMMANDS)


@every_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert not [wrong for link in links(page.read_text(encoding="utf-8")) if (wrong := broken(link, page))]


@every_page
def test_commands_and_options_exist(page: Path) -> None:
    wrong = {line: mistakes(line) for line in command_lines(page.read_text(encoding="utf-8"))}
    assert not {line: found for line, found in wrong.items() if found}


@every_page
def test_recipes_that_commands_name_exist(page: Path) -> None:
    for line in command_lines(page.read_text(encoding="utf-8")):
        for recipe in re.findall(r"\brecipes/[\w.-]+\.toml", line):
            assert (ROOT / recipe).exists(), line


@every_page
def test_python_is_python(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python", "py"):
        ast.parse(block, filename=str(page))


def test_these_checks_see_what_they_should(tmp_path: Path) -> None:
    """A page made wrong on purpose, and the real pages, in which there is something to check."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A page, *nearly*\n\n[good](page.md) [up](#a-page-nearly) [away](https://example.org/none) [bad](gone.md)\n"
        "[anchor](page.md#nowhere) `[code](no.md)` ![picture](none.png)\n\n"
        "- as a list:\n\n  ```console\n  $ scratchlm run r.toml \\\n      --model.d-model 8 --modle.layers 3 --fresh\n"
        "  run folder: --not-an-option\n  ```\n\n```python\nx = = 1\n```\n\n`scratchlm rum r.toml`, `scratchlm generate RUN --top-k 4`\n",
        encoding="utf-8",
    )
    text = page.read_text(encoding="utf-8")
    assert [wrong for link in links(text) if (wrong := broken(link, page))] == [
        "gone.md: there is no gone.md",
        "page.md#nowhere: no heading of that name",
        "none.png: there is no none.png",
    ]
    found = [mistakes(line) for line in command_lines(text)]
    assert found == [["run has no option --modle.layers"], ["there is no command 'rum'"], []]
    with pytest.raises(SyntaxError):
        ast.parse(*blocks(text, "python"))
    everything = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(links(everything)) >= 2 and len(command_lines(everything)) >= 5
    assert len(blocks(everything, "python")) >= 4


def test_the_readmes_sample_and_figures_are_those_of_the_committed_run() -> None:
    results = ROOT / "docs/results/demo"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sample = read_samples(results / "samples.txt")[0]
    assert (sample.prompt + sample.continuation).rstrip() in readme
    run = json.loads((results / "quiet.json").read_text())
    assert f"**{run['bits']:.4f}**" in readme
    assert f"{run['loss']:.4f} nats per token" in readme
    assert f"{run['median']:,.0f} tokens/s" in readme
