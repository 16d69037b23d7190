"""`graftserve features`: a table that holds what the backbone says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def few(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of each of three classes, and one that is none."""
    root = tmp_path_factory.mktemp("few")
    for label in ("0", "1", "2"):
        (root / label).mkdir()
        for file in sorted((digits_dir / label).iterdir())[:3]:
            (root / label / file.name).write_bytes(file.read_bytes())
    (root / "2" / "bad.jpg").write_bytes(file.read_bytes()[:200])
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def expected(folder: Path, paths: list[str], layer: str = "") -> np.ndarray:
    from graftserve.training.backbones import BACKBONES, load_backbone
    from graftserve.training.preprocess import decode_images

    backbone = load_backbone("efficientnet-lite0", truncate_at=layer)
    pixels = decode_images(
        [(folder / path).read_bytes() for path in paths], BACKBONES["efficientnet-lite0"].preprocess
    )
    return backbone(pixels, training=False).numpy()


def test_the_table_holds_what_the_backbone_says(graftserve, few: Path, cache: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    status, out, err = graftserve(
        "features", few, "--output", tmp_path / "t.parquet", "--cache-dir", cache, "--json"
    )
    assert status == 0, err
    result = json.loads(out)
    assert (result["images"], result["features"], result["skipped"], result["computed"]) == (9, 1280, 1, 9)
    assert "skipped 2/bad.jpg: " in err

    table = parquet.read_table(tmp_path / "t.parquet")
    assert table.column_names == ["path", "label", "split", "features"]
    assert str(table.schema.field("features").type) == "fixed_size_list<element: float>[1280]"
    paths = table["path"].to_pylist()
    assert len(paths) == 9
    assert table["label"].to_pylist() == [path.split("/")[0] for path in paths]
    assert set(table["split"].to_pylist()) <= {"train", "validation", "test"}
    features = np.stack(table["features"].to_numpy())
    np.testing.assert_allclose(features, expected(few, paths), rtol=1e-4, atol=1e-4)

    status, out, _ = graftserve("features", few, "-o", tmp_path / "t.npz", "--cache-dir", cache)
    assert status == 0
    assert ["cached", "9"] in [line.split() for line in out.splitlines()]
    with np.load(tmp_path / "t.npz") as arrays:
        assert sorted(arrays) == ["features", "label", "path", "split"]
        assert arrays["path"].tolist() == paths
        assert arrays["label"].tolist() == table["label"].to_pylist()
        assert arrays["split"].tolist() == table["split"].to_pylist()
        np.testing.assert_array_equal(arrays["features"], features)


def test_any_layer_will_do(graftserve, few: Path, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.npz"
    status, _, err = graftserve(
        "features", few, "-o", output, "--layer", "block2_add", "--cache-dir", cache, "--engine", "tensorflow"
    )
    assert status == 0, err
    with np.load(output) as arrays:
        assert arrays["features"].shape == (9, 24)
        np.testing.assert_allclose(
            arrays["features"], expected(few, arrays["path"].tolist(), "block2_add"), rtol=1e-4, atol=1e-4
        )
    status, _, err = graftserve("features", few, "-o", output, "--layer", "nope", "--cache-dir", cache)
    assert status == 1
    assert "no layer 'nope'" in err


def test_a_runs_own_backbone_and_splits(
    graftserve, trained, digits_dir: Path, feature_cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "features").symlink_to(feature_cache)
    output = tmp_path / "t.npz"
    status, out, err = graftserve(
        "features", digits_dir, "-o", output, "--run", trained.path, "--cache-dir", tmp_path
    )
    assert status == 0, err
    assert ["computed", "0"] in [line.split() for line in out.splitlines()]  # training has computed them
    with np.load(output) as arrays:
        split_of = dict(zip(arrays["path"].tolist(), arrays["split"].tolist(), strict=True))
    rows = [line.split(",") for line in (trained.path / "split.csv").read_text().splitlines()[1:]]
    assert split_of == {row[0]: row[2] for row in rows}


def test_rows_are_written_a_group_at_a_time(
    graftserve, few: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet

    monkeypatch.setattr("graftserve.cli.features._ROW_GROUP", 4)
    output = tmp_path / "t.parquet"
    assert graftserve("features", few, "-o", output, "--cache-dir", cache)[0] == 0
    file = parquet.ParquetFile(output)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert groups == [4, 4, 1]


def test_a_table_that_is_there_stays_whole_if_writing_fails(
    graftserve, few: Path, cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "t.npz"
    output.mkdir()
    (output / "kept").write_text("x")
    status, _, err = graftserve("features", few, "-o", output, "--cache-dir", cache)
    assert status == 1
    assert "t.npz" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "{tmp}/t.csv"], "--output: expected a name ending in .parquet or .npz, got t.csv"),
        (["-o", "{tmp}/t.npz", "--run", "x", "--weights", "none"], "leave --backbone and --weights out"),
        (["-o", "{tmp}/t.npz", "--backbone", "nope"], "no 'nope'. Known: efficientnet-lite0, "),
        (["-o", "{tmp}/t.npz", "--engine", "gpu"], "'gpu' is not one of"),
        ([], "Missing option '-o' / '--output'"),
    ],
)
def test_wrong_usage(graftserve, few: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    status, out, err = graftserve("features", few, *(flag.format(tmp=tmp_path) for flag in flags))
    assert (status, out) == (2, "")
    assert message in err


def test_what_cannot_be_had_is_said_before_anything_is_computed(
    graftserve, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = graftserve("features", few, "-o", tmp_path / "none" / "t.npz")
    assert (status, err) == (1, f"Error: --output: there is no folder {tmp_path / 'none'}\n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("graftserve.cli.output.find_spec", lambda name: None if name == "pyarrow" else name)
    status, _, err = graftserve("features", few, "-o", tmp_path / "t.parquet")
    assert (status, err) == (1, "Error: pyarrow is not installed: pip install 'graftserve[parquet]'\n")
