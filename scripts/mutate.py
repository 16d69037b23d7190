"""Changes the pure cores in many small ways, and shows the changes that no test notices.

    python scripts/mutate.py [CORE ...]

What is changed and tested is in tests/mutation.toml. cosmic-ray does it, in an unpacked wheel for each core
below build/mutation, where its database stays. Ends with a table.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from cosmic_ray.config import serialize_config
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

CONFIG = Path("tests/mutation.toml")
OUT = Path("build/mutation")
WHEELS = Path("build/wheel")
AT_ONCE = 2  # as `make test`
COSMIC_RAY = Path(sys.executable).with_name("cosmic-ray")


@click.command(help="Runs the mutants of the cores; of all by default.")
@click.argument("cores", nargs=-1)
def main(cores: tuple[str, ...]) -> None:
    config = tomllib.loads(CONFIG.read_text())
    unknown = set(cores) - set(config["cores"])
    if unknown:
        known = ", ".join(config["cores"])
        raise click.UsageError(f"expected cores of {CONFIG}: {known}; got {', '.join(sorted(unknown))}")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        sessions = pool.map(
            lambda name: run(OUT.resolve() / name, config["cores"][name], config), cores or config["cores"]
        )
        table = [row for session in sessions for row in show(session)]
    click.echo(f"{'module':32} mutants  killed  left")
    for module, mutants, left in table:
        click.echo(f"{module:32} {mutants:7} {mutants - left:7} {left:5}")


def run(folder: Path, core: dict[str, Any], config: dict[str, Any]) -> Path:
    """Run the mutants of a core in `folder`; the database of what came of them."""
    shutil.rmtree(folder, ignore_errors=True)
    (wheel,) = WHEELS.glob("*.whl")
    shutil.unpack_archive(wheel, folder, "zip")
    # Plugins take half the time of a run that has little else to do. Bytecode of one mutant would be taken
    # for the next one's, of the same second and size.
    variables = f"PYTHONPATH={folder} PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONDONTWRITEBYTECODE=1"
    pytest = f"{variables} {sys.executable} -m pytest -p pytest_timeout -p no:cacheprovider -x -q"
    command = ["sh", "-c", " && ".join(f"{pytest} {tests}" for tests in core["tests"])]
    started_s = time.monotonic()
    unchanged = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if unchanged.returncode:
        raise click.ClickException(
            f"expected the tests of {folder.name} to pass without a change, got:\n{unchanged.stdout}"
        )
    settings = {
        "module-path": [str(folder / "graftserve" / module) for module in core["modules"]],
        "timeout": 10 + 5 * (time.monotonic() - started_s),
        "test-command": shlex.join(command),
        "distributor": {"name": "local"},
    }
    config_file, session = folder / "config.toml", folder / "session.sqlite"
    config_file.write_text(serialize_config(settings))
    subprocess.run([COSMIC_RAY, "init", config_file, session], check=True)
    leave_out(session, re.compile("|".join(config["operators"])), re.compile("|".join(config["lines"])))
    subprocess.run([COSMIC_RAY, "exec", config_file, session], check=True)
    return session


def leave_out(session: Path, operators: re.Pattern[str], lines: re.Pattern[str]) -> None:
    """Skip the mutants of these operators, and on these lines."""
    with use_db(session, WorkDB.Mode.open) as database:
        skipped = []
        for item in database.pending_work_items:
            mutation = item.mutations[0]
            line = mutation.module_path.read_text().splitlines()[mutation.start_pos[0] - 1]
            if operators.match(mutation.operator_name) or lines.match(line):
                skipped.append(item.job_id)
        database.set_multiple_results(skipped, WorkResult(WorkerOutcome.SKIPPED))


def show(session: Path) -> Iterator[tuple[str, int, int]]:
    """Print the mutants that no test noticed; of each module its name, its mutants, and how many of them."""
    mutants, left = Counter[str](), Counter[str]()
    with use_db(session, WorkDB.Mode.open) as database:
        for item, result in database.completed_work_items:
            if result.worker_outcome is WorkerOutcome.SKIPPED:
                continue
            module = str(item.mutations[0].module_path.relative_to(session.parent / "graftserve"))
            mutants[module] += 1
            if result.test_outcome is not TestOutcome.KILLED:
                left[module] += 1
                click.echo(result.diff or result.output)
    for module, number in mutants.items():
        yield module, number, left[module]


if __name__ == "__main__":
    main()
