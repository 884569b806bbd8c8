"""`blitzjax chat`, `scale` and `status`: clients of a running controller, on a terminal or in a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from blitzjax.errors import BlitzError, InvalidRequest, Unavailable
from blitzjax.serve.asking import Options, Prompt
from blitzjax.serve.client import Client
from blitzjax.types import DEFAULT_MAX_TOKENS
from blitzjax.v1 import inference_pb2 as pb

_LONGEST_S = 1e9  # gRPC takes much longer ones, and infinity, for over
_BAR = 24  # or what a narrow terminal leaves: numbers and phases are never cut for it
_OPTIONS = ("model", "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "seed", "stop", "priority")
_COLOURS = {"serving": "green", "live": "yellow", "loading": "cyan", "draining": "magenta", "failed": "red"}


def chat(args: argparse.Namespace) -> int:
    """One question, or a conversation until end of input. Ctrl-C ends an answer, twice the conversation."""
    if args.raw and args.system is not None:
        raise InvalidRequest("--raw has no chat template, so there is no --system message either")
    with connected(args) as client:
        history = [] if args.system is None else [{"role": "system", "content": args.system}]
        if args.message is not None:
            _answer(client, args, args.message if args.raw else [*history, _said("user", args.message)])
            return 0
        client.status()  # whoever is not there, or wants a key, says so before anybody types
        for message in _messages():
            try:
                if args.raw:
                    _answer(client, args, message)
                    continue
                asked = fitting(client, args, [*history, _said("user", message)])
                history = [*asked, _said("assistant", _answer(client, args, asked))]
            except KeyboardInterrupt:
                print(" [stopped]")
            except InvalidRequest as e:
                print(f"blitzjax: {e}", file=sys.stderr)
    return 0


def fitting(client: Client, args: argparse.Namespace, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation, without as many of its oldest turns as the context has no room for; the system message stays.

    All of it, for the server to refuse, if the question alone is too long.
    """
    turns, first = divmod(len(messages) - 1, 2)  # a turn is a question and its answer
    for forgotten in range(turns + 1):
        asked = messages[:first] + messages[first + 2 * forgotten:]
        if _has_room(client, args, asked):
            if forgotten:
                print(f"[the context is full; oldest turns forgotten: {forgotten}]", file=sys.stderr)
            return asked
    return messages


