"""A recorded run gives its commands again; a log that was changed says where."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from blitzjax import cli
from blitzjax import config as configs
from blitzjax import events, types as t
from blitzjax.cli_replay import replay
from blitzjax.control.cluster import Cluster
from blitzjax.engine.convert import TINY
from blitzjax.serve.eventlog import EventLog

CONFIG = configs.from_tables({"scale": {"policy": "manual"}})
EVENTS = [
    events.InstanceJoined(0.0, "i0", "a", "h", TINY.units, 64, 16, 4), events.InstanceJoined(0.1, "i1", "b", "h", 0, 64, 16, 4),
    events.WorldJoined(0.2, "i0"), events.WorldJoined(0.2, "i1"), events.ScaleRequested(0.5, 2, "zigzag"),
    events.TransferReady(0.6, "i0", 1), events.TransferReady(0.6, "i1", 1),
    *(events.RequestArrived(1 + k / 10, t.Request(f"r{k}", TINY.name, 20, 10, 1 + k / 10)) for k in range(9)),
    events.PrefillDone(2.0, "i1", "r0", 1), events.RequestFinished(2.5, "i1", "r0", 1, "length"), events.InstanceLost(3.0, "i1", "x"),
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path, brain = tmp_path / "events.jsonl", Cluster(CONFIG, TINY)
    writer = EventLog(path, {"specs": [asdict(TINY)], "config": configs.to_tables(CONFIG)})
    for event in EVENTS:
        writer.event(event)
        for command in brain.handle(event):
            writer.command(event.at, command)
    writer.close()
    return path


def test_the_commands_come_again(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = replay(log)
    assert (found.events, found.different) == (len(EVENTS), None) and found.commands > len(EVENTS) / 2
    assert cli.main(["replay", str(log)]) == 0
    assert f"{len(EVENTS)} events give the {found.commands} recorded commands again" in capsys.readouterr().out


def test_a_log_that_is_there_is_kept_under_a_number(log: Path) -> None:
    for first in (1, 3):
        writer = EventLog(log, {"specs": [asdict(TINY)], "config": configs.to_tables(CONFIG)})
        writer.event(events.Ticked(float(first)))
        writer.close()
    assert [replay(log.with_name(f"{log.name}{end}")).events for end in (".1", ".2", "")] == [len(EVENTS), 1, 1]


def test_a_changed_command_is_named_with_its_line(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = log.read_text().splitlines(keepends=True)
    at = next(k for k, line in enumerate(lines) if '"Assign"' in line)
    lines[at] = lines[at].replace('"attempt":1', '"attempt":7')
    log.write_text("".join(lines))
    different = replay(log).different
    assert different is not None and different.line == at  # 1-based: the line before the command
    assert different.commands[0] == replace(replay(log).given[0], attempt=7)
    assert cli.main(["replay", str(log)]) == 1
    said = capsys.readouterr().out
    assert f"line {at}: RequestArrived" in said and "- Assign(" in said and "+ Assign(" in said


def test_another_configuration_decides_otherwise(log: Path) -> None:
    log.write_text(log.read_text().replace('"max_attempts":4', '"max_attempts":1', 1))
    assert replay(log).different is not None


def test_a_log_that_breaks_off_is_replayed_as_far_as_it_goes(log: Path) -> None:
    whole = log.read_text()
    for cut in range(whole.index("\n") + 1, len(whole), 97):
        log.write_text(whole[:cut])
        assert replay(log).different is None


@pytest.mark.parametrize(("damaged", "says"), [
    ("{", "Expecting property name enclosed in double quotes"), ("{}", "it has no 'at'"),
    ('{"at": 1.0, "event": "Dreamt"}', "unknown record 'Dreamt'")])
def test_a_line_that_is_no_record_is_named(log: Path, damaged: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:6], damaged, *lines[7:]]) + "\n")
    assert cli.main(["replay", str(log)]) == 2
    assert capsys.readouterr().err == f"blitzjax: cannot read event log {log}: line 7 is no record: {says}\n"


@pytest.mark.parametrize("text", ["", "{}\n", '{"blitzjax_log": 1, "specs": [{}], "config": {"scale": {"x": 1}}}\n'])
def test_what_is_no_log_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text(text)
    assert cli.main(["replay", str(tmp_path / "x")]) == 2
    assert f"{tmp_path / 'x'} is no event log" in capsys.readouterr().err
