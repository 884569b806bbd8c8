"""Every knob, in five tables. Unknown keys and wrong types are errors that name the key; baselines are rows of values.

A knob is here because it changes a figure or fixes an outage. `load(path, overrides)` resolves TOML plus
`--set table.key=value` before anything is frozen.
"""

from __future__ import annotations

import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from blitzjax.errors import ConfigError, reason
from blitzjax.types import DTYPES, LiveMode, Roles, Source, ToolCallParser

ORIGINS = '["https://chat.example.org", "http://localhost:3000"], or ["*"], any'
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    host: str = "127.0.0.1"
    port: int = 50051
    max_queued_requests: int = 1024  # waiting for an instance; one more is RESOURCE_EXHAUSTED
    max_attempts: int = 4  # an attempt is lost with its worker; the request then runs elsewhere
    shutdown_timeout_s: float = 30.0  # in-flight requests may finish after SIGTERM
    prefix_routing: bool = True  # among instances with room, one that was sent prompts which begin alike
    tool_call_parser: ToolCallParser = "auto"  # how models write calls of functions; auto: as the chat template says
    http_port: int = 0  # OpenAI's interface at http://HOST:PORT/v1; 0: none
    allowed_origins: tuple[str, ...] = ()  # whose web pages may call over HTTP, "*": any; none: any if there is a key
    ssl_certfile: str = ""  # PEM, with the chain: gRPC and HTTP are encrypted; metrics are not. Empty: neither is
    ssl_keyfile: str = ""  # PEM, of that certificate
    metrics_port: int = 0  # Prometheus' text at http://HOST:PORT/metrics; 0: none
    event_log: str = ""  # JSON lines of every event and command; a file that is there becomes FILE.1; empty: none
    hang_timeout_s: float = 10.0  # controller, coordination service: silent so long (a start: 12 times), killed; 0: never
    resume_timeout_s: float = 30.0  # workers wait so long for a crashed controller, controllers for clients; 0: no


@dataclass(frozen=True, slots=True)
class EngineConfig:
    dtype: str = "bfloat16"  # parameters and matmul inputs: "bfloat16" | "float32", KV too but on GPUs; residuals are float32;
    # "int8": matrices of layers are rounded to blocks of int8, and multiply bfloat16
    max_model_len: int = 2048  # prompt + answer, tokens; at most the model's limit; chooses LongRoPE's factors
    max_num_seqs: int = 16  # sequences decoding together
    max_num_batched_tokens: int = 512  # one step: decoding sequences + prompt chunk
    page_size: int = 16  # tokens per KV page
    kv_pages: int = 0  # KV pages of an instance; 0: max_num_seqs x max_model_len tokens, or what a GPU has memory for
    memory_fraction: float = 0.9  # of each GPU, reserved at the start; workers that share one get equal parts
    answer_share: float = 0.5  # of max_tokens, that a request gets pages for at once; 1: no request is ever preempted
    prefix_caching: bool = True  # prompts that begin alike share the KV of what they have in common
    prefix_cache_bytes: int = 1 << 30  # of an instance's host memory; kv_pages bound it too
    tensor_parallel: int = 1  # devices per instance
    step_timeout_s: float = 120.0  # a worker that is in one step, or one layer of a prompt, for so long ends; 0: never
    native_kernels: bool = True  # what a bfloat16 model computes on CPUs in C++; last bits differ, so one value for all hosts
    cudnn_attention: bool = True  # on NVIDIA GPUs, in bfloat16, where it fits; keys and values are bfloat16 then
    fused_layers: int = 0  # layers that a decode step runs as one program, best a multiple of the model's pattern; 0: one each
    executable_cache: str = ""  # directory; empty: executables/ in $BLITZJAX_CACHE or ~/.cache/blitzjax
    share_executables: bool = True  # a worker takes what others have compiled for such a machine, over their gRPC port


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    """Token-backlog policy of the BlitzScale paper, section 7.1 of our notes, for mixed instances."""

    policy: str = "auto"  # "auto" | "manual"
    roles: Roles = "mixed"  # "split": prompts run on some instances, which send their KV to others that decode
    min_instances: int = 1  # of each model; with split roles: that run prompts; 0: none while nobody asks
    min_decode: int = 1  # with split roles
    max_instances: int = 4
    live: LiveMode = "zigzag"
    source: Source = "multicast"  # "unicast": one target a source, and only what served before sends
    prefill_lower: float = 0.5  # seconds of one instance's prefill rate that the backlog may hold, per instance
    prefill_upper: float = 0.7
    kv_lower: float = 0.75  # share of an instance's pages
    kv_upper: float = 0.95
    migrate_lower: float = 0.4  # seconds of KV, per decode instance, that prefill instances may hold
    migrate_upper: float = 0.8
    migrate_tokens_per_s: float = 100_000.0  # KV that one decode instance receives
    prefill_tokens_per_s: float = 0.0  # one instance's prefill rate, as `bench calibrate` measures it; 0: learned
    forecast_s: float = 0.0  # the policy looks so far ahead along the growth of the backlog; 0: not at all
    down_after_s: float = 5.0  # load must stay low for this long before an instance drains
    drain_by_moving: bool = False  # answers of mixed instances that drain move to others, with their KV, and end there
    zero_after_s: float = 30.0  # with min_instances 0: the last one drains when nobody has asked for this long
    yield_after_s: float = 30.0  # of waiting for a first instance: then another model's last one drains, or, manual, it ends
    host_copies: bool = True  # a model without an instance stays in the memory of one host; false: on disk only
    live_queue_tokens: int = 16384  # prompt tokens a loading instance may take on


