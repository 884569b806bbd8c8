"""The `blitzjax` command. Each subcommand imports what it needs when it runs, so that `--help` is instant.

Exit codes: 0 done, 1 the cluster failed, 2 a mistake in the command or the request (one line on stderr says which).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import blitzjax
from blitzjax.config import ORIGINS
from blitzjax.errors import BlitzError
from blitzjax.serve.origins import origins
from blitzjax.types import DEFAULT_MAX_TOKENS, DTYPES

_ADDRESS = "127.0.0.1:50051"

# Programs with an argument parser of their own, for launches on several hosts.
_PROGRAMS = {
    "worker": ("blitzjax.serve.worker", "one worker process of the pool"),
    "coordinator": ("blitzjax.transfer.coordinator", "the coordination service that workers join"),
    "controller": ("blitzjax.serve.controller", "the process that clients talk to"),
    "gateway": ("blitzjax.serve.gateway", "OpenAI's HTTP interface in front of a controller"),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what matters of it, an exception says
    if argv and argv[0] in _PROGRAMS:
        return importlib.import_module(_PROGRAMS[argv[0]][0]).main(argv[1:])
    parser = build_parser()
    args = parser.parse_args(argv)
    module, function = args.run
    try:
        code = getattr(importlib.import_module(module), function)(args)
        sys.stdout.flush()
        return code
    except BlitzError as e:
        print(f"blitzjax: {e}", file=sys.stderr)
        return 2
    except TimeoutError as e:
        print(f"blitzjax: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough; what is still buffered must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:  # a full disk, say
        print(f"blitzjax: {e}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blitzjax", allow_abbrev=False,
        description="A JAX serving engine whose instances work while their parameters still arrive.",
        epilog="Begin with `blitzjax serve smollm2-135m`, and in another terminal `blitzjax chat`.")
    parser.add_argument("--version", action="version", version=f"blitzjax {blitzjax.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = _command(commands, "serve", "a whole cluster on this machine, or this machine's part of one",
                     ("blitzjax.cli_serve", "serve"))
    _add_serve(serve)
    _add_hosts(serve)
    serve.epilog = "With BLITZJAX_API_KEY in the environment, callers must send that key, over gRPC and HTTP."
    _add_chat(_command(commands, "chat", "talk to the model", ("blitzjax.cli_client", "chat")))
    _add_scale(_command(commands, "scale", "change the number of instances", ("blitzjax.cli_client", "scale")))
    _add_deploy(_command(commands, "deploy", "serve one more model over the same workers",
                         ("blitzjax.cli_serve", "deploy")))
    undeploy = _command(commands, "undeploy", "stop serving a model", ("blitzjax.cli_client", "undeploy"))
    undeploy.add_argument("name", metavar="NAME", help="as `blitzjax status` shows it")
    _add_address(undeploy)
    status = _command(commands, "status", "instances, layers, requests", ("blitzjax.cli_client", "status"))
    _add_address(status)
    status.add_argument("--json", action="store_true", help="the whole picture as JSON")
    convert = _command(commands, "convert", "write a layer-ordered checkpoint and print its directory",
                       ("blitzjax.cli_serve", "convert"))
    _add_model(convert)
    _add_sim(_command(commands, "sim", "a trace through several systems, in virtual time", ("blitzjax.cli_sim", "sim")))
    bench = commands.add_parser("bench", help="measure this machine", description="Measure this machine.")
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    calibrate = _command(benches, "calibrate", "costs of a model here, for `blitzjax sim --costs` and `blitzjax serve`",
                         ("blitzjax.cli_bench", "calibrate"))
    _add_serve(calibrate, several=False)
    calibrate.add_argument("--out", type=Path, default=Path(), metavar="DIR",
                           help="costs.json and costs.toml go there (default: here)")
    cache = _command(commands, "cache", "converted models and compiled files that are kept for the next start",
                     ("blitzjax.cli_cache", "cache"))
    cache.add_argument("--prune", type=float, metavar="DAYS",
                       help="remove what no start has used for so long; not below the age of a cluster that still runs")
    replay = _command(commands, "replay", "feed an event log to a fresh brain and compare its commands",
                      ("blitzjax.cli_replay", "main"))
    replay.add_argument("log", type=Path, metavar="LOG", help="what `blitzjax serve --event-log LOG` wrote")
    for name, (_, text) in _PROGRAMS.items():
        commands.add_parser(name, help=f"{text}; see `blitzjax {name} --help`", add_help=False)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, text: str,
             run: tuple[str, str]) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser, several: bool = False, dtype: str = "bfloat16") -> None:
    parser.add_argument("model", metavar="MODEL", nargs="+" if several else None,
                        help="a checkpoint directory (converted, Hugging Face, Orbax), a .gguf file, OWNER/NAME on the "
                             "Hugging Face hub, a built-in name, or code of your own as package.module:function")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="Orbax parameters of a model that is your code")
    parser.add_argument("--dtype", choices=DTYPES, help=f"of the parameters (engine.dtype; default: {dtype})")


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default=_ADDRESS, metavar="HOST:PORT",
                        help=f"the controller (default {_ADDRESS}); grpcs://HOST:PORT over TLS. What BLITZJAX_API_KEY says in "
                             "the environment is sent as the key")
    parser.add_argument("--cacert", type=Path, metavar="FILE",
                        help="who may have signed its certificate, PEM (default: whom gRPC trusts)")


def _add_serve(parser: argparse.ArgumentParser, several: bool = True) -> None:
    _add_model(parser, several)
    if several:
        parser.add_argument("--served-model-name", nargs="+", metavar="NAME",
                            help="what clients call each MODEL (default: the checkpoint's name, that of its file or directory "
                                 "when it was converted)")
    parser.add_argument("--instances", type=int,
                        help="instances of each model that always serve; 0: none while nobody asks "
                             "(scale.min_instances; default 1)")
    parser.add_argument("--pool", type=int, help="worker processes (cluster.pool; default 3)")
    parser.add_argument("--host", help="listen here (serve.host)")
    parser.add_argument("--port", type=int, help="listen here; 0: any free port (serve.port)")
    parser.add_argument("--http-port", type=int, metavar="PORT",
                        help="OpenAI's interface over HTTP (serve.http_port; default: none)")
    parser.add_argument("--allowed-origins", type=origins, metavar="JSON",
                        help=f"whose web pages may call over HTTP, as {ORIGINS} (serve.allowed_origins; default: any if "
                             "there is a key, else none)")
    parser.add_argument("--tool-call-parser", choices=("auto", "hermes", "llama3_json", "mistral", "qwen3_coder"),
                        help="how models write calls of functions (serve.tool_call_parser; as the chat template says)")
    parser.add_argument("--ssl-certfile", metavar="FILE",
                        help="certificate, PEM: gRPC and HTTP over TLS (serve.ssl_certfile; default: in the clear)")
    parser.add_argument("--ssl-keyfile", metavar="FILE", help="its key, PEM (serve.ssl_keyfile)")
    parser.add_argument("--max-model-len", type=int, help="tokens of prompt and answer (engine.max_model_len)")
    parser.add_argument("--max-num-seqs", type=int, help="sequences decoding together (engine.max_num_seqs)")
    parser.add_argument("--max-num-batched-tokens", type=int, help="of a step (engine.max_num_batched_tokens)")
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction,
                        help="share the KV of equal beginnings (engine.prefix_caching; on)")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, help="devices per instance (engine.tensor_parallel)")
    parser.add_argument("--live", choices=("zigzag", "best_effort", "off"), help="work while loading (scale.live)")
    parser.add_argument("--source", choices=("multicast", "disk"), help="where parameters come from (scale.source)")
    parser.add_argument("--roles", choices=("mixed", "split"),
                        help="split: prompts run on some instances, others decode (scale.roles)")
    parser.add_argument("--scaling-policy", choices=("auto", "manual"), help="who decides (scale.policy)")
    parser.add_argument("--metrics-port", type=int, metavar="PORT",
                        help="Prometheus' text at /metrics, and /health (serve.metrics_port; default: none)")
    parser.add_argument("--shutdown-timeout", type=float, metavar="SECONDS",
                        help="answers in flight may finish after SIGTERM (serve.shutdown_timeout_s; default 30)")
    parser.add_argument("--event-log", help="JSON lines of every event and command; a file that is there becomes FILE.1 "
                             "(serve.event_log)")
    parser.add_argument("--pin-cores", action="store_true", default=None, help="a core per worker (cluster.pin_cores)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML; the flags above win over it")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE",
                        help="any knob; wins over everything else; may be repeated")


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", metavar="HOST,HOST,...",
                        help="machines that share the pool; the same command runs on each, but for --host-index")
    parser.add_argument("--host-index", type=int, default=0, metavar="K",
                        help="this machine is the K-th of them; clients talk to the first, 0")
    parser.add_argument("--leaf", default="", metavar="NAME",
                        help="of the switch, or rack, that this machine is at: parameters enter each leaf once")


def _add_deploy(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, dtype="as the cluster has it")
    parser.add_argument("--served-model-name", default="", metavar="NAME",
                        help="what clients call it (default: the checkpoint's name)")
    parser.add_argument("--instances", type=int, metavar="N", help="that always serve (default: as the cluster has it)")
    parser.add_argument("--max-instances", type=int, metavar="N", help="default: as the cluster has it")
    _add_address(parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("message", nargs="?", help="one question; without it, a conversation")
    parser.add_argument("--model", metavar="NAME", help="which of several; default: the one deployed first")
    parser.add_argument("--max-tokens", type=int,
                        help=f"of the answer (default {DEFAULT_MAX_TOKENS}, or what the context has room for)")
    parser.add_argument("--temperature", type=float, help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float, help="least probability, relative to the likeliest token's")
    parser.add_argument("--repetition-penalty", type=float, help="over prompt and answer; 1 is off")
    parser.add_argument("--presence-penalty", type=float, help="over the answer; 0 is off")
    parser.add_argument("--frequency-penalty", type=float, help="over the answer; 0 is off")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this; may be repeated")
    parser.add_argument("--priority", type=int, help="lower goes first (default 0)")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without a chat template")
    _add_address(parser)


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=int, required=True, metavar="N", help="instances")
    parser.add_argument("--model", default="", metavar="NAME", help="which of several")
    parser.add_argument("--watch", action="store_true", help="show layers arriving")
    parser.add_argument("--no-wait", action="store_true", help="return when the change is accepted")
    parser.add_argument("--live", choices=("zigzag", "best_effort", "off"), help="for this change only")
    parser.add_argument("--source", choices=("multicast", "disk"), help="for this change only")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="give up waiting after this (default 300)")
    _add_address(parser)


def _add_sim(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", default="full,blitz,multicast,network,sllm,allcache,half", metavar="A,B,...",
                        help="rows to compare; see --list")
    parser.add_argument("--trace", default="azure_conv", help="a file, or a trace of ours by its name (default azure_conv)")
    parser.add_argument("--start-s", type=float, default=0.0, help="of the window (default 0)")
    parser.add_argument("--duration-s", type=float, default=480.0, help="of the window (default 480)")
    parser.add_argument("--load", type=float, default=0.5, help="mean rate as a share of the cluster's (default 0.5)")
    parser.add_argument("--model", default="mistral-24b", help="costs of this model (default mistral-24b)")
    parser.add_argument("--machine", default="A", help="costs of this cluster (default A)")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="a measured row instead of --machine and --model")
    parser.add_argument("--instances", type=int, help="in the pool (default: as many as the machine holds)")
    parser.add_argument("--begin", type=int, default=1,
                        help="instances that serve at the beginning, of each model and role; 0: models start at zero, "
                             "and go back there (default 1)")
    parser.add_argument("--models", type=int, default=1,
                        help="so many, of these costs, share the pool; the k-th is asked 1/k as often (default 1)")
    parser.add_argument("--zero-after-s", type=float, default=30.0,
                        help="scale.zero_after_s, with --begin 0 (default 30)")
    parser.add_argument("--roles", choices=("mixed", "split"), default="mixed",
                        help="split: prompts run on some instances, which send their KV to others (default mixed)")
    parser.add_argument("--down-after-s", type=float, default=0.333, help="scale.down_after_s (default 0.333)")
    parser.add_argument("--seed", type=int, default=0, help="of the trace's scaling (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.html, report.json and table.csv there")
    parser.add_argument("--list", action="store_true", help="systems, models and machines")


if __name__ == "__main__":
    sys.exit(main())
