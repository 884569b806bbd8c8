"""What happens when a burst of prompts meets a cluster that grows: one round, fired and recorded.

Threads of `Burst` are its only writers; lists only grow, so that a view may read them at any time. All times are seconds
since the round began, on the client's clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from blitzjax.errors import BlitzError
from blitzjax.serve.client import Client
from blitzjax.types import LiveMode
from blitzjax.v1 import inference_pb2 as pb
from launch.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Plan:
    """What every round does alike; only the live mode differs."""

    target: int = 2  # instances to scale to
    gap_s: float = 0.05  # between two requests
    scale_at_s: float = 0.06  # when the operator asks for more instances: about as soon as the automatic policy would
    max_tokens: int = 32
    timeout_s: float = 240.0


@dataclass(frozen=True, slots=True)
class InstanceSample:
    id: str
    phase: str
    layers_loaded: int
    partner: str
    waiting: int
    running: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture of the cluster, as WatchScale sent it."""

    at_s: float
    queued: int
    target: int
    instances: tuple[InstanceSample, ...]


@dataclass(slots=True)
class Answer:
    """One request; its own thread mutates it."""

    index: int
    name: str
    due_s: float
    sent_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    layers_helped: int = 0
    helper: str = ""  # the loading instance that ran them
    attempts: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None or self.sent_s is None else self.first_token_s - self.sent_s

    @property
    def outstanding(self) -> bool:
        return self.sent_s is not None and self.finished_s is None


@dataclass(slots=True)
class Round:
    """All that was measured in one round."""

    mode: LiveMode
    layers: int
    answers: list[Answer]
    samples: list[Sample] = field(default_factory=list)
    scale_asked_s: float | None = None
    scale_done_s: float | None = None
    errors: list[str] = field(default_factory=list)  # of the scale-up and of the watcher

    @property
    def scale_s(self) -> float | None:
        """From Scale(target) to every instance serving."""
        if self.scale_asked_s is None or self.scale_done_s is None:
            return None
        return self.scale_done_s - self.scale_asked_s

    @property
    def failures(self) -> list[str]:
        return self.errors + [f"{a.name}: {a.error}" for a in self.answers if a.error]

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"scale_s": self.scale_s, "ttft_s": [a.ttft_s for a in self.answers]}


class Burst:
    """Sends the prompts, asks for the scale-up, watches the cluster. `start` once, poll `done`, then `finish`."""

    def __init__(self, client: Client, prompts: Sequence[Prompt], mode: LiveMode, plan: Plan, layers: int) -> None:
        self.plan = plan
        self.round = Round(mode, layers, [Answer(k, p.name, k * plan.gap_s) for k, p in enumerate(prompts)])
        self._client = client
        self._prompts = prompts
        self._began = 0.0
        self._over = threading.Event()
        self._watcher = self._thread(self._watch)
        self._workers = [self._thread(self._scale)] + [self._thread(self._ask, a) for a in self.round.answers]

    def start(self) -> None:
        self._began = time.monotonic()
        for thread in (self._watcher, *self._workers):
            thread.start()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def done(self) -> bool:
        """Every request ended and the scale-up is over."""
        return not any(thread.is_alive() for thread in self._workers)

    def finish(self) -> Round:
        """Waits for the end and for the watcher's last picture."""
        for thread in self._workers:
            thread.join()
        self._over.set()
        self._watcher.join()
        return self.round

    def _thread(self, run: Callable[..., None], *args: Answer) -> threading.Thread:
        return threading.Thread(target=run, args=args, daemon=True)

    def _sleep_until(self, at_s: float) -> None:
        time.sleep(max(0.0, at_s - self.elapsed_s))

    def _ask(self, answer: Answer) -> None:
        self._sleep_until(answer.due_s)
        answer.sent_s = self.elapsed_s
        message = [{"role": "user", "content": self._prompts[answer.index].text}]
        try:
            for chunk in self._client.stream(message, max_tokens=self.plan.max_tokens, temperature=0.0,
                                             timeout_s=self.plan.timeout_s):
                if chunk.token_ids and answer.first_token_s is None:
                    answer.first_token_s = self.elapsed_s
                answer.token_ids.extend(chunk.token_ids)
                answer.text += chunk.text
                if chunk.usage is not None:
                    self._account(answer, chunk.usage)
        except BlitzError as e:
            answer.error = str(e)
        answer.finished_s = self.elapsed_s

    def _account(self, answer: Answer, usage: pb.Usage) -> None:
        answer.prompt_tokens, answer.attempts = usage.prompt_tokens, usage.attempts
        answer.layers_helped = usage.layers_helped
        if usage.layers_helped:
            answer.helper = last_helper(self.round.samples)

    def _scale(self) -> None:
        self._sleep_until(self.plan.scale_at_s)
        self.round.scale_asked_s = self.elapsed_s
        try:
            self._client.scale(self.plan.target, live=self.round.mode, wait=True, timeout_s=self.plan.timeout_s)
            self.round.scale_done_s = self.elapsed_s
        except BlitzError as e:
            self.round.errors.append(f"scale to {self.plan.target}: {e}")

    def _watch(self) -> None:
        try:
            for picture in self._client.watch():
                self.round.samples.append(sample_of(picture, self.elapsed_s))
                if self._over.is_set():
                    return
        except BlitzError as e:
            self.round.errors.append(f"watch: {e}")


def sample_of(picture: pb.ClusterStatus, at_s: float) -> Sample:
    return Sample(at_s, picture.queued_requests, picture.target_instances, tuple(
        InstanceSample(i.id, i.phase, i.layers_loaded, i.partner, i.waiting, i.running) for i in picture.instances))


def last_helper(samples: Sequence[Sample]) -> str:
    """The instance that was seen live last: it works with a partner while its layers arrive."""
    return next((i.id for sample in reversed(samples) for i in sample.instances if i.phase == "live"), "")
