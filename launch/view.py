"""The burst while it happens: a live table on a terminal, one line a second in a pipe. Reads a Burst, changes nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.burst import Answer, Burst, InstanceSample, Sample

_BAR = 30
_LAST_ANSWERS = 6
_FRAME_S = 0.1
_LINE_S = 1.0
_COLOURS = {"serving": "green", "live": "yellow", "loading": "cyan", "draining": "magenta", "failed": "red"}
NAMES = {"zigzag": "live, ZigZag", "best_effort": "live, best effort", "off": "stop the world"}


def follow(burst: Burst, console: Console) -> None:
    """Shows `burst` until it is done."""
    if not console.is_terminal:
        _print_lines(burst, console)
        return
    with Live(frame(burst), console=console, auto_refresh=False) as live:
        while not burst.done:
            live.update(frame(burst), refresh=True)
            time.sleep(_FRAME_S)
        live.update(frame(burst), refresh=True)


def _print_lines(burst: Burst, console: Console) -> None:
    due = 0.0
    while not burst.done:
        if burst.elapsed_s >= due:
            console.print(line(burst), markup=False, highlight=False, soft_wrap=True)
            due = burst.elapsed_s + _LINE_S
        time.sleep(_FRAME_S)
    console.print(line(burst), markup=False, highlight=False, soft_wrap=True)


def line(burst: Burst) -> str:
    """The state in one line."""
    sample = _latest(burst)
    instances = "  ".join(f"{i.id} {i.phase} {i.layers_loaded}/{burst.round.layers}" for i in _shown(sample))
    outstanding = sum(a.outstanding for a in burst.round.answers)
    return f"{burst.elapsed_s:6.1f} s  {instances}  outstanding {outstanding}  {ttft_so_far(burst.round.answers)}"


def frame(burst: Burst) -> Group:
    """The whole picture."""
    return Group(_title(burst), _instances(burst), Text(work_split(_latest(burst), burst.round.layers), style="yellow"),
                 _answers(burst.round.answers))


def ttft_so_far(answers: Sequence[Answer]) -> str:
    seen = [a.ttft_s for a in answers if a.ttft_s is not None]
    if not seen:
        return "no first token yet"
    return (f"first tokens {len(seen)}/{len(answers)}, TTFT median {statistics.median(seen):.2f} s, "
            f"max {max(seen):.2f} s")


def work_split(sample: Sample | None, layers: int) -> str:
    """Who runs what now, from the pairs in the picture."""
    pairs = [i for i in _shown(sample) if i.phase == "live" and i.partner]
    if not pairs:
        return "no live pair: every instance that serves runs all layers"
    return "; ".join(_pair(i, layers) for i in pairs)


def _pair(new: InstanceSample, layers: int) -> str:
    if new.layers_loaded == 0:
        return f"{new.id} waits for its first layer, {new.partner} runs all"
    return f"{new.id} runs up to layer {new.layers_loaded} of {layers}, {new.partner} the rest"


def _title(burst: Burst) -> Text:
    sample, answers = _latest(burst), burst.round.answers
    sent = sum(a.sent_s is not None for a in answers)
    queued = sample.queued if sample is not None else 0
    done = sum(a.finished_s is not None for a in answers)
    return Text.assemble((f"{NAMES[burst.round.mode]}  ", "bold"), f"{burst.elapsed_s:5.1f} s   sent {sent}, ",
                         f"answered {done}, queue {queued}   {ttft_so_far(answers)}")


def _instances(burst: Burst) -> Table:
    layers = burst.round.layers
    table = Table()
    for name in ("instance", "phase", "layers", "", "waiting", "running", "works with"):
        table.add_column(name)
    for i in _shown(_latest(burst)):
        full = _BAR * i.layers_loaded // layers if layers else 0
        colour = _COLOURS.get(i.phase, "white")
        table.add_row(i.id, f"[{colour}]{i.phase}", f"[{colour}]{'█' * full}[dim]{'░' * (_BAR - full)}",
                      f"{i.layers_loaded}/{layers}", str(i.waiting), str(i.running), i.partner or "-")
    return table


def _answers(answers: Sequence[Answer]) -> Group:
    """The latest answers: who ran their prompt, and their text so far."""
    begun = [a for a in answers if a.first_token_s is not None]
    latest = sorted(begun, key=lambda a: a.first_token_s or 0.0)[-_LAST_ANSWERS:]
    return Group(*(Text(f"{a.ttft_s:6.2f} s  {a.name:14} {helped(a):22} {one_line(a.text, 70)}", no_wrap=True,
                        overflow="ellipsis") for a in latest))


def helped(answer: Answer) -> str:
    """Which layers of the prompt a loading instance ran; known when the answer is complete."""
    if answer.finished_s is None:
        return "..."
    if not answer.layers_helped:
        return "-"
    return f"layers 1-{answer.layers_helped} on {answer.helper or 'the new one'}"


def one_line(text: str, width: int) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= width else joined[:width - 1] + "…"


def _latest(burst: Burst) -> Sample | None:
    return burst.round.samples[-1] if burst.round.samples else None


def _shown(sample: Sample | None) -> tuple[InstanceSample, ...]:
    return sample.instances if sample is not None else ()
