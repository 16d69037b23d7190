"""Who may import whom: the arrows of the design, read from the sources."""

import ast
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

PACKAGES = ("cli", "client", "export", "k8s", "serving", "training")

ALLOWED = {
    "cli": {"client", "export", "k8s", "serving", "training"},
    "client": set(),
    "export": {"client.wire", "training"},
    "k8s": {"client"},
    "serving": {"client.wire"},
    "training": set(),
}

# Everything else must be importable where TensorFlow is not installed.
TENSORFLOW = {"export", "training", "serving.litert", "serving.loader"}


def modules(package: str) -> list[Path]:
    return sorted(Path(str(files(f"graftserve.{package}"))).rglob("*.py"))


def imports(path: Path, package: str) -> set[str]:
    """Absolute names of all that a module imports, wherever in it."""
    root = Path(str(files(f"graftserve.{package}")))
    here = ["graftserve", package, *path.relative_to(root).with_suffix("").parts]
    if here[-1] == "__init__":
        here.append("")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows(package: str) -> None:
    paths = modules(package)
    assert paths
    for path in paths:
        for name in imports(path, package):
            if not name.startswith("graftserve."):
                continue
            target = name.removeprefix("graftserve.")
            inside = target.split(".")[0] == package
            assert inside or any(
                target == allowed or target.startswith(f"{allowed}.") for allowed in ALLOWED[package]
            ), f"{path} imports {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_tensorflow_stays_where_it_belongs(package: str) -> None:
    for path in modules(package):
        name = f"{package}.{path.stem}"
        if name in TENSORFLOW or package in TENSORFLOW:
            continue
        heavy = {imported.split(".")[0] for imported in imports(path, package)} & {"tensorflow", "keras"}
        assert not heavy, f"{path} imports {heavy}"


@pytest.mark.parametrize(
    "package",
    [
        "cli",
        "cli.replay",
        "client",
        "export",
        "export.pull",
        "k8s.rehearsal",
        "k8s.render",
        "k8s.rollout",
        "training",
        "serving.flags",
    ],
)
def test_importing_the_package_loads_nothing_heavy(package: str) -> None:
    code = (
        f"import sys, graftserve.{package}; "
        "print(sorted({'tensorflow', 'keras', 'sklearn', 'scipy', 'PIL'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
