"""A real cluster is measured; the simulator, fed with what was found, takes as long for what the cluster does."""

from __future__ import annotations

from pathlib import Path

from rig import POOL, SPEC, Rig, caught

from blitzjax.arrivals import Arrival
from blitzjax.calibrate import Calibration
from blitzjax.serve.model import load_model
from blitzjax.sim import costs
from blitzjax.sim.shell import Setup, simulate
from blitzjax.sim.systems import SYSTEMS


def test_measured_costs_explain_what_the_cluster_does(rig: Rig, model_dir: Path, tmp_path: Path) -> None:
    def once() -> bool:
        rig.only(1)
        said: list[str] = []
        calibration = Calibration(rig.client, rig.cluster.config, load_model(model_dir), said.append, repeats=1)
        costs.write(tmp_path / "costs.json", *calibration.run("here"))
        machine, model = costs.read(tmp_path / "costs.json")
        assert model.spec == SPEC and len(model.unit_sizes) == SPEC.units and model.chunk_s[-1][0] == 64
        assert (machine.hosts, machine.gpus, model.slots) == (1, POOL, 8)
        assert 0 < model.prefill_s(32) and 0 < model.decode_s(1, 64) and 0 <= machine.handoff_s + machine.rpc_s
        assert any("scale-up" in text for text in said)
        rig.only(1)
        alone = min(rig.send([k] * 64, max_tokens=1).result().ttft_s for k in range(4))
        found = simulate(Setup(machine, model, SYSTEMS["full"], 1), iter([Arrival(0.0, 64, 1)])).ttft_s[0]
        return (model.decode_s(1, 64) < 1 and machine.handoff_s + machine.rpc_s < 1
                and alone / 8 < found < 8 * alone)  # it was measured while another instance computed too

    assert caught(once)
