"""What do dashboards and autoscalers read? The cluster's picture in Prometheus' text format, over HTTP at /metrics.

Names that begin with vllm: mean what vLLM's mean, so what reads those works unchanged: the gauges of the Gateway API
inference extension among them. Invariant: a scrape changes nothing, and no reader can hold up the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

from blitzjax.errors import BlitzError
from blitzjax.v1 import inference_pb2 as pb

_log = logging.getLogger("blitzjax.controller")
_TIMEOUT_S = 5.0  # of one scrape
_REQUEST_BYTES = 8192
_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_Sample = tuple[dict[str, str], float]


def render(picture: pb.ClusterStatus) -> str:
    """One block for each metric: help, type, samples."""
    return "".join(line + "\n" for name, kind, about, samples in _metrics(picture) for line in (
        f"# HELP {name} {about}", f"# TYPE {name} {kind}", *(_line(name, *sample) for sample in samples)))


def _metrics(picture: pb.ClusterStatus) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    models, instances = picture.models, picture.instances

    def each(read: Callable[[pb.ModelStatus], float]) -> list[_Sample]:
        return [({"model_name": m.name}, read(m)) for m in models]

    yield "vllm:num_requests_waiting", "gauge", "Requests that no instance has room for yet.", each(lambda m: m.queued)
    yield "vllm:num_requests_running", "gauge", "Requests that an instance has.", each(lambda m: m.running)
    yield ("vllm:kv_cache_usage_perc", "gauge", "Share of the KV pages of a model's instances that requests have; 1: all.",
           each(lambda m: _usage([i for i in instances if i.model == m.name])))
    yield ("vllm:prefix_cache_queries_total", "counter", "Prompt tokens that were looked for in prefix caches.",
           each(lambda m: m.prefix_cache_queries))
    yield ("vllm:prefix_cache_hits_total", "counter", "Prompt tokens that prefix caches had.",
           each(lambda m: m.prefix_cache_hits))
    phases = Counter((i.model, i.phase) for i in instances)
    yield ("blitzjax:instances", "gauge", "Workers in a phase; of no model while they are idle.",
           [({"model_name": model, "phase": phase}, count) for (model, phase), count in sorted(phases.items())])
    yield "blitzjax:target_instances", "gauge", "Instances that are wanted.", each(lambda m: m.target)
    yield ("blitzjax:layers_loaded", "gauge", "Layers that an instance holds.",
           [({"model_name": i.model, "instance": i.id}, i.layers_loaded) for i in instances if i.model])
    yield ("blitzjax:kv_received_bytes_total", "counter", "KV of requests that came from instances that run prompts.",
           [({"instance": i.id}, i.kv_received_bytes) for i in instances])


def _usage(instances: list[pb.InstanceStatus]) -> float:
    total = sum(i.pages_total for i in instances)
    return sum(i.pages_used for i in instances) / total if total else 0.0


def _line(name: str, labels: dict[str, str], value: float) -> str:
    quoted = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
    return f"{name}{{{quoted}}} {value!r}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@contextlib.asynccontextmanager
async def endpoint(picture: Callable[[], pb.ClusterStatus], host: str, port: int) -> AsyncIterator[None]:
    """Answers scrapes while the block runs; port 0: there are none. Raises BlitzError when it cannot listen."""
    if not port:
        yield
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(head, picture))
                await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(answer, host, port, limit=_REQUEST_BYTES)
    except OSError as e:
        raise BlitzError(f"cannot listen on {host}:{port} for metrics: {e.strerror}") from e
    _log.info("metrics are at http://%s:%d/metrics", host, port)
    async with server:
        yield


def _response(head: bytes, picture: Callable[[], pb.ClusterStatus]) -> bytes:
    found = head.split(b" ")[:2] == [b"GET", b"/metrics"]
    body = (render(picture()) if found else "only GET /metrics is here\n").encode()
    status = "200 OK" if found else "404 Not Found"
    return (f"HTTP/1.1 {status}\r\nContent-Type: {_TYPE}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n").encode() + body
