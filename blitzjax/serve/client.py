"""A small Python client: `Client` for scripts, `AsyncClient` for programs. Needs grpc only.

`grpcs://HOST:PORT` is TLS; `cacert`, a PEM file, is of who may have signed the server's certificate. `api_key` None means
$BLITZJAX_API_KEY. Failures are the exceptions of blitzjax/errors.py; other gRPC statuses (DEADLINE_EXCEEDED, say) are a
BlitzError with that `code`. A server that crashes and resumes (rejoin.py) is not one: calls go on with its successor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict, Unpack

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blitzjax.errors import InvalidRequest
from blitzjax.serve import access
from blitzjax.serve.rejoin import Patience, Rejoin, Server
from blitzjax.types import LiveMode, Source
from blitzjax.v1 import inference_pb2 as pb
from blitzjax.v1 import inference_pb2_grpc as rpc

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]  # text, token ids (an array, too), or a chat

_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))
_POLL_S = 0.05


class Options(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`; what is absent is the server's default. See inference.proto."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    n: int
    logprobs: int
    prompt_logprobs: int
    echo: bool
    fill_context: bool
    model: str
    request_id: str
    priority: int  # lower goes first
    progress: bool
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """One message of an answer. The last one has `finish_reason` and `usage`, the first one what is of the prompt."""

    request_id: str
    index: int  # which of n answers
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.ScoredToken, ...]  # of token_ids, if asked for
    finish_reason: str
    usage: pb.Usage | None
    prompt_token_ids: tuple[int, ...]  # with echo
    prompt_logprobs: tuple[pb.ScoredToken, ...]  # of the prompt but its first token, if asked for
    progress: pb.Progress | None  # what the request waits for, if asked for; such a chunk has nothing else
    at_s: float  # since the call began, on this side


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. `ttft_s` and `token_times_s` count from the call, on this side."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[pb.ScoredToken, ...]
    finish_reason: str
    usage: pb.Usage
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[pb.ScoredToken, ...]
    ttft_s: float
    token_times_s: tuple[float, ...]
    total_s: float


class Client:
    """Blocking. Thread-safe; close it, or use it as a context manager."""

    def __init__(self, address: str = "127.0.0.1:50051", *, api_key: str | None = None, cacert: Path | None = None):
        self._metadata = access.metadata(api_key)
        self._channel = access.channel(grpc, address, _OPTIONS, cacert)
        self._stub = rpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._server = Server()
        self.address = address

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Result:
        """Waits for the whole answer."""
        return collect(list(self.stream(prompt, **options)))

    def generate_all(self, prompt: Prompt, **options: Unpack[Options]) -> list[Result]:
        """Waits for all n answers, in order."""
        return collect_all(list(self.stream(prompt, **options)))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Chunk]:
        """Chunks as they come; closing the iterator ends the generation. Goes on where it was if the server crashes
        and says that it resumes.
        """
        patience = Patience(self._server, options.get("timeout_s"))
        rejoin = Rejoin(generate_request(prompt, options), patience)
        while True:
            call = self._stub.Generate(rejoin.request, timeout=patience.left_s, metadata=self._metadata)
            try:
                for message in call:
                    if (new := rejoin.unseen(message)) is not None:
                        yield _chunk(new, patience.started)
                return self._server.said(call.initial_metadata())
            except grpc.RpcError as e:
                pause_s = patience.pause_after(e, call.initial_metadata(), call.trailing_metadata())
            finally:
                call.cancel()
            time.sleep(pause_s)
            rejoin.restart()

    def tokenize(self, prompt: Prompt, *, model: str = "", timeout_s: float | None = 10.0) -> pb.TokenizeResponse:
        """The prompt as `generate` would have it: token ids and text, whichever was given."""
        return self._unary(self._stub.Tokenize, generate_request(prompt, Options(model=model)), timeout_s)

    def abort(self, *request_ids: str) -> None:
        self._unary(self._stub.Abort, pb.AbortRequest(request_ids=request_ids), None)

    def status(self, timeout_s: float | None = 10.0) -> pb.ClusterStatus:
        return self._unary(self._stub.Status, pb.StatusRequest(), timeout_s)

    def scale(self, target: int, *, model: str = "", live: LiveMode | None = None, source: Source | None = None,
              wait: bool = False, timeout_s: float | None = None) -> pb.ScaleResponse:
        """Asks for `target` instances; with `wait`, returns when exactly that many serve and none loads. One model
        needs no name.
        """
        return self._unary(
            self._stub.Scale,
            pb.ScaleRequest(target=target, live=live, source=source, wait=wait, model=model), timeout_s)

    def deploy(self, directory: str | Path, *, min_instances: int | None = None, max_instances: int | None = None,
               timeout_s: float | None = None) -> pb.DeployResponse:
        """Serves one more converted checkpoint; returns when the workers are compiled for it."""
        return self._unary(self._stub.Deploy, deploy_request(directory, min_instances, max_instances), timeout_s)

    def undeploy(self, model: str, timeout_s: float | None = None) -> pb.UndeployResponse:
        """Returns when the model's requests have ended and no worker holds it."""
        return self._unary(self._stub.Undeploy, pb.UndeployRequest(model=model), timeout_s)

    def watch(self, timeout_s: float | None = None) -> Iterator[pb.ClusterStatus]:
        """The cluster now and after every change; closing the iterator ends the call."""
        patience = Patience(self._server, timeout_s)
        while True:
            call = self._stub.WatchScale(pb.WatchScaleRequest(), timeout=patience.left_s, metadata=self._metadata)
            try:
                for picture in call:
                    patience.heard()
                    yield picture
                return
            except grpc.RpcError as e:
                pause_s = patience.pause_after(e, call.initial_metadata(), call.trailing_metadata())
            finally:
                call.cancel()
            time.sleep(pause_s)

    def ready(self) -> bool:
        """True when at least one instance serves, or a model that has none can have one at once."""
        try:
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not self.ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.address} is not ready after {timeout_s:g} s")
            time.sleep(_POLL_S)

    def _unary(self, method: grpc.UnaryUnaryMultiCallable, request, timeout_s: float | None):
        patience = Patience(self._server, timeout_s)
        while True:
            try:
                reply, call = method.with_call(request, timeout=patience.left_s, metadata=self._metadata)
                self._server.said(call.initial_metadata())
                return reply
            except grpc.RpcError as e:
                pause_s = patience.pause_after(e, e.initial_metadata(), e.trailing_metadata())
            time.sleep(pause_s)
            _ask_again(request)


