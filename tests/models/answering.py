"""A whole engine instance, run in the caller's thread until it has answered everything."""

from __future__ import annotations

from collections.abc import Sequence

from blitzjax.config import Config, EngineConfig
from blitzjax.engine import messages as m
from blitzjax.engine.instance import Instance
from blitzjax.engine.params import LayerStore
from blitzjax.engine.stages import Stages
from blitzjax.events import RequestFinished
from blitzjax.types import Request, Sampling, Work


def work(name: str, prompt: Sequence[int], sampling: Sampling) -> Work:
    return Work(Request(name, "model", len(prompt), sampling.max_tokens, 0.0), 1, tuple(prompt), (), sampling)


def answer(store: LayerStore, stages: Stages, engine: EngineConfig, works: Sequence[Work]) -> dict[str, list[m.Tokens]]:
    """What a new instance says to each of `works`, asked at once."""
    said: dict[str, list[m.Tokens]] = {item.request.id: [] for item in works}
    running = set(said)

    def collect(output: object) -> None:
        if isinstance(output, m.Tokens):
            said[output.request_id].append(output)
        elif isinstance(output, m.Decoded):
            for request_id, start, token in zip(output.request_ids, output.starts, output.token_ids, strict=True):
                said[request_id].append(m.Tokens(request_id, 1, start, (token,), "", 0))
        elif isinstance(output, RequestFinished):
            running.remove(output.request_id)
            if not running:
                instance.post(m.Stop())

    instance = Instance("one", Config(engine=engine), store, stages, None, collect, None, None)
    for item in works:
        instance.post(item)
    instance.run()
    instance.check()
    return said


def token_ids(said: Sequence[m.Tokens]) -> list[int]:
    return [token for one in said for token in one.token_ids]
