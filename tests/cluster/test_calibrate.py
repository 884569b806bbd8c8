"""A real cluster is measured; the simulator, fed with what was found, takes as long for what the cluster does."""

from __future__ import annotations

from pathlib import Path

import pytest

from rig import POOL, SPEC, Rig, prompts

from blitzjax.arrivals import Arrival
from blitzjax.calibrate import Calibration
from blitzjax.serve.model import load_model
from blitzjax.sim import costs
from blitzjax.sim.shell import Setup, simulate
from blitzjax.sim.systems import SYSTEMS


def test_measured_costs_explain_what_the_cluster_does(rig: Rig, model_dir: Path, tmp_path: Path) -> None:
    rig.only(1)
    said: list[str] = []
    calibration = Calibration(rig.client, rig.cluster.config, load_model(model_dir), said.append, repeats=1)
    costs.write(tmp_path / "costs.json", *calibration.run("here"))
    machine, model = costs.read(tmp_path / "costs.json")
    assert model.spec == SPEC and len(model.unit_sizes) == SPEC.units and model.chunk_s[-1][0] == 64
    assert (machine.hosts, machine.gpus, model.slots) == (1, POOL, 8)
    assert 0 < model.prefill_s(32) and 0 < model.decode_s(1, 64) < 1 and 0 <= machine.handoff_s + machine.rpc_s < 1
    assert any("scale-up" in text for text in said)
    rig.only(1)
    alone = min(rig.send(prompts(1, seed=2)[0], max_tokens=1).result().ttft_s for _ in range(3))
    found = simulate(Setup(machine, model, SYSTEMS["full"], 1), iter([Arrival(0.0, 64, 1)]))
    assert found.ttft_s[0] == pytest.approx(alone, rel=3, abs=0.02)  # others may keep both cores busy