class AsyncClient:
    """The same on asyncio; make it inside the event loop."""

    def __init__(self, address: str = "127.0.0.1:50051", *, api_key: str | None = None, cacert: Path | None = None):
        self._metadata = access.metadata(api_key)
        self._channel = access.channel(grpc.aio, address, _OPTIONS, cacert)
        self._stub = rpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._server = Server()
        self.address = address

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Result:
        """Waits for the whole answer."""
        return collect([chunk async for chunk in self.stream(prompt, **options)])

    async def generate_all(self, prompt: Prompt, **options: Unpack[Options]) -> list[Result]:
        """Waits for all n answers, in order."""
        return collect_all([chunk async for chunk in self.stream(prompt, **options)])

    async def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncIterator[Chunk]:
        """Chunks as they come; closing the iterator ends the generation. Goes on where it was if the server crashes
        and says that it resumes.
        """
        patience = Patience(self._server, options.get("timeout_s"))
        rejoin = Rejoin(generate_request(prompt, options), patience)
        while True:
            call = self._stub.Generate(rejoin.request, timeout=patience.left_s, metadata=self._metadata)
            try:
                async for message in call:
                    if (new := rejoin.unseen(message)) is not None:
                        yield _chunk(new, patience.started)
                self._server.said(await call.initial_metadata())
                return
            except grpc.RpcError as e:
                pause_s = patience.pause_after(e, await call.initial_metadata(), await call.trailing_metadata())
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)
            rejoin.restart()

    async def tokenize(self, prompt: Prompt, *, model: str = "", timeout_s: float | None = 10.0) -> pb.TokenizeResponse:
        """The prompt as `generate` would have it: token ids and text, whichever was given."""
        return await self._unary(self._stub.Tokenize, generate_request(prompt, Options(model=model)), timeout_s)

    async def abort(self, *request_ids: str) -> None:
        await self._unary(self._stub.Abort, pb.AbortRequest(request_ids=request_ids), None)

    async def status(self, timeout_s: float | None = 10.0) -> pb.ClusterStatus:
        return await self._unary(self._stub.Status, pb.StatusRequest(), timeout_s)

    async def scale(self, target: int, *, model: str = "", live: LiveMode | None = None,
                    source: Source | None = None, wait: bool = False,
                    timeout_s: float | None = None) -> pb.ScaleResponse:
        """Asks for `target` instances; with `wait`, returns when exactly that many serve and none loads. One model
        needs no name.
        """
        return await self._unary(
            self._stub.Scale,
            pb.ScaleRequest(target=target, live=live, source=source, wait=wait, model=model), timeout_s)

    async def deploy(self, directory: str | Path, *, min_instances: int | None = None,
                     max_instances: int | None = None, timeout_s: float | None = None) -> pb.DeployResponse:
        """Serves one more converted checkpoint; returns when the workers are compiled for it."""
        return await self._unary(self._stub.Deploy, deploy_request(directory, min_instances, max_instances), timeout_s)

    async def undeploy(self, model: str, timeout_s: float | None = None) -> pb.UndeployResponse:
        """Returns when the model's requests have ended and no worker holds it."""
        return await self._unary(self._stub.Undeploy, pb.UndeployRequest(model=model), timeout_s)

    async def watch(self, timeout_s: float | None = None) -> AsyncIterator[pb.ClusterStatus]:
        """The cluster now and after every change; closing the iterator ends the call."""
        patience = Patience(self._server, timeout_s)
        while True:
            call = self._stub.WatchScale(pb.WatchScaleRequest(), timeout=patience.left_s, metadata=self._metadata)
            try:
                async for picture in call:
                    patience.heard()
                    yield picture
                return
            except grpc.RpcError as e:
                pause_s = patience.pause_after(e, await call.initial_metadata(), await call.trailing_metadata())
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

    async def ready(self) -> bool:
        """True when at least one instance serves, or a model that has none can have one at once."""
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not await self.ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.address} is not ready after {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def _unary(self, method: grpc.aio.UnaryUnaryMultiCallable, request, timeout_s: float | None):
        patience = Patience(self._server, timeout_s)
        while True:
            call = method(request, timeout=patience.left_s, metadata=self._metadata)
            try:
                reply = await call
                self._server.said(await call.initial_metadata())
                return reply
            except grpc.RpcError as e:
                pause_s = patience.pause_after(e, await call.initial_metadata(), await call.trailing_metadata())
            await asyncio.sleep(pause_s)
            _ask_again(request)


def _ask_again(request: Message) -> None:
    """What its last call had begun is no mistake of the next one."""
    if "resume" in request.DESCRIPTOR.fields_by_name:
        request.resume = True


def deploy_request(directory: str | Path, min_instances: int | None, max_instances: int | None) -> pb.DeployRequest:
    return pb.DeployRequest(directory=str(Path(directory).resolve()), min_instances=min_instances,
                            max_instances=max_instances)


def generate_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """Raises TypeError for an option that does not exist, or for a message of a chat that is none; InvalidRequest for a
    number or a text that no request can hold.
    """
    unknown = set(options) - set(Options.__annotations__)
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    outside = ("model", "request_id", "priority", "progress", "timeout_s")
    if isinstance(stop := options.get("stop"), str):  # its characters would pass for strings
        options = options | {"stop": (stop,)}
    try:
        return _request(prompt, options, outside)
    except ValueError as e:  # a number out of range, or half a character
        raise InvalidRequest(str(e)) from e


def _request(prompt: Prompt, options: Options, outside: Sequence[str]) -> pb.GenerateRequest:
    out = pb.GenerateRequest(model=options.get("model", ""), request_id=options.get("request_id", ""),
                             priority=options.get("priority", 0), progress=options.get("progress", False),
                             sampling=pb.SamplingParams(**{k: v for k, v in options.items() if k not in outside}))
    if isinstance(prompt, str):
        out.text = prompt
    elif len(prompt) and isinstance(prompt[0], Mapping):
        out.chat.messages.extend(_message(m) for m in prompt)
    else:
        out.tokens.SetInParent()
        out.tokens.ids.extend(prompt)
    return out


def _message(said: Mapping[str, str]) -> pb.ChatMessage:
    role, content = said.get("role"), said.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise TypeError(f"a message has a role and a content, both of them text; got {dict(said)}")
    return pb.ChatMessage(role=role, content=content)


def collect(chunks: Sequence[Chunk]) -> Result:
    """Joins the chunks of one complete answer. Raises ValueError when they are of several."""
    chunks = [chunk for chunk in chunks if chunk.progress is None]
    first, last = chunks[0], chunks[-1]
    if any(chunk.index != last.index for chunk in chunks):
        raise ValueError("these are several answers (n > 1); use generate_all")
    times = tuple(chunk.at_s for chunk in chunks for _ in chunk.token_ids)
    return Result(
        request_id=last.request_id, index=last.index, text="".join(c.text for c in chunks),
        token_ids=tuple(t for c in chunks for t in c.token_ids), logprobs=tuple(t for c in chunks for t in c.logprobs),
        finish_reason=last.finish_reason, usage=last.usage, prompt_token_ids=first.prompt_token_ids,
        prompt_logprobs=first.prompt_logprobs, ttft_s=times[0] if times else last.at_s, token_times_s=times,
        total_s=last.at_s)


def collect_all(chunks: Sequence[Chunk]) -> list[Result]:
    """Joins the chunks of all answers to one request, by index."""
    chunks = [chunk for chunk in chunks if chunk.progress is None]
    return [collect([c for c in chunks if c.index == index]) for index in sorted({c.index for c in chunks})]


def _chunk(message: pb.GenerateResponse, started: float) -> Chunk:
    return Chunk(
        request_id=message.request_id, index=message.index, text=message.text, token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs), finish_reason=message.finish_reason,
        usage=message.usage if message.HasField("usage") else None, prompt_token_ids=tuple(message.prompt_token_ids),
        prompt_logprobs=tuple(message.prompt_logprobs),
        progress=message.progress if message.HasField("progress") else None, at_s=time.monotonic() - started)
