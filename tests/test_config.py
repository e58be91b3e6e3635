"""Recipes: nothing is lost between TOML and back, and what is wrong is named."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import annotated_types
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from scratchlm import config as config_module
from scratchlm.config import ModelConfig, Recipe, load_recipe, save_recipe
from scratchlm.errors import UserError
from scratchlm.model import choices, parts
from scratchlm.section import Section, field_paths, nearest_field, validate

RECIPES = Path(__file__).parent.parent / "recipes"


def sections_of(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every section of a recipe, and of its sections, by its dotted name."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            found |= {prefix + name: field.annotation, **sections_of(field.annotation, f"{prefix}{name}.")}
    return found


SECTIONS = sections_of(Recipe)
LEAVES = [path for path in field_paths(Recipe) if path not in SECTIONS]


def field_of(path: str) -> FieldInfo:
    section: Any = Recipe
    *outer, leaf = path.split(".")
    for name in outer:
        section = section.model_fields[name].annotation
    field: FieldInfo = section.model_fields[leaf]
    return field


def limits_of(metadata: list[Any]) -> dict[str, float]:
    """The bounds among a field's constraints."""
    limits: dict[str, float] = {}
    for constraint in metadata:
        for part in getattr(constraint, "metadata", [constraint]):
            for key, kind in (("ge", "Ge"), ("gt", "Gt"), ("le", "Le"), ("lt", "Lt")):
                if isinstance(part, getattr(annotated_types, kind)):
                    limits[key] = getattr(part, key)
    return limits


def values_for(annotation: Any, limits: dict[str, float]) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may hold, as hypothesis draws it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(st.none() if a is type(None) else values_for(a, limits) for a in arguments))
    if origin is list:
        return st.lists(values_for(arguments[0], {}), max_size=3)
    if origin is typing.Annotated:
        return values_for(
            arguments[0], {key: value for a in arguments[1:] for key, value in limits_of([a]).items()}
        )
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values_for(arguments[0], {}), min_size=1, max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(values_for(a, {}) for a in arguments))
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(int(limits.get("ge", -(2**60))), int(limits.get("le", 2**60)))
    if annotation is float:
        low, high = limits.get("ge", limits.get("gt", -1e300)), limits.get("le", limits.get("lt", 1e300))
        drawn = st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits)
        return drawn.map(lambda value: value + 0.0)  # −0.0 equals 0.0
    return {str: st.text(max_size=20), Path: st.text(max_size=20).map(Path)}[annotation]


SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    # Fields that others restrict, or that take a pattern.
    "name": st.from_regex(r"\A[a-zA-Z0-9_+-][a-zA-Z0-9_.+-]{0,20}\Z"),
    "device": st.sampled_from(["auto", "cpu", "mps", "cuda", "cuda:1"]),
    "train.accumulation": st.sampled_from([1, "auto"]),
    "train.micro_batch": st.sampled_from([None, 1, "auto"]),
    "train.batch_warmup_start": st.just(1),
    "train.memory_limit": st.sampled_from([None, "8GB", "1.5 TiB", "512MiB", "70kB", "8000000000", "3B"]),
    "train.batch_size": st.integers(1, 9),
    "tokenizer.special_tokens": st.lists(st.text(max_size=9), min_size=1, max_size=4, unique=True),
    "model.context_length": st.integers(256, 2**24),
    "evaluate.context_length": st.one_of(st.none(), st.integers(100, 256)),
    "evaluate.stride": st.one_of(st.none(), st.integers(1, 100)),
    "optim.betas": st.tuples(*[st.floats(0, 1, exclude_max=True).map(lambda value: value + 0.0)] * 2),
    "model.d_model": st.integers(1, 50).map(lambda n: 16 * n),
    "model.heads": st.sampled_from([1, 2, 4]),
    "model.kv_heads": st.sampled_from([None, 1]),
    "model.head_dim": st.sampled_from([None, 2, 64]),
    "model.layers": st.integers(3, 100),
    "model.block": st.sampled_from(["serial", "parallel"]),
    "model.attention": st.just(("mha", "mha")),
    "model.stride_summary": st.just(1),
    "model.mask": st.sampled_from([("causal",), ("sliding_window", "causal"), ("fixed",)]),
    "model.linear.normalise": st.none(),
    "model.moe.d_shared": st.none(),
    "model.moe.shared_gate": st.just(False),
    "model.moe.normalise": st.just(True),
    "model.rope.fraction": st.just(1.0),
    "model.rope.factor": st.just(1.0),
    "model.rope.low_freq_factor": st.floats(0.5, 2),
    "model.rope.high_freq_factor": st.floats(3, 9),
    "model.rope.scaling": st.just(("linear", "ntk")),
    "model.moe.experts": st.just(8),
    "model.moe.shared": st.integers(0, 2),
    "model.moe.top_k": st.integers(1, 2),
    "model.moe.fine_grained": st.integers(1, 4),
    "model.moe.groups": st.just(1),
    "model.moe.top_groups": st.just(None),
    "model.moe.first_dense": st.just(0),
    "model.moe.every": st.just(1),
    "model.moe.bias_update": st.floats(0, 1).map(lambda value: value + 0.0),
}


