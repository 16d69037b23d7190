"""Shared parts: real photographs, a small folder of real digits, one trained run, one exported model."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {
        "slow": None if config.getoption("--slow") else "needs --slow",
        "network": "needs the internet",
        "gpu": "needs a GPU",
    }
    for item in items:
        for marker, reason in left_out.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def photos() -> dict[str, Any]:
    """Three photographs, uint8 [H, W, 3]."""
    from skimage import data

    return {"chelsea": data.chelsea(), "coffee": data.coffee(), "rocket": data.rocket()}


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """encode(pixels or PIL image, format, **options of Image.save) -> bytes."""

    def encode(image: Any, image_format: str = "JPEG", **options: Any) -> bytes:
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image)
        buffer = io.BytesIO()
        image.save(buffer, image_format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 handwritten digits as JPEG files in ten class folders."""
    from graftserve.cli.digits import write_digits

    everything = tmp_path_factory.mktemp("all") / "digits"
    write_digits(everything)
    few = tmp_path_factory.mktemp("few") / "digits"
    for folder in sorted(everything.iterdir()):
        (few / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:20]:
            file.rename(few / folder.name / file.name)
    return few


@pytest.fixture(scope="session")
def feature_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="session")
def trained(digits_dir: Path, feature_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run on `digits_dir` with the default backbone."""
    from graftserve.training import Recipe, train

    output = tmp_path_factory.mktemp("runs") / "digits"
    return train(Recipe(str(digits_dir)), output, cache_dir=feature_cache)


@pytest.fixture(scope="session")
def exported(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`trained` as version 1 of the model "digits"."""
    from graftserve.export import export_run

    return export_run(trained.path, tmp_path_factory.mktemp("models") / "digits")


@pytest.fixture(scope="session")
def quantized(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`exported` with its network in int8, too."""
    from graftserve.export import export_run

    base_path = tmp_path_factory.mktemp("quantized") / "digits"
    return export_run(trained.path, base_path, quantize=True, max_accuracy_drop=0.5)  # few images
