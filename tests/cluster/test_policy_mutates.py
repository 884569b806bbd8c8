"""The automatic policy, left alone with split roles: a burst whose answers fill the decode instance's pages makes a
prefill instance decode, in place, and recruits another for prompts; afterwards the cluster shrinks again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blitzjax.serve.local import LocalCluster
from blitzjax.v1 import inference_pb2 as pb
from rig import SPEC, Rig
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


def test_a_burst_makes_a_prefill_instance_decode_and_recruits_another(auto: Rig, answers) -> None:  # noqa: F811
    before = auto.settle(3)
    assert roles(before) == ["decode", "prefill", "prefill"]
    results = burst(auto, answers)
    mutated = of_role(before, "prefill") & of_role(
        auto.wait(lambda s: of_role(s, "decode") & of_role(before, "prefill"), "mutated", 20), "decode")
    grown = auto.wait(lambda s: len(of_role(s, "prefill")) == len(of_role(s, "decode")) == 2, "replaced", 20)
    assert of_role(grown, "prefill") - of_role(before, "prefill"), "an idle worker runs prompts instead"
    results()
    after = auto.settle(3)
    assert roles(after) == ["decode", "prefill", "prefill"] and received(after) > received(before)
    log = [json.loads(line) for line in auto.event_log.read_text().rpartition("\n")[0].splitlines()]
    assert not any(r.get("event") == "InstanceLost" for r in log)
    for instance in mutated:
        loads = {r["at"] for r in log if r.get("event") == "LayerLoaded" and r["instance"] == instance
                 and r["units"] == SPEC.units}
        assert len(loads) <= 1, "it loaded the model once, before: no parameters moved for its new role"
