"""`graftserve evaluate`, on a run whose model tells red, green and blue apart by the mean colour."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

from graftserve.cli.app import _run
from graftserve.training.backbones import Normalization
from graftserve.training.errors import RunError
from graftserve.training.graft import build_head, graft, set_linear
from graftserve.training.judge import _name, _replacing
from graftserve.training.preprocess import Preprocess
from graftserve.training.recipe import Head, Recipe
from graftserve.training.run import RunDirectory

LABELS = ("blue", "green", "red")
CHANNELS = {"red": 0, "green": 1, "blue": 2}
SIDE_PX = 32
SHARPNESS = 4.0
Evaluate = Callable[..., tuple[int, str, str]]


def write_image(path: Path, encode: Callable[..., bytes], colour: str, level: int) -> None:
    """An image of one colour, which differs from all others."""
    pixels = np.full((40, 40, 3), level, np.uint8)
    pixels[..., CHANNELS[colour]] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pixels, "PNG"))


@pytest.fixture(scope="module")
def photos_dir(encode: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of each colour, of which one red one is in fact blue."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for label in LABELS:
        for index in range(6):
            colour = "blue" if (label, index) == ("red", 5) else label
            write_image(root / label / f"{index}.png", encode, colour, 20 * index + CHANNELS[label])
    return root


@pytest.fixture(scope="module")
def run_dir(photos_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: the last two images of each colour are its test split, and its temperature is 2."""
    path = tmp_path_factory.mktemp("runs") / "colours"
    path.mkdir()
    inner_input = keras.Input((SIDE_PX, SIDE_PX, 3))
    inner = keras.Model(inner_input, keras.layers.GlobalAveragePooling2D()(inner_input), name="network")
    pixels = keras.Input((SIDE_PX, SIDE_PX, 3), dtype="uint8", name="pixels")
    features = inner(Normalization((0.0,) * 3, (255.0,) * 3, name="normalization")(pixels))
    head = set_linear(
        build_head(3, 3, Head()), SHARPNESS * np.eye(3, dtype=np.float32)[:, ::-1], np.zeros(3, np.float32)
    )
    graft(keras.Model(pixels, features, name="colours"), head).save(path / "model.keras")

    run = RunDirectory(path)
    run.write_recipe(Recipe(str(photos_dir)), "0")
    (path / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    with (path / "split.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        for label in LABELS:
            writer.writerows((f"{label}/{n}.png", label, "test" if n > 3 else "train") for n in range(6))
    run.write_document(
        "metrics.json",
        {"preprocess": Preprocess(SIDE_PX, "squash").to_dict(), "temperature": 2.0, "evaluation": {}},
    )
    return path


@pytest.fixture
def evaluate(capfd: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """evaluate(*args) -> (exit status, stdout, stderr)."""
    cache = tmp_path_factory.getbasetemp() / "colour-features"

    def evaluate(*args: str | Path) -> tuple[int, str, str]:
        status = _run(["evaluate", *(str(arg) for arg in args), "--cache-dir", str(cache)])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return evaluate


def expected_probabilities(colour: str, level: int) -> np.ndarray:
    """In the order of LABELS, by hand."""
    means = np.full(3, level / 255)
    means[CHANNELS[colour]] = 250 / 255
    exponentials = np.exp(SHARPNESS * means[::-1])
    return exponentials / exponentials.sum()


def test_a_run_is_judged_by_what_it_held_out(evaluate: Evaluate, run_dir: Path) -> None:
    status, out, err = evaluate(run_dir)
    assert status == 0, err
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    values = {name: value.strip() for name, value in lines.items()}
    assert values["images"] == "6 of test, 0 skipped"
    assert values["accuracy"].startswith("0.8333, 95% interval 0.5000 to 1.0000")
    assert values["top 5"] == "1.0000"
    assert values["macro F1"] == "0.8222"  # red 2/3, blue 4/5, green 1
    assert values["weakest classes"] == "red (F1 0.6667), blue (F1 0.8000), green (F1 1.0000)"
    assert values["report"] == str(run_dir / "evaluation-test" / "report.html")
    assert " at temperature 2.000" in values["calibration error"]

    document = json.loads((run_dir / "evaluation-test" / "evaluation.json").read_text())
    colours = [*[("blue", 0)] * 2, *[("green", 1)] * 2, ("red", 2), ("blue", 2)]
    levels = [82, 102, 81, 101, 80, 100]
    probabilities = np.array(
        [expected_probabilities(colour, level) for (colour, _), level in zip(colours, levels, strict=True)]
    )
    truth = [label for _, label in colours]
    log_loss = -np.log(probabilities[range(6), truth]).mean()
    assert document["evaluation"]["log_loss"] == pytest.approx(log_loss, abs=1e-4)
    tempered = probabilities**0.5 / (probabilities**0.5).sum(axis=1, keepdims=True)
    assert document["calibrated"]["log_loss"] == pytest.approx(
        -np.log(tempered[range(6), truth]).mean(), abs=1e-4
    )
    assert (
        values["log-loss"] == f"{log_loss:.4f}, {document['calibrated']['log_loss']:.4f} at temperature 2.000"
    )
    assert document["labels"] == list(LABELS)

    with (run_dir / "evaluation-test" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"{label}/{n}.png" for label in LABELS for n in (4, 5)]
    assert rows[-1] | {"score": "", "label_score": ""} == {
        "path": "red/5.png",
        "split": "test",
        "label": "red",
        "predicted": "blue",
        "score": "",
        "label_rank": "3",
        "label_score": "",
    }
    np.testing.assert_allclose([float(row["score"]) for row in rows], probabilities.max(axis=1), atol=1e-5)
    html = (run_dir / "evaluation-test" / "report.html").read_text()
    assert "83.3%" in html
    assert html.count('src="data:image/jpeg;base64,') == 1
    assert 'alt="red/5.png"' in html


def test_other_data_may_have_fewer_classes_and_all_of_them_counts(
    evaluate: Evaluate, run_dir: Path, encode: Callable[..., bytes], tmp_path: Path
) -> None:
    data = tmp_path / "new photos"
    for index in range(3):
        write_image(data / "red" / f"{index}.png", encode, "red", 7 * index)
    write_image(data / "green" / "0.png", encode, "green", 9)
    (data / "green" / "broken.png").write_bytes(b"\x89PNG broken")
    status, out, err = evaluate(run_dir, data, "--json")
    assert status == 0, err
    document = json.loads(out)
    assert document["output"] == str(run_dir / "evaluation-new-photos")
    assert document["evaluation"]["images"] == 4
    assert document["evaluation"]["accuracy"] == 1.0
    assert document["evaluation"]["accuracy_interval"] == [pytest.approx(0.025 ** (1 / 4)), 1.0]
    assert [scores["images"] for scores in document["evaluation"]["classes"]] == [0, 1, 3]
    assert document["skipped"] == 1
    html = Path(document["output"], "report.html").read_text()
    assert "green/broken.png" in html
    assert "for 1 of 3 classes: blue" in html


def test_an_evaluation_is_replaced_as_a_whole_and_nothing_else_is(
    evaluate: Evaluate, run_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "here"
    output.mkdir()
    assert evaluate(run_dir, "--output", output)[0] == 0
    (output / "left over").touch()
    assert evaluate(run_dir, "--output", output, "--split", "train")[0] == 0
    assert {path.name for path in output.iterdir()} == {"evaluation.json", "predictions.csv", "report.html"}
    assert json.loads((output / "evaluation.json").read_text())["evaluation"]["images"] == 12
    assert [path.name for path in tmp_path.iterdir()] == ["here"]

    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "letter.txt").write_text("mine")
    status, out, err = evaluate(run_dir, "--output", tmp_path / "precious")
    assert (status, out) == (1, "")
    assert "precious: exists and is no evaluation; give another --output" in err
    assert (tmp_path / "precious" / "letter.txt").read_text() == "mine"


def test_a_failure_while_writing_leaves_the_old_evaluation(tmp_path: Path) -> None:
    output = tmp_path / "evaluation"
    output.mkdir()
    (output / "evaluation.json").write_text("old")

    def fail() -> None:
        with _replacing(output) as folder:
            (folder / "evaluation.json").write_text("new")
            raise RunError("on the way")

    with pytest.raises(RunError, match="on the way"):
        fail()
    assert (output / "evaluation.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation"]


def test_data_named_like_a_split_do_not_take_its_place(tmp_path: Path) -> None:
    assert _name(tmp_path / "flowers" / "test") == "flowers-test"
    assert _name(tmp_path / "new photos (2)") == "new-photos-2-"
    (tmp_path / "list.csv").touch()
    assert _name(tmp_path / "list.csv") == "list"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{tmp}/nothing"], "not a run directory"),
        (["{tmp}/unfinished"], "the run is not finished; continue it with graftserve train --resume"),
        (["{run}", "{tmp}/nothing"], "nothing: "),
        (["{run}", "{tmp}/others"], "violet"),
        (["{run}", "{tmp}/broken"], "none of the 2 images can be read; the first: green/0.png: "),
        (
            ["{run}", "--split", "validation"],
            "no image is in its validation split; give --split train or --split",
        ),
        (["{tmp}/moved"], "others can be given as DATA"),
        (["{tmp}/changed"], "none of the run's 6 test images is there; give others as DATA"),
    ],
)
def test_what_cannot_be_judged_is_said_in_one_line(
    evaluate: Evaluate,
    run_dir: Path,
    encode: Callable[..., bytes],
    tmp_path: Path,
    args: list[str],
    message: str,
) -> None:
    write_image(tmp_path / "others" / "violet" / "0.png", encode, "red", 3)
    write_image(tmp_path / "others" / "red" / "0.png", encode, "red", 3)
    for label in LABELS:
        write_image(tmp_path / "again" / label / "other.png", encode, label, 3)
    for label in ("red", "green"):
        (tmp_path / "broken" / label).mkdir(parents=True)
        (tmp_path / "broken" / label / "0.png").write_bytes(b"\x89PNG broken")
    for name, data_dir in (("unfinished", "x"), ("moved", "gone"), ("changed", "again")):
        copy = tmp_path / name
        copy.mkdir()
        for file in ("model.keras", "labels.txt", "split.csv", "metrics.json"):
            (copy / file).symlink_to(run_dir / file)
        RunDirectory(copy).write_document(
            "recipe.json", {"recipe": Recipe(str(tmp_path / data_dir)).to_dict()}
        )
    (tmp_path / "unfinished" / "metrics.json").unlink()
    before = {path.name for path in run_dir.iterdir()}

    status, out, err = evaluate(*(arg.format(tmp=tmp_path, run=run_dir) for arg in args))
    assert (status, out) == (1, "")
    assert message in err
    assert "Traceback" not in err
    assert {path.name for path in run_dir.iterdir()} == before


def test_a_split_is_of_the_runs_own_images(evaluate: Evaluate, run_dir: Path) -> None:
    status, _, err = evaluate(run_dir, run_dir, "--split", "test")
    assert status == 2
    assert "--split: is of the run's own images; leave it or DATA out." in err
    assert evaluate(run_dir, "--split", "holdout")[0] == 2


def test_images_that_are_gone_are_named(
    evaluate: Evaluate, run_dir: Path, photos_dir: Path, tmp_path: Path
) -> None:
    gone = photos_dir / "green" / "5.png"
    kept = gone.read_bytes()
    gone.unlink()
    try:
        status, out, err = evaluate(run_dir, "--output", tmp_path / "x")
    finally:
        gone.write_bytes(kept)
    assert status == 0, err
    assert "5 of test, 1 skipped" in out
    assert f"no longer in {photos_dir}" in (tmp_path / "x" / "report.html").read_text()


@pytest.mark.slow
def test_a_trained_run_scores_as_it_did_in_training(
    evaluate: Evaluate, trained: RunDirectory, tmp_path: Path
) -> None:
    status, out, err = evaluate(trained.path, "--output", tmp_path / "x", "--json")
    assert status == 0, err
    found, recorded = json.loads(out)["evaluation"], trained.metrics["evaluation"]["test"]
    assert found["confusion"] == recorded["confusion"]
    assert found["log_loss"] == pytest.approx(recorded["log_loss"], abs=1e-4)
