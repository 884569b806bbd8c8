"""When do requests arrive, and how large are they? Traces from files, cut and scaled.

Invariant: arrivals are sorted by time, and every prompt and every answer has at least one token.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from blitzjax.errors import ConfigError, reason


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float  # seconds from the beginning of the trace
    prompt_tokens: int
    answer_tokens: int
    model: int = 0  # which of several


_TRACES = Path(__file__).with_name("traces")  # they come with the package; README.md there says where they are from
_SPREAD_S = 0.1  # bursts and silences are patterns of seconds; copies at one instant would be bursts of their own

_AZURE = "TIMESTAMP", "ContextTokens", "GeneratedTokens"  # the time is a date

# Column names of (time, prompt, answer), and how many of its time units a second has.
_COLUMNS = (
    (_AZURE, 1.0),
    (("arrival_s", "input_tokens", "output_tokens"), 1.0),
    (("Timestamp", "Request tokens", "Response tokens"), 1.0),  # BurstGPT
    (("timestamp", "input_length", "output_length"), 1000.0),  # Mooncake
    (("timestamp_ms", "prefill", "decode"), 1000.0),  # BlitzScale's own
)


def find(name: str) -> Path:
    """A file, or one of the package's own traces by how its name begins. Raises ConfigError."""
    path = Path(name)
    if path.exists():
        return path
    known = {path.name[:-7]: path for path in sorted(_TRACES.glob("*.csv.gz"))}
    found = [one for one in known if one.startswith(name)]
    if len(found) != 1:
        raise ConfigError(f"{'no trace' if not found else 'more than one trace begins with'} {name!r}; give a file, or one of "
                          f"{', '.join(found or known)}")
    return known[found[0]]


def read(path: Path) -> list[Arrival]:
    """A CSV file or, named *.jsonl, JSON lines; either may be gzipped. Requests without prompt or answer are dropped.

    Raises ConfigError when the file cannot be read or its columns are unknown.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            json_lines = path.name.removesuffix(".gz").endswith(".jsonl")
            lines = (line for line in file if line.strip())
            rows = list(map(json.loads, lines) if json_lines else csv.DictReader(lines))
        found = list(_arrivals(rows))
    except (OSError, EOFError, zlib.error, RecursionError, csv.Error, TypeError, ValueError) as e:
        raise ConfigError(f"cannot read trace {path}: {reason(e)}") from e
    if not found:
        raise ConfigError(f"trace {path} has no requests")
    found.sort(key=lambda arrival: arrival.at)
    return [replace(arrival, at=arrival.at - found[0].at) for arrival in found]


def window(arrivals: Iterable[Arrival], start_s: float, duration_s: float) -> list[Arrival]:
    """Arrivals in [start_s, start_s + duration_s), with times from the beginning of the window."""
    return [replace(a, at=a.at - start_s) for a in arrivals if start_s <= a.at < start_s + duration_s]


def truncate(arrivals: Iterable[Arrival], prompt_tokens: int, answer_tokens: int) -> list[Arrival]:
    """Longer prompts and answers are cut, as the paper's client does with prompts above 4095 tokens."""
    return [replace(a, prompt_tokens=min(a.prompt_tokens, prompt_tokens),
                    answer_tokens=min(a.answer_tokens, answer_tokens)) for a in arrivals]


def deal(arrivals: list[Arrival], models: int, seed: int) -> list[Arrival]:
    """Every arrival goes to one of so many models, the k-th with a weight of 1 / k: some are rarely asked."""
    if models == 1:
        return arrivals
    weights = [1 / (k + 1) for k in range(models)]
    drawn = random.Random(f"models {seed}").choices(range(models), weights, k=len(arrivals))
    return [replace(arrival, model=model) for arrival, model in zip(arrivals, drawn)]


def scale(arrivals: list[Arrival], factor: float, seed: int) -> Iterator[Arrival]:
    """`factor` times as many requests with the temporal pattern kept, as TraceUpscaler does.

    Every arrival is repeated floor(factor) times, or once more with probability frac(factor), evenly over the time to
    the next one but at most over _SPREAD_S; sizes are drawn consecutively from the trace, so that their distribution
    and their order stay. Below 1 it thins the trace out.
    """
    assert arrivals and factor > 0
    chance = random.Random(seed)
    whole, rest = int(factor), factor % 1
    drawn = 0
    for arrival, following in zip(arrivals, [*arrivals[1:], arrivals[-1]]):
        copies = whole + (chance.random() < rest)
        gap_s = min(following.at - arrival.at, _SPREAD_S)
        for k in range(copies):
            sizes = arrivals[drawn % len(arrivals)]
            drawn += 1
            yield Arrival(arrival.at + gap_s * k / copies, sizes.prompt_tokens, sizes.answer_tokens, arrival.model)


def _arrivals(rows: list[Mapping[str, str | float]]) -> Iterator[Arrival]:
    if not rows:
        return
    (at, prompt, answer), per_second = next(
        (known for known in _COLUMNS if all(name in rows[0] for name in known[0])), (("", "", ""), 0.0))
    if not at:
        raise ValueError(f"unknown columns {', '.join(map(str, rows[0]))}")
    for number, row in enumerate(rows, start=1):
        try:
            seconds = _date_s(str(row[at])) if at == _AZURE[0] else float(row[at]) / per_second
            made = Arrival(seconds, int(float(row[prompt])), int(float(row[answer])))
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise ValueError(f"row {number}: {reason(e)}") from e
        if not math.isfinite(made.at):
            raise ValueError(f"row {number}: {at} is no time: {row[at]}")
        if made.prompt_tokens >= 1 and made.answer_tokens >= 1:
            yield made


def _date_s(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
