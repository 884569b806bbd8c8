"""The controller is killed: workers go on, another controller takes over, every request ends with the right tokens."""

from __future__ import annotations

import pytest
from test_killed_workers import all_right, burst

from rig import Rig


def test_while_requests_decode(rig: Rig, expected) -> None:
    rig.only(2)
    workers = rig.pids()
    answers = burst(rig, 32)
    rig.wait(lambda s: s.running_requests > 4, "busy")
    rig.cluster.signal_controller()
    assert all_right(answers, expected)
    assert {answer.result().usage.attempts for _, answer in answers} == {1}
    rig.settle(2)
    assert rig.pids() == workers
    assert all_right(burst(rig, 8), expected)


@pytest.mark.parametrize("live", ["zigzag", "off"])
def test_in_the_middle_of_a_scale_up(rig: Rig, expected, live: str) -> None:
    """The chain and the live pair need no controller: what they did meanwhile is told to the next one."""
    rig.only(1)
    workers = rig.pids()
    rig.scale(3, live=live)
    answers = burst(rig, 32)
    rig.wait(lambda s: any(i.phase in ("loading", "live") and i.layers_loaded >= 2 for i in s.instances), "loading")
    rig.cluster.signal_controller()
    assert all_right(answers, expected)
    rig.settle(3)
    assert rig.pids() == workers
    rig.only(4)
    assert all_right(burst(rig, 8), expected)
