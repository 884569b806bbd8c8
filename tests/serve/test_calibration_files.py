"""How a calibration begins, and reads an event log, on readings made by hand."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from toy import TOY_WORKER, toy_config, toy_launch, write_model

from blitzjax import cli, cli_bench
from blitzjax import config as configs
from blitzjax.calibrate import Calibration, Seen, Transfer, fit_step, requests_of, transfers_of
from blitzjax.cli_bench import measured, to_toml
from blitzjax.cli_serve import configure
from blitzjax.serve.eventlog import Record
from blitzjax.serve.local import LocalCluster
from blitzjax.serve.model import load_model
from blitzjax.sim import costs
from blitzjax.commands import Assign, PrepareTransfer, StartTransfer
from blitzjax.events import LayerLoaded, PrefillDone, RequestArrived, RequestFinished, TransferEnded
from blitzjax.types import Chain, MulticastPlan, Request


def test_a_step_is_taken_apart_and_no_part_is_negative() -> None:
    rows = [(1.0, b, b * k) for b in (1, 2, 4, 8) for k in (50.0, 500.0)]
    assert fit_step(rows, [0.01 + 0.002 * b + 1e-6 * k for _, b, k in rows]) == pytest.approx((0.01, 0.002, 1e-6))
    flat = fit_step(rows, [0.03 - 1e-6 * k for _, _, k in rows])
    assert flat == pytest.approx((0.03, 0.0, 0.0), rel=0.1) and min(flat) == 0


def test_requests_are_read_once_they_finished() -> None:
    def arrived(name: str, at: float) -> Record:
        return Record(at, RequestArrived(at, Request(name, "m", 40, 9, at)))

    log = [arrived("b", 1.0), arrived("a", 2.0), Record(2.0, Assign("i0", "a", 1)),
           Record(3.0, PrefillDone(3.0, "i0", "a", 1)), Record(3.5, PrefillDone(3.5, "i0", "b", 1)),
           Record(4.0, RequestFinished(4.0, "i0", "a", 1, "length"))]
    assert requests_of(log) == [Seen("i0", 40, 2.0, 3.0, 4.0)]
    log.append(Record(5.0, RequestFinished(5.0, "i0", "b", 1, "length")))
    assert requests_of(log) == [Seen("i0", 40, 1.0, 3.5, 5.0), Seen("i0", 40, 2.0, 3.0, 4.0)]


def test_a_transfer_ends_at_its_receiver() -> None:
    plan = MulticastPlan(7, "m", (Chain(("i0", "i1"), 0, 6, 0),))
    log = [Record(1.0, PrepareTransfer(i, plan)) for i in ("i0", "i1")]
    log += [Record(1.1, StartTransfer(i, 7)) for i in ("i0", "i1")]
    log += [Record(1.2 + k / 10, LayerLoaded(1.2 + k / 10, "i1", k + 1)) for k in range(3)]
    log += [Record(2.0, TransferEnded(2.0, "i0", 7, 6, "")), Record(2.1, TransferEnded(2.1, "i1", 7, 6, ""))]
    assert list(transfers_of(log)) == [
        Transfer(1.0, 1.1, 2.1, {1: pytest.approx(1.2), 2: pytest.approx(1.3), 3: pytest.approx(1.4)})]


def test_the_policy_reads_what_was_measured(tmp_path: Path) -> None:
    machine, model = costs.MACHINES["A"], costs.MODELS["llama3-8b"]
    (tmp_path / "costs.toml").write_text(to_toml(machine, model))
    found = configs.load(tmp_path / "costs.toml").scale
    assert found.prefill_tokens_per_s == 15000.0
    assert found.migrate_tokens_per_s == pytest.approx(12.5e9 / model.kv_token_bytes, rel=1e-3)


def test_the_command_takes_one_model_and_the_flags_of_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[argparse.Namespace] = []
    monkeypatch.setattr(cli_bench, "calibrate", lambda args: asked.append(args) or 0)
    assert cli.main(["bench", "calibrate", "m", "--pool", "1", "--set", "engine.max_num_seqs=4"]) == 0
    assert asked[0].model == "m"
    config = measured(configure(asked[0]), tmp_path / "log")
    assert (config.cluster.pool, config.scale.policy, config.serve.port, config.engine.max_num_seqs) == (2, "manual", 0, 4)


def test_it_waits_for_workers_that_join_later(tmp_path: Path) -> None:
    """A cluster is ready with the first one."""
    config, model = toy_config(f"serve.event_log={tmp_path / 'events.jsonl'}"), write_model(tmp_path / "toy")
    late = tmp_path / "late"
    late.touch()
    wait = f'case "$*" in *"--rank 1"*) while test -e {late}; do sleep 0.05; done;; esac; exec "$@"'
    launch = replace(toy_launch(tmp_path), worker=("sh", "-c", wait, "sh", *TOY_WORKER))
    with LocalCluster(config, model, launch) as cluster, cluster.client() as client, ThreadPoolExecutor(1) as thread:
        cluster.wait_ready(300)
        assert len(client.status().instances) == 1
        calibration = thread.submit(Calibration, client, config, load_model(model), print)
        with pytest.raises(TimeoutError):
            calibration.result(timeout=1)
        late.unlink()
        calibration.result()
        assert len(client.status().instances) == 2
