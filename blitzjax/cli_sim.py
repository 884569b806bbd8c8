"""`blitzjax sim`: the same trace through several systems, in virtual time; a table, and a report to look at."""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from blitzjax import arrivals
from blitzjax.arrivals import Arrival
from blitzjax.config import ScaleConfig
from blitzjax.errors import ConfigError
from blitzjax.sim import costs, report, shell
from blitzjax.sim.costs import ModelCosts
from blitzjax.sim.systems import SYSTEMS

_MOST_LOAD = 100  # times what all instances can serve
_LONGEST_PROMPT = 4095  # tokens; the paper's client cuts longer ones. Of a short context half is for answers


def sim(args: argparse.Namespace) -> int:
    if args.list:
        return _list()
    if not (args.duration_s > 0 and 0 < args.load <= _MOST_LOAD):
        raise ConfigError(f"--duration-s and --load must be above 0, --load at most {_MOST_LOAD}")
    if not (args.zero_after_s >= 0 and args.down_after_s >= 0):
        raise ConfigError("--zero-after-s and --down-after-s must be at least 0")
    if args.out:  # found out before the minutes that it takes
        check_writable(args.out)
    machine, model = costs.read(args.costs) if args.costs else (
        _named(costs.MACHINES, args.machine, "machine"), _named(costs.MODELS, args.model, "model"))
    most = machine.hosts * (machine.gpus // model.tensor_parallel)
    instances = most if args.instances is None else args.instances
    if instances > most:  # a larger cluster of the same kind
        machine = replace(machine, hosts=-(-instances // (machine.gpus // model.tensor_parallel)))
    setups = [shell.Setup(machine, model, _named(SYSTEMS, name, "system"), instances, args.begin, args.down_after_s,
                          roles=args.roles, scale=ScaleConfig(zero_after_s=args.zero_after_s), models=args.models)
              for name in args.systems.split(",")]
    _check_begin(args, setups)
    longest = min(_LONGEST_PROMPT, model.spec.max_len // 2)
    trace = arrivals.truncate(arrivals.window(arrivals.read(arrivals.find(args.trace)), args.start_s, args.duration_s),
                              longest, model.spec.max_len - longest)
    if not trace:
        raise ConfigError(f"no requests in the {args.duration_s:g} s from second {args.start_s:g} of {args.trace}")
    factor = scale_factor(trace, model, instances, args.load)
    trace = arrivals.deal(trace, args.models, args.seed)
    if sys.implementation.name == "cpython":  # elsewhere memory comes back no other way
        gc.disable()  # what a request leaves behind holds no cycles; looking for some takes a tenth of the time
    try:
        outcomes = [_run(setup, trace, factor, args.seed) for setup in setups]
    finally:
        gc.enable()
    rows = report.table(outcomes)
    print(report.to_text(rows))
    if args.begin == 0:
        print(f"requests that found no instance of their model, mean TTFT: {report.cold(outcomes)}")
    if args.out is not None:
        said = {"trace": args.trace, "start": f"{args.start_s:g} s", "model": model.spec.name, "machine": machine.name,
                "instances": instances, "roles": args.roles, "scaled by": f"{factor:.3g}", "seed": args.seed}
        if args.models > 1:
            said["models"] = args.models
        (args.out / "report.html").write_text(report.to_html(outcomes, said), "utf-8")
        (args.out / "report.json").write_text(report.to_json(outcomes, said), "utf-8")
        (args.out / "table.csv").write_text(report.to_csv(rows), "utf-8")
        print(f"wrote {args.out / 'report.html'}, report.json, table.csv")
    return 0


def check_writable(directory: Path) -> None:
    """Makes it, if need be. Raises ConfigError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as e:
        raise ConfigError(f"cannot write to {directory}: {e.strerror}") from e


def _check_begin(args: argparse.Namespace, setups: list[shell.Setup]) -> None:
    if args.begin < 0 or args.models < 1:
        raise ConfigError("--begin must be 0 or more, --models 1 or more")
    if args.begin == 0 and args.roles == "split":
        raise ConfigError("--begin 0 needs mixed roles: with split ones, one instance decodes all the time")
    for setup in setups:
        share = setup.system.share
        if share and share < 1 and setup.serving * setup.models >= setup.instances:
            raise ConfigError(f"{setup.system.name} would serve with all of {setup.instances} instances; it takes more")
        if setup.serving * setup.models > setup.instances:
            raise ConfigError(f"{setup.system.name} begins with {setup.serving} instances of each of {setup.models} "
                              f"models, more than {setup.instances}")


def scale_factor(trace: list[Arrival], model: ModelCosts, instances: int, load: float) -> float:
    """How often each arrival is repeated, so that the mean rate is `load` of what all instances can serve."""
    prompt = sum(a.prompt_tokens for a in trace) / len(trace)
    answer = sum(a.answer_tokens for a in trace) / len(trace)
    capacity = instances / model.seconds_per_request(prompt, answer)
    return load * capacity * max(trace[-1].at, 1.0) / len(trace)


def _run(setup: shell.Setup, trace: list[Arrival], factor: float, seed: int):
    started = time.monotonic()

    def progress(at_s: float, ended: int) -> None:
        if sys.stderr.isatty():
            print(f"{setup.system.name}: {at_s / 60:.0f} min, {ended} requests, {time.monotonic() - started:.0f} s",
                  end="\r", file=sys.stderr, flush=True)

    outcome = shell.simulate(setup, arrivals.scale(trace, factor, seed), progress)
    if not outcome.ended:
        raise ConfigError(f"{factor:.3g} times the trace's {len(trace)} requests are none: give a higher --load")
    print(f"{setup.system.name}: {outcome.end_s:.0f} s of virtual time, {outcome.ended} requests, "
          f"{time.monotonic() - started:.1f} s", file=sys.stderr)
    return outcome


def _named(rows, name: str, kind: str):
    if name not in rows:
        raise ConfigError(f"no {kind} {name!r}; there are {', '.join(rows)}")
    return rows[name]


def _list() -> int:
    for system in SYSTEMS.values():
        print(f"system   {system.name:18} {system.text}")
    for model in costs.MODELS.values():
        print(f"model    {model.spec.name:18} {model.param_bytes / 1e9:.1f} GB on {model.tensor_parallel} GPUs")
    for machine in costs.MACHINES.values():
        print(f"machine  {machine.name:18} {machine.hosts} hosts of {machine.gpus} GPUs, {machine.nic_gbps:g} Gbps")
    return 0
