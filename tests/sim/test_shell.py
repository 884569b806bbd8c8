"""Whole runs: the brain of the live cluster over simulated instances."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blitzjax import cli
from blitzjax.arrivals import Arrival
from blitzjax.errors import ConfigError
from blitzjax.commands import Abort, Migrate
from blitzjax.events import Event, PrefillDone, RequestFinished
from blitzjax.sim import costs
from blitzjax.sim.clock import Clock
from blitzjax.sim.instance import SimInstance
from blitzjax.sim.links import Fabric, Link
from blitzjax.sim.outcome import Outcome, mean, quantiles
from blitzjax.sim.parts import Sequence, Stretch
from blitzjax.sim.report import table
from blitzjax.sim.shell import Setup, config_of, simulate
from blitzjax.sim.systems import SYSTEMS
from blitzjax.types import Request

A, M24 = costs.MACHINES["A"], costs.MODELS["mistral-24b"]
BURST = [Arrival(0.5 + 0.001 * k, 1000 + 37 * (k % 11), 20 + k % 7) for k in range(60)]


def run(system: str = "blitz", arrivals: list[Arrival] = BURST, machine: costs.MachineCosts = A, model=M24,
        instances: int = 4, start: int = 1) -> Outcome:
    return simulate(Setup(machine, model, SYSTEMS[system], instances, start), iter(arrivals))


def test_a_lone_request_costs_what_the_table_says() -> None:
    out = run("full", [Arrival(1.0, 2000, 5)], instances=1)
    decode = sum(M24.decode_s(1, 2000 + k) for k in range(4))
    assert list(out.ttft_s) == pytest.approx([A.rpc_s + M24.prefill_s(2000)])
    assert list(out.tpot_s) == pytest.approx([decode / 4])
    assert out.gpu_s == pytest.approx(2 * out.end_s) and not out.scale_ups


@given(st.floats(1e-3, 1.0), st.floats(0, 1e-3), st.integers(1, 400), st.floats(0, 1))
def test_a_stretch_is_cut_at_the_end_of_the_running_step(first_s: float, growth_s: float, steps: int,
                                                         part: float) -> None:
    stretch = Stretch(0.0, first_s, growth_s, steps)
    ends, at = [], 0.0
    for k in range(steps):
        at += first_s + k * growth_s
        ends.append(at)
    assert stretch.lasts(steps) == pytest.approx(ends[-1])
    moment = part * ends[-1]
    cut = stretch.steps_by(moment)
    assert ends[cut - 1] >= moment * (1 - 1e-6)
    assert cut == 1 or ends[cut - 2] <= moment * (1 + 1e-6)


def test_the_same_seed_gives_the_same_run_and_every_request_ends_once() -> None:
    first, second = run(), run()
    assert first.ttft_s == second.ttft_s and first.scale_ups == second.scale_ups and first.releases == second.releases
    assert first.ended == len(BURST) and first.rejects == 0 and first.scale_ups


def test_first_tokens_come_before_the_load_ends_and_zigzag_beats_best_effort_beats_stopping_the_world() -> None:
    """Criterion (iv) on a network slow enough that the modes differ: 4.7 s a load, one source, one target."""
    slow = replace(A, nic_gbps=40, gpus=2)
    runs = {name: run(name, machine=slow, instances=2) for name in ("multicast", "blitz-best-effort", "blitz")}
    stopped, best_effort, zigzag = (mean(runs[name].ttft_s) for name in runs)
    assert zigzag < 0.95 * best_effort < 0.95 * stopped
    (up,) = runs["blitz"].scale_ups
    assert up.stop - up.start > 4.5
    done = sorted(at + t for at, t in zip(runs["blitz"].arrived_s, runs["blitz"].ttft_s))
    alone = sorted(at + t for at, t in zip(runs["multicast"].arrived_s, runs["multicast"].ttft_s))
    assert sum(t < up.stop for t in done) > 1.15 * sum(t < up.stop for t in alone)


def test_host_memory_hits_are_fast_and_misses_cost_a_pass_over_the_ssd() -> None:
    hit, miss = run("allcache"), run("sllm", instances=2, machine=replace(A, gpus=2))
    hit_s, miss_s = (up.scale_ups[0].stop - up.scale_ups[0].start for up in (hit, miss))
    assert hit_s == pytest.approx(M24.param_bytes / (2 * 16e9), rel=0.02)
    assert miss_s == pytest.approx(M24.param_bytes / (2 * 1.25e9), rel=0.02)


def test_link_bytes_are_those_of_the_parameters_moved() -> None:
    spread = replace(A, gpus=2)  # one instance a host: everything crosses the network
    out = run("multicast", machine=spread)
    assert out.link_bytes["nic_in"] == out.link_bytes["nic_out"]
    assert out.link_bytes["nic_in"] == pytest.approx(len(out.scale_ups) * M24.param_bytes, rel=1e-3)


class Movers:
    """Instances without a brain: i0 decodes a request whose KV takes a second to another one."""

    def __init__(self) -> None:
        self.clock, self.events = Clock(), list[Event]()
        config = config_of(Setup(A, replace(M24, slots=1), SYSTEMS["full"], 3))
        fabric = Fabric(self.clock)

        def send_kv(source: str, target: str, tokens: int, then: Callable[[], None]) -> Callable[[], None]:
            flow = fabric.begin([Link("nic", 1.0)], [1.0], lambda mark: then())
            return lambda: fabric.stop(flow)

        self.instances = {f"i{k}": SimInstance(f"i{k}", config, M24, self.clock, self.events.append,
                                               lambda name: self.instances[name], lambda *a: 0.0, send_kv, 0.0)
                          for k in range(3)}
        for instance in self.instances.values():
            instance.arrived(M24.spec.units)
        self.instances["i0"].assign(Request("r", M24.spec.name, 100, 50, 0.0), 1)
        self.clock.run(0.2)
        assert [type(event) for event in self.events] == [PrefillDone]

    def after(self, *commands: Migrate | Abort) -> list[tuple[str, str]]:
        """What is said, and by whom, once they were obeyed, a tenth of a second one after another."""
        self.events.clear()
        for k, command in enumerate(commands):
            self.clock.at(0.2 + 0.1 * k, self.instances[command.instance].obey, command)
        self.clock.run()
        for instance in self.instances.values():
            instance.check()
        return [(type(event).__name__, event.instance) for event in self.events]


def test_kv_that_is_sent_to_another_instance_after_all_arrives_there_only() -> None:
    first, second = (Migrate("i0", "r", 1, target) for target in ("i1", "i2"))
    assert Movers().after(first, second) == [("KVMigrated", "i2"), ("RequestFinished", "i2")]


def handed_over(movers: Movers) -> Sequence:
    """i1 has taken a prompt of which i0 ran half, whose KV takes a second."""
    sequence = Sequence(Request("half", M24.spec.name, 100, 5, 0.0), 1, next_layer=M24.spec.layers // 2)
    movers.instances["i0"].send_layers(sequence, "i1")
    movers.instances["i1"].partners.handed("i0", sequence)
    return sequence


def test_a_prompt_that_two_ran_has_its_first_token_before_its_kv_is_there_and_the_others_behind_it() -> None:
    movers = Movers()
    handed_over(movers)
    movers.clock.run()
    at = {type(event): event.at for event in movers.events if event.instance == "i1"}
    assert at[PrefillDone] < 0.5 and at[RequestFinished] > 1.0
    movers.instances["i1"].check()


def test_a_prompt_whose_kv_is_not_there_yet_may_move_on_and_may_be_given_up() -> None:
    movers = Movers()
    sequence = handed_over(movers)
    assert movers.after(Abort("i0", "r"), Migrate("i1", "half", 1, "i2"))[-2:] == [
        ("KVMigrated", "i2"), ("RequestFinished", "i2")] and sequence.stop_kv is None
    movers = Movers()
    handed_over(movers)
    assert ("RequestFinished", "i1") in movers.after(Abort("i1", "half")) and not movers.instances["i1"].sequences


def test_kv_of_a_request_that_is_over_does_not_arrive() -> None:
    assert Movers().after(Migrate("i0", "r", 1, "i1"), Abort("i0", "r")) == [("RequestFinished", "i0")]


def test_a_request_whose_target_has_no_seat_for_it_has_failed() -> None:
    movers = Movers()
    movers.instances["i1"].assign(Request("other", M24.spec.name, 100, 500, 0.0), 1)
    assert ("RequestFailed", "i0") in movers.after(Migrate("i0", "r", 1, "i1"))


def test_measured_chunks_run_one_after_another_and_a_transfer_waits_for_its_members() -> None:
    measured = replace(M24, chunk_s=((64, 0.1), (128, 0.15)), step_tokens=128)
    assert [measured.prefill_s(n) for n in (1, 64, 65, 128, 300)] == pytest.approx([0.1, 0.1, 0.15, 0.15, 0.4])
    together = run("full", [Arrival(1.0, 60, 1), Arrival(1.0, 60, 1)], instances=1, model=measured)
    assert list(together.ttft_s) == pytest.approx([A.rpc_s + 0.1, A.rpc_s + 0.2])
    (fast,), (slow,) = (run("multicast", machine=replace(A, setup_s=s), instances=2).scale_ups for s in (0.0, 0.5))
    assert (slow.stop - slow.start) - (fast.stop - fast.start) == pytest.approx(0.5)


def test_a_measured_row_is_read_back(tmp_path: Path) -> None:
    measured = replace(M24, chunk_s=((64, 0.1), (128, 0.15)), unit_sizes=(1e6,) * M24.spec.units, slots=8)
    for model in (M24, measured):
        costs.write(tmp_path / "row.json", A, model)
        assert costs.read(tmp_path / "row.json") == (A, model)
    (tmp_path / "row.json").write_text("{}")
    with pytest.raises(ConfigError, match="row.json"):
        costs.read(tmp_path / "row.json")


@pytest.mark.parametrize(("part", "name", "value", "says"), [
    ("machine", "hosts", "4", "hosts must be a whole number"), ("machine", "domain_gpus", 0, "domain_gpus must be"),
    ("machine", "nic_gbps", 0, "nic_gbps must be a finite number above 0, got 0"), ("machine", "gpus", 1, "a host has 1 GPUs"),
    ("machine", "rpc_s", float("nan"), "rpc_s must be a finite number above 0 or 0, got nan"),
    ("model", "slots", 0, "slots must be"), ("model", "param_bytes", 1e6, "unit_sizes must be"),
    ("model", "unit_sizes", [1e6], "unit_sizes must be the bytes of 42 units"), ("model", "spec", None, "NoneType"),
    ("model", "chunk_s", [[64, 0.2], [32, 0.1]], "chunk_s must be pairs of tokens and seconds, in rising order"),
    ("model", "chunk_s", [[64, 0.2, 1]], "too many values")])
def test_a_damaged_row_is_refused_by_what_is_wrong_with_it(tmp_path: Path, part: str, name: str, value: object,
                                                           says: str) -> None:
    costs.write(tmp_path / "row.json", A, M24)
    row = json.loads((tmp_path / "row.json").read_text())
    row[part][name] = value
    (tmp_path / "row.json").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=f"row.json: .*{says}"):
        costs.read(tmp_path / "row.json")


@pytest.mark.parametrize("max_len", [512, 4096])
def test_a_model_of_a_short_context_has_room_for_answers(tmp_path: Path, max_len: int) -> None:
    costs.write(tmp_path / "row.json", A, replace(M24, spec=replace(M24.spec, max_len=max_len)))
    assert cli.main(["sim", "--costs", str(tmp_path / "row.json"), "--systems", "full", "--duration-s", "10", "--load", "0.1",
                     "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "report.json").read_text())["table"]
    assert row["requests"] and not row["rejects"] and row["tpot_p50_s"] > 0


def test_a_load_that_leaves_no_request_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sim", "--systems", "full", "--duration-s", "10", "--load", "1e-9"]) == 2
    assert "give a higher --load" in capsys.readouterr().err


def test_host_copies_are_those_of_the_whole_run() -> None:
    row, = table([run("allcache")])
    assert row["host_copies"] == pytest.approx(1)  # four 24B instances fit on a host


def test_quantiles_are_nearest_rank() -> None:
    assert quantiles([3.0, 1.0, 2.0, 4.0], [0, 25, 50, 51, 100]) == [1.0, 1.0, 2.0, 3.0, 4.0]
    assert quantiles([], [50]) == [0.0]


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sim", "--systems", "full,blitz", "--instances", "4", "--duration-s", "20", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    assert "ttft_p99_s" in capsys.readouterr().out
    data = json.loads((tmp_path / "report.json").read_text())
    assert [row["system"] for row in data["table"]] == ["full", "blitz"]
    blitz = data["systems"]["blitz"]
    assert len(blitz["ttft_s_percentiles"]) == 101 and blitz["scale_ups"]
    sent = sum(moved for name, moved in blitz["link_bytes"].items() if name.startswith("fast_out:"))
    assert sent == pytest.approx(data["table"][1]["fast_out_bytes"]) and sent > 4e10
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 6 and "http" not in page and "src=" not in page
    assert (tmp_path / "table.csv").read_text().startswith("system,requests,")
    assert cli.main(["sim", "--systems", "fool"]) == 2
    assert "there are blitz, " in capsys.readouterr().err


def test_the_simulator_never_imports_jax() -> None:
    code = "import sys, blitzjax.cli_sim; print([m for m in ('jax', 'numpy', 'grpc', 'flax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "[]", done.stderr
