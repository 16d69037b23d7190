"""A whole run on real digits, and every way it can be refused."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from graftserve.training import DataError, Recipe, RunDirectory, RunError, WeightsError, train
from graftserve.training.preprocess import decode_image


def test_the_run_directory_holds_everything(trained: RunDirectory, digits_dir: Path) -> None:
    run = RunDirectory.open_finished(trained.path)
    assert run.labels == tuple("0123456789")
    assert run.recipe == Recipe(str(digits_dir))
    names = {path.name for path in run.path.iterdir()}
    assert names == {
        *(
            "recipe.json",
            "labels.txt",
            "split.csv",
            "skipped.csv",
            "duplicates.csv",
            "weights.txt",
            "model.keras",
            "goldens",
        ),
        *("predictions.csv", "metrics.json", "report.md", "report.html"),
    }
    with (run.path / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 200
    assert all((digits_dir / row["path"]).is_file() for row in rows)
    test = run.evaluation("test")
    assert test is not None
    assert test.images == sum(row["split"] == "test" for row in rows)
    assert test.accuracy > 0.7  # 16 images a class; chance is 0.1
    assert f"{test.accuracy:.4f}" in (run.path / "report.md").read_text()


def test_the_saved_model_says_what_was_recorded(trained: RunDirectory) -> None:
    model = trained.load_model()
    assert len(trained.goldens) == 8
    for golden in trained.goldens:
        pixels = decode_image(tf.constant(golden.file.read_bytes()), trained.preprocess)
        probabilities = model(pixels[None], training=False)["probabilities"].numpy()[0]
        np.testing.assert_allclose(probabilities, golden.probabilities, atol=1e-5)


def test_the_second_run_computes_no_feature(digits_dir: Path, feature_cache: Path, trained, tmp_path) -> None:
    run = train(Recipe(str(digits_dir)), tmp_path / "run", cache_dir=feature_cache)
    assert run.metrics["features"]["computed"] == 0
    assert run.metrics["features"]["cached"] == 200
    assert run.metrics["evaluation"] == trained.metrics["evaluation"]


def test_an_existing_run_is_refused_resumed_or_replaced(
    digits_dir: Path, feature_cache: Path, trained: RunDirectory, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(trained.path, output)
    recipe = Recipe(str(digits_dir))
    with pytest.raises(RunError, match="holds a finished run; continue it with --resume, replace it with"):
        train(recipe, output, cache_dir=feature_cache)

    before = (output / "metrics.json").stat().st_mtime_ns
    train(recipe, output, cache_dir=feature_cache, resume=True)
    assert (output / "metrics.json").stat().st_mtime_ns == before

    other = Recipe(str(digits_dir), test_percent=30)
    with pytest.raises(RunError, match="was started with another test_percent"):
        train(other, output, cache_dir=feature_cache, resume=True)
    assert train(other, output, cache_dir=feature_cache, overwrite=True).recipe == other


def test_an_unfinished_run_can_be_resumed_and_not_exported(
    digits_dir: Path, feature_cache: Path, trained: RunDirectory, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    shutil.copy(trained.path / "recipe.json", output)
    with pytest.raises(RunError, match="not finished; continue it with graftserve train --resume"):
        RunDirectory.open_finished(output)
    with pytest.raises(RunError, match="holds a started run"):
        train(Recipe(str(digits_dir)), output, cache_dir=feature_cache)
    train(Recipe(str(digits_dir)), output, cache_dir=feature_cache, resume=True)
    assert RunDirectory.open_finished(output).metrics["evaluation"] == trained.metrics["evaluation"]


def test_a_folder_that_is_no_run_is_left_alone(digits_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and is no run directory"):
        train(Recipe(str(digits_dir)), tmp_path, cache_dir=tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    with pytest.raises(RunError, match="not a run directory"):
        RunDirectory.open_finished(tmp_path)


@pytest.fixture
def small_dir(digits_dir: Path, tmp_path: Path) -> Path:
    """Two classes of twelve, whose features the cache has."""
    root = tmp_path / "data"
    for label in "01":
        (root / label).mkdir(parents=True)
        for file in sorted((digits_dir / label).iterdir())[:12]:
            shutil.copy(file, root / label)
    return root


def test_bad_files_are_skipped_and_listed(
    small_dir: Path, feature_cache: Path, trained, tmp_path, caplog
) -> None:
    whole = next((small_dir / "0").iterdir()).read_bytes()
    (small_dir / "0" / "truncated.jpg").write_bytes(whole[:400])
    (small_dir / "1" / "notes.txt").write_text("hello")
    output = tmp_path / "run"
    run = train(Recipe(str(small_dir)), output, cache_dir=feature_cache)
    assert run.metrics["skipped"] == 2
    with (output / "skipped.csv").open(newline="") as file:
        rows = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert rows["1/notes.txt"] == "not a JPEG, PNG, GIF, BMP or WebP image"
    assert "JPEG" in rows["0/truncated.jpg"]
    assert "1/notes.txt: not a JPEG" in caplog.text
    assert "0/truncated.jpg: " in caplog.text


def test_the_same_image_twice_is_said_and_listed(
    small_dir: Path, feature_cache: Path, trained, tmp_path, caplog
) -> None:
    original = next((small_dir / "0").iterdir())
    for index in range(40):  # enough for every split to get one
        shutil.copy(original, small_dir / "0" / f"copy{index}.jpg")
    shutil.copy(original, small_dir / "1" / "elsewhere.jpg")
    run = train(Recipe(str(small_dir)), tmp_path / "run", cache_dir=feature_cache)
    assert (
        "in more than one split, which flatters the accuracy (duplicates.csv), stands 1 image: 0/"
        in caplog.text
    )
    assert "under more than one label (duplicates.csv) stands 1 image: 0/" in caplog.text
    with (run.path / "duplicates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 42
    assert {row["label"] for row in rows} == {"0", "1"}
    assert len({row["split"] for row in rows}) > 1


@pytest.mark.parametrize("bad", [b"hello", b"\xff\xd8\xff\xe0 broken"])
def test_strict_stops_at_a_bad_file(
    small_dir: Path, feature_cache: Path, trained, tmp_path, bad: bytes
) -> None:
    (small_dir / "0" / "bad.jpg").write_bytes(bad)
    with pytest.raises(DataError, match=r"1 file cannot be used \(--strict\): 0/bad\.jpg: "):
        train(Recipe(str(small_dir)), tmp_path / "run", cache_dir=feature_cache, strict=True)


def test_one_image_is_trained_on_and_the_lack_of_a_test_is_said(
    small_dir: Path, feature_cache: Path, trained, tmp_path, caplog
) -> None:
    for file in sorted((small_dir / "1").iterdir())[1:]:
        file.unlink()
    run = train(Recipe(str(small_dir)), tmp_path / "run", cache_dir=feature_cache)
    assert run.metrics["images"]["1"] == {"train": 1, "validation": 0, "test": 0}
    assert "no test image, so nothing is known of the accuracy, for" in caplog.text


def test_nothing_is_written_before_the_input_is_known_to_be_good(small_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(DataError):
        train(Recipe(str(tmp_path / "none")), output, cache_dir=tmp_path)
    with pytest.raises(WeightsError):
        train(Recipe(str(small_dir), weights="none.h5"), output, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="expected one of efficientnet-lite0"):
        train(Recipe(str(small_dir), backbone="none"), output, cache_dir=tmp_path)
    assert not output.exists()


def test_damaged_run_files_are_named(trained: RunDirectory, tmp_path: Path) -> None:
    for name, access in [
        ("model.keras", lambda run: run.load_model()),
        ("metrics.json", lambda run: run.preprocess),
        ("recipe.json", lambda run: run.recipe),
        ("goldens/goldens.json", lambda run: run.goldens),
    ]:
        output = tmp_path / name.replace("/", "_")
        shutil.copytree(trained.path, output)
        (output / name).write_bytes(b"not what it was")
        with pytest.raises(RunError, match=f"{Path(name).name}: missing or damaged"):
            access(RunDirectory(output))


def test_another_format_is_refused(trained: RunDirectory, tmp_path: Path) -> None:
    values = json.loads((trained.path / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps(values | {"format": 7}))
    with pytest.raises(RunError, match="format 2 expected, got 7"):
        _ = RunDirectory(tmp_path).recipe
    (tmp_path / "recipe.json").write_text(json.dumps(values | {"recipe": {"data_dir": "x", "colour": 1}}))
    with pytest.raises(RunError, match="colour: there is no such setting"):
        _ = RunDirectory(tmp_path).recipe
