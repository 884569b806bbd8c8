"""`blitzjax serve`, `deploy` and `convert`: flags to configuration, model to checkpoint directory, a local cluster."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import blitzjax
from blitzjax import config as configs
from blitzjax.addresses import check_free, joined
from blitzjax.config import Config, ScaleConfig
from blitzjax.engine import locations
from blitzjax.errors import BlitzError, CheckpointError, ConfigError, InvalidRequest
from blitzjax.serve import access
from blitzjax.serve.hosts import Launch, WorkerHost, across, check_ports
from blitzjax.serve.model import read_manifest
from blitzjax.types import ModelSpec

if TYPE_CHECKING:
    from blitzjax.serve.client import Client
    from blitzjax.serve.local import LocalCluster

_POOL = 3  # small enough for a laptop, large enough to scale
_SILENT_S = 15.0  # a start that takes longer says why

_KNOBS = {
    "instances": "scale.min_instances", "pool": "cluster.pool", "host": "serve.host", "port": "serve.port",
    "http_port": "serve.http_port", "allowed_origins": "serve.allowed_origins",
    "ssl_certfile": "serve.ssl_certfile", "ssl_keyfile": "serve.ssl_keyfile",
    "tool_call_parser": "serve.tool_call_parser", "dtype": "engine.dtype", "max_model_len": "engine.max_model_len",
    "max_num_seqs": "engine.max_num_seqs",
    "tensor_parallel_size": "engine.tensor_parallel", "live": "scale.live", "source": "scale.source",
    "roles": "scale.roles", "scaling_policy": "scale.policy", "event_log": "serve.event_log", "pin_cores": "cluster.pin_cores",
    "metrics_port": "serve.metrics_port", "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "enable_prefix_caching": "engine.prefix_caching", "shutdown_timeout": "serve.shutdown_timeout_s",
}


def serve(args: argparse.Namespace) -> int:
    """Runs until Ctrl-C, SIGTERM, a terminal that is closed, or the controller's end; returns the controller's exit code.
    """
    from blitzjax.serve.local import LocalCluster

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a conversion as Ctrl-C does
    hosts = [host.strip() for host in args.hosts.split(",")] if args.hosts else []
    config = configure(args, len(args.model), max(1, len(hosts)))
    if args.host_index and not hosts:
        raise BlitzError("--host-index says which of --hosts this machine is; give --hosts, the same on all machines")
    if not args.host_index:  # raise now what the controller would
        access.api_key()
        access.server_context(config.serve.ssl_certfile, config.serve.ssl_keyfile)
    if args.checkpoint is not None and len(args.model) > 1:
        raise BlitzError("--checkpoint belongs to one MODEL; give the others as directories, or deploy them later")
    names = args.served_model_name or []
    if names and len(names) != len(args.model):
        raise BlitzError(f"--served-model-name wants a name for each of the {len(args.model)} models, got {len(names)}")
    if not all(names):
        raise BlitzError("--served-model-name wants names that are not empty")
    names = names or [""] * len(args.model)
    check_names([name or locations.name_of(model) for model, name in zip(args.model, names, strict=True)])
    launch = replace(across(config, hosts, args.host_index) if hosts else Launch(), leaf=args.leaf)
    for port in (config.serve.port, config.serve.http_port, config.serve.metrics_port):
        if not args.host_index:
            check_free(joined(config.serve.host, port))
    if hosts:
        check_ports(launch)
    models = [checkpoint(model, config.engine.dtype, args.checkpoint) for model in args.model]
    if "engine.max_model_len" in given(args):
        check_context(config, [read_manifest(model, name)[0] for model, name in zip(models, names, strict=True)])
    if args.host_index:
        return _only_workers(config, launch)
    cluster = LocalCluster(config, models, replace(launch, console=True), args.served_model_name or ())
    _on_end(cluster.terminate)
    with cluster:
        print(f"starting {cluster.workers}; logs are in {cluster.run_dir}", flush=True)
        with contextlib.suppress(BlitzError):  # it ended, and has said why; or it was killed, and begins again
            wait_ready(cluster)
            print(banner(cluster), flush=True)
        return cluster.wait()


def check_names(names: Sequence[str]) -> None:
    """Of the models that are served; empty: not known yet. Raises BlitzError for one that two would have."""
    for name, count in Counter(filter(None, names)).items():
        if count > 1:
            raise BlitzError(f"{count} models would be called {name!r}; give each its own: --served-model-name NAME NAME")


def _on_end(act: Callable[[], None]) -> None:
    """What is to happen on SIGTERM, Ctrl-C, and when the terminal is closed, unless nohup let that be ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: act())


