"""Specs: what is compared, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from scratchlm.cli import main
from scratchlm.errors import UserError
from scratchlm.experiments.spec import load_experiment


def load(folder: Path, text: str, base: str = 'base = "small.toml"\n'):  # type: ignore[no-untyped-def]
    (folder / "exp.toml").write_text(base + text)
    return load_experiment(folder / "exp.toml")


def test_variants_are_the_base_with_their_fields(small: Path) -> None:
    found = load(
        small,
        """
        seeds = [3, 5]
        fields."train.steps" = 7
        [fields.model]
        layers = 1
        [variants.post]
        model.norm_placement = "post"
        model.rope.theta = [500.0]
        [variants.wide]
        "model.d_model" = 64
        optim.lr = 0.5
        """,
    )
    base, post, wide = found.variants
    assert [one.name for one in found.variants] == ["base", "post", "wide"] and found.spec.chosen_seeds == [3, 5]
    assert {one.recipe.train.steps for one in found.variants} == {7}
    assert {one.recipe.model.layers for one in found.variants} == {1}
    assert (base.recipe.model.norm_placement, post.recipe.model.norm_placement) == ("pre", "post")
    assert post.recipe.model.rope.theta == (500.0,) and base.recipe.model.rope.theta != (500.0,)
    assert (wide.recipe.model.d_model, wide.recipe.optim.lr) == (64, 0.5)
    assert wide.recipe.model.norm_placement == "pre"
    assert post.changes == {"model.norm_placement": "post", "model.rope.theta": [500.0]}


def test_a_preset_stands_for_a_whole_model(small: Path) -> None:
    found = load(small, '[variants.llama]\nmodel.preset = "llama-3-tiny"\nmodel.layers = 1\n')
    model = found.variants[1].recipe.model
    assert model.layers == 1 and model.norm == "rmsnorm" and model.d_model != 32
    both = load(small, "[variants.a]\nmodel.layers = 1\n", base='base = "llama-3-tiny"\n')
    assert both.variants[0].recipe.model.d_model == model.d_model


def test_a_grid_is_every_combination(small: Path) -> None:
    found = load(small, '[sweep]\n[sweep.fields]\noptim.lr = [0.1, 0.2]\nmodel.norm_placement = ["pre", "post"]\n')
    assert [one.name for one in found.variants] == [
        "base",
        "lr=0.1,norm_placement=pre",
        "lr=0.1,norm_placement=post",
        "lr=0.2,norm_placement=pre",
        "lr=0.2,norm_placement=post",
    ]
    assert found.variants[-1].recipe.optim.lr == 0.2


def test_draws_are_of_the_ranges_and_repeat(small: Path) -> None:
    text = """
    [sweep]
    kind = "random"
    samples = 40
    [sweep.fields]
    "optim.lr" = {low = 1e-4, high = 1.0, log = true}
    "model.d_model" = {low = 16, high = 64, multiple_of = 16}
    "model.norm" = ["rmsnorm", "layernorm"]
    """
    found = load(small, text)
    points = found.variants[1:]
    rates = [one.recipe.optim.lr for one in points]
    assert all(1e-4 <= rate <= 1 for rate in rates)
    assert 5 < sum(rate < 1e-2 for rate in rates) < 35  # half of them, in the logarithm
    assert {one.recipe.model.d_model for one in points} == {16, 32, 48, 64}
    assert {one.recipe.model.norm for one in points} == {"rmsnorm", "layernorm"}
    assert [one.name for one in load(small, text).variants] == [one.name for one in found.variants]
    other = load(small, text.replace("samples = 40", "samples = 40\n    seed = 1"))
    assert [one.name for one in other.variants] != [one.name for one in found.variants]


REFUSED = {
    "unknown field": ("[variants.a]\nmodel.norm_placment = 'post'\n", "did you mean model.norm_placement"),
    "unknown in all": ("fields.train.stepz = 3\n[variants.a]\nmodel.layers = 1\n", "did you mean train.steps"),
    "unknown in sweep": ("[sweep]\nfields.'optim.lrr' = [1.0]\n", "did you mean optim.lr"),
    "value": ("[variants.a]\nmodel.norm = 'rmsnrm'\n", "variant 'a'.*did you mean rmsnorm"),
    "combination": ("[variants.odd]\nmodel.heads = 3\n", "variant 'odd'"),
    "preset": ("[variants.a]\nmodel.preset = 'llama-9'\n", "llama-9"),
    "a section": ("[variants.a]\nmodel = 3\n", "unknown field model"),
    "own seed": ("[variants.a]\nseed = 3\n", "seed is set by the list of seeds"),
    "own out": ("[variants.a]\nout = 'x'\n", "out is set by the folder"),
    "nothing": ("", "nothing to compare"),
    "reference": ("reference = 'b'\n[variants.a]\nmodel.layers = 1\n", "there are base, a"),
    "name": ("[variants.'a b/../c']\nmodel.layers = 1\n", "names folders"),
    "base's name": ("[variants.base]\nmodel.layers = 1\n", "choose another name"),
    "seeds": ("seeds = [1, 1]\n[variants.a]\nmodel.layers = 1\n", "distinct seeds"),
    "no seeds": ("seeds = 0\n[variants.a]\nmodel.layers = 1\n", "positive number"),
    "budget": ("[variants.a]\nmodel.layers = 1\n[budget]\nkind = 'time'\n", "allowed: tokens, flops"),
    "active": ("[variants.a]\nmodel.layers = 1\n[budget]\nactive = true\n", "belongs to kind = parameters"),
    "rates": ("[variants.a]\nmodel.layers = 1\n[rates]\nfactors = [0.5, 2.0]\n", "must hold 1.0"),
    "range": ("[sweep]\nkind = 'random'\nfields.'optim.lr' = {low = 2.0, high = 1.0}\n", "not below"),
    "empty list": ("[sweep]\nfields.'optim.lr' = []\n", "give a list of values"),
    "unknown section": ("[variant.a]\nmodel.layers = 1\n", "did you mean variants"),
    "twice": ("[variants.a]\n'model.layers' = 1\nmodel.layers = 2\n", "given twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused_in_one_line_before_anything_runs(
    case: str, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        load(small, text)
    assert main(["ablate", "exp.toml"]) == 2
    _, err = capfd.readouterr()
    assert len(err.strip().splitlines()) == 1 and err.startswith("scratchlm: error:")
    assert not (small / "runs").exists()


def test_files_that_are_none(small: Path) -> None:
    for path, message in (("none.toml", "does not exist"), (".", "cannot be read")):
        with pytest.raises(UserError, match=message):
            load_experiment(small / path)
    (small / "exp.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not valid TOML"):
        load_experiment(small / "exp.toml")
    (small / "exp.toml").write_text('base = "elsewhere.toml"\n[variants.a]\nmodel.layers = 1\n')
    with pytest.raises(UserError, match=r"elsewhere\.toml does not exist"):
        load_experiment(small / "exp.toml")


def test_a_dry_run_only_lists(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (small / "exp.toml").write_text('base = "small.toml"\n[variants.post]\nmodel.norm_placement = "post"\n')
    assert main(["ablate", "exp.toml", "--dry-run", "True"]) == 0
    out = capfd.readouterr().out
    assert "the recipe as it is" in out and "model.norm_placement = post" in out
    assert not (small / "runs").exists()
