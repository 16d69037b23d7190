"""Recipes: what comes with graftserve, what is laid over it, and every way to get one wrong."""

import json
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from graftserve.training.errors import RecipeError
from graftserve.training.recipe import Augmentation, Head, PseudoLabels, Recipe, Stage
from graftserve.training.recipe_files import describe_recipe, load_recipe, recipe_names

NAMES = ("probe", "auto", "bottleneck", "discriminative", "frozen-lower", "slim", "two-stage")


def test_the_recipes_that_come_along() -> None:
    assert recipe_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_names_its_source_and_survives_being_saved(name: str) -> None:
    text = (files("graftserve.training") / "recipes" / f"{name}.toml").read_text()
    header = text.partition("\n\nmethod")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "\n# Source: " in header
    assert "ublish" in header or name == "auto"
    assert describe_recipe(name) in text
    recipe = load_recipe(name, "flowers")
    assert (recipe.recipe, recipe.data_dir) == (name, "flowers")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_classics_are_what_they_were() -> None:
    bottleneck = load_recipe("bottleneck", "x")
    (stage,) = bottleneck.stages
    assert (bottleneck.batch_size, stage.steps, stage.optimizer) == (100, 4000, "sgd")
    assert (stage.learning_rate, stage.momentum, stage.unfreeze) == (0.01, 0.0, "none")
    assert bottleneck.head == Head()
    lower = load_recipe("frozen-lower", "x")
    (stage,) = lower.stages
    assert lower.head == Head((1024, 1024), 0.5)
    assert (stage.unfreeze, stage.learning_rate, stage.momentum, stage.patience) == ("5", 1e-4, 0.9, 10)
    assert lower.augmentation == Augmentation(True, 0.3, 0.3, 30.0, "nearest")
    head, top = load_recipe("two-stage", "x").stages
    assert (head.optimizer, head.unfreeze) == ("rmsprop", "none")
    assert (top.optimizer, top.learning_rate, top.momentum, top.unfreeze) == ("sgd", 1e-4, 0.9, "boundary")
    last = load_recipe("discriminative", "x").stages[-1]
    assert (last.optimizer, last.learning_rate, last.backbone_rate) == ("adam", 3e-4, 0.1)
    assert (last.schedule, last.warmup_epochs > 0) == ("cosine", True)
    slim = load_recipe("slim", "x").stages[0]
    assert (slim.optimizer, slim.decay_rate, slim.decay_epochs, slim.weight_decay) == (
        "rmsprop",
        0.94,
        2,
        4e-5,
    )


