"""Does the simulator tell the truth? One short trace through a live cluster of four workers, and through the simulator
with costs that were measured on this cluster: the same scale decisions, scale-up times and TTFT?

Real processes and real weights (SmolLM2-135M). Workers are in network namespaces on rate-limited links; without root on
loopback, which the result says. Two workers have a core each and may serve, the others wait. Sizes of the trace's
prompts and answers are divided by --shrink, for a core is no GPU. The default window is one in which the simulated
decisions stay the same when all rates change by 15 %: in others, rounding decides. Calibrated before the trace and after it, and simulated with the mean of both, for a shared machine
drifts: what that left is in the result. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import figures, fleet, netns
from bench.result import say
from blitzjax import arrivals, cli_replay
from blitzjax.arrivals import Arrival
from blitzjax.calibrate import Calibration
from blitzjax.cli_serve import checkpoint
from blitzjax.cli_sim import scale_factor
from blitzjax.config import ScaleConfig
from blitzjax.errors import BlitzError
from blitzjax.serve.client import AsyncClient
from blitzjax.serve.model import load_model
from blitzjax.sim import shell
from blitzjax.sim.costs import MachineCosts, ModelCosts
from blitzjax.sim.systems import SYSTEMS
from blitzjax.commands import Command, LoadFromDisk, PrepareTransfer, Release
from blitzjax.events import Event, PrefillDone, RequestArrived, RequestFinished, TransferEnded
from blitzjax.types import InstanceId

_MODEL = "smollm2-135m"
_POOL = 4
_SERVING = 2  # at most: there are two cores
_LINK_MBIT = 1000
_TABLES = {"engine": {"max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 8}}
_SYSTEMS = {"zigzag": "blitz", "best_effort": "blitz-best-effort", "off": "multicast"}
_DOWN_AFTER_S = 3.0
_GOALS = {"scale_up_ratio": 0.20, "ttft_ratio": 0.25}  # from 1


@dataclass(slots=True)
class Course:
    """What a brain heard and said, from the beginning of the trace: `told` once per event, in order."""

    decisions: list[str] = field(default_factory=list)  # "+2": two begin to load; "-1": one is released
    times: list[float] = field(default_factory=list)  # of the decisions
    scale_ups: list[float] = field(default_factory=list)  # seconds from being told to load until everything is there
    ttfts: dict[str, float] = field(default_factory=dict)
    finished: int = 0
    _arrived: dict[str, float] = field(default_factory=dict)
    _loading: dict[InstanceId, float] = field(default_factory=dict)

    def told(self, event: Event, commands: Iterable[Command]) -> None:
        match event:
            case RequestArrived(at, request):
                self._arrived[request.id] = at
            case PrefillDone(at, _, request_id) if request_id in self._arrived:
                self.ttfts.setdefault(request_id, at - self._arrived[request_id])
            case RequestFinished():
                self.finished += 1
            case TransferEnded(at, instance) if instance in self._loading:
                self.scale_ups.append(at - self._loading.pop(instance))
        released, loading = 0, set()
        for command in commands:
            match command:
                case PrepareTransfer(_, plan):
                    loading |= {i for chain in plan.chains for i in chain.instances[1:]}
                case LoadFromDisk(instance):
                    loading.add(instance)
                case Release():
                    released += 1
        for instance in loading:
            self._loading[instance] = event.at
        for count, sign in ((len(loading), "+"), (released, "-")):
            if count:
                self.decisions.append(f"{sign}{count}")
                self.times.append(event.at)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for. `load` is the mean rate as a share of what the instances that may serve could do."""

    trace: str
    start_s: float
    duration_s: float
    shrink: int
    load: float
    live: str
    seed: int

    def arrivals(self, model: ModelCosts) -> list[Arrival]:
        """As many requests as the measured costs say that `load` is."""
        cut = arrivals.window(arrivals.read(arrivals.find(self.trace)), self.start_s, self.duration_s)
        longest = model.chunk_s[-1][0]
        small = [Arrival(a.at, min(max(1, a.prompt_tokens // self.shrink), longest),
                         min(max(2, a.answer_tokens // self.shrink), 64)) for a in cut]
        return list(arrivals.scale(small, scale_factor(small, model, _SERVING, self.load), self.seed))


# ---- live


def calibrated(directory: Path, rate_mbit: int | None) -> tuple[MachineCosts, ModelCosts]:
    """A cluster of its own, scaled by hand."""
    with fleet.fleet(directory, _POOL, rate_mbit, _TABLES) as made, made.cluster.client() as client:
        on_two_cores(made)
        yield_to_controller(made)
        calibration = Calibration(client, made.cluster.config, load_model(directory),
                                  lambda text: print(f"  {text}", flush=True))
        return calibration.run("calibrated")


def lived(directory: Path, rate_mbit: int | None, load: Load, asked: Sequence[Arrival], rate: float) -> Course:
    """The trace through a cluster that scales by itself. Fails when a request does."""
    tables = _TABLES | {"scale": {"policy": "auto", "live": load.live, "max_instances": _SERVING,
                                  "prefill_tokens_per_s": rate, "down_after_s": _DOWN_AFTER_S}}
    with fleet.fleet(directory, _POOL, rate_mbit, tables) as made:
        on_two_cores(made)
        yield_to_controller(made)
        vocab = load_model(directory).spec.vocab
        mark = asyncio.run(_play(made, asked, vocab, load.seed))
        made.cluster.stop()
        course, replayed = Course(), cli_replay.replay(made.event_log)
        if replayed.different is not None:
            raise SystemExit(f"the log does not give its commands again: {replayed.different}")
        for turn in cli_replay.turns(made.event_log):
            if turn.line > mark and course.finished < len(asked):  # the simulation ends with the last request
                course.told(turn.event, turn.commands)
        return course


def on_two_cores(made: fleet.Fleet) -> None:
    """Workers 0 and 2 share a core; the two that will serve do not: whoever serves alone, the next one is i0 or i1."""
    with made.cluster.client() as client:
        for _ in range(20):
            serving = [i.id for i in client.status().instances if i.phase == "serving"]
            if serving and "i2" not in serving:
                return
            made.cluster.signal_worker(2)
            time.sleep(5)
    raise SystemExit("worker 2 insists on serving")


def yield_to_controller(made: fleet.Fleet) -> None:
    """Controller and client have cores of their own elsewhere; here, where they can, workers leave them theirs."""
    for k in range(_POOL):
        group = Path(f"/proc/{made.cluster.worker_pid(k)}/autogroup")  # niceness counts inside of a session only
        with contextlib.suppress(OSError):
            group.write_text("5")


async def _play(made: fleet.Fleet, asked: Sequence[Arrival], vocab: int, seed: int) -> int:
    """→ how many lines the log had when the trace began."""
    tokens = random.Random(seed)
    prompts = [[tokens.randrange(vocab) for _ in range(a.prompt_tokens)] for a in asked]
    async with AsyncClient(made.address) as client:
        for _ in range(2):  # both have worked, and a multicast was compiled
            await client.scale(2, live="off", source="multicast", wait=True, timeout_s=60)
            await asyncio.gather(*[fleet.ask(client, prompts[k % len(prompts)], 4) for k in range(8)])
            await fleet.settle(client, 1)
        await asyncio.sleep(_DOWN_AFTER_S + 1)  # the operator's wish is over
        with made.event_log.open("rb") as log:
            mark = sum(1 for _ in log)
        answers = await asyncio.gather(*[fleet.ask(client, prompt, a.answer_tokens, a.at)
                                         for prompt, a in zip(prompts, asked, strict=True)])
        if failed := [a.error for a in answers if a.result is None]:
            raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    return mark


# ---- simulated


def simulated(machine: MachineCosts, model: ModelCosts, load: Load, asked: Sequence[Arrival]) -> Course:
    course = Course()
    setup = shell.Setup(machine, model, SYSTEMS[_SYSTEMS[load.live]], _POOL, down_after_s=_DOWN_AFTER_S,
                        scale=ScaleConfig(), most=_SERVING)
    shell.simulate(setup, iter(asked), watch=course.told)
    return course


# ---- together


def between(before: ModelCosts, after: ModelCosts) -> ModelCosts:
    """The mean of two calibrations. The policy's rate stays what both brains were told: that of the first."""
    chunks = zip(before.chunk_s, after.chunk_s, strict=True)
    mean = {name: (getattr(before, name) + getattr(after, name)) / 2 for name in ("step_s", "sequence_s", "kv_token_s")}
    return replace(before, chunk_s=tuple((most, (a + b) / 2) for (most, a), (_, b) in chunks), **mean)


def drift(before: ModelCosts, after: ModelCosts) -> float:
    """How much longer the widest chunk takes after the trace."""
    return after.chunk_s[-1][1] / before.chunk_s[-1][1]


def compare(live: Course, sim: Course) -> dict[str, object]:
    """The figures that the goals are about, and `agrees`."""
    mean = {name: statistics.fmean(course.ttfts.values()) for name, course in (("live", live), ("sim", sim))}
    up = {name: statistics.fmean(course.scale_ups) if course.scale_ups else 0.0
          for name, course in (("live", live), ("sim", sim))}
    ratios = {"scale_up_ratio": up["sim"] / up["live"] if up["live"] else 1.0, "ttft_ratio": mean["sim"] / mean["live"]}
    same = live.decisions == sim.decisions
    return {
        "same_decisions": same, **{key: figures.rounded(value) for key, value in ratios.items()},
        "agrees": same and all(abs(value - 1) <= _GOALS[key] for key, value in ratios.items()),
        **{name: {"decisions": course.decisions, "at_s": [figures.rounded(t - begin) for t in course.times],
                  "scale_up_s": [figures.rounded(s) for s in course.scale_ups],
                  "ttft": figures.rounded_row(figures.ttft(list(course.ttfts.values())))}
           for name, course, begin in (("live", live, _begin(live)), ("sim", sim, _begin(sim)))}}


def _begin(course: Course) -> float:
    return min(course._arrived.values())


def show(found: Mapping[str, Any]) -> None:
    for name in ("live", "sim"):
        row = found[name]
        print(f"  {name:4}  TTFT mean {row['ttft']['ttft_mean_s']:.2f} s, p95 {row['ttft']['ttft_p95_s']:.2f} s; "
              f"scale-ups {', '.join(f'{s:.2f}' for s in row['scale_up_s'])} s\n        "
              + "  ".join(f"{what} at {at:.1f}" for what, at in zip(row["decisions"], row["at_s"], strict=True)))
    print(f"  decisions {'are the same' if found['same_decisions'] else 'DIFFER'}; simulated over live: scale-up "
          f"{found['scale_up_ratio']:.2f} (goal 0.8 to 1.2), mean TTFT {found['ttft_ratio']:.2f} (goal 0.75 to 1.25)")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    began, machine, reason = time.monotonic(), figures.machine(), netns.missing()
    rate = None if reason else _LINK_MBIT
    load = Load(args.trace, args.start_s, 45.0 if args.quick else args.duration_s, args.shrink, args.load, args.live,
                args.seed)
    print(f"{_MODEL} on {machine}; " + (f"loopback ({reason})" if reason else f"links of {_LINK_MBIT} Mbit/s"))
    directory = checkpoint(_MODEL, "bfloat16")
    try:
        print("Calibration", flush=True)
        measured, before = calibrated(directory, rate)
        asked = load.arrivals(before)
        print(f"{len(asked)} requests in {load.duration_s:g} s of {load.trace}, {sum(a.prompt_tokens for a in asked)} "
              f"prompt tokens, {sum(a.answer_tokens for a in asked)} answered ones", flush=True)
        live = lived(directory, rate, load, asked, before.prefill_tokens_per_s)
        print("Calibration, again", flush=True)
        after = calibrated(directory, rate)[1]
        model = between(before, after)
        found = compare(live, simulated(measured, model, load, asked))
    except (BlitzError, TimeoutError) as e:
        raise SystemExit(f"bench.agreement: {e}") from e
    show(found)
    print(f"  a chunk takes {drift(before, after):.2f} of the time that it took before the trace")
    found |= {"requests": len(asked), "drift": figures.rounded(drift(before, after)), "calibration": {
        "prefill_tokens_per_s": model.prefill_tokens_per_s, "chunk_s": model.chunk_s, "step_s": model.step_s,
        "sequence_s": model.sequence_s, "kv_token_s": model.kv_token_s, "nic_gbps": measured.nic_gbps,
        "setup_s": measured.setup_s, "rpc_s": measured.rpc_s, "handoff_s": measured.handoff_s},
        "network": "loopback" if reason else "namespaces", "machine": machine,
        "seconds": figures.rounded(time.monotonic() - began)}
    say("agreement", found, argv, args.out)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.agreement", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="45 s of the trace")
    parser.add_argument("--trace", default="azure_code_2023", help="as for `blitzjax sim` (default: %(default)s)")
    parser.add_argument("--start-s", type=float, default=300.0, help="of the window (default 300)")
    parser.add_argument("--duration-s", type=float, default=100.0, help="of the window (default 100)")
    parser.add_argument("--shrink", type=int, default=16, help="divides prompts and answers (default 16)")
    parser.add_argument("--load", type=float, default=0.15, help="mean rate over that of two instances (default 0.15)")
    parser.add_argument("--live", choices=tuple(_SYSTEMS), default="zigzag", help="while loading (default zigzag)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
