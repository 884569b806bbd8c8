"""The shape of the paper's evaluation on full windows of the traces: eight criteria, a figure each, simulated.

    i     TTFT: Blitz <= AllCache <= ServerlessLLM         v     a source that sends KV too scales more slowly
    ii    TTFT gains more than TPOT, but on AzureCode      vi    GPU time below full provision and ServerlessLLM
    iii   a chain takes as long however long it is         vii   host copies: below one, against one per host
    iv    ZigZag > best effort > stopping the world        viii  violations grow with the time that the world stops

Pure simulation with the paper's costs, no model and no process; --quick takes two minutes of each trace. Writes one
HTML page with all figures. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from bench.result import say
from blitzjax import arrivals
from blitzjax.arrivals import Arrival
from blitzjax.cli_sim import scale_factor
from blitzjax.sim import costs, report
from blitzjax.sim.chains import ChainFlow
from blitzjax.sim.clock import Clock
from blitzjax.sim.costs import MachineCosts, ModelCosts
from blitzjax.sim.links import Fabric, Link
from blitzjax.sim.outcome import Outcome, mean
from blitzjax.sim.plots import Line, plot
from blitzjax.sim.shell import Setup, simulate
from blitzjax.sim.systems import SYSTEMS
from blitzjax.types import Roles

_SYSTEMS = ("full", "blitz", "blitz-best-effort", "multicast", "lambda-scale", "network", "allcache", "sllm")
_HOST_GBPS = (256, 128, 64, 32, 16, 8, 4)  # of criterion viii
_CHAIN = (1, 2, 4, 8, 16, 32, 63)  # targets, of criterion iii


@dataclass(frozen=True, slots=True)
class Row:
    """At half of capacity AzureCode's bursts overload even full provision for minutes, hence a tenth."""

    name: str
    trace: str
    model: ModelCosts
    machine: MachineCosts
    instances: int
    seconds: float
    load: float

    def trace_of(self, seconds: float, seed: int) -> list[Arrival]:
        cut = arrivals.window(arrivals.read(arrivals.find(self.trace)), 0, min(seconds, self.seconds))
        small = arrivals.truncate(cut, 4095, 12000)
        return list(arrivals.scale(small, scale_factor(small, self.model, self.instances, self.load), seed))


_A, _B = costs.MACHINES["A"], costs.MACHINES["B"]
ROWS = (Row("conv-24b", "azure_conv_2023", costs.MODELS["mistral-24b"], _A, 8, 480, 0.5),
        Row("conv-72b", "azure_conv_2023", costs.MODELS["qwen2.5-72b"], _A, 8, 480, 0.5),
        Row("code-8b", "azure_code_2023", costs.MODELS["llama3-8b"], _B, 16, 360, 0.1))


def outcomes(row: Row, trace: Sequence[Arrival], roles: Roles) -> dict[str, Outcome]:
    found = {}
    for name in _SYSTEMS:
        setup = Setup(row.machine, row.model, SYSTEMS[name], row.instances, roles=roles)
        found[name] = simulate(setup, iter(trace))
        ttft_s = mean(found[name].ttft_s)
        print(f"  {row.name} {roles} {name}: {found[name].ended} requests, TTFT {ttft_s:.3f} s", flush=True)
    return found


def by_row(row: Row, found: dict[str, Outcome]) -> dict[str, dict[str, object]]:
    """Criteria i, ii, vi and vii: numbers, and whether they hold."""
    ttft = {name: mean(o.ttft_s) for name, o in found.items()}
    tpot = {name: mean(o.tpot_s) for name, o in found.items()}
    gpu = {name: o.gpu_s for name, o in found.items()}
    copies = {name: o.host_copy_s / o.end_s for name, o in found.items()}
    gains = 1 - ttft["blitz"] / ttft["sllm"], 1 - tpot["blitz"] / tpot["sllm"]
    return {
        "i": {"ttft_s": ttft, "holds": ttft["blitz"] <= 1.05 * ttft["allcache"] <= 1.05 * ttft["sllm"]},
        "ii": {"ttft_gain": gains[0], "tpot_gain": gains[1], "holds": gains[0] > gains[1] or row.name == "code-8b"},
        "vi": {"of_full": gpu["blitz"] / gpu["full"], "of_sllm": gpu["blitz"] / gpu["sllm"],
               "holds": gpu["blitz"] < min(gpu["full"], gpu["sllm"])},
        "vii": {"copies": {name: copies[name] for name in ("blitz", "sllm")},
                "holds": copies["blitz"] < 1 < copies["sllm"]}}


def chain_times(model: ModelCosts, machine: MachineCosts) -> dict[str, list[tuple[float, float]]]:
    """Criterion iii: seconds until `n` targets have everything, by one chain and by unicasts of one source."""
    prefix = [0.0, *accumulate(model.unit_bytes)]
    rate = costs.bytes_per_s(machine.nic_gbps) * model.tensor_parallel

    def seconds(routes: list[list[list[Link]]]) -> float:
        clock = Clock()
        fabric, ends = Fabric(clock), [0.0]
        for route in routes:
            ChainFlow(fabric, route, prefix, 0, machine.chunk_bytes, False,
                      lambda member, units: ends.append(clock.now), lambda: None)
        clock.run()
        return max(ends)

    found: dict[str, list[tuple[float, float]]] = {"chain": [], "unicast": []}
    for n in _CHAIN:
        ports = [(Link(f"out{k}", rate), Link(f"in{k}", rate)) for k in range(n + 1)]
        hops = [[ports[k][0], ports[k + 1][1]] for k in range(n)]
        found["chain"].append((n, seconds([hops])))
        found["unicast"].append((n, seconds([[[ports[0][0], ports[k + 1][1]]] for k in range(n)])))
    return found