def strategy(path: str) -> st.SearchStrategy[Any]:
    if path in SPECIAL:
        return SPECIAL[path]
    field = field_of(path)
    return values_for(field.annotation, limits_of(field.metadata))


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for path, value in flat.items():
        *outer, leaf = path.split(".")
        place = values
        for name in outer:
            place = place.setdefault(name, {})
        place[leaf] = value
    return values


KIND_FOR = {
    # A field of the corpus is refused where the kind of corpus does not read it.
    **dict.fromkeys(("paths", "validation_paths", "separator"), "text"),
    **dict.fromkeys(("text_field", "dataset", "subset", "train_split", "validation_split"), "huggingface"),
}


def consistent(flat: dict[str, Any]) -> dict[str, Any]:
    """Without the fields of other kinds of corpus; a field of the corpus alone brings its kind."""
    values = nested(flat)
    corpus = values.get("corpus", {})
    kind = corpus.setdefault("kind", KIND_FOR.get(next(iter(corpus), ""), "python-stdlib")) if corpus else None
    fitting = {"jsonl": "text", "parquet": "text"}.get(kind, kind)
    for name in [name for name in corpus if KIND_FOR.get(name, fitting) != fitting]:
        del corpus[name]
    if kind in ("jsonl", "parquet"):
        corpus.pop("separator", None)
    if values.get("train", {}).get("precision") == "fp32":
        values["train"] |= {"weights": "fp32", "fp8": False}
    train = values.get("train", {})
    if train.get("cuda_graph"):
        if str(train.get("compile_mode")).endswith("cuda_graphs"):
            train["compile_mode"] = "default"
        if isinstance(train.get("micro_batch"), int) or isinstance(train.get("accumulation"), int):
            train.pop("cuda_graph")
    if corpus.get("validation_paths") or corpus.get("validation_split"):
        corpus.pop("hold_out", None)
    return values


def there_and_back(recipe: Recipe, folder: Path) -> Recipe:
    save_recipe(recipe, folder / "saved.toml")
    return load_recipe(folder / "saved.toml")