def test_flags_win_over_settings_which_win_over_the_file() -> None:
    recipe = load_recipe(
        "two-stage",
        "x",
        ["stages.1.epochs=7", "stages.patience=3", "head.hidden=[5, 6]", "weights=some file.h5", "seed=3"],
        {"stages.-1.epochs": 2.5, "seed": 4},
    )
    assert [stage.epochs for stage in recipe.stages] == [30, 2.5]
    assert [stage.patience for stage in recipe.stages] == [3, 3]
    assert recipe.head.hidden == (5, 6)
    assert (recipe.weights, recipe.seed) == ("some file.h5", 4)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('method = "fine-tune"\nseed = 9\n[[stages]]\nunfreeze = 12\nepochs = 1\n')
    recipe = load_recipe(str(path), "x")
    assert (recipe.recipe, recipe.seed, recipe.stages[0].unfreeze) == ("mine", 9, "12")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["batchsize=3"], r"batchsize: there is no such setting; did you mean batch_size\?"),
        (["stages.epoch=3"], r"stages\.0\.epoch: there is no such setting; did you mean epochs\?"),
        (["head.hiden=[1]"], r"head\.hiden: there is no such setting; did you mean hidden\?"),
        (["colour=3"], "colour: there is no such setting"),
        (["stages.2.epochs=3"], "expected a number below 2, got 2"),
        (["stages.1=3"], "expected a setting of the stage"),
        (["seed.x=3"], "seed: expected a whole number"),
        (["seed=3", "seed.x=3"], "seed.x: seed is no table"),
        (["epochs"], "expected key=value"),
        (["=3"], "expected key=value"),
        (["seed=yes"], "seed: expected a whole number, got 'yes'"),
        (["seed=1.5"], r"seed: expected a whole number, got 1\.5"),
        (["stages.optimizer=adagrad"], "expected one of sgd, rmsprop, adam, adamw, got 'adagrad'"),
        (["stages.learning_rate=-1"], "stages.learning_rate: expected a number above 0, got -1"),
        (["validation_percent=60", "test_percent=40"], "together below 100, got 60 and 40"),
        (["head.hidden=5"], "head.hidden: expected a list, got 5"),
        (["mixed_precision=1"], "mixed_precision: expected true or false, got 1"),
        (["augmentation=1"], "augmentation: expected a table, got 1"),
        (["stages=[]"], 'expected at least one for the method "fine-tune"'),
    ],
)
def test_wrong_settings_say_what_is_right(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("two-stage", "x", settings)


def test_stages_cannot_be_set_where_there_are_none() -> None:
    with pytest.raises(RecipeError, match="has no stages; choose one that fine-tunes"):
        load_recipe("probe", "x", flags={"stages.epochs": 3.0})


@pytest.mark.parametrize(
    "setting",
    ["augmentation.mixup=0.2", "pseudo_labels.unlabeled_dir=more", "head.dropout=0.5", "batch_size=8"],
)
def test_what_the_probe_would_pass_over_is_an_error(setting: str) -> None:
    with pytest.raises(RecipeError, match="the probe does not use it; choose a recipe that fine-tunes"):
        load_recipe("probe", "x", [setting])


def test_a_situation_is_for_auto() -> None:
    assert load_recipe("auto", "x", ["situation=small-similar"]).situation == "small-similar"
    with pytest.raises(RecipeError, match="situation: only the recipe auto uses it"):
        load_recipe("two-stage", "x", ["situation=small-similar"])


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe 'two_stage': there is none.*did you mean two-stage\?"):
        load_recipe("two_stage", "x")
    (tmp_path / "bad.toml").write_text("method = ")
    with pytest.raises(RecipeError, match="not a TOML file"):
        load_recipe(str(tmp_path / "bad.toml"), "x")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(RecipeError, match="not a TOML file"):
        load_recipe(str(tmp_path / "latin.toml"), "x")
    with pytest.raises(FileNotFoundError):
        load_recipe(str(tmp_path / "none.toml"), "x")


def test_a_missing_value_is_named() -> None:
    with pytest.raises(RecipeError, match="data_dir: expected a value, got none"):
        Recipe.from_dict({"seed": 1})


@pytest.mark.parametrize(
    ("kind", "field", "bad"),
    [
        (Head, "hidden", (0,)),
        (Head, "dropout", 1.0),
        (Augmentation, "zoom", 1.0),
        (Augmentation, "shift", -0.1),
        (Augmentation, "rotation_degrees", 181),
        (Augmentation, "rand_augment_count", -1),
        (Augmentation, "rand_augment_strength", 1.1),
        (Augmentation, "mixup", -1),
        (Augmentation, "cutmix", -1),
        (PseudoLabels, "confidence", 0),
        (PseudoLabels, "share", 1),
        (PseudoLabels, "start_epoch", -1),
        (Stage, "epochs", 0),
        (Stage, "steps", -1),
        (Stage, "layer_decay", 0),
        (Stage, "momentum", 1),
        (Stage, "epsilon", 0),
        (Stage, "patience", -1),
    ],
)
def test_values_out_of_range_are_refused(kind: type, field: str, bad: object) -> None:
    with pytest.raises(RecipeError, match=rf"{field}: expected .*, got "):
        kind(**{field: bad})


def test_which_augmentation_needs_pixels() -> None:
    assert not Augmentation(horizontal_flip=True).changes_pixels
    for change in (
        {"zoom": 0.1},
        {"shift": 0.1},
        {"rotation_degrees": 1},
        {"rand_augment_count": 1},
        {"mixup": 1},
    ):
        assert Augmentation(**change).changes_pixels


def test_recipe_files_are_plain_toml() -> None:
    for name in NAMES:
        assert tomllib.loads((files("graftserve.training") / "recipes" / f"{name}.toml").read_text())[
            "method"
        ]
