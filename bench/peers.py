"""Is blitzjax as fast as what people would use instead? The same prompts through it and its peers, side by side.

    blitzjax-1x2  one instance on two cores, over gRPC
    blitzjax-2x1  two instances, each pinned to a core, over gRPC
    llama.cpp     its server, over HTTP; built once from the sources that llama-cpp-python ships (cmake, C++ compiler)
    vllm          vLLM's CPU build, `vllm serve`, over HTTP
    transformers  `transformers serve` with continuous batching, over HTTP
    openvino      OpenVINO GenAI's continuous batching in process, without any server

SmolLM2-135M, the same weights in bfloat16 for all, 128 tokens in, 64 out, greedy. In each round every peer starts, is
asked once (start to first token), warms up, answers 1, 8 and 16 streams at once, and stops; rounds turn the order.
What has to be installed goes to --dir, once. Tokens per CPU second, over all of a peer's processes, depend less on who
else uses the machine than tokens per second. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import figures, prompts
from bench.peer import Answer, Peer
from bench.peer_servers import PEERS
from bench.result import say
from blitzjax.cli_serve import checkpoint
from blitzjax.engine.locations import default_cache

_MODEL = "smollm2-135m"
_PROMPT_TOKENS = 128
_MAX_TOKENS = 64
_STREAMS = (1, 8, 16)
_SEED = 11


async def measure(peer: Peer, encode, rounds_seed: int) -> dict[str, float | None]:
    """One life of `peer`."""
    began = time.monotonic()
    async with peer.started():
        (first,) = await peer.answer(prompts.of_lengths(encode, [_PROMPT_TOKENS], _SEED - 1), 1)
        row: dict[str, float | None] = {"first_token_s": (first.first_s or first.last_s) - began}
        await peer.answer(prompts.of_lengths(encode, [_PROMPT_TOKENS] * max(_STREAMS), _SEED - 2), _MAX_TOKENS)
        for streams in _STREAMS:
            asked = prompts.of_lengths(encode, [_PROMPT_TOKENS] * streams, rounds_seed * 100 + streams)
            before = peer.cpu_s()
            row |= _figures(streams, await peer.answer(asked, _MAX_TOKENS))
            row[f"tokens_per_cpu_s_{streams}"] = streams * _MAX_TOKENS / (peer.cpu_s() - before)
        row["peak_rss_mb"] = peer.peak_rss_mb()
    return row


def _figures(streams: int, answers: Sequence[Answer]) -> dict[str, float | None]:
    if wrong := [a.tokens for a in answers if a.tokens != _MAX_TOKENS]:
        raise SystemExit(f"{len(wrong)} answers do not have {_MAX_TOKENS} tokens but {wrong[0]}")
    took = max(a.last_s for a in answers) - min(a.sent_s for a in answers)
    ttft = [a.first_s - a.sent_s for a in answers if a.first_s is not None]
    return {f"tokens_per_s_{streams}": streams * _MAX_TOKENS / took,
            f"ttft_p50_s_{streams}": statistics.median(ttft) if ttft else None}


def goals(peers: dict[str, dict[str, float | None]]) -> dict[str, float]:
    """Ratios of the better of our two layouts to the peers that were run."""
    ours = [row for name, row in peers.items() if name.startswith("blitzjax")]
    out: dict[str, float] = {}
    if not ours:
        return out
    for name in peers.keys() - {peer for peer in peers if peer.startswith("blitzjax")}:
        for streams in _STREAMS:
            for key in (f"tokens_per_s_{streams}", f"tokens_per_cpu_s_{streams}"):
                if theirs := peers[name][key]:
                    best = max(value for row in ours if (value := row[key]) is not None)
                    out[f"{key} over {name}"] = figures.rounded(best / theirs)
    return dict(sorted(out.items()))


def _print(peers: dict[str, dict[str, float | None]]) -> None:
    print(f"\n  {'':13}" + "".join(f"{f'{s} streams':>18}" for s in _STREAMS) + f"{'first token':>13}{'peak RSS':>11}")
    for name, row in peers.items():
        cells = []
        for s in _STREAMS:
            ttft = row[f"ttft_p50_s_{s}"]
            cells.append(f"{row[f'tokens_per_s_{s}']:.0f} tok/s {'' if ttft is None else f'{ttft:.2f} s':>6}")
        print(f"  {name:13}" + "".join(f"{c:>18}" for c in cells)
              + f"{row['first_token_s']:>11.1f} s{row['peak_rss_mb']:>8.0f} MB")
    print(flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=default_cache() / "peers", help="peers live here (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    args = parser.parse_args(argv)
    names = args.peers.split(",")
    if unknown := set(names) - PEERS.keys():
        parser.error(f"unknown peers {', '.join(sorted(unknown))}; peers are {', '.join(PEERS)}")
    rounds, machine = 1 if args.quick else args.rounds, figures.machine()
    print(f"{_MODEL} on {machine}: {_PROMPT_TOKENS} tokens in, {_MAX_TOKENS} out", flush=True)
    directory = checkpoint(_MODEL, "bfloat16")
    encode = prompts.encoder(directory)
    peers = {name: PEERS[name](directory, args.dir) for name in names}
    for peer in peers.values():
        peer.install()
    seen: dict[str, list[dict[str, float | None]]] = {name: [] for name in names}
    with asyncio.Runner() as runner:  # gRPC complains when there is another event loop after the first
        for k in range(rounds):
            for name in names[k % len(names):] + names[:k % len(names)]:
                row = runner.run(measure(peers[name], encode, k + 1))
                row["load"] = os.getloadavg()[0]
                seen[name].append(row)
                print(f"  round {k + 1} {name:13}" + "".join(
                    f"  {row[f'tokens_per_s_{s}']:4.0f} ({row[f'tokens_per_cpu_s_{s}']:.0f}/CPU s)" for s in _STREAMS)
                    + f"  first {row['first_token_s']:.2f} s, load {row['load']:.1f}", flush=True)
    medians = {name: figures.median_of(rows) for name, rows in seen.items()}
    _print(medians)
    versions = {name: peer.version for name, peer in peers.items()}
    result = {"peers": medians, "best_of_ours_over": goals(medians), "versions": versions,
              "rounds": rounds, "model": _MODEL, "prompt_tokens": _PROMPT_TOKENS, "max_tokens": _MAX_TOKENS,
              "machine": machine, "all": {n: [figures.rounded_row(r) for r in rows] for n, rows in seen.items()}}
    say("peers", result, argv, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
