"""What do dashboards, autoscalers and probes read? Over HTTP: the cluster in Prometheus' text format at /metrics, and
whether it can answer at /health, and at /ping whether anybody is there.

Names that begin with vllm: mean what vLLM's mean, so what reads those works unchanged: the gauges of the Gateway API
inference extension among them. Invariant: a scrape changes nothing, and no reader can hold up the event loop.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

from blitzjax.addresses import joined
from blitzjax.errors import BlitzError
from blitzjax.serve.latencies import Histogram, Latencies
from blitzjax.v1 import inference_pb2 as pb

_log = logging.getLogger("blitzjax.controller")
TYPE = "text/plain; version=0.0.4; charset=utf-8"

_Sample = tuple[dict[str, str], float]
_Metric = tuple[str, str, str, list[_Sample]]  # name, type, what it is


def render(picture: pb.ClusterStatus, latencies: Mapping[str, Latencies]) -> str:
    """One block for each metric: help, type, samples. `latencies` are those of models by name; without them, as where
    only the picture is known, there are no counters of answers and no histograms.
    """
    blocks = [*_metrics(picture), *(_counters(latencies) if latencies else ())]
    lines = [line for name, kind, about, samples in blocks for line in (
        f"# HELP {name} {about}", f"# TYPE {name} {kind}", *(_line(name, *sample) for sample in samples))]
    for name, about, read in _HISTOGRAMS if latencies else ():
        lines += [f"# HELP {name} {about}", f"# TYPE {name} histogram"]
        for model, known in latencies.items():
            lines += _histogram(name, {"model_name": model}, read(known))
    return "\n".join(lines) + "\n"


_HISTOGRAMS: tuple[tuple[str, str, Callable[[Latencies], Histogram]], ...] = (
    ("vllm:time_to_first_token_seconds", "Arrival to first token.", lambda known: known.first_token),
    ("vllm:request_time_per_output_token_seconds", "Mean of an answer's tokens after the first.",
     lambda known: known.per_token),
    ("vllm:inter_token_latency_seconds", "Between one token of an answer and the next.",
     lambda known: known.between_tokens),
    ("vllm:e2e_request_latency_seconds", "Arrival to last token.", lambda known: known.whole),
    ("vllm:request_queue_time_seconds", "Arrival until an instance had room.", lambda known: known.queued),
    ("vllm:request_prefill_time_seconds", "From there to the first token.", lambda known: known.prefill),
    ("vllm:request_decode_time_seconds", "From the first token to the last one.", lambda known: known.decode),
    ("vllm:request_inference_time_seconds", "Both.", lambda known: known.inference),
)


def _histogram(name: str, labels: dict[str, str], durations: Histogram) -> Iterator[str]:
    for bound, count in durations.cumulated():
        yield _line(f"{name}_bucket", labels | {"le": bound}, count)
    yield _line(f"{name}_sum", labels, durations.sum_s)
    yield _line(f"{name}_count", labels, sum(durations.counts))


def _counters(latencies: Mapping[str, Latencies]) -> Iterator[_Metric]:
    models = latencies.items()
    yield ("vllm:request_success_total", "counter", "Answers that ended, by why.",
           [({"model_name": name, "finished_reason": reason}, count)
            for name, known in models for reason, count in sorted(known.reasons.items())])
    yield ("vllm:prompt_tokens_total", "counter", "Prompt tokens of answers that began.",
           [({"model_name": name}, known.prompt_tokens) for name, known in models])
    yield ("vllm:generation_tokens_total", "counter", "Tokens of answers.",
           [({"model_name": name}, known.generated_tokens) for name, known in models])


def _metrics(picture: pb.ClusterStatus) -> Iterator[_Metric]:
    models, instances = picture.models, picture.instances

    def each(read: Callable[[pb.ModelStatus], float]) -> list[_Sample]:
        return [({"model_name": m.name}, read(m)) for m in models]

    yield "vllm:num_requests_waiting", "gauge", "Requests that no instance has room for yet.", each(lambda m: m.queued)
    yield "vllm:num_requests_running", "gauge", "Requests that an instance has.", each(lambda m: m.running)
    yield ("vllm:kv_cache_usage_perc", "gauge", "Share of its instances' KV pages that requests have; 1: all.",
           each(lambda m: _usage([i for i in instances if i.model == m.name])))
    yield ("vllm:prefix_cache_queries_total", "counter", "Prompt tokens that were looked for in prefix caches.",
           each(lambda m: m.prefix_cache_queries))
    yield ("vllm:prefix_cache_hits_total", "counter", "Prompt tokens that prefix caches had.",
           each(lambda m: m.prefix_cache_hits))
    phases = Counter((i.model, i.phase) for i in instances)
    yield ("blitzjax:instances", "gauge", "Workers in a phase; of no model while they are idle.",
           [({"model_name": model, "phase": phase}, count) for (model, phase), count in sorted(phases.items())])
    yield "blitzjax:target_instances", "gauge", "Instances that are wanted.", each(lambda m: m.target)
    yield ("blitzjax:host_copies", "gauge", "Workers that keep it in host memory.",
           each(lambda m: sum(m.name in i.copies for i in instances)))
    yield ("blitzjax:layers_loaded", "gauge", "Layers that an instance holds.",
           [({"model_name": i.model, "worker": i.id}, i.layers_loaded) for i in instances if i.model])
    yield ("blitzjax:kv_received_bytes_total", "counter", "KV of requests that came from instances that run prompts.",
           [({"worker": i.id}, i.kv_received_bytes) for i in instances])


def _usage(instances: list[pb.InstanceStatus]) -> float:
    total = sum(i.pages_total for i in instances)
    return sum(i.pages_used for i in instances) / total if total else 0.0


def _line(name: str, labels: dict[str, str], value: float) -> str:
    quoted = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
    return f"{name}{{{quoted}}} {value!r}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@contextlib.asynccontextmanager
async def endpoint(metrics: Callable[[], str], ready: Callable[[], bool], host: str, port: int) -> AsyncIterator[None]:
    """Answers scrapes and probes while the block runs; port 0: it does not. Raises BlitzError when it cannot listen."""
    if not port:
        yield
        return
    from aiohttp import web  # costs a start 0.1 s

    async def scrape(request: web.Request) -> web.Response:
        return web.Response(text=metrics(), headers={"Content-Type": TYPE})

    async def health(request: web.Request) -> web.Response:
        return web.Response(status=200 if ready() else 503, headers={"Content-Type": TYPE})

    async def ping(request: web.Request) -> web.Response:
        return web.Response(headers={"Content-Type": TYPE})

    app = web.Application()
    app.add_routes([web.get("/metrics", scrape), web.get("/health", health), web.get("/ping", ping)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)  # without waiting for connections that say nothing
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as e:
            raise BlitzError(f"cannot listen on {joined(host, port)} for metrics: {e.strerror}") from e
        _log.info("metrics are at http://%s/metrics", joined(host, port))
        yield
    finally:
        await runner.cleanup()
