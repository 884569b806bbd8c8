"""Are the tokens right while instances come and go? Greedy answers during scale-ups against one instance's.

The reference answers are asked one by one of the same cluster before it scales. A difference at a step that float32
rounding may decide (see figures.NEAR_TIE_MARGIN) is a near-tie; every other one is a mismatch. Both are printed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import fleet, probe, prompts
from bench.figures import Difference, first_difference
from blitzjax.serve.client import AsyncClient
from blitzjax.types import LiveMode, Source

_SEED = 1


@dataclass(frozen=True, slots=True)
class ScaleUp:
    start: int
    stop: int
    live: LiveMode
    source: Source = "multicast"

    @property
    def mode(self) -> str:
        return self.live if self.source == "multicast" else self.source

    def __str__(self) -> str:
        return f"{self.start}→{self.stop} {self.mode}"


ALL = tuple(ScaleUp(*sizes, live) for live in ("zigzag", "best_effort", "off") for sizes in ((1, 2), (1, 3), (2, 4))
            ) + (ScaleUp(1, 3, "zigzag", "disk"),)
FEW = (ScaleUp(1, 2, "zigzag"), ScaleUp(1, 2, "zigzag", "disk"))


@dataclass(frozen=True, slots=True)
class Trial:
    """One scale-up under load. `differences` are against the reference, in order of prompts."""

    scale_up: ScaleUp
    requests: int
    helped: int  # a loading instance ran some of the prompt's layers
    seconds: float  # until every instance served
    differences: tuple[Difference, ...]
    errors: tuple[str, ...]


def measure(checkpoint: Path, dtype: str, scale_ups: Sequence[ScaleUp], count: int, max_tokens: int,
            rate_mbit: int | None) -> dict[str, object]:
    """`count` prompts per scale-up, the same ones each time, in another order and at other moments. The checkpoint is
    float32, the engine computes in `dtype`.
    """
    print(f"Right tokens: {count} prompts at random moments of each scale-up", flush=True)
    tables: dict[str, dict[str, object]] = {
        "engine": {"dtype": dtype, "max_model_len": 1024}, "cluster": {"max_world": 2 * len(scale_ups)}}
    with fleet.fleet(checkpoint, max(s.stop for s in scale_ups), rate_mbit, tables) as made:
        lengths = prompts.mixed_lengths(count, _SEED)
        asked = prompts.of_lengths(prompts.encoder(checkpoint), lengths, _SEED)
        reference, trials = asyncio.run(_trials(made.address, asked, scale_ups, max_tokens))
    trials = _with_margins(checkpoint, asked, reference, trials)
    for trial in trials:
        for d in trial.differences:
            print(f"    {trial.scale_up}, prompt {d.prompt} step {d.step}: {d.got} instead of {d.expected}, "
                  + ("not a near-tie" if d.margin is None else f"margin {d.margin:.2e}"))
    modes = {}
    for mode in dict.fromkeys(trial.scale_up.mode for trial in trials):
        modes[mode] = _count([trial for trial in trials if trial.scale_up.mode == mode])
    return {"token_mismatches": sum(m["mismatches"] for m in modes.values()),
            "near_ties": sum(m["near_ties"] for m in modes.values()), "tokens": modes,
            "requests": sum(m["requests"] for m in modes.values())}


async def _trials(address: str, asked: Sequence[prompts.Tokens], scale_ups: Sequence[ScaleUp], max_tokens: int
                  ) -> tuple[list[prompts.Tokens], list[Trial]]:
    """The reference answers first."""
    async with AsyncClient(address) as client:
        reference = [(await fleet.ask(client, prompt, max_tokens)).tokens for prompt in asked]
        trials: list[Trial] = []
        for k, scale_up in enumerate(scale_ups):
            trials.append(await _trial(client, scale_up, asked, reference, max_tokens, random.Random(_SEED + k),
                                       trials[-1].seconds if trials else 3.0))
            trial = trials[-1]
            print(f"  {scale_up!s:18} {trial.requests} answers, {trial.helped} helped by loading instances, "
                  f"{len(trial.differences)} differ, {len(trial.errors)} failed; scale-up {trial.seconds:.1f} s", flush=True)
            for error in trial.errors[:3]:
                print(f"    {error}")
    return reference, trials


async def _trial(client: AsyncClient, scale_up: ScaleUp, asked: Sequence[prompts.Tokens],
                 reference: Sequence[prompts.Tokens], max_tokens: int, rng: random.Random, window_s: float) -> Trial:
    """Requests come uniformly in about the time that a scale-up takes."""
    await fleet.settle(client, scale_up.start)
    order = rng.sample(range(len(asked)), len(asked))
    tasks = {i: asyncio.create_task(fleet.ask(client, asked[i], max_tokens, rng.uniform(0, window_s))) for i in order}
    done = await client.scale(scale_up.stop, live=scale_up.live, source=scale_up.source, wait=True, timeout_s=120)
    answers = {i: await task for i, task in tasks.items()}
    differences, errors = [], []
    for i in sorted(answers):
        step = first_difference(reference[i], answers[i].tokens)
        if answers[i].result is None:
            errors.append(f"prompt {i}: {answers[i].error}")
        if step is not None:
            differences.append(Difference(i, step, reference[i][step:step + 4], answers[i].tokens[step:step + 4]))
    helped = sum(a.result is not None and a.result.usage.layers_helped > 0 for a in answers.values())
    return Trial(scale_up, len(asked), helped, done.seconds, tuple(differences), tuple(errors))


def _with_margins(checkpoint: Path, asked: Sequence[prompts.Tokens], reference: Sequence[prompts.Tokens],
                  trials: Sequence[Trial]) -> list[Trial]:
    """Teacher forcing: the reference's logits where an answer took another token."""
    places = sorted({(d.prompt, d.step) for t in trials for d in t.differences if d.expected and d.got})
    found = probe.margins(checkpoint, [asked[i] + reference[i][:step] for i, step in places])
    margins = dict(zip(places, found, strict=True))
    return [replace(t, differences=tuple(replace(d, margin=margins.get((d.prompt, d.step))) for d in t.differences))
            for t in trials]


def _count(trials: Sequence[Trial]) -> dict[str, int]:
    differences = [d for t in trials for d in t.differences]
    near = sum(d.near_tie for d in differences)
    return {"requests": sum(t.requests for t in trials), "helped": sum(t.helped for t in trials), "near_ties": near,
            "mismatches": len(differences) - near, "failed": sum(len(t.errors) for t in trials)}
