"""The server's file: one model's versions and labels change, all else stays as its author wrote it."""

from pathlib import Path

import pytest
from google.protobuf import text_format

from graftserve.client.wire import ModelServerConfig
from graftserve.k8s.rollout import ConfigFileError, ConflictError, ModelConfigFile, Placement, RefusedError

WRITTEN = """\
# Served by the flower shop; ask Ada before you change it.
model_config_list {
  config {
    name: "birds"  # not ours
    base_path: "/models/birds"
    model_version_policy { specific { versions: 7 } }
    version_labels { key: "stable" value: 7 }
  }
  config {
    name: "flowers"
    base_path: "/models/flowers"
    # pinned, so that an export changes nothing
    model_version_policy {
      specific {
        versions: 3
      }
    }
    version_labels { key: "stable" value: 3 }
    version_labels { key: "champion" value: 3 }  # the shop window
    model_platform: "tensorflow"
  }
}
"""
OLD = Placement(frozenset({3}), 3)
NEW = Placement(frozenset({3, 4}), 3, 4)


def parsed(text: str) -> ModelServerConfig:
    return text_format.Parse(text, ModelServerConfig())


def change(path: Path, kind: type[Exception], message: str, error: Exception | None = None) -> None:
    """Ask for NEW and fail with `error` in place of the server; or fail the test if it comes to that."""

    def send() -> None:
        with ModelConfigFile(path, "flowers").changing(NEW, OLD):
            if error is None:
                pytest.fail("nothing must be sent")
            assert ModelConfigFile(path, "flowers").placement()[0] == NEW
            raise error

    with pytest.raises(kind, match=message):
        send()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "models.config"
    file.write_text(WRITTEN)
    return file


def test_what_the_file_asks_for(path: Path) -> None:
    file = ModelConfigFile(path, "flowers")
    assert file.placement() == (OLD, frozenset({3}))
    assert file.base_path() == "/models/flowers"
    assert ModelConfigFile(path, "birds").placement() == (Placement(frozenset({7}), 7), frozenset())


def test_one_model_changes_and_comments_stay(path: Path) -> None:
    path.chmod(0o640)
    with ModelConfigFile(path, "flowers").changing(NEW, OLD) as config:
        sent = ModelServerConfig.FromString(config.SerializeToString())
    text = path.read_text()
    assert parsed(text) == sent
    assert ModelConfigFile(path, "flowers").placement() == (NEW, frozenset({3}))
    assert dict(sent.model_config_list.config[1].version_labels) == {"stable": 3, "canary": 4, "champion": 3}
    assert sent.model_config_list.config[0] == parsed(WRITTEN).model_config_list.config[0]
    for kept in ("# Served by the flower shop", "# not ours", "# pinned, so that", "# the shop window"):
        assert kept in text
    assert text.startswith(WRITTEN[: WRITTEN.index("    # pinned")])
    assert "\n    model_version_policy { specific { versions: 3 versions: 4 } }\n" in text
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(item.name for item in path.parent.iterdir()) == [".models.config.lock", "models.config"]


def test_there_and_back_says_the_same(path: Path) -> None:
    file = ModelConfigFile(path, "flowers")
    for placement, expected in ((NEW, OLD), (OLD, NEW)):
        with file.changing(placement, expected):
            pass
    assert parsed(path.read_text()) == parsed(WRITTEN)


def test_what_says_so_already_is_not_written(path: Path) -> None:
    before = path.stat()
    with ModelConfigFile(path, "flowers").changing(OLD, NEW):
        pass
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    "text",
    [
        'model_config_list { config { name: "flowers" base_path: "/m" } }',
        "model_config_list: {\n config: {\n  name: 'flowers', base_path: '/m';\n } }",
        'model_config_list { config { base_path: "/m" version_labels { key: "a" value: 1 } '
        'name: "flowers" } }',
        'model_config_list < config < name: "flowers" base_path: "/m{}#\\"}" > >',
        'model_config_list { config: [ { name: "flowers" base_path: "/m" }, '
        '{ name: "b" base_path: "/b" } ] }',
        'model_config_list { config { name: "flo" "wers" base_path: "/m" } }',
        'model_config_list { config { name: "b" base_path: "/" } # { \n'
        'config { name: "flowers" base_path: "/m" logging_config '
        "{ sampling_config { sampling_rate: 1.5e-3 } } } }",
    ],
)
def test_every_spelling_says_what_it_should(tmp_path: Path, text: str) -> None:
    path = tmp_path / "models.config"
    path.write_text(text)
    wanted = parsed(text)
    entry = next(item for item in wanted.model_config_list.config if item.name == "flowers")
    entry.model_version_policy.specific.versions.extend([3, 4])
    entry.version_labels.update({"stable": 3, "canary": 4})
    with ModelConfigFile(path, "flowers").changing(NEW, Placement(None)) as config:
        assert config == wanted
    assert parsed(path.read_text()) == wanted


def test_what_somebody_else_wrote_is_left_alone(path: Path) -> None:
    changed = WRITTEN.replace("versions: 3", "versions: 5")
    path.write_text(changed)
    change(path, ConflictError, "somebody else changed model flowers")
    assert path.read_text() == changed


def test_what_the_server_refuses_does_not_stay(path: Path) -> None:
    change(path, RefusedError, "it is refused", RefusedError("it is refused"))
    assert path.read_text() == WRITTEN


def test_what_may_have_been_done_stays(path: Path) -> None:
    change(path, RuntimeError, "the line went dead", RuntimeError("the line went dead"))
    assert ModelConfigFile(path, "flowers").placement()[0] == NEW


def test_a_link_stays_one(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.config"
    link.symlink_to(path)
    with ModelConfigFile(link, "flowers").changing(NEW, OLD):
        pass
    assert link.is_symlink()
    assert ModelConfigFile(path, "flowers").placement()[0] == NEW


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_config_list { config { name: }", "expected a ModelServerConfig in text format"),
        ("", "expected a model_config_list, got none"),
        (
            'model_config_list { config { name: "birds" } }',
            "expected the model flowers once, got the models birds",
        ),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "models.config"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigFileError, match=message):
        ModelConfigFile(path, "flowers").placement()


def test_a_folder_that_cannot_be_written(path: Path) -> None:
    (path.parent / ".models.config.lock").mkdir()
    change(path, ConfigFileError, "models.config.lock: Is a directory")
    assert path.read_text() == WRITTEN
