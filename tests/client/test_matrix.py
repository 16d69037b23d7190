"""The client on the oldest and the newest releases that pyproject.toml allows, each in its own environment.

Each environment is a folder that pip fills and PYTHONPATH names; `-S` keeps everything else out.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import graftserve.client

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("matrix_program.py")
OURS = Path(graftserve.client.__file__).parents[1]

OLDEST = {
    name: f"=={release}.*"
    for name, release in (
        line.split(">=")
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    )
}
NEWEST = dict.fromkeys(OLDEST, "")
ENVIRONMENTS = {
    "oldest": OLDEST,
    "protobuf 5": NEWEST | {"protobuf": "==5.*"},
    "protobuf 6": NEWEST | {"protobuf": "==6.*"},
    "protobuf 7": NEWEST | {"protobuf": "==7.*", "numpy": ">=2"},
}
OTHER_PYTHONS = [f"python3.{minor}" for minor in range(11, 16) if minor != sys.version_info.minor]


def install(python, requirements, folder):
    done = subprocess.run(
        [
            *(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"),
            *("--only-binary", ":all:", "--target", folder),
            *(f"{name}{release}" for name, release in requirements.items()),
        ],
        capture_output=True,
        text=True,
        timeout=500,
    )
    if done.returncode:
        why = f"pip could not install {requirements} for {python}: {done.stderr.strip().splitlines()[-1]}"
        if "CI" in os.environ:
            pytest.fail(why)
        pytest.skip(why)
    (folder / "graftserve").symlink_to(OURS)


def check(python, folder, requirements, implementation="upb"):
    done = subprocess.run(
        [python, "-S", "-s", "-W", "error", PROGRAM],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # of our own package, which the folder only links to
            "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    versions = found.pop("versions")
    for name, release in requirements.items():
        if release.startswith("==") and name in versions:
            assert re.match(re.escape(release[2:-1]), versions[name]), versions
    assert all(Path(file).is_relative_to(folder) for file in found.pop("files"))
    assert found == {
        "implementation": implementation,
        "codec": ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16"],
        "bools": [[True, False], [2]],
        "floats": [[0.5], [1]],
        "copies": [True, True],
        "config": {
            "modelConfigList": {
                "config": [{"name": "m", "modelVersionPolicy": {"latest": {"numVersions": 2}}}]
            }
        },
        "label": "5 bytes",
        "score": 0.75,
        "many": ["3 bytes"],
        "y": [2.5, 3.0],
        "metadata": ["float32", [None]],
        "bad image": "InvalidImageError",
        "no signature": "FailedPreconditionError",
        "no model": "NotFoundError",
    }
    return versions


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_client_works_on(name, tmp_path):
    install(sys.executable, ENVIRONMENTS[name], tmp_path)
    try:
        check(sys.executable, tmp_path, ENVIRONMENTS[name])
        # protobuf without its extension module, as where no wheel fits.
        check(sys.executable, tmp_path, ENVIRONMENTS[name], "python")
    finally:
        shutil.rmtree(tmp_path)  # a hundred megabytes


@pytest.mark.parametrize("python", OTHER_PYTHONS)
def test_the_client_works_with(python, tmp_path):
    path = shutil.which(python)
    if path is None or subprocess.run([path, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip(f"no {python} with pip on the PATH")
    install(path, NEWEST, tmp_path)
    try:
        versions = check(path, tmp_path, NEWEST)
        assert f"python{versions['python']}".startswith(f"{python}.")
    finally:
        shutil.rmtree(tmp_path)
