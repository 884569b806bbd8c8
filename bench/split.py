"""Prompts on some instances, decoding on others: right tokens, KV bytes, and what a burst feels while prefill grows.

The same burst, four times: on one mixed instance (the reference), on mixed instances that grow 2 → 3 at t=0, on
1 prefill + 1 decode, and on 1P+1D that grows to 2P+1D live at t=0. Greedy float32, real processes, SmolLM2-135M,
loopback. A difference that float32 rounding may decide is a near-tie, every other one a mismatch. Last line: one JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import figures, fleet, probe, prompts
from bench.figures import Difference, first_difference
from bench.result import say
from blitzjax.cli_serve import checkpoint
from blitzjax.serve.client import AsyncClient

_MODEL = "smollm2-135m"
_SEED = 5
_POOL = 3


@dataclass(frozen=True, slots=True)
class Size:
    prompts: int
    longest: int  # tokens of a prompt; the shortest has an eighth
    answer: int  # tokens


FULL, QUICK = Size(24, 384, 32), Size(8, 192, 12)


@dataclass(frozen=True, slots=True)
class Round:
    """One burst on instances that grow from `start` to `stop` at the same time."""

    name: str
    start: int
    stop: int


MIXED, SPLIT = (Round("mixed 1", 1, 1), Round("mixed 2→3", 2, 3)), (Round("1P+1D", 2, 2), Round("1P+1D→2P+1D", 2, 3))


def run(size: Size) -> dict[str, object]:
    directory = checkpoint(_MODEL, "float32")
    step = size.longest // 8
    lengths = [step + (size.longest - step) * i // (size.prompts - 1) for i in range(size.prompts)]
    asked = prompts.of_lengths(prompts.encoder(directory), lengths, _SEED)
    answers: dict[str, list[fleet.Answer]] = {}
    rows: dict[str, dict[str, float | int]] = {}
    for roles, rounds in (("mixed", MIXED), ("split", SPLIT)):
        tables: dict[str, dict[str, object]] = {
            "engine": {"dtype": "float32", "max_model_len": 512}, "scale": {"roles": roles}}
        with fleet.fleet(directory, _POOL, None, tables) as made:
            asyncio.run(_rounds(made.address, rounds, asked, size.answer, answers, rows))
    wrong = _against_reference(directory, asked, answers)
    return {"rounds": rows, "kv_bytes": sum(row["kv_bytes"] for row in rows.values()),
            "token_mismatches": sum(not d.near_tie for d in wrong), "near_ties": sum(d.near_tie for d in wrong),
            "failed": sum(a.result is None for given in answers.values() for a in given),
            "requests": sum(map(len, answers.values())), "prompt_tokens": sum(lengths), "answer_tokens": size.answer}


async def _rounds(address: str, rounds: Sequence[Round], asked: Sequence[prompts.Tokens], max_tokens: int,
                  answers: dict[str, list[fleet.Answer]], rows: dict[str, dict[str, float | int]]) -> None:
    async with AsyncClient(address) as client:
        for one in rounds:
            await fleet.settle(client, one.start)
            await fleet.ask(client, asked[0], 4)  # connections are up
            before = await _kv_bytes(client)
            tasks = [asyncio.create_task(fleet.ask(client, prompt, max_tokens)) for prompt in asked]
            await asyncio.sleep(0)  # the requests go out first
            grown = await client.scale(one.stop, live="zigzag", wait=True, timeout_s=120)
            answers[one.name] = list(await asyncio.gather(*tasks))
            rows[one.name] = _row(answers[one.name], await _kv_bytes(client) - before,
                                  grown.seconds if one.stop > one.start else 0.0)
            print(f"  {one.name:12} " + "  ".join(f"{k} {v:g}" for k, v in rows[one.name].items()), flush=True)


async def _kv_bytes(client: AsyncClient) -> int:
    return sum(i.kv_received_bytes for i in (await client.status()).instances)


def _row(given: Sequence[fleet.Answer], kv_bytes: int, scale_up_s: float) -> dict[str, float | int]:
    """Times of the answers that came. `gap` is between two tokens of an answer."""
    results = [a.result for a in given if a.result is not None]
    gaps = [b - a for r in results for a, b in zip(r.token_times_s, r.token_times_s[1:])]
    times = {**figures.ttft([r.ttft_s for r in results]), "gap_p50_s": statistics.median(gaps),
             "gap_p95_s": figures.percentile(gaps, 95), "scale_up_s": scale_up_s}
    return {**figures.rounded_row(times), "kv_bytes": kv_bytes,
            "helped_requests": sum(r.usage.layers_helped > 0 for r in results),
            "attempts": sum(r.usage.attempts for r in results)}


def _against_reference(directory: Path, asked: Sequence[prompts.Tokens], answers: dict[str, list[fleet.Answer]]
                       ) -> list[Difference]:
    """Where an answer leaves the mixed instance's, with the margin that the reference had there."""
    reference = [a.tokens for a in answers[MIXED[0].name]]
    found = []
    for name, given in answers.items():
        for i, answer in enumerate(given):
            step = first_difference(reference[i], answer.tokens) if answer.result is not None else None
            if step is not None:
                found.append((name, i, step))
    margins = probe.margins(directory, [asked[i] + reference[i][:step] for _, i, step in found]) if found else []
    out = []
    for (name, i, step), margin in zip(found, margins, strict=True):
        expected, got = reference[i][step : step + 4], answers[name][i].tokens[step : step + 4]
        out.append(Difference(i, step, expected, got, margin if expected and got else None))
        print(f"  {name}, prompt {i} step {step}: {got} instead of {expected}, margin {margin:.2e}")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.split", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small burst, about a minute")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file as well")
    args = parser.parse_args(argv)
    began, machine = time.monotonic(), figures.machine()
    print(f"{_MODEL} on {machine}, loopback")
    result = run(QUICK if args.quick else FULL)
    result |= {"model": _MODEL, "quick": args.quick, "machine": machine,
               "seconds": figures.rounded(time.monotonic() - began)}
    say("split", result, argv, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
