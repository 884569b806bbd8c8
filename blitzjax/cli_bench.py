"""`blitzjax bench calibrate MODEL`: what this machine can do, for the simulator and for the scaling policy."""

from __future__ import annotations

import argparse
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

from blitzjax.calibrate import Calibration
from blitzjax.cli_serve import check_context, checkpoint, configure, given
from blitzjax.cli_sim import check_writable
from blitzjax.config import Config
from blitzjax.serve.local import LocalCluster
from blitzjax.serve.hosts import Launch
from blitzjax.serve.model import load_model
from blitzjax.sim import costs
from blitzjax.sim.costs import MachineCosts, ModelCosts

_READY_S = 600.0  # a first start compiles


def calibrate(args: argparse.Namespace) -> int:
    """Writes costs.json and costs.toml."""
    check_writable(args.out)
    with tempfile.TemporaryDirectory(prefix="blitzjax-calibrate-") as directory:
        config = measured(configure(args), Path(directory) / "events.jsonl")
        model = load_model(checkpoint(args.model, config.engine.dtype, args.checkpoint))
        if "engine.max_model_len" in given(args):
            check_context(config, [model.spec])
        print(f"starting {config.cluster.pool} workers with {model.name}", flush=True)
        with LocalCluster(config, model.directory, Launch(run_dir=Path(directory))) as cluster:
            cluster.wait_ready(_READY_S)
            with cluster.client() as client:
                calibration = Calibration(client, config, model, lambda text: print(f"  {text}", flush=True))
                machine, costed = calibration.run(platform.node() or "here")
    costs.write(args.out / "costs.json", machine, costed)
    (args.out / "costs.toml").write_text(to_toml(machine, costed), "utf-8")
    print(f"one instance: {costed.prefill_tokens_per_s:.0f} prompt tokens/s, decode step {costed.step_s * 1e3:.1f} ms "
          f"+ {costed.sequence_s * 1e3:.2f} ms a sequence + {costed.kv_token_s * 1e6:.2f} us a token of KV\n"
          f"between instances: {machine.nic_gbps * costed.tensor_parallel:.2f} Gbit/s after {machine.setup_s:.3f} s\n"
          f"wrote {args.out / 'costs.json'} (blitzjax sim --costs) and {args.out / 'costs.toml'} "
          "(blitzjax serve --config)")
    return 0


def measured(config: Config, event_log: Path) -> Config:
    """The configuration with which `config` is calibrated: two workers or more, scaled by hand, logged."""
    pool = max(2, config.cluster.pool)
    return replace(config, serve=replace(config.serve, port=0, event_log=str(event_log)),
                   scale=replace(config.scale, policy="manual", roles="mixed", min_instances=1, max_instances=pool),
                   cluster=replace(config.cluster, pool=pool))


def to_toml(machine: MachineCosts, model: ModelCosts) -> str:
    """What the scaling policy should know of the machine."""
    receive = costs.bytes_per_s(machine.nic_gbps) * model.tensor_parallel / model.kv_token_bytes
    return (f"# {model.spec.name} on {machine.name}, measured by `blitzjax bench calibrate`\n[scale]\n"
            f"prefill_tokens_per_s = {model.prefill_tokens_per_s:.1f}\nmigrate_tokens_per_s = {receive:.1f}\n")