@dataclass(frozen=True, slots=True)
class TransferConfig:
    chunk_bytes: int = 4 << 20  # target size of one multicast step per device; adjusted to divide a layer evenly
    collective_timeout_s: float = 10.0  # a collective whose peer hangs fails after this
    handoff_timeout_s: float = 10.0  # activations or KV that do not arrive in this time fail the attempt
    pull_ahead_layers: int = 3  # the old side asks for its next batch this many layers before it is idle


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    pool: int = 1  # worker processes, on all hosts
    base_port: int = 6400  # on several hosts: of the coordination service; a host's workers listen on the next ones
    threads: int = 0  # XLA threads per worker; 0: all its cores
    pin_cores: bool = False  # worker k computes on core k modulo the cores
    heartbeat_s: float = 10.0  # coordination service declares a silent worker dead after this
    fast_gbps: float = 0.0  # what workers of one host exchange; 0: no more than over the network, so no sharded hops
    max_world: int = 64  # collective cliques per set of members before a rejoin needs a restart


@dataclass(frozen=True, slots=True)
class Config:
    serve: ServeConfig = field(default_factory=ServeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def load(path: Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a TOML file and applies `table.key=value` overrides. Raises ConfigError naming the key."""
    tables: dict[str, dict[str, object]] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as e:
            raise ConfigError(f"cannot read config {path}: {reason(e)}") from e
    for text in overrides:
        key, eq, value = text.partition("=")
        table, dot, name = key.strip().partition(".")
        if not eq or not dot:
            raise ConfigError(f"--set wants table.key=value, got {text!r}")
        values = tables.setdefault(table, {})
        if isinstance(values, dict):  # else it is refused below
            values[name] = _parse_scalar(value.strip())
    return from_tables(tables)


def from_tables(tables: typing.Mapping[str, object]) -> Config:
    """{"scale": {"live": "off"}} → Config. Raises ConfigError for unknown tables, unknown keys, wrong types or values."""
    config = Config()
    for name, table in tables.items():
        if name not in {f.name for f in fields(Config)}:
            raise ConfigError(f"unknown table [{name}]; tables are {', '.join(f.name for f in fields(Config))}")
        if not isinstance(table, dict):
            raise ConfigError(f"[{name}] must be a table")
        config = replace(config, **{name: _fill(name, getattr(config, name), table)})
    _check_ranges(config)
    return config


def to_tables(config: Config) -> dict[str, dict[str, object]]:
    return {f.name: {g.name: getattr(getattr(config, f.name), g.name) for g in fields(getattr(config, f.name))}
            for f in fields(config)}


def _fill(table: str, default, values: typing.Mapping[str, object]):
    hints = typing.get_type_hints(type(default))
    changed = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"unknown key {table}.{key}; keys are {', '.join(sorted(hints))}")
        changed[key] = _coerce(f"{table}.{key}", hints[key], value)
    return replace(default, **changed)


def _coerce(key: str, kind: object, value: object) -> object:
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise ConfigError(f"{key} must be one of {', '.join(map(str, typing.get_args(kind)))}, got {value!r}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, got {value}")
    if kind == tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise ConfigError(f"{key} must be a list of texts, got {value!r}")
        return tuple(value)
    assert isinstance(kind, type) and not isinstance(kind, types.GenericAlias)
    if type(value) is not kind:
        raise ConfigError(f"{key} must be {kind.__name__}, got {value!r}")
    return value


def _parse_scalar(text: str) -> object:
    """A TOML value of one line, or the bare word as a string."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _check_ranges(c: Config) -> None:
    def want(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    want(c.engine.dtype in DTYPES, f"engine.dtype must be one of {', '.join(DTYPES)}, got {c.engine.dtype!r}")
    want(c.scale.policy in ("auto", "manual"), f"scale.policy must be auto or manual, got {c.scale.policy!r}")
    least, which = (1, " with scale.roles=split") if c.scale.roles == "split" else (0, "")
    want(c.scale.min_instances >= least, f"scale.min_instances must be at least {least}{which}, got {c.scale.min_instances}")
    want(1 <= c.scale.max_instances >= c.scale.min_instances,
         f"scale.max_instances must be at least 1 and at least scale.min_instances, got {c.scale.max_instances}")
    want(0 < c.scale.prefill_lower < c.scale.prefill_upper, "scale.prefill_lower must be in (0, scale.prefill_upper)")
    want(0 < c.scale.kv_lower < c.scale.kv_upper <= 1, "scale.kv_lower must be in (0, scale.kv_upper], kv_upper <= 1")
    want(0 < c.scale.migrate_lower < c.scale.migrate_upper, "scale.migrate_lower must be in (0, scale.migrate_upper)")
    want(c.scale.prefill_tokens_per_s >= 0, "scale.prefill_tokens_per_s must be at least 0 (0: learned)")
    want(c.scale.forecast_s >= 0, "scale.forecast_s must be at least 0")
    want(c.scale.roles == "mixed" or 1 <= c.scale.min_decode <= c.scale.max_instances - c.scale.min_instances,
         "scale.min_decode must be in [1, scale.max_instances - scale.min_instances]")
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "tensor_parallel"):
        want(getattr(c.engine, name) >= 1, f"engine.{name} must be at least 1")
    want("[" not in c.serve.host, f"serve.host must be without brackets, as in ::1, got {c.serve.host!r}")
    want(0 <= c.serve.port < 65536, f"serve.port must be in [0, 65535] (0: any free port), got {c.serve.port}")
    for key in ("serve.max_attempts", "serve.max_queued_requests", "cluster.pool", "cluster.max_world"):
        want(_at(c, key) >= 1, f"{key} must be at least 1")
    for key in ("serve.shutdown_timeout_s", "scale.down_after_s", "scale.zero_after_s", "scale.yield_after_s",
                "scale.live_queue_tokens", "engine.kv_pages", "engine.prefix_cache_bytes", "engine.step_timeout_s",
                "cluster.threads", "cluster.fast_gbps"):
        want(_at(c, key) >= 0, f"{key} must be at least 0")
    for key in ("transfer.collective_timeout_s", "transfer.handoff_timeout_s", "cluster.heartbeat_s",
                "scale.migrate_tokens_per_s"):
        want(_at(c, key) > 0, f"{key} must be above 0")
    want(c.serve.resume_timeout_s >= 0, "serve.resume_timeout_s must be at least 0 (0: a crash loses all requests)")
    want(c.serve.hang_timeout_s >= 0, "serve.hang_timeout_s must be at least 0 (0: what hangs stays)")
    want(0 <= c.serve.http_port < 65536, "serve.http_port must be in [0, 65535] (0: no HTTP)")
    want(all(map(is_origin, c.serve.allowed_origins)),
         f"serve.allowed_origins must be origins, as {ORIGINS}, got {list(c.serve.allowed_origins)}")
    want(0 <= c.serve.metrics_port < 65536, "serve.metrics_port must be in [0, 65535] (0: no metrics)")
    ports = [port for port in (c.serve.port, c.serve.http_port, c.serve.metrics_port) if port]
    want(len(set(ports)) == len(ports), "serve.port, serve.http_port and serve.metrics_port must be different ports")
    want(c.engine.fused_layers >= 0, "engine.fused_layers must be at least 0 (0: every layer is a program of its own)")
    want(0 <= c.engine.answer_share <= 1, "engine.answer_share must be in [0, 1]")
    want(0 < c.engine.memory_fraction <= 1, "engine.memory_fraction must be in (0, 1]")
    want(0 < c.cluster.base_port < 65536 - c.cluster.pool, "cluster.base_port and those above it must be TCP ports")
    want(c.transfer.chunk_bytes >= 64, "transfer.chunk_bytes must be at least 64")


def _at(config: Config, key: str) -> float:
    table, _, name = key.partition(".")
    return getattr(getattr(config, table), name)


def is_origin(text: object) -> bool:
    """As a browser says where a page is from; `*`: any."""
    return isinstance(text, str) and bool(_ORIGIN.fullmatch(text))
