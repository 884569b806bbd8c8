"""How long from nothing to the first token, when everything was compiled before?

A whole cluster starts, all its processes, with 1 and with 2 instances of SmolLM2-135M (bfloat16), a core each; every
executable comes from the cache. Once all instances serve, each gets one request. Seconds from the start to the last of
the first tokens, and the CPU time that the slowest worker and the controller took until then, which neighbours on a
machine change less. Goal: 3 s. Medians of rounds after one that warms up; last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import figures, prompts
from bench.result import say
from blitzjax import config as configs
from blitzjax.cli_serve import checkpoint
from blitzjax.serve.client import AsyncClient
from blitzjax.serve.local import LocalCluster

_MODEL = "smollm2-135m"
_PROMPT = 32  # tokens
_SEED = 90
_POLL_S = 0.01
_TIMEOUT_S = 300.0


def measure(rounds: int, source: str) -> dict[str, object]:
    directory = checkpoint(_MODEL, "bfloat16")
    prompt, = prompts.of_lengths(prompts.encoder(directory), [_PROMPT], _SEED)
    found: dict[str, object] = {}
    with asyncio.Runner() as runner:  # gRPC complains when there is another event loop after the first
        for instances in (1, 2):
            seen = [_start(runner, directory, instances, source, prompt) for _ in range(rounds + 1)][1:]
            found[f"instances_{instances}"] = {**figures.median_of(seen), "rounds": [row["first_token_s"] for row in seen]}
            print(f"  {instances} instance(s): {found[f'instances_{instances}']}", flush=True)
    return {**found, "source": source}


def _start(runner: asyncio.Runner, directory: Path, instances: int, source: str, prompt: prompts.Tokens
           ) -> dict[str, float]:
    config = configs.from_tables({
        "serve": {"port": 0},
        "scale": {"policy": "manual", "min_instances": instances, "max_instances": instances, "source": source},
        "cluster": {"pool": instances, "pin_cores": True, "threads": 1}})
    began = time.monotonic()
    with LocalCluster(config, directory) as cluster:
        ready, first = runner.run(_first_tokens(cluster.address, instances, prompt))
        workers = max(figures.cpu_s(cluster.worker_pid(k)) for k in range(instances))
        controller = figures.cpu_s(cluster.controller_pid())
    return figures.rounded_row({"ready_s": ready - began, "first_token_s": first - began, "worker_cpu_s": workers,
                                "controller_cpu_s": controller})


async def _first_tokens(address: str, instances: int, prompt: prompts.Tokens) -> tuple[float, float]:
    """When all instances served, and when each of as many requests had its first token."""
    async with AsyncClient(address) as client, asyncio.timeout(_TIMEOUT_S):
        while not await client.ready() or sum(
                i.phase == "serving" for i in (await client.status()).instances) < instances:
            await asyncio.sleep(_POLL_S)
        ready = time.monotonic()
        await asyncio.gather(*(client.generate(prompt, max_tokens=1, ignore_eos=True) for _ in range(instances)))
        return ready, time.monotonic()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.start", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--source", choices=("multicast", "disk"), default="multicast",
                        help="how a second instance gets the model: from the first one, or both read it at once")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    args = parser.parse_args(argv)
    say("start", measure(2 if args.quick else args.rounds, args.source), argv, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