def wait_ready(cluster: LocalCluster) -> None:
    """Raises BlitzError if the controller ended."""
    try:
        cluster.wait_ready(_SILENT_S)
    except TimeoutError:
        print("no instance serves yet: the first start of a model compiles it, for a minute or more; the next one loads that",
              flush=True)
        cluster.wait_ready(float("inf"))


def _only_workers(config: Config, launch: Launch) -> int:
    """This machine's part of a cluster whose controller is elsewhere. Runs until Ctrl-C, SIGTERM or a closed terminal."""
    host = WorkerHost(config, launch)
    _on_end(host.stop)
    print(f"starting {host.workers}; logs are in {host.workers.run_dir}", flush=True)
    asyncio.run(host.run())
    return 0


def deploy(args: argparse.Namespace) -> int:
    from blitzjax.cli_client import connected

    with connected(args) as client:
        cluster = client.status()  # is anybody there, before a long conversion?
        name = args.served_model_name or locations.name_of(args.model)
        if name in {model.name for model in cluster.models}:
            raise InvalidRequest(f"a model named {name!r} is deployed already; give this one another --served-model-name")
        directory = checkpoint(args.model, args.dtype or cluster.dtype, args.checkpoint)
        reply = client.deploy(directory, served_model_name=args.served_model_name, min_instances=args.instances,
                              max_instances=args.max_instances)
    print(f"{reply.model} is deployed after {reply.seconds:.2f} s")
    return 0


def convert(args: argparse.Namespace) -> int:
    print(checkpoint(args.model, args.dtype or Config().engine.dtype, args.checkpoint))
    return 0


def configure(args: argparse.Namespace, models: int = 1, hosts: int = 1) -> Config:
    """File, then flags, then --set. Sizes that nobody gave follow each other: the pool bounds the instances of so many
    models, and is divided over so many hosts.
    """
    overrides, said = _overrides(args), given(args)
    if "scale.max_instances" not in said:  # as the pool allows; never an error that nobody caused
        overrides.insert(0, f"scale.max_instances={1 << 30}")
    if "cluster.pool" not in said:
        lowest = _least(configs.load(args.config, overrides).scale) * models
        overrides.insert(0, f"cluster.pool={ceil(max(_POOL, lowest) / hosts) * hosts}")
    config = configs.load(args.config, overrides)
    pool, least = config.cluster.pool, _least(config.scale)
    needed = least * models
    if needed > pool:
        names = "scale.min_instances" + (" + scale.min_decode" if config.scale.roles == "split" else "")
        each = f", of each of {models} models" if models > 1 else ""
        raise BlitzError(f"{names} is {least}{each}, but the pool has {pool} workers; give --pool {needed}")
    if "scale.max_instances" not in said:
        config = configs.load(args.config, [*overrides, f"scale.max_instances={pool}"])
    return config


def _least(scale: ScaleConfig) -> int:
    """Instances that always serve."""
    return scale.min_instances + (scale.min_decode if scale.roles == "split" else 0)


def _overrides(args: argparse.Namespace) -> list[str]:
    """What wins over the file, later ones over earlier ones."""
    flags = [f"{key}={json.dumps(value)}" for name, key in _KNOBS.items() if (value := getattr(args, name)) is not None]
    return [*flags, *args.set]


