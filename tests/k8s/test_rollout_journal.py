"""The journal: whole after each step, one writer at a time, never another's."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from graftserve.k8s.rollout import BusyError, ConflictError, Journal, JournalError, Outcome, Record, Rollout

SETTINGS = {"model_config_file": "/etc/models.config"}
FIRST = Rollout(1, 4, 3, "2026-01-01T00:00:00+00:00", by="ada@shop")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "deep" / "down" / "flowers.json", "localhost:8500", "flowers")


def test_from_begin_to_end(journal: Journal) -> None:
    assert journal.read() == Record()
    with journal.writing("ada", SETTINGS) as writer:
        writer.begin(FIRST)
        assert journal.read().current == FIRST
        writer.update(replace(FIRST, checked="whole"))
        assert journal.read().current.checked == "whole"
        ended = replace(FIRST, outcome=Outcome.PROMOTED)
        writer.end(ended)
    assert journal.read() == Record(3, SETTINGS, None, (ended,))
    assert journal.read().next_number == 2
    assert sorted(item.name for item in journal.path.parent.iterdir()) == [
        "flowers.json",
        "flowers.json.lock",
    ]


def test_a_second_writer_is_told_who_the_first_is(journal: Journal) -> None:
    with (
        journal.writing("ada@shop, process 7,", SETTINGS),
        pytest.raises(BusyError, match="ada@shop, process 7, is at work"),
        journal.writing("bob", SETTINGS),
    ):
        pytest.fail("two writers")
    with journal.writing("bob", SETTINGS) as writer:
        writer.begin(FIRST)


def test_another_process_is_kept_out_until_it_dies(journal: Journal) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom graftserve.k8s.rollout import Journal\n"
        "with Journal(Path(sys.argv[1]), 'localhost:8500', 'flowers').writing('the other', {}):\n"
        "    print('in', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, journal.path], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(BusyError, match="the other is at work"), journal.writing("me", SETTINGS):
            pytest.fail("two writers")
        other.kill()
        other.wait()
        with journal.writing("me", SETTINGS) as writer:
            writer.begin(FIRST)


def test_a_write_that_no_lock_kept_out_is_noticed(journal: Journal) -> None:
    with journal.writing("ada", SETTINGS) as writer:
        writer.begin(FIRST)
        values = json.loads(journal.path.read_text())
        values["generation"] += 1
        journal.path.write_text(json.dumps(values))
        with pytest.raises(ConflictError, match="somebody else wrote it meanwhile"):
            writer.update(replace(FIRST, checked="whole"))
    assert journal.read().current.checked == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(target="other:1"), "it is of model flowers at other:1"),
        (lambda values: values.update(format=2), "written by another release"),
        (lambda values: values["current"].update(gate={"nope": 1}), "move it away"),
        (lambda values: values["current"].update(nope=1), "move it away"),
        (lambda values: values.pop("history"), "move it away"),
    ],
)
def test_anything_else_is_not_taken_for_one(journal: Journal, change, message: str) -> None:
    with journal.writing("ada", SETTINGS) as writer:
        writer.begin(FIRST)
    values = json.loads(journal.path.read_text())
    change(values)
    journal.path.write_text(json.dumps(values))
    with pytest.raises(JournalError, match=message):
        journal.read()


def test_half_a_file_is_not_taken_for_one(journal: Journal) -> None:
    with journal.writing("ada", SETTINGS) as writer:
        writer.begin(FIRST)
    journal.path.write_bytes(journal.path.read_bytes()[:50])
    with pytest.raises(JournalError, match="expected the record of rollouts"):
        journal.read()
