"""Models that begin, and end, without instances: where their parameters are meanwhile, and how long prompts wait."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from blitzjax import arrivals, cli
from blitzjax.arrivals import Arrival
from blitzjax.config import ScaleConfig
from blitzjax.sim import costs
from blitzjax.sim.outcome import Outcome, mean
from blitzjax.sim.shell import Setup, simulate
from blitzjax.sim.systems import SYSTEMS

A, M8, M24 = costs.MACHINES["A"], costs.MODELS["llama3-8b"], costs.MODELS["mistral-24b"]
PAIR = replace(A, hosts=2, gpus=2)  # one 24B instance a host
MANY = 6


def run(system: str, trace: list[Arrival], machine: costs.MachineCosts = PAIR, model: costs.ModelCosts = M24,
        instances: int = 2, models: int = 1, zero_after_s: float = 3.0) -> Outcome:
    return simulate(Setup(machine, model, SYSTEMS[system], instances, start=0, models=models,
                          scale=ScaleConfig(zero_after_s=zero_after_s)), iter(trace))


def test_a_model_wakes_from_its_host_copy_and_leaves_one_behind() -> None:
    out = run("blitz", [Arrival(2.5, 2000, 5), Arrival(20.5, 2000, 5)])
    loaded_s = M24.param_bytes / (2 * 16e9)
    assert list(out.ttft_s) == list(out.cold_ttft_s) == pytest.approx([loaded_s + M24.prefill_s(2000)] * 2, rel=0.01)
    copies = {round(sample.at): sample.host_copies for sample in out.samples}
    assert [copies[at] for at in (1, 5, 12, 19)] == [1, 0, 1, 1]
    assert len(out.scale_ups) == 2 and len(out.releases) == 1 and out.gpu_s < 2 * 15


def test_a_cached_host_is_as_fast_until_its_copy_expires() -> None:
    """ServerlessLLM: loads come from the SSD, but not within 30 s after the last instance went."""
    out = run("sllm", [Arrival(1.0, 2000, 5), Arrival(30.0, 2000, 5), Arrival(80.0, 2000, 5)])
    slow_s, fast_s = M24.param_bytes / (2 * 1.25e9), M24.param_bytes / (2 * 16e9)
    assert [up.stop - up.start for up in out.scale_ups] == pytest.approx([slow_s, fast_s, slow_s], rel=0.01)


def test_where_the_keeper_is_busy_prompts_run_behind_the_layers_that_it_sends() -> None:
    """Three models on two hosts: who keeps the third serves the first, so that it comes down a chain."""
    trace = [Arrival(1.0, 500, 200, 0), *[Arrival(2.6, 4000, 5, 2)] * 4]
    live, stopped = (run(name, trace, models=3) for name in ("blitz", "multicast"))
    load_s = M24.param_bytes / (2 * 12.5e9)
    for out in (live, stopped):
        assert out.scale_ups[1].stop - out.scale_ups[1].start == pytest.approx(load_s, rel=0.01)
        assert max(sample.host_copies for sample in out.samples) <= 3
    assert max(live.cold_ttft_s[-4:]) < load_s + 0.1
    assert min(stopped.cold_ttft_s[-4:]) > load_s + M24.prefill_s(4000) - 0.01


@cache
def many(system: str, gpus: int) -> Outcome:
    """40 s of AzureCode for six models on 32 GPUs, `gpus` a host."""
    cut = arrivals.truncate(arrivals.window(arrivals.read(arrivals.find("azure_code")), 0, 40), 4095, 100)
    trace = list(arrivals.scale(arrivals.deal(cut, MANY, seed=1), 6, seed=1))
    return run(system, trace, replace(A, hosts=32 // gpus, gpus=gpus), M8, instances=32, models=MANY)


def test_host_copies_of_many_models_are_one_each_at_most_but_grow_with_the_hosts_of_a_cache() -> None:
    blitz, spread = many("blitz", 8), many("blitz", 2)
    assert max(sample.host_copies for out in (blitz, spread) for sample in out.samples) == MANY
    assert min(sample.host_copies for sample in blitz.samples) < MANY  # those that serve need none
    few, more = (max(sample.host_copies for sample in many("sllm", gpus).samples) for gpus in (8, 2))
    assert MANY < few < more
    assert min(sample.host_copies for sample in many("allcache", 8).samples) == 4 * MANY


def test_requests_that_find_no_instance_wait_as_with_a_copy_on_every_host_and_all_are_answered() -> None:
    blitz, sllm, cached = (many(name, 8) for name in ("blitz", "sllm", "allcache"))
    assert len({out.ended for out in (blitz, sllm, cached)}) == 1
    assert blitz.ended > 300 and blitz.rejects == sllm.rejects == cached.rejects == 0
    assert len(blitz.cold_ttft_s) > 50
    assert mean(blitz.cold_ttft_s) < 1.2 * mean(cached.cold_ttft_s) < 0.3 * mean(sllm.cold_ttft_s)


def test_the_command_takes_many_models_from_zero(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sim", "--begin", "0", "--models", "3", "--instances", "4", "--duration-s", "5", "--zero-after-s", "2"]
    assert cli.main([*argv, "--systems", "blitz,half"]) == 0
    assert "found no instance of their model, mean TTFT: blitz " in capsys.readouterr().out
    assert cli.main([*argv, "--roles", "split"]) == 2
    assert "--begin 0 needs mixed roles" in capsys.readouterr().err
    assert cli.main([*argv, "--begin", "2"]) == 2
    assert "blitz begins with 2 instances of each of 3 models, more than 4" in capsys.readouterr().err
    assert cli.main([*argv, "--models", "0"]) == 2
