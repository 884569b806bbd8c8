"""The automatic policy, left alone with split roles: a burst whose answers fill the decode instance's pages makes a
prefill instance decode, in place, and recruits another for prompts; afterwards the cluster shrinks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blitzjax.serve.local import LocalCluster
from blitzjax.v1 import inference_pb2 as pb
from rig import Rig
from test_prefill_and_decode import answers, burst, received, roles  # noqa: F401


@pytest.fixture(scope="module")
def auto(rig: Rig, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    mixed, log = rig.cluster.config, tmp_path_factory.mktemp("auto") / "events.jsonl"
    config = replace(mixed, scale=replace(mixed.scale, roles="split", policy="auto", min_instances=2, down_after_s=2.0),
                     serve=replace(mixed.serve, port=0, event_log=str(log)))
    with LocalCluster(config, model_dir) as cluster:
        cluster.wait_ready(120)
        auto = Rig(cluster)
        auto.settle(3)
        yield auto


def of_role(status: pb.ClusterStatus, role: str) -> set[str]:
    return {i.id for i in status.instances if i.role == role and i.phase == "serving"}


def states_in(auto: Rig, wanted: dict, bursts: int) -> list[pb.ClusterStatus]:
    """What was seen while so many bursts ran at once, all of whose tokens were right."""
    results, states = [burst(auto, wanted) for _ in range(bursts)], []
    auto.wait(lambda s: s.running_requests > 0, "running")
    auto.wait(lambda s: states.append(s) or not s.running_requests + s.queued_requests, "over", 90)
    for result in results:
        result()
    return states


def test_a_burst_makes_a_prefill_instance_decode_and_recruits_another(auto: Rig, answers) -> None:  # noqa: F811
    for bursts in (1, 2, 3, 4):  # how many it takes to fill the pages depends on how fast prompts are
        begun, before = len(auto.whole_log()), auto.settle(3)
        assert roles(before) == ["decode", "prefill", "prefill"]
        states = states_in(auto, answers, bursts)
        grown = [s for s in states if len(of_role(s, "prefill")) == len(of_role(s, "decode")) == 2]
        if grown:
            break
    assert grown, "no burst made two instances of each role"
    loaded = {line["instance"] for line in auto.whole_log()[begun:] if line.get("event") == "LayerLoaded"}
    mutated = of_role(before, "prefill") & of_role(grown[0], "decode")
    assert mutated and not mutated & loaded, "no parameters move for a new role"
    recruited = of_role(grown[0], "prefill") - of_role(before, "prefill")
    assert recruited and recruited <= loaded, "an idle worker runs prompts instead"
    after = auto.settle(3)
    assert roles(after) == ["decode", "prefill", "prefill"] and received(after) > received(before)
    assert not any(line.get("event") == "InstanceLost" for line in auto.whole_log())
