"""The automatic policy, left alone with split roles: a burst whose answers fill the decode instance's pages makes a
prefill instance decode, in place, and recruits another for prompts; afterwards the cluster shrinks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blitzjax.cli_replay import fresh, turns
from blitzjax.types import Phase, Role
from rig import Rig, another
from test_prefill_and_decode import Burst, answers, received, roles  # noqa: F401


@pytest.fixture(scope="module")
def auto(rig: Rig, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with another(rig, model_dir, tmp_path_factory.mktemp("auto"), 3, roles="split", policy="auto", min_instances=2,
                 down_after_s=2.0) as auto:
        yield auto


def decided(log: Path) -> list[tuple[str, str]]:
    """Instances that "mutated" from prefill to decode while they served, and those "recruited" and "ready" for prompts.

    From the brain's history: between two looks at the cluster an instance may leave and come back as another.
    """
    brain, story = fresh(log), []
    were = {i.id: i for i in brain.status().instances}
    for turn in turns(log):
        brain.handle(turn.event)
        now = {i.id: i for i in brain.status().instances}
        for name, was in were.items():
            match was.phase, was.role, now[name].phase, now[name].role:
                case Phase.SERVING, Role.PREFILL, Phase.SERVING, Role.DECODE:
                    story.append((name, "mutated"))
                case Phase.IDLE, _, Phase.LOADING, Role.PREFILL:
                    story.append((name, "recruited"))
                case Phase.LOADING | Phase.LIVE, _, Phase.SERVING, Role.PREFILL:
                    story.append((name, "ready"))
        were = now
    return story


def test_a_burst_makes_a_prefill_instance_decode_and_recruits_another(auto: Rig, answers) -> None:  # noqa: F811
    log = Path(auto.cluster.config.serve.event_log)
    for bursts in (1, 2, 3, 4):  # how many it takes to fill the pages depends on how fast prompts are
        before = auto.settle(3)
        assert roles(before) == ["decode", "prefill", "prefill"]
        auto.whole_log()
        told = len(decided(log))
        for result in [Burst(auto, answers) for _ in range(bursts)]:
            result()
        after = auto.settle(3)
        assert roles(after) == ["decode", "prefill", "prefill"] and received(after) > received(before)
        auto.whole_log()
        story = decided(log)[told:]
        if {"mutated", "recruited", "ready"} <= {what for _, what in story}:
            break
    else:
        pytest.fail(f"no prefill instance decoded in place while another came to run prompts; the last burst: {story}")
    assert not any(line.get("event") == "InstanceLost" for line in auto.log())
