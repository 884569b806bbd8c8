"""Does live scaling beat stop-the-world? A burst of long prompts at t=0 and with it a scale-up 1 → 2, in every mode.

One core per instance; a link so slow that a layer's load takes about five times its compute for one prompt. The modes
take turns on one cluster, in another order each round.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from bench import figures, fleet, probe, prompts
from blitzjax.serve.client import AsyncClient
from blitzjax.types import LiveMode

Mode: TypeAlias = LiveMode | Literal["none"]
MODES: tuple[Mode, ...] = ("zigzag", "off", "best_effort", "none")
_MAX_TOKENS = 4
_SEED = 3


@dataclass(frozen=True, slots=True)
class Load:
    """`count` prompts of `tokens` tokens at once; `ratio` is one layer's load over its compute for one prompt."""

    dtype: str
    count: int
    tokens: int
    ratio: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What `load` means on this machine: `rate_mbit` of the links makes its ratio; None is loopback, without a limit."""

    load: Load
    sizes: probe.Sizes
    layer_s: float
    rate_mbit: int | None

    @property
    def tables(self) -> dict[str, dict[str, object]]:
        """Configuration of the cluster: a prompt is one chunk, and the whole burst may wait on one instance."""
        load = self.load
        return {"engine": {"dtype": load.dtype, "max_model_len": 2 * load.tokens, "max_num_seqs": 32,
                           "max_num_batched_tokens": load.tokens},
                "scale": {"live_queue_tokens": 2 * load.count * load.tokens}}

    @property
    def ideal(self) -> figures.Ideal:
        embed = self.sizes.embed_bytes / self.sizes.layer_bytes * self.load.ratio
        return figures.Ideal(self.sizes.layers, self.load.ratio, self.load.count, embed)


def plan(checkpoint: Path, load: Load, limited: bool) -> Plan:
    """Measures a layer's compute first; `limited`: there will be links whose rate can be chosen."""
    sizes, layer_s = probe.sizes(checkpoint), probe.layer_s(checkpoint, load.dtype, load.tokens)
    rate = max(1, round(sizes.layer_bytes * 8 / (load.ratio * layer_s) / 1e6)) if limited else None
    link = f"links at {rate} Mbit/s load it in {sizes.layer_bytes * 8e-3 / rate:.0f} ms" if rate else "loopback, no limit"
    print(f"One layer: compute {layer_s * 1e3:.1f} ms for {load.tokens} tokens on one core, "
          f"{sizes.layer_bytes / 1e6:.1f} MB; {link}", flush=True)
    return Plan(load, sizes, layer_s, rate)


def measure(address: str, checkpoint: Path, planned: Plan, rounds: int) -> dict[str, object]:
    """On a cluster of two workers with the plan's links and tables, one of them serving."""
    load = planned.load
    print(f"Live against stop-the-world: {load.count} prompts of {load.tokens} tokens, scale-up 1→2", flush=True)
    seen = asyncio.run(_rounds(address, checkpoint, rounds, load))
    modes = {mode: figures.median_of(rows) for mode, rows in seen.items()}
    ideals = figures.ideal_table(planned.ideal, planned.layer_s, MODES)
    _print(modes, ideals)
    return {"modes": modes, "requests": rounds * load.count * len(MODES), "live": {
        "ratios": figures.ratios(modes), "ideal": ideals, "ideal_ratios": figures.ratios(ideals),
        "rounds": {mode: [figures.rounded_row(row) for row in rows] for mode, rows in seen.items()},
        "layer_compute_ms": figures.rounded(planned.layer_s * 1e3), "link_mbit": planned.rate_mbit,
        "layer_load_over_compute": load.ratio if planned.rate_mbit else None,
        "prompts": load.count, "prompt_tokens": load.tokens}}