def _has_room(client: Client, args: argparse.Namespace, messages: list[dict[str, str]]) -> bool:
    """For the answer, too."""
    try:
        known = client.tokenize(messages, model=args.model or "")
    except InvalidRequest:  # too long to be looked at
        return False
    return len(known.token_ids) + (args.max_tokens or min(DEFAULT_MAX_TOKENS, known.max_model_len // 4)) <= known.max_model_len


def _messages() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            message = input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
        if message.strip():
            yield message


def _answer(client: Client, args: argparse.Namespace, prompt: Prompt) -> str:
    """Prints text as it comes; returns all of it."""
    options = Options(progress=sys.stderr.isatty())
    for name in _OPTIONS:
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)  # type: ignore[literal-required]  # of _OPTIONS
    text, told, cut_at = "", False, 0
    for chunk in client.stream(prompt, **options):
        if chunk.progress is not None:
            told |= _tell_progress(chunk.progress)
            continue
        if told:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            told = False
        text += chunk.text
        print(chunk.text, end="", flush=True)
        if chunk.finish_reason == "length" and chunk.usage is not None and args.max_tokens is None:
            cut_at = chunk.usage.completion_tokens
    print()
    if cut_at:
        print(f"[cut off after {cut_at} tokens; --max-tokens sets another limit]", file=sys.stderr)
    return text


def _tell_progress(progress: pb.Progress) -> bool:
    """One line that is written over; nothing, and False, when an instance serves already."""
    if progress.serving:
        return False
    print(f"\r\033[K[no instance yet: {progress.layers_loaded}/{progress.layers} layers, "
          f"{progress.queued} waiting]", end="", file=sys.stderr, flush=True)
    return True


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def scale(args: argparse.Namespace) -> int:
    if not 0 < args.timeout_s <= _LONGEST_S:
        raise InvalidRequest(f"--timeout-s must be in (0, {_LONGEST_S:g}], got {args.timeout_s:g}")
    with connected(args) as client:
        if not args.watch:
            print(_scaled(_scale(client, args)))
            return 0
        change = _Change(client, args)
        change.start()
        _show(change.pictures(), Console())
        print(_scaled(change.result()))
    return 0


def _scale(client: Client, args: argparse.Namespace) -> pb.ScaleResponse:
    """Raises TimeoutError, which says how far it came."""
    try:
        return client.scale(args.to, model=args.model, live=args.live, source=args.source,
                            wait=args.watch or not args.no_wait, timeout_s=args.timeout_s)
    except BlitzError as e:
        if e.code != "DEADLINE_EXCEEDED":
            raise
        picture = client.status()
        serving = sum(model.serving for model in picture.models if args.model in ("", model.name))
        raise TimeoutError(f"{serving} instead of {args.to} instances serve after {args.timeout_s:g} s, and the change goes "
                           f"on; now: {_line(picture)}{_awaited(picture)}") from e


def _scaled(reply: pb.ScaleResponse) -> str:
    return f"{reply.serving} of {reply.target} instances serve after {reply.seconds:.2f} s"


class _Change(threading.Thread):
    """A Scale call beside the WatchScale stream that shows it."""

    def __init__(self, client: Client, args: argparse.Namespace):
        super().__init__(daemon=True)
        self._client, self._args = client, args
        self._reply: pb.ScaleResponse | Exception

    def run(self) -> None:
        try:
            self._reply = _scale(self._client, self._args)
        except Exception as e:  # the other thread raises it
            self._reply = e

    def pictures(self) -> Iterator[pb.ClusterStatus]:
        """Ends with the first picture after the change was done or refused."""
        for picture in self._client.watch():
            done = not self.is_alive()
            yield picture
            if done:
                return

    def result(self) -> pb.ScaleResponse:
        """Raises what the server answered, and what went wrong here."""
        self.join()
        if isinstance(self._reply, Exception):
            raise self._reply
        return self._reply


def _show(pictures: Iterator[pb.ClusterStatus], console: Console) -> None:
    """A table that changes in place, or one line per change when the output is no terminal."""
    if not console.is_terminal:
        last = None
        for picture in pictures:
            line = _line(picture)
            if line != last:
                print(f"{picture.at:9.3f} s  {line}", flush=True)
            last = line
        return
    with Live(console=console, auto_refresh=False) as live:
        for picture in pictures:
            live.update(_table(picture), refresh=True)


def _line(picture: pb.ClusterStatus) -> str:
    workers = "  ".join(
        " ".join([i.id, f"{i.phase}{_role(i)}", *_names(picture, i), f"{i.layers_loaded}/{_layers(picture, i)}"])
        for i in picture.instances)
    return f"target {picture.target_instances}  {workers or 'no worker has joined yet'}"


def _awaited(picture: pb.ClusterStatus) -> str:
    """Who has not joined."""
    return f"; not joined: {', '.join(picture.awaited)}" if picture.awaited else ""


def _role(instance: pb.InstanceStatus) -> str:
    """What split roles use it for."""
    return "" if instance.role in ("", "mixed") or instance.phase == "idle" else f" {instance.role}"


def _names(picture: pb.ClusterStatus, i: pb.InstanceStatus) -> list[str]:
    """Which models it is about, where that is not plain: with one model it goes without saying."""
    model = [i.model] if i.model and len(picture.models) > 1 else []
    return model + [f"(keeps {', '.join(i.copies)})"] * bool(i.copies)


def _table(picture: pb.ClusterStatus) -> Table:
    table = Table(title=_title(picture), title_justify="left")
    named = any(_names(picture, i) for i in picture.instances)
    for name in ("", "phase", *["model"] * named, "layers", "", "wait", "run", "KV pages", "with"):
        table.add_column(name, no_wrap=name != "layers", max_width=_BAR if name == "layers" else None)
    for i in picture.instances:
        layers = _layers(picture, i)
        colour = _COLOURS.get(i.phase, "white")
        bar = ProgressBar(layers or 1, i.layers_loaded, style="dim", complete_style=colour, finished_style=colour)
        table.add_row(i.id, f"[{colour}]{i.phase}{_role(i)}", *[" ".join(_names(picture, i))] * named, bar,
                      f"{i.layers_loaded}/{layers}", str(i.waiting), str(i.running),
                      f"{i.pages_used}/{i.pages_total}", i.partner or "-")
    return table


def _title(picture: pb.ClusterStatus) -> str:
    models = ", ".join(m.name for m in picture.models)
    chains = "".join(f"; moving {' → '.join(c.instances)}" for c in picture.chains)
    asked = sum(m.prefix_cache_queries for m in picture.models)
    had = sum(m.prefix_cache_hits for m in picture.models)
    cached = f"; {had / asked:.0%} of prompt tokens cached" if asked else ""
    return (f"{models}: target {picture.target_instances}, {picture.queued_requests} queued, "
            f"{picture.running_requests} running{cached}{chains}{_awaited(picture)}")


def _layers(picture: pb.ClusterStatus, i: pb.InstanceStatus) -> int:
    """Of the instance's model; of the first one while it is idle."""
    layers = {m.name: m.layers for m in picture.models}
    return layers.get(i.model) or next(iter(layers.values()), 0)


def undeploy(args: argparse.Namespace) -> int:
    with connected(args) as client:
        reply = client.undeploy(args.name)
    print(f"{args.name} is gone after {reply.seconds:.2f} s")
    return 0


def status(args: argparse.Namespace) -> int:
    with connected(args) as client:
        picture = client.status()
    if args.json:
        from google.protobuf.json_format import MessageToJson

        print(MessageToJson(picture, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
    elif sys.stdout.isatty():
        Console().print(_table(picture))
    else:
        print(_title(picture))
        print(_line(picture))
    return 0


@contextlib.contextmanager
def connected(args: argparse.Namespace) -> Iterator[Client]:
    """A Client; where none can be, what to do."""
    with Client(args.address, cacert=args.cacert) as client:
        try:
            yield client
        except Unavailable as e:
            if not str(e).startswith("nothing listens"):
                raise
            raise Unavailable(f"{e}; start one with: blitzjax serve MODEL") from None
        except ValueError as e:  # a number out of range, or a text that is none
            raise InvalidRequest(str(e)) from e
