"""Does live scale-up work, help, and leave others alone? Right tokens, TTFT against three baselines, TPOT, readiness.

    tokens  greedy float32 answers during scale-ups equal one instance's
    live    a burst and a scale-up 1 → 2 at t=0: ZigZag, best effort, stop-the-world, no scaling, side by side
    tpot    time per output token on the source during a broadcast over 1 Gbit/s links, over that before it
    ready   Scale command to first layer usable, less the transfer of embedding and first layer

Real processes and real weights (SmolLM2-135M); hosts are network namespaces on rate-limited links, one core pinned per
instance. Without root everything runs on loopback, which the result says. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import burst, decoding, figures, fleet, netns, probe, readiness, same_tokens
from blitzjax.cli_serve import checkpoint

PARTS = ("tokens", "live", "tpot", "ready")
_MODEL = "smollm2-135m"
_DTYPE = "bfloat16"
_LINK_MBIT = 1000


@dataclass(frozen=True, slots=True)
class Size:
    """How much is run."""

    rounds: int
    token_prompts: int
    token_length: int
    scale_ups: tuple[same_tokens.ScaleUp, ...]
    burst: int
    burst_tokens: int
    load_ratio: float


def full(rounds: int, load_ratio: float) -> Size:
    return Size(rounds, 64, 16, same_tokens.ALL, 24, 512, load_ratio)


def quick(load_ratio: float) -> Size:
    return Size(1, 12, 8, same_tokens.FEW, 12, 128, load_ratio)


def run(parts: Sequence[str], size: Size, limited: bool) -> dict[str, object]:
    """The result so far as parts that were not asked for leave their keys null."""
    result: dict[str, object] = {"modes": None, "tpot_p50_ratio": None, "ready_ms": None, "token_mismatches": None}
    requests = 0
    rate = _LINK_MBIT if limited else None
    if "tokens" in parts:
        print(f"Right tokens: {size.token_prompts} prompts at random moments of each scale-up", flush=True)
        found = same_tokens.measure(checkpoint(_MODEL, "float32"), size.scale_ups, size.token_prompts, size.token_length, rate)
        requests += found.pop("requests")
        result |= found
    if "live" in parts:
        print(f"Live against stop-the-world: {size.burst} prompts of {size.burst_tokens} tokens, scale-up 1→2", flush=True)
        found = burst.measure(checkpoint(_MODEL, _DTYPE), burst.Load(_DTYPE, size.burst, size.burst_tokens, size.load_ratio),
                              size.rounds, limited)
        requests += found.pop("requests")
        result["modes"] = found.pop("modes")
        result["live"] = found
    if {"tpot", "ready"} & set(parts):
        found = steady(parts, size.rounds, rate)
        requests += found.pop("requests")
        result |= found
    return result | {"requests": requests}


def steady(parts: Sequence[str], rounds: int, rate_mbit: int | None) -> dict[str, object]:
    """Parts tpot and ready, on one cluster whose very first scale-up is measured too."""
    directory, result = checkpoint(_MODEL, _DTYPE), {"requests": 0}
    tables = {"engine": {"dtype": _DTYPE, "max_model_len": decoding.CONTEXT}}
    ready_rounds = max(2, rounds) if "ready" in parts else 0
    with fleet.fleet(directory, 2, rate_mbit, tables) as made:
        if ready_rounds:
            print("Ready: Scale command to first layer usable, less the transfer of embedding and first layer", flush=True)
            asyncio.run(readiness.exercise(made.address, ready_rounds))
        if "tpot" in parts:
            print("Time per output token on the source of a broadcast", flush=True)
            result |= asyncio.run(decoding.measure(made.address, directory, rounds))
            result |= readiness.report(made.event_log, ready_rounds, probe.sizes(directory))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scale_up", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small round of everything, about a minute")
    parser.add_argument("--rounds", type=int, default=5, help="of the parts live, tpot and ready (default 5)")
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
    result = run(parts, quick(args.load_ratio) if args.quick else full(args.rounds, args.load_ratio), limited=not reason)
    result |= {"command": " ".join(["python -m bench.scale_up", *(sys.argv[1:] if argv is None else argv)]),
               "model": _MODEL, "rounds": 1 if args.quick else args.rounds, "quick": args.quick,
               "network": "loopback" if reason else "namespaces", "machine": machine,
               "seconds": figures.rounded(time.monotonic() - began)}
    text = json.dumps(result)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
