"""The log of a real cluster's whole life so far, kills included if they came before, gives its commands again."""

from __future__ import annotations

from rig import Rig, prompts

from blitzjax.cli_replay import replay
from blitzjax.serve import eventlog
from blitzjax.commands import Command, PrepareTransfer, StartLive


def test_a_fresh_brain_gives_the_recorded_commands(rig: Rig) -> None:
    rig.only(1)
    rig.scale(3, live="zigzag")
    answers = [rig.send(prompt) for prompt in prompts(24, seed=1)]
    assert all(answer.result().token_ids for answer in answers)
    rig.settle(3)
    rig.only(1)
    found = replay(rig.event_log)
    assert found.different is None
    commands = [record.item for record in eventlog.read(rig.event_log) if isinstance(record.item, Command)]
    assert found.commands >= len(commands) - 100  # the log is still being written
    assert {PrepareTransfer, StartLive} <= set(map(type, commands))
