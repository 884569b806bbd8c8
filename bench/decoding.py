"""Is anybody disturbed? Time per output token of requests that decode on the source, before and during a broadcast.

Both windows are of the same answers, seconds apart, within one KV bucket, so that the step itself does not change. The
ratio is of medians over all gaps between tokens, as the client sees them.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from bench import figures, fleet, prompts
from blitzjax.errors import BlitzError
from blitzjax.serve.client import AsyncClient

_STREAMS = 4
_BEYOND_HALF_TOKENS = 4
_BEFORE_S = 2.0
_STARTED_TOKENS = 3
_TIMEOUT_S = 60.0
_SEED = 4


async def measure(made: fleet.Fleet, checkpoint: Path, rounds: int, context: int) -> dict[str, object]:
    """Wants an idle cluster of two workers, one of them serving.

    Prompts fill just over half of `context`, a power of two, so that all answers stay in its KV bucket.
    """
    encode = prompts.encoder(checkpoint)
    seen = []
    async with AsyncClient(made.address) as client, fleet.watching(made.address) as watch:
        for k in range(rounds):
            await fleet.settle(client, 1)
            made.spare(next(i.id for i in (await client.status()).instances if i.phase == "serving"))
            asked = prompts.of_lengths(encode, [context // 2 + _BEYOND_HALF_TOKENS] * _STREAMS, _SEED + k)
            before, during = await _round(client, watch, asked, context)
            seen.append({"before_ms": statistics.median(before) * 1e3, "during_ms": statistics.median(during) * 1e3,
                         "ratio": statistics.median(during) / statistics.median(before),
                         "p95_ratio": figures.percentile(during, 95) / figures.percentile(before, 95)})
            print("  round {}: TPOT p50 {before_ms:.1f} ms before, {during_ms:.1f} ms during the broadcast: {ratio:.3f} "
                  "(p95: {p95_ratio:.3f}; ".format(k + 1, **seen[-1]) + f"{len(before)} and {len(during)} gaps)", flush=True)
    middle = figures.median_of(seen)
    return {"tpot_p50_ratio": middle["ratio"], "tpot": middle | {
        "streams": _STREAMS, "rounds": [figures.rounded(row["ratio"]) for row in seen]}, "requests": rounds * _STREAMS}


async def _round(client: AsyncClient, watch: fleet.Watch, asked: Sequence[prompts.Tokens], context: int
                 ) -> tuple[list[float], list[float]]:
    """Gaps between tokens before and during the broadcast, of all answers."""
    times: list[list[float]] = [[] for _ in asked]
    streams = [asyncio.create_task(_decode(client, prompt, context - len(prompt), arrived))
               for prompt, arrived in zip(asked, times, strict=True)]
    try:
        await _until(lambda: all(len(arrived) >= _STARTED_TOKENS for arrived in times))
        began = time.monotonic()
        await asyncio.sleep(_BEFORE_S)
        broadcast = time.monotonic()
        await client.scale(2, source="multicast")
        await _until(lambda: watch.first(2, broadcast) is not None)
        ended = watch.first(2, broadcast)
        assert ended is not None
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return gaps(times, began, broadcast), gaps(times, broadcast, ended)


def gaps(times: Sequence[Sequence[float]], start: float, stop: float) -> list[float]:
    """Gaps between neighbouring tokens of one answer that both came in [start, stop)."""
    return [b - a for arrived in times for a, b in zip(arrived, arrived[1:], strict=False) if start <= a and b < stop]


async def _decode(client: AsyncClient, prompt: Sequence[int], max_tokens: int, arrived: list[float]) -> None:
    """Appends the arrival time of every token."""
    with contextlib.suppress(BlitzError):
        async for chunk in client.stream(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True):
            arrived.extend([time.monotonic()] * len(chunk.token_ids))


async def _until(true) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened for {_TIMEOUT_S:g} s")
        await asyncio.sleep(0.005)