def given(args: argparse.Namespace) -> set[str]:
    """Keys that somebody set; what is wrong with the file, `configs.load` says."""
    try:
        tables = {} if args.config is None else tomllib.loads(args.config.read_text("utf-8"))
    except (OSError, ValueError):
        tables = {}
    in_file = {f"{table}.{key}" for table, values in tables.items() if isinstance(values, dict) for key in values}
    return in_file | {text.partition("=")[0].strip() for text in _overrides(args)}


def check_context(config: Config, specs: Sequence[ModelSpec]) -> None:
    """A length that somebody asked for: one of the models must take it, and whose is shorter is told. Raises ConfigError."""
    wanted = config.engine.max_model_len
    short = [f"{spec.name} takes at most {spec.max_len} tokens" for spec in specs if spec.max_len < wanted]
    if len(short) == len(specs):
        raise ConfigError(f"engine.max_model_len is {wanted}, but {', '.join(short)}")
    for said in short:
        print(f"{said}, not the {wanted} of engine.max_model_len", flush=True)


def checkpoint(model: str, dtype: str, source: Path | None = None) -> Path:
    """The checkpoint directory of MODEL, converting it when needed: in a process of its own, for that imports jax.

    `source` is where the parameters of MODEL are if it is code. Raises CheckpointError.
    """
    if source is None and (path := locations.cached(model, dtype)) is not None:
        return path
    print(f"preparing {model}: what is converted once is kept in {locations.default_cache()}", file=sys.stderr, flush=True)
    where = () if source is None else ("--checkpoint", str(source))
    done = subprocess.run([sys.executable, "-m", "blitzjax.engine.convert", model, "--dtype", dtype, *where],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = done.stdout.split("\n")
    made = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if done.returncode != 0 or not made:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise CheckpointError(f"cannot convert {model!r}: {said[-1] if said else f'exit code {done.returncode}'}")
    return Path(made)


def banner(cluster: LocalCluster) -> str:
    """What to say when it is ready."""
    with cluster.client() as client:
        return _banner([model.name for model in client.status().models], cluster.address, cluster.config, _spoken(client))


def _spoken(client: Client) -> str:
    """What the first model, which `chat` takes, can be asked in: chat, text, or token ids."""
    for kind, prompt in (("chat", [{"role": "user", "content": "x"}]), ("text", "x")):
        with contextlib.suppress(InvalidRequest):
            client.tokenize(prompt)
            return kind
    return "tokens"


def _banner(models: list[str], address: str, config: Config, spoken: str = "chat") -> str:
    scale = config.scale
    at = "" if address == "127.0.0.1:50051" else f" --address {address}"
    each, which = (" each", f" --model {models[-1]}") if len(models) > 1 else ("", "")
    web = f"{'https' if config.serve.ssl_certfile else 'http'}://{joined(config.serve.host, config.serve.http_port)}"
    http = f"  http    {web}/v1, as OpenAI's\n" if config.serve.http_port else ""
    talk = {"chat": f"blitzjax chat{at} \"What is a multicast?\"", "text": f"blitzjax chat{at} --raw \"The tide comes in\"",
            "tokens": f"Client({address!r}).generate([1, 2, 3]).token_ids in Python: there is no tokenizer, so token ids"}[spoken]
    split = f" ({scale.min_instances} prefill, {scale.min_decode} decode)" if scale.roles == "split" else ""
    return (
        f"blitzjax {blitzjax.__version__} is ready: {', '.join(models)} on {address}, "
        f"{_least(scale)}{each} of {config.cluster.pool} instances{split}, {scale.policy} scaling, live {scale.live}\n"
        f"  talk    {talk}\n"
        f"{http}  scale   blitzjax scale{at}{which} --to {config.cluster.pool} --watch\n"
        f"  look    blitzjax status{at}\n"
        f"  stop    Ctrl-C; answers in flight finish")