def interference(model: ModelCosts, machine: MachineCosts) -> list[tuple[float, float]]:
    """Criterion v: (share of the parameters that the source sends as KV meanwhile, time over that without)."""
    rate = costs.bytes_per_s(machine.nic_gbps) * model.tensor_parallel
    found = []
    for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
        clock, ends = Clock(), list[float]()
        fabric, out, first, second = Fabric(clock), Link("out", rate), Link("in1", rate), Link("in2", rate)
        if share:
            fabric.begin([out, second], [share * model.param_bytes], lambda mark: None)
        fabric.begin([out, first], [model.param_bytes], lambda mark: ends.append(clock.now))
        clock.run()
        found.append((share, ends[0] * rate / model.param_bytes))
    return found


def while_loading() -> dict[str, Outcome]:
    """Criterion iv: one scale-up 1 → 2 of 4.7 s under a burst."""
    model, slow = costs.MODELS["mistral-24b"], replace(_A, nic_gbps=40, gpus=2)
    burst = [Arrival(0.5 + 0.001 * k, 1000 + 37 * (k % 11), 20 + k % 7) for k in range(60)]
    return {name: simulate(Setup(slow, model, SYSTEMS[name], 2), iter(burst))
            for name in ("blitz", "blitz-best-effort", "multicast")}


def violations(row: Row, trace: Sequence[Arrival], full: Outcome) -> list[tuple[float, float]]:
    """Criterion viii: (seconds of a load, share of violations), AllCache with slower and slower host links."""
    limits = report.SLO_FACTOR * mean(full.ttft_s), report.SLO_FACTOR * mean(full.tpot_s)
    found = []
    for gbps in _HOST_GBPS:
        setup = Setup(replace(row.machine, host_gbps=gbps), row.model, SYSTEMS["allcache"], row.instances)
        load_s = row.model.param_bytes / row.model.tensor_parallel / costs.bytes_per_s(gbps)
        found.append((load_s, simulate(setup, iter(trace)).violations(*limits)))
        print(f"  loads of {load_s:.2f} s: {found[-1][1]:.3f} of all requests violate", flush=True)
    return found


def first_tokens(runs: dict[str, Outcome]) -> list[Line]:
    """Requests that have their first token, over time."""
    return [Line(name, [(at, k + 1.0) for k, at in enumerate(sorted(a + t for a, t in zip(o.arrived_s, o.ttft_s)))])
            for name, o in runs.items()]


def rising(points: Sequence[tuple[float, float]], chance: float) -> bool:
    return all(b[1] >= a[1] - chance for a, b in zip(points, points[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.shapes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="120 s of each trace instead of 480 and 360")
    parser.add_argument("--roles", choices=("mixed", "split"), default="mixed")
    parser.add_argument("--seed", type=int, default=1, help="of which requests an up-scaled trace has more (default 1)")
    parser.add_argument("--page", type=Path, default=Path("shapes.html"), help="the figures (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    args = parser.parse_args(argv)
    began, seconds = time.monotonic(), 120.0 if args.quick else 480.0
    found: dict[str, dict[str, Any]] = {}
    pages = []
    for row in ROWS:
        trace = row.trace_of(seconds, args.seed)
        runs = outcomes(row, trace, args.roles)
        found[row.name] = by_row(row, runs)
        pages.append(report.to_html(list(runs.values()), {"row": row.name, "roles": args.roles}))
        if row is ROWS[0]:
            stops = violations(row, trace, runs["full"])
    chain, kv, runs = chain_times(ROWS[0].model, _A), interference(ROWS[0].model, _A), while_loading()
    waits = [mean(runs[name].ttft_s) for name in ("blitz", "blitz-best-effort", "multicast")]
    found |= {
        "iii": {**chain, "holds": chain["chain"][-1][1] < 1.05 * chain["chain"][0][1]
                and chain["unicast"][-1][1] > 0.99 * _CHAIN[-1] * chain["unicast"][0][1]},
        "iv": {"ttft_s": waits, "holds": waits[0] < waits[1] < waits[2]},
        "v": {"kv_share_and_time": kv, "holds": rising(kv, 0) and abs(kv[-1][1] - 1.5) < 0.01},
        "viii": {"load_s_and_violations": stops, "holds": rising(stops, 0.02)}}
    figures = [plot("iii: n targets, seconds", "", [Line(name, points) for name, points in chain.items()], log_x=True),
               plot("iv: first tokens during a load of 4.7 s", "s", first_tokens(runs)),
               plot("v: scale-up time by KV sent meanwhile", "", [Line("over that without", kv)]),
               plot("viii: violations by load time", "s", [Line(ROWS[0].name, stops)], log_x=True)]
    args.page.write_text("".join(pages) + f"<div class=plots>{''.join(figures)}</div>")
    held = {f"{name} {key}": one["holds"] for name in (row.name for row in ROWS) for key, one in found[name].items()}
    held |= {key: found[key]["holds"] for key in ("iii", "iv", "v", "viii")}
    print("\n".join(f"  {name:14} {'holds' if ok else 'FAILS'}" for name, ok in held.items()))
    print(f"figures are in {args.page}")
    say("shapes", {"holds": all(held.values()), "criteria": found, "roles": args.roles, "seed": args.seed, "quick": args.quick,
                   "seconds": round(time.monotonic() - began, 1)}, argv, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