@settings(max_examples=60, deadline=None)
@given(flat=st.fixed_dictionaries({path: strategy(path) for path in LEAVES}))
def test_any_recipe_survives_toml(flat: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = validate(Recipe, consistent(flat), "test")
    assert there_and_back(recipe, tmp_path_factory.mktemp("recipe")) == recipe


AROUND: dict[str, dict[str, Any]] = {
    # What a field needs beside it to be legal, or to have another value than its default.
    "model.block": {"model.norm_placement": "pre"},
    "model.rope.factor": {"model.rope.scaling": "linear"},
    "model.linear.normalise": {"model.attention": "linear"},
    "model.moe.d_shared": {"model.moe.shared": 1},
    "model.moe.shared_gate": {"model.moe.shared": 1},
}
OTHER: dict[str, Any] = {
    # Fields whose strategy above has one value only, the default: another one, checked by hand.
    "train.accumulation": 4,
    "train.batch_warmup_start": 8,
    "model.rope.fraction": 0.5,
    "model.rope.factor": 4.0,
    "model.stride_summary": 3,
    "model.moe.groups": 2,
    "model.linear.normalise": False,
    "model.moe.d_shared": 500,
    "model.moe.shared_gate": True,
    "model.moe.normalise": False,
    "model.moe.top_groups": 1,
    "model.moe.first_dense": 1,
    "model.moe.every": 2,
}


def experts(path: str) -> dict[str, Any]:
    """Fields of a mixture say nothing without experts."""
    return {"model.moe.experts": 8} if path.startswith("model.moe.") else {}


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_alone_survives_toml(path: str, tmp_path: Path) -> None:
    default = field_of(path).get_default(call_default_factory=True)

    @settings(max_examples=3, deadline=None, database=None)
    @given(strategy(path).filter(lambda value: value != default))
    def check(value: Any) -> None:
        around = {**AROUND.get(path, {}), **({} if path == "model.moe.experts" else experts(path))}
        recipe = validate(Recipe, consistent({**around, path: value}), "test")
        kind = {"corpus.kind": recipe.corpus.kind} if path != "corpus.kind" else {}
        assert recipe != validate(Recipe, nested({**around, **kind}), "")
        assert there_and_back(recipe, tmp_path) == recipe

    if path in OTHER:
        around = {**AROUND.get(path, {}), **experts(path)}
        recipe = validate(Recipe, nested({**around, path: OTHER[path]}), "test")
        assert there_and_back(recipe, tmp_path) == recipe != validate(Recipe, nested(around), "test")
    else:
        check()


def is_numeric(path: str) -> bool:
    annotation = field_of(path).annotation
    return annotation in (int, float) or {int, float} & set(typing.get_args(annotation)) != set()


BOUNDED = [
    path
    for path in LEAVES
    if path.startswith(("corpus.", "tokenizer.", "data.", "model.", "optim.", "evaluate.", "generate.")) and is_numeric(path)
    and path != "optim.grad_clip"  # a norm that is never reached is how some write "no clipping"
]  # fmt: skip


@pytest.mark.parametrize("path", BOUNDED)
def test_absurd_sizes_are_refused(path: str) -> None:
    assert field_of(path).annotation is not None
    for absurd in (10**30, -(10**30)):
        with pytest.raises(UserError, match=rf"^my.toml: {re.escape(path)} = ") as caught:
            validate(Recipe, nested({path: absurd}), "my.toml")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("betas", [[1.0, 0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 1e300]])
def test_decay_rates_are_below_one(betas: list[float]) -> None:
    with pytest.raises(UserError, match=r"optim.betas.[01] = "):
        validate(Recipe, nested({"optim.betas": betas}), "my.toml")


def test_seeds_fit_the_generators() -> None:
    assert validate(Recipe, nested({"generate.seed": 2**63 - 1}), "my.toml").generate.seed == 2**63 - 1
    with pytest.raises(UserError, match=r"generate.seed = 9223372036854775808: input should be less than"):
        validate(Recipe, nested({"generate.seed": 2**63}), "my.toml")


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (
            {"paths": ["a.txt"]},
            'paths is set, but kind = python-stdlib reads no files: leave it out, or set kind = "text"',
        ),
        ({"paths": ["a.jsonl.gz"]}, 'paths is set, .* or set kind = "jsonl"'),
        ({"paths": ["*.parquet"], "kind": "huggingface", "dataset": "x"}, 'paths is set, .* set kind = "parquet"'),
        ({"validation_paths": ["v.txt"]}, "validation_paths is set, but kind = python-stdlib reads no files"),
        (
            {"kind": "huggingface", "dataset": "x", "validation_paths": ["v"]},
            "validation_paths .* huggingface reads no f",
        ),
        (
            {"dataset": "x"},
            'dataset is set, but kind = python-stdlib reads no dataset: .* set kind = "huggingface"',
        ),
        ({"kind": "text", "paths": ["a"], "dataset": "x"}, "dataset is set, but kind = text reads no dataset"),
        ({"kind": "jsonl", "paths": ["a"], "validation_split": "v"}, "validation_split is set, but kind = jsonl"),
        ({"validation_split": "v"}, "validation_split is set, but kind = python-stdlib"),
        (
            {"kind": "huggingface", "dataset": "x", "validation_split": "v", "hold_out": "ends"},
            "validation_split says what is held out",
        ),
        (
            {"kind": "parquet", "paths": ["a"], "separator": ""},
            "separator is set, but kind = parquet reads no separator",
        ),
        ({"kind": "text", "paths": ["a"], "text_field": "t"}, "text_field is set, but kind = text reads no fields"),
    ],
)
def test_a_field_that_the_kind_of_corpus_does_not_read_is_refused(corpus: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^my.toml: corpus: {message}"):
        validate(Recipe, {"corpus": corpus}, "my.toml")
    with pytest.raises(UserError, match=f"^CorpusConfig: {message}"):
        config_module.CorpusConfig(**corpus)


def test_fields_at_their_defaults_are_not_refused(tmp_path: Path) -> None:
    every = {name: field.get_default() for name, field in config_module.CorpusConfig.model_fields.items()}
    for kind in ("python-stdlib", "text", "jsonl", "parquet", "huggingface"):
        recipe = validate(Recipe, {"corpus": {**every, "kind": kind}}, "my.toml")
        assert there_and_back(recipe, tmp_path) == recipe


def test_the_default_recipe_survives_toml(tmp_path: Path) -> None:
    assert there_and_back(Recipe(), tmp_path) == Recipe()
    text = (tmp_path / "saved.toml").read_text(encoding="utf-8")
    for name in SECTIONS:
        assert f"[{name}]" in text
    assert "weight_decay = 0.1" in text, "defaults are written out"


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_is_described_and_none_means_default(path: str) -> None:
    field = field_of(path)
    assert field.description and field.description[0] != " " and len(field.description) > 8
    default = field.get_default(call_default_factory=True)
    if type(None) in typing.get_args(field.annotation):
        assert default is None, "TOML has no null: None could not be written back over another default"
    if default is not None:  # defaults are not validated by pydantic itself
        assert validate(Recipe, nested({path: default}), "test") == Recipe()


def test_every_section_is_described() -> None:
    for name, section in SECTIONS.items():
        assert issubclass(section, Section) and section.__doc__, name
    modules = (config_module, parts)
    declared = {c for m in modules for c in vars(m).values() if isinstance(c, type) and issubclass(c, Section)}
    assert declared == {*SECTIONS.values(), Recipe, Section}, "every section is part of the recipe"


@pytest.mark.parametrize("path", field_paths(Recipe))
def test_a_misspelt_field_is_told_its_name(path: str) -> None:
    misspelt = path + path[-1]
    with pytest.raises(UserError) as caught:
        validate(Recipe, nested({misspelt: 1}), "my.toml")
    assert str(caught.value) == f"my.toml: unknown field {misspelt}; did you mean {path}?"


def test_hints_for_other_mistakes() -> None:
    for wrong, hint in {
        "lr": "optim.lr",
        "layers": "model.layers",
        "train.d_model": "model.d_model",
        "optim.weight-decay": "optim.weight_decay",
        "modle.layers": "model.layers",
        "zzz": "",
    }.items():
        assert nearest_field(Recipe, wrong) == (f"; did you mean {hint}?" if hint else "")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[train]\nsteps = 'many'", "train.steps = 'many': input should be a valid integer"),
        ("[train]\nsteps = 1.5", "train.steps = 1.5"),
        ("[train]\nsteps = true", "train.steps: true is a boolean"),
        ("[train]\nsteps = -1", "train.steps = -1: input should be greater than or equal to 0"),
        ("[train]\ntrackers = 'wandb'", "train.trackers = 'wandb': input should be a valid list"),
        ("[train]\ntrackers = ['wanb']", r"train.trackers.0 = 'wanb' is unknown; did you mean wandb\?"),
        (
            "[train]\nbatch_size = 5\naccumulation = 2",
            "train.accumulation = 2 does not divide train.batch_size = 5",
        ),
        (
            "[train]\nbatch_size = 8\nmicro_batch = 3",
            "train.micro_batch = 3 does not divide train.batch_size = 8",
        ),
        (
            "[train]\nbatch_size = 8\nmicro_batch = 2\naccumulation = 2",
            "train.micro_batch = 2 times train.accumulation = 2 is not train.batch_size = 8: leave one of them out",
        ),
        (
            "[train]\nmicro_batch = 'most'",
            r"train.micro_batch = 'most'",
        ),
        ("[train]\nmicro_batch = 0", "train.micro_batch = 0: input should be greater than or equal to 1"),
        ("[train]\naccumulation = true", "train.accumulation: true is a boolean"),
        ("[train]\nmemory_limit = '8 potatoes'", "train.memory_limit: memory '8 potatoes' is no size"),
        ("[train]\nmemory_limit = '-1GB'", "train.memory_limit: memory '-1GB' is no size"),
        ("[optim]\nlr = nan", "optim.lr = nan"),
        ("[optim]\nlr = inf", "optim.lr = inf"),
        ("[optim]\nbetas = [0.9]", "optim.betas.1"),
        (
            "[optim]\noptimizer = 'adamww'",
            r"optim.optimizer = 'adamww' is unknown; did you mean adamw\?; allowed: adamw, adam, lion, adafactor, ",
        ),
        ("[model]\nheads = 3", "model: heads = 3 does not divide d_model = 256"),
        ("model = 4", "model = 4"),
        ("[tokenizer]\nspecial_tokens = []", "special_tokens is empty"),
        ("[tokenizer]\nspecial_tokens = ['a', 'b', 'a']", "names 'a' twice"),
        ("name = 'a/b'", "name = 'a/b'"),
        ("name = '..'", "name = '..'"),
        ("device = 'gpu'", "device = 'gpu'"),
        (
            "[train]\nsteps = 'a'\nbatch_size = 'b'",
            r"train.steps = 'a'.*\(and 1 more\)|train.batch_size.*\(and 1 more\)",
        ),
        ("[train\nsteps = 1", "not valid TOML"),
        ("a = 1\na = 2", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(toml: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(toml, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes("name = 'café'".encode("latin-1"))
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(tmp_path / "latin.toml")


def test_a_recipe_is_named_after_its_file_and_has_a_folder(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text("seed = 3", encoding="utf-8")
    recipe = load_recipe(tmp_path / "small.toml")
    assert (recipe.name, recipe.seed, recipe.folder) == ("small", 3, Path("runs/small"))
    assert Recipe(out=Path("there")).folder == Path("there")


@pytest.mark.parametrize(
    "path", sorted([*RECIPES.glob("*.toml"), *RECIPES.glob("speedrun/*.toml")]), ids=lambda path: path.stem
)
def test_every_recipe_loads(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name.startswith(path.stem)  # a speedrun may have the text of another recipe
    assert there_and_back(recipe, tmp_path) == recipe != Recipe(name=path.stem)


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} >= {"python-stdlib", "tinystories", "openwebtext"}


def test_sections_are_fixed_and_errors_also_come_from_the_constructor() -> None:
    recipe = Recipe()
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    with pytest.raises(UserError, match=r"Recipe: unknown field sed; did you mean seed\?"):
        Recipe(sed=3)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="Recipe: model: heads = 3"):
        Recipe(model={"heads": 3})  # type: ignore[arg-type]
    assert issubclass(Recipe, BaseModel)


def test_the_command_line_shows_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(ModelConfig, args=["--help"])
    shown = capsys.readouterr().out
    for axis in choices.AXES:
        flag = "--" + axis.axis.replace("_", "-")
        assert flag in shown
        for name in axis.names:
            assert name in shown
    assert tyro.cli(ModelConfig, args=["--feedforward", "relu2", "--layers", "3"]) == ModelConfig(
        feedforward="relu2", layers=3
    )
