"""Does live scale-up work, help, and leave others alone? Right tokens, TTFT against three baselines, TPOT, readiness.

    tokens  greedy answers during scale-ups equal one instance's
    live    a burst and a scale-up 1 → 2 at t=0: ZigZag, best effort, stop-the-world, no scaling, side by side
    tpot    time per output token on the source during a broadcast over 1 Gbit/s links, over that before it
    ready   Scale command to first layer usable, less the transfer of that layer

Real processes and real weights (SmolLM2-135M); hosts are network namespaces on rate-limited links, one core pinned per
instance. Without root everything runs on loopback, which the result says. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import burst, decoding, figures, fleet, netns, probe, readiness, same_tokens
from bench.result import say
from blitzjax.cli_serve import checkpoint

PARTS = ("tokens", "live", "tpot", "ready")
_MODEL = "smollm2-135m"
_DTYPE = "bfloat16"
_LINK_MBIT = 1000  # of the parts tpot and ready
_CONTEXT = 512  # tokens, of part tpot


@dataclass(frozen=True, slots=True)
class Size:
    """How much is run."""

    rounds: int
    token_prompts: int
    token_length: int
    token_link_mbit: int
    scale_ups: tuple[same_tokens.ScaleUp, ...]
    burst: int
    burst_tokens: int
    one_cluster: bool  # parts live, tpot and ready share one, and its links


def full(rounds: int) -> Size:
    return Size(rounds, 64, 16, 1000, same_tokens.ALL, 24, 512, False)


QUICK = Size(1, 6, 8, 2500, same_tokens.FEW, 6, 128, True)


def run(parts: Sequence[str], size: Size, load_ratio: float, token_dtype: str, limited: bool) -> dict[str, object]:
    """Keys of parts that were not asked for stay null."""
    result: dict[str, object] = {"modes": None, "tpot_p50_ratio": None, "ready_ms": None, "token_mismatches": None}
    found: list[dict[str, Any]] = []
    if "tokens" in parts:
        rate = size.token_link_mbit if limited else None
        found.append(same_tokens.measure(checkpoint(_MODEL, "float32"), token_dtype, size.scale_ups,
                                         size.token_prompts, size.token_length, rate))
    if set(parts) - {"tokens"}:
        found += _pairs(parts, size, load_ratio, limited)
    for one in found:
        result |= one
    return result | {"requests": sum(one.get("requests", 0) for one in found)}


def _pairs(parts: Sequence[str], size: Size, load_ratio: float, limited: bool) -> list[dict[str, object]]:
    """Parts live, tpot and ready: clusters of two workers."""
    directory, found = checkpoint(_MODEL, _DTYPE), []
    planned = None
    if "live" in parts:
        planned = burst.plan(directory, burst.Load(_DTYPE, size.burst, size.burst_tokens, load_ratio), limited)
    if planned is None or not size.one_cluster:
        tables = {"engine": {"dtype": _DTYPE, "max_model_len": _CONTEXT}}
        with fleet.fleet(directory, 2, _LINK_MBIT if limited else None, tables) as made:
            found += _steady(made, parts, size.rounds, _CONTEXT)
    if planned is not None:
        with fleet.fleet(directory, 2, planned.rate_mbit, planned.tables) as made:
            if size.one_cluster:
                found += _steady(made, parts, size.rounds, 2 * size.burst_tokens)
            found.append(burst.measure(made.address, directory, planned, size.rounds))
    return found


def _steady(made: fleet.Fleet, parts: Sequence[str], rounds: int, context: int) -> list[dict[str, object]]:
    """Parts ready and tpot. Ready comes first: the very first scale-up of a cluster counts."""
    found, directory = [], checkpoint(_MODEL, _DTYPE)
    if "ready" in parts:
        print("Ready: Scale command to first layer usable, less the transfer of that layer", flush=True)
        asyncio.run(readiness.exercise(made.address, rounds))
        found.append(readiness.report(made.event_log, rounds, probe.sizes(directory)))
    if "tpot" in parts:
        print("Time per output token on the source of a broadcast", flush=True)
        found.append(asyncio.run(decoding.measure(made, directory, rounds, context)))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scale_up", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small round of everything, about a minute")
    parser.add_argument("--rounds", type=int, default=5, help="of the parts live, tpot and ready (default 5)")
    parser.add_argument("--dtype", default="float32", help="part tokens: what the engine computes in (default float32)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--load-ratio", type=float, default=5.0, help="part live: load over compute of a layer")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    began, machine, reason = time.monotonic(), figures.machine(), netns.missing()
    print(f"{_MODEL} on {machine}")
    print(f"No network namespaces here ({reason}): loopback, without link rates" if reason else
          "One network namespace per worker, links rate-limited with tc tbf")
    result = run(parts, QUICK if args.quick else full(args.rounds), args.load_ratio, args.dtype, limited=not reason)
    result |= {"model": _MODEL, "rounds": 1 if args.quick else args.rounds, "quick": args.quick,
               "network": "loopback" if reason else "namespaces", "machine": machine,
               "seconds": figures.rounded(time.monotonic() - began)}
    say("scale_up", result, argv, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