async def _rounds(address: str, checkpoint: Path, rounds: int, load: Load
                  ) -> dict[str, list[dict[str, float | None]]]:
    encode = prompts.encoder(checkpoint)
    seen: dict[str, list[dict[str, float | None]]] = {mode: [] for mode in MODES}
    async with AsyncClient(address) as client, fleet.watching(address) as watch:
        for mode in MODES[1::-1]:  # warm-up: both workers' caches have grown once, connections are up
            await _burst(client, watch, mode, prompts.of_lengths(encode, [load.tokens] * load.count, _SEED - 1))
            await fleet.settle(client, 1)
        for k in range(rounds):
            for mode in MODES[k % len(MODES):] + MODES[:k % len(MODES)]:
                burst = prompts.of_lengths(encode, [load.tokens] * load.count, _SEED + k)
                row = await _burst(client, watch, mode, burst)
                seen[mode].append(row)
                joint = row["layers_at_first_joint_token"]
                print(f"  round {k + 1} {mode:12} TTFT mean {row['ttft_mean_s']:6.2f} s  p95 {row['ttft_p95_s']:6.2f} s  "
                      f"scale-up {row['scale_up_s'] or 0:5.2f} s  helped {row['helped_requests']:2.0f}"
                      + (f"  first joint token at {joint:.0f} layers" if joint is not None else ""), flush=True)
    return seen


async def _burst(client: AsyncClient, watch: fleet.Watch, mode: Mode, burst: Sequence[prompts.Tokens]
                 ) -> dict[str, float | None]:
    await fleet.settle(client, 1)
    new = [i.id for i in (await client.status()).instances if i.phase == "idle"]
    began = time.monotonic()
    asked = [asyncio.create_task(fleet.ask(client, prompt, _MAX_TOKENS)) for prompt in burst]
    await asyncio.sleep(0)  # the requests go out first
    if mode != "none":
        await client.scale(2, live=mode, source="multicast")
    answers = await asyncio.gather(*asked)
    if mode != "none":
        await client.scale(2, wait=True, timeout_s=60)
    if failed := [a.error for a in answers if a.result is None]:
        raise SystemExit(f"{len(failed)} requests failed in mode {mode}: {failed[0]}")
    helped = [a for a in answers if a.whole.usage.layers_helped > 0]
    await asyncio.sleep(0.1)  # the last picture arrives
    serving = watch.first(2, began)
    joint = min((a.first_token_s for a in helped), default=None)
    return {
        **figures.ttft([a.first_token_s - began for a in answers]),
        "scale_up_s": None if mode == "none" or serving is None else serving - began,
        "layers_at_first_joint_token": None if joint is None else watch.at(joint).layers(new),
        "helped_requests": len(helped),
        "layers_helped": statistics.fmean([a.whole.usage.layers_helped for a in helped]) if helped else 0.0,
        "makespan_s": max(a.sent_s + a.whole.total_s for a in answers) - began}


def _print(modes: dict[str, dict[str, float | None]], ideals: dict[str, dict[str, float | None]]) -> None:
    """Measured beside ideal."""
    print(f"\n  {'':12} {'TTFT mean':>20} {'TTFT p95':>20} {'first joint token':>20} {'scale-up':>9}")
    print(f"  {'':12} {'measured':>10}{'ideal':>10} {'measured':>10}{'ideal':>10} {'measured':>10}{'ideal':>10}")
    for mode, row in modes.items():
        ideal, cells = ideals[mode], []
        for key in ("ttft_mean_s", "ttft_p95_s", "layers_at_first_joint_token"):
            unit = "s" if key.endswith("_s") else "L"
            cells.append("".join(f"{'–' if v is None else f'{v:.2f} s' if unit == 's' else f'{v:.0f} layers':>10}"
                                 for v in (row[key], ideal[key])))
        up = "–" if row["scale_up_s"] is None else f"{row['scale_up_s']:.2f} s"
        print(f"  {mode:12} {cells[0]} {cells[1]} {cells[2]} {up:>9}")
    for name, of in (("measured", modes), ("ideal", ideals)):
        print(f"  {name:9}" + ", ".join(f"{k} {v:.2f}" for k, v in figures.ratios(of).items()))
    print()
