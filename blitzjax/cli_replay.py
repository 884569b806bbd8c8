"""`blitzjax replay LOG`: does the brain, fed with the recorded events, give the recorded commands again?

It does unless the log comes from another version of the brain, or something besides the events had a say; the first
difference is where to look. Invariant: nothing here has a clock, a worker or a socket.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from blitzjax import config as configs
from blitzjax.control.cluster import Cluster
from blitzjax.errors import ConfigError, reason
from blitzjax.serve import eventlog
from blitzjax.commands import Command
from blitzjax.events import Event
from blitzjax.types import spec_from

_SHOWN = 4  # events up to a difference


@dataclass(frozen=True, slots=True)
class Turn:
    """An event, which is in `line` of the log, and what the brain said to it. `last`: nothing follows."""

    line: int
    event: Event
    commands: list[Command]
    last: bool


@dataclass(frozen=True, slots=True)
class Replay:
    events: int
    commands: int  # that came again
    different: Turn | None  # the first one whose commands did not come again; `given` did. Nothing after it is compared
    given: list[Command]
    status: str  # of the cluster after the last event that was replayed, in a line


def replay(path: Path) -> Replay:
    """Feeds every event to a fresh brain. Raises ConfigError when the log cannot be read.

    A log whose writer was killed may lack commands of its last event.
    """
    brain, events, commands = fresh(path), 0, 0
    for turn in turns(path):
        given = brain.handle(turn.event)
        events += 1
        if (given[: len(turn.commands)] if turn.last else given) != turn.commands:
            return Replay(events, commands, turn, given, _describe(brain))
        commands += len(turn.commands)
    return Replay(events, commands, None, [], _describe(brain))


def turns(path: Path) -> Iterator[Turn]:
    """Raises ConfigError."""
    try:
        event: tuple[int, Event] | None = None
        commands: list[Command] = []
        for line, record in enumerate(eventlog.read(path), start=2):
            if isinstance(record.item, Command):
                commands.append(record.item)
                continue
            if event is not None:
                yield Turn(*event, commands, False)
            event, commands = (line, record.item), []
        if event is not None:
            yield Turn(*event, commands, True)
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"cannot read event log {path}: {reason(e)}") from e


def fresh(path: Path) -> Cluster:
    """A brain as the one that wrote the log, before its first event. Raises ConfigError."""
    try:
        header = eventlog.read_header(path)
        specs = [spec_from(spec) for spec in header["specs"]]
        return Cluster(configs.from_tables(header["config"]), specs)
    except OSError as e:
        raise ConfigError(f"cannot read event log {path}: {reason(e)}") from e
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError(f"{path} is no event log of this version of blitzjax: {reason(e)}") from e


def main(args: argparse.Namespace) -> int:
    """Exit code 1 when the commands differ."""
    found = replay(args.log)
    if found.different is None:
        print(f"{found.events} events give the {found.commands} recorded commands again\n{found.status}")
        return 0
    print(f"{found.commands} commands came again; those after line {found.different.line} of {args.log} do not:")
    before = deque((t for t in turns(args.log) if t.line <= found.different.line), maxlen=_SHOWN)
    for turn in before:
        print(f"  line {turn.line}: {turn.event}")
    print()
    for recorded, given in zip_longest(found.different.commands, found.given, fillvalue="nothing"):
        print(f"  = {given}" if recorded == given else f"  - {recorded}\n  + {given}")
    print(f"\n(-: recorded, +: given now) {found.status}")
    return 1


def _describe(brain: Cluster) -> str:
    status = brain.status()
    instances = " ".join(f"{i.id}:{i.phase.value}:{i.units}" for i in status.instances)
    return f"at the end: {status.queued} queued, {status.running} running, target {status.target}; {instances}"
