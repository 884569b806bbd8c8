"""What did the rounds measure? Percentiles, a table, the answers, a picture, the raw data. Computes from records only."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.burst import Answer, Round
from launch.view import NAMES, helped, one_line


@dataclass(frozen=True, slots=True)
class Summary:
    """One round in numbers; seconds are nan when nothing was measured."""

    mode: str
    requests: int
    failed: int
    scale_s: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_max_s: float
    total_s: float  # until the last answer was complete
    helped: int  # requests of which a loading instance ran layers


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the closest ranks; `share` in [0, 1]. nan for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    below = math.floor(at := share * (len(ordered) - 1))
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def summarize(round_: Round) -> Summary:
    ttfts = [a.ttft_s for a in round_.answers if a.ttft_s is not None]
    ends = [a.finished_s for a in round_.answers if a.finished_s is not None]
    return Summary(
        mode=round_.mode, requests=len(round_.answers), failed=sum(bool(a.error) for a in round_.answers),
        scale_s=math.nan if round_.scale_s is None else round_.scale_s,
        ttft_mean_s=statistics.fmean(ttfts) if ttfts else math.nan, ttft_p50_s=percentile(ttfts, 0.5),
        ttft_p95_s=percentile(ttfts, 0.95), ttft_max_s=max(ttfts, default=math.nan),
        total_s=max(ends, default=math.nan), helped=sum(a.layers_helped > 0 for a in round_.answers))


def differing(first: Round, second: Round) -> list[str]:
    """Names of the requests whose tokens are not the same in both rounds."""
    return [a.name for a, b in zip(first.answers, second.answers, strict=True) if a.token_ids != b.token_ids]


def table(rounds: Sequence[Round]) -> Table:
    out = Table(title="measured in this run, seconds; helped: the loading instance ran layers of it",
                title_justify="left")
    for name in ("", "scale-up", "TTFT mean", "p50", "p95", "max", "all done", "helped"):
        out.add_column(name, justify="left" if not name else "right")
    for s in map(summarize, rounds):
        times = (s.scale_s, s.ttft_mean_s, s.ttft_p50_s, s.ttft_p95_s, s.ttft_max_s, s.total_s)
        out.add_row(NAMES[s.mode], *(f"{t:.2f}" for t in times), f"{s.helped} of {s.requests}")
    return out


def verdict(first: Round, second: Round) -> str:
    """What a reader should take from the table, whichever way it went."""
    a, b = summarize(first), summarize(second)
    differ = differing(first, second)
    tokens = (f"tokens differ between the rounds in {len(differ)} of {a.requests}: {', '.join(differ)}" if differ
              else f"tokens identical between the rounds: {a.requests} of {a.requests}")
    return (f"{tokens}\nmean TTFT of {NAMES[a.mode]} is {a.ttft_mean_s / b.ttft_mean_s:.2f} x that of {NAMES[b.mode]} "
            "(one run each; cores shared with client and controller)")


def print_answers(round_: Round, console: Console, width: int = 100) -> None:
    for a in round_.answers:
        console.print(f"{a.name:14} {helped(a):22} {one_line(a.error or a.text, width)}", markup=False, highlight=False,
                      soft_wrap=True)


def write_json(rounds: Sequence[Round], about: Mapping[str, object], path: Path) -> None:
    """Everything that was recorded, and the summaries; nan becomes null."""
    summaries = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(summarize(r)).items()}
                 for r in rounds]
    data = {"about": about, "summaries": summaries, "rounds": [r.as_json() for r in rounds]}
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", "utf-8")


def outstanding(answers: Sequence[Answer]) -> tuple[list[float], list[int]]:
    """Requests sent and not yet answered, as the steps of a line: (times, counts from each time on)."""
    changes = sorted([(a.sent_s, 1) for a in answers if a.sent_s is not None]
                     + [(a.finished_s, -1) for a in answers if a.finished_s is not None])
    times, counts = [0.0], [0]
    for at, change in changes:
        times.append(at)
        counts.append(counts[-1] + change)
    return times, counts


def layers_over_time(round_: Round) -> dict[str, tuple[list[float], list[int]]]:
    """Per instance: (times, layers loaded)."""
    out: dict[str, tuple[list[float], list[int]]] = {}
    for sample in round_.samples:
        for i in sample.instances:
            times, layers = out.setdefault(i.id, ([], []))
            times.append(sample.at_s)
            layers.append(i.layers_loaded)
    return out
